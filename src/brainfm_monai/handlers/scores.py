"""Scores of a validation, over the subjects of all processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from ignite.metrics import Metric
from ignite.metrics.metric import reinit__is_reduced, sync_all_reduce
from monai.handlers import from_engine
from monai.metrics import compute_dice
from torch import Tensor

from brainfm_monai.metrics.fields import (
    compute_bias_error,
    compute_distance_mae,
    compute_mean_inside,
    compute_mni_error,
)
from brainfm_monai.tasks import TaskLayout

__all__ = ["SegmentationDice", "TaskErrors"]

PRED_LABEL = from_engine(["pred", "label"])


class _SampleMeans(Metric):
    """Means of scores over the samples of all processes; samples without a score do not count."""

    def __init__(
        self,
        layout: TaskLayout,
        output_transform: Callable[[Any], Any],
        names: Mapping[str, str],
        mode: Literal["flatten", "both"],
    ) -> None:
        self.layout, self.names = layout, dict(names)
        super().__init__(output_transform=output_transform, metrics_result_mode=mode)

    @reinit__is_reduced
    def reset(self) -> None:
        """Forget all samples."""
        self.total = torch.zeros(2, len(self.names), dtype=torch.float64)  # sums of the scores, and their numbers

    def _add(self, task: str, scores: Tensor, available: Tensor | None = None) -> None:
        """Add the scores of a task, (B,); those that are not finite or not available are left out."""
        counted = scores.isfinite() if available is None else scores.isfinite() & (available.to(scores.device) > 0)
        sums = torch.stack([torch.where(counted, scores, 0.0).sum(), counted.sum()])
        self.total[:, list(self.names).index(task)] += sums.cpu()

    @sync_all_reduce("total")
    def _means(self) -> dict[str, float]:
        sums, counts = self.total.tolist()
        return {name: s / n for name, s, n in zip(self.names.values(), sums, counts, strict=True) if n}


class SegmentationDice(_SampleMeans):
    """Mean hard Dice over the foreground structures that occur in the reference, over all samples of all processes.

    A sample that shows no structure does not count.

    Args:
        layout: names the channels of the prediction.
        output_transform: from the engine's output to (prediction, targets); ``pred`` and ``label`` if not given.
    """

    def __init__(self, layout: TaskLayout, output_transform: Callable[[Any], Any] = PRED_LABEL) -> None:
        super().__init__(layout, output_transform, {"segmentation": "mean_dice"}, "both")

    @reinit__is_reduced
    def update(self, output: tuple[Tensor, Mapping[str, Tensor]]) -> None:
        """Add a batch: prediction (B, layout.channels, H, W, D) and targets with ``segmentation`` (B, 1, H, W, D)."""
        labels = self.layout.split(output[0])["segmentation"].argmax(1, keepdim=True)
        count = len(self.layout.protocol)
        dice = compute_dice(labels, output[1]["segmentation"], include_background=False, num_classes=count)
        self._add("segmentation", dice.nanmean(1))

    def compute(self) -> float:
        """Mean over the samples seen; NaN without any."""
        return self._means().get("mean_dice", float("nan"))


class TaskErrors(_SampleMeans):
    """Errors of the tasks beside the segmentation, each a mean over the samples that have the target.

    ``distance_mae_mm``, ``mni_error_mm`` and ``log_bias_error`` (normalised L2) are those of the evaluation, see
    :mod:`brainfm_monai.metrics.fields`; ``<image>_mae`` is the mean absolute error in the head, in the unit of the files. A task
    of another kind has none.

    Args:
        layout: names the channels of the prediction.
        output_transform: from the engine's output to (prediction, targets); ``pred`` and ``label`` if not given.
    """

    def __init__(self, layout: TaskLayout, output_transform: Callable[[Any], Any] = PRED_LABEL) -> None:
        names = {"distance": "distance_mae_mm", "mni": "mni_error_mm", "log_bias_field": "log_bias_error"}
        names |= {name: f"{name}_mae" for name, task in layout.tasks.items() if task.kind == "image"}
        super().__init__(layout, output_transform, {n: names[n] for n in layout.tasks if n in names}, "flatten")

    @reinit__is_reduced
    def update(self, output: tuple[Tensor, Mapping[str, Tensor]]) -> None:
        """Add a batch: prediction (B, layout.channels, H, W, D), and the targets of the loss."""
        target, parts = output[1], self.layout.split(output[0])
        visible = target["visible"]
        head = visible & (target["segmentation"] > 0) if "segmentation" in target else visible
        for task in self.names:
            if task not in target:
                continue
            pred, true = (self.layout.tasks[task].to_map(values) for values in (parts[task], target[task]))
            if task == "distance":
                error = compute_distance_mae(pred, true, visible).nanmean(1)
            elif task == "mni":
                error = compute_mni_error(pred, true, head)["error_mean"]
            elif task == "log_bias_field":
                error = compute_bias_error(pred, true, head)["normalised_l2"]
            else:
                inside = head & target[f"valid_{task}"] if f"valid_{task}" in target else head
                error = compute_mean_inside((pred - true).abs(), inside)[:, 0]
            self._add(task, error, target.get(f"available_{task}"))

    def compute(self) -> dict[str, float]:
        """Means over the samples seen; tasks that none of them has are left out."""
        return self._means()
