"""Scores of a validation, over the subjects of all processes."""

from collections.abc import Mapping
from typing import Any

import torch
from ignite.metrics import Metric
from ignite.metrics.metric import reinit__is_reduced, sync_all_reduce
from monai.handlers import from_engine
from monai.metrics import compute_dice
from torch import Tensor

from brainfm_monai.metrics import fields
from brainfm_monai.tasks import TaskLayout

NAMES = {"distance": "distance_mae_mm", "mni": "mni_error_mm", "log_bias_field": "log_bias_error"}


class TaskErrors(Metric):
    """Errors of the tasks beside the segmentation, each a mean over the samples of all processes that have the target.

    ``distance_mae_mm``, ``mni_error_mm`` and ``log_bias_error`` (normalised L2) are those of the evaluation, see
    :mod:`brainfm_monai.metrics.fields`; ``<image>_mae`` is the mean absolute error in the head, in the unit of the
    files. A task of another kind has none.
    """

    mode: Any = "flatten"  # of ignite: how a dictionary of results enters the metrics of the engine

    def __init__(self, layout: TaskLayout) -> None:
        self.layout, self.names = layout, self._name_scores(layout)
        super().__init__(output_transform=from_engine(["pred", "label"]), metrics_result_mode=self.mode)

    def _name_scores(self, layout: TaskLayout) -> dict[str, str]:
        """Name of the score of every task that has one."""
        names = NAMES | {name: f"{name}_mae" for name, task in layout.tasks.items() if task.kind == "image"}
        return {name: names[name] for name in layout.tasks if name in names}

    @reinit__is_reduced
    def reset(self) -> None:
        """Forget all samples."""
        self.total = torch.zeros(2, len(self.names), dtype=torch.float64)  # sums of the scores, and their numbers

    @reinit__is_reduced
    def update(self, output: tuple[Tensor, Mapping[str, Tensor]]) -> None:
        """Add a batch: prediction (B, layout.channels, H, W, D), and the targets of the loss."""
        parts, target = self.layout.split(output[0]), output[1]
        for number, task in enumerate(self.names):
            if task not in target:
                continue
            scores, available = self._score(task, parts[task], target), target.get(f"available_{task}")
            counted = scores.isfinite() if available is None else scores.isfinite() & (available.to(scores.device) > 0)
            self.total[:, number] += torch.stack([torch.where(counted, scores, 0.0).sum(), counted.sum()]).cpu()

    def _score(self, task: str, pred: Tensor, target: Mapping[str, Tensor]) -> Tensor:
        """Score of every sample, (B,); not finite where there is none."""
        visible = target["visible"]
        head = visible & (target["segmentation"] > 0) if "segmentation" in target else visible
        pred, true = (self.layout.tasks[task].to_map(values) for values in (pred, target[task]))
        if task == "distance":
            return fields.compute_distance_mae(pred, true, visible).nanmean(1)
        if task == "mni":
            return fields.compute_mni_error(pred, true, head)["error_mean"]
        if task == "log_bias_field":
            return fields.compute_bias_error(pred, true, head)["normalised_l2"]
        inside = head & target[f"valid_{task}"] if f"valid_{task}" in target else head
        return fields.compute_mean_inside((pred - true).abs(), inside)[:, 0]

    @sync_all_reduce("total")
    def compute(self) -> Any:
        """Means over the samples seen, by name; tasks that none of them has are left out."""
        sums, counts = self.total.tolist()
        return {name: s / n for name, s, n in zip(self.names.values(), sums, counts, strict=True) if n}


class SegmentationDice(TaskErrors):
    """Mean hard Dice over the foreground structures that occur in the reference, over all samples of all processes.

    A sample that shows no structure does not count.
    """

    mode = "both"

    def _name_scores(self, layout: TaskLayout) -> dict[str, str]:
        return {"segmentation": "mean_dice"}

    def _score(self, task: str, pred: Tensor, target: Mapping[str, Tensor]) -> Tensor:
        labels, count = pred.argmax(1, keepdim=True), len(self.layout.protocol)
        return compute_dice(labels, target[task], include_background=False, num_classes=count).nanmean(1)

    def compute(self) -> float:
        """Mean over the samples seen; NaN without any."""
        return float(super().compute().get("mean_dice", float("nan")))
