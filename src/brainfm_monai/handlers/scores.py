"""Scores of a validation, over the subjects of all processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from ignite.metrics import Metric
from ignite.metrics.metric import reinit__is_reduced, sync_all_reduce
from torch import Tensor

from brainfm_monai.tasks import MAX_DISTANCE_MM, TASKS, TaskLayout

__all__ = ["SegmentationDice", "TaskErrors"]


class SegmentationDice(Metric):
    """Mean hard Dice over the foreground structures that occur in the reference, over all samples of all processes.

    A sample that shows no structure does not count.

    Args:
        layout: names the channels of the prediction.
        output_transform: from the engine's output to (prediction, targets).
    """

    def __init__(self, layout: TaskLayout, output_transform: Callable[[Any], Any] = lambda output: output) -> None:
        self.layout = layout
        super().__init__(output_transform=output_transform)

    @reinit__is_reduced
    def reset(self) -> None:
        """Forget all samples."""
        self.total = torch.zeros(2, dtype=torch.float64)  # sum of the samples' scores, and their number

    @reinit__is_reduced
    def update(self, output: tuple[Tensor, Mapping[str, Tensor]]) -> None:
        """Add a batch: prediction (B, layout.channels, H, W, D) and targets with ``segmentation`` (B, 1, H, W, D)."""
        pred, target = output
        labels = self.layout.split(pred)["segmentation"].argmax(1).flatten(1)
        truth = target["segmentation"].flatten(1)
        count = len(self.layout.protocol)
        for one, reference in zip(labels, truth, strict=True):
            size = torch.bincount(one, minlength=count) + torch.bincount(reference, minlength=count)
            overlap = torch.bincount(reference[one == reference], minlength=count)
            present = torch.bincount(reference, minlength=count) > 0
            present[0] = False
            if present.any():
                score = (2 * overlap[present] / size[present]).mean()
                self.total += torch.tensor([float(score), 1.0], dtype=torch.float64)

    @sync_all_reduce("total")
    def compute(self) -> float:
        """Mean over the samples seen; NaN without any."""
        total, count = self.total.tolist()
        return total / count if count else float("nan")


class TaskErrors(Metric):
    """Errors of the tasks beside the segmentation, in their units, each a mean over the samples that have the target.

    ``distance_mae_mm``: mean absolute error where the true distance lies within +-3 mm, both clipped to that; ``mni_error_mm``:
    mean Euclidean distance in the head; ``log_bias_error``: L2 norm of the difference over that of the truth in the head, both
    without their mean; ``<image>_mae``: mean absolute error in the head, in the output unit. A task of another kind has none.

    Args:
        layout: names the channels of the prediction.
        output_transform: from the engine's output to (prediction, targets).
    """

    def __init__(self, layout: TaskLayout, output_transform: Callable[[Any], Any] = lambda output: output) -> None:
        self.layout = layout
        names = {name: _ERROR_NAMES.get(task.kind, "").format(name) for name, task in layout.tasks.items()}
        self.names = {task: name for task, name in names.items() if name}
        super().__init__(
            output_transform=output_transform, metrics_result_mode="flatten"
        )  # each error is a metric of its own

    @reinit__is_reduced
    def reset(self) -> None:
        """Forget all samples."""
        self.total = torch.zeros(
            2, len(self.names), dtype=torch.float64
        )  # sums of the samples' errors, and their numbers

    @reinit__is_reduced
    def update(self, output: tuple[Tensor, Mapping[str, Tensor]]) -> None:
        """Add a batch: prediction (B, layout.channels, H, W, D), and the targets of the loss."""
        pred, target = output
        parts = self.layout.split(pred)
        visible = target["visible"]
        head = visible & (target["segmentation"] > 0) if "segmentation" in target else visible
        for place, task in enumerate(self.names):
            if task not in target:
                continue
            inside = head & target[f"valid_{task}"] if f"valid_{task}" in target else head
            kind = self.layout.tasks[task].kind
            errors = _ERRORS[kind](parts[task].float(), target[task].float(), visible if kind == "distance" else inside)
            errors = errors * (TASKS[task].scale if kind in ("image", "coordinates") else 1.0)
            available = target.get(f"available_{task}", torch.ones_like(errors)).to(errors.device) > 0
            there = available & errors.isfinite()
            self.total[:, place] += torch.stack([torch.where(there, errors, 0.0).sum(), there.sum()]).cpu()

    @sync_all_reduce("total")
    def compute(self) -> dict[str, float]:
        """Means over the samples seen; tasks that none of them has are left out."""
        sums, counts = self.total.tolist()
        return {name: s / n for name, s, n in zip(self.names.values(), sums, counts, strict=True) if n}


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the mask, per sample, NaN where it is empty: (B, C, H, W, D) and (B, C or 1, H, W, D) to (B,)."""
    weight = mask.expand_as(values).to(values.dtype)
    return (values * weight).sum((1, 2, 3, 4)) / weight.sum((1, 2, 3, 4))


def _distance_error(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    near = mask & (target.abs() < MAX_DISTANCE_MM)
    return _mean((pred.clamp(-MAX_DISTANCE_MM, MAX_DISTANCE_MM) - target).abs(), near)


def _coordinate_error(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    return _mean((pred - target).norm(dim=1, keepdim=True), mask)


def _image_error(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    return _mean((pred - target).abs(), mask)


def _field_error(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    difference = pred - target
    squares = [(x - _mean(x, mask).reshape(-1, 1, 1, 1, 1)).square() for x in (difference, target)]
    return (_mean(squares[0], mask) / _mean(squares[1], mask)).sqrt()


_ERRORS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "distance": _distance_error,
    "coordinates": _coordinate_error,
    "log_field": _field_error,
    "image": _image_error,
}
_ERROR_NAMES = {
    "distance": "distance_mae_mm",
    "coordinates": "mni_error_mm",
    "log_field": "log_bias_error",
    "image": "{}_mae",
}
