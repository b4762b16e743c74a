"""Losses of all tasks: one formula per function, missing targets masked sample by sample."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from brainfm_monai.tasks import MAX_DISTANCE_MM, TaskLayout

__all__ = [
    "MultiTaskLoss",
    "compute_centred_mse",
    "compute_dice_ce",
    "compute_distance_l1",
    "compute_mask_loss",
    "compute_masked_l1",
]


def compute_dice_ce(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy plus soft Dice over the foreground classes that are present, without a one-hot volume.

    Args:
        logits: shape (B, L, H, W, D).
        labels: shape (B, 1, H, W, D), integer, in [0, L).

    Returns:
        Loss per sample, shape (B,), in float32.

    Reference:
        Milletari et al., V-Net, 3DV 2016 (Dice); normalised over present classes, because an absent one adds a constant.
    """
    batch, classes = logits.shape[:2]
    log_prob = logits.float().flatten(2).log_softmax(1)
    index = labels.flatten(2).long()
    log_true = torch.gather(log_prob, 1, index)
    cross_entropy = -log_true.mean(dim=(1, 2))
    truth = log_prob.new_zeros(batch, classes).scatter_add_(1, index[:, 0], torch.ones_like(log_true[:, 0]))
    overlap = log_prob.new_zeros(batch, classes).scatter_add(1, index[:, 0], log_true[:, 0].exp())
    predicted = log_prob.exp().sum(2)
    dice = 2 * overlap / (truth + predicted).clamp_min(1.0)
    present = (truth > 0) & (torch.arange(classes, device=truth.device) > 0)
    return cross_entropy + ((1 - dice) * present).sum(1) / present.sum(1).clamp_min(1)


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the mask's voxels and all channels, per sample: (B, C, H, W, D) and (B, 1, H, W, D) to (B,)."""
    weight = mask.to(values.dtype)
    return (values * weight).sum((1, 2, 3, 4)) / (weight.sum((1, 2, 3, 4)) * values.shape[1]).clamp_min(1.0)


def compute_masked_l1(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean absolute error inside a mask.

    Args:
        pred: shape (B, C, H, W, D).
        target: same shape and unit.
        mask: shape (B, 1, H, W, D).

    Returns:
        Loss per sample, shape (B,).
    """
    return _masked_mean((pred.float() - target).abs(), mask)


def compute_distance_l1(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Absolute error of signed distances inside +-3 mm; beyond, only the side matters, and it keeps a gradient.

    Args:
        pred: shape (B, C, H, W, D), mm.
        target: same shape, mm.
        mask: shape (B, 1, H, W, D).

    Returns:
        Loss per sample, shape (B,), mm.
    """
    pred = pred.float()
    error = (pred - target).abs()
    error = torch.where(target >= MAX_DISTANCE_MM, (MAX_DISTANCE_MM - pred).clamp_min(0), error)
    error = torch.where(target <= -MAX_DISTANCE_MM, (pred + MAX_DISTANCE_MM).clamp_min(0), error)
    return _masked_mean(error, mask)


def compute_mask_loss(logits: Tensor, truth: Tensor, mask: Tensor) -> Tensor:
    """Binary cross entropy plus soft Dice of a map that may be empty.

    Args:
        logits: shape (B, 1, H, W, D).
        truth: same shape, 0 or 1.
        mask: where it counts, same shape.

    Returns:
        Loss per sample, shape (B,).

    Reference:
        Milletari et al., V-Net, 3DV 2016 (Dice); 1 is added above and below, so that
        an empty map is met by an empty one.
    """
    logits, truth = logits.float(), truth.float()
    cross_entropy = _masked_mean(nnf.binary_cross_entropy_with_logits(logits, truth, reduction="none"), mask)
    pred, truth = (logits.sigmoid() * mask).flatten(1), (truth * mask).flatten(1)
    dice = (2 * (pred * truth).sum(1) + 1) / (pred.sum(1) + truth.sum(1) + 1)
    return cross_entropy + 1 - dice


def compute_centred_mse(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error of two fields up to a constant, inside a mask: a scan does not tell its overall gain.

    Args:
        pred: shape (B, 1, H, W, D), log of a factor.
        target: same shape and unit.
        mask: shape (B, 1, H, W, D).

    Returns:
        Loss per sample, shape (B,).
    """
    difference = pred.float() - target
    offset = _masked_mean(difference, mask).reshape(-1, 1, 1, 1, 1)
    return _masked_mean((difference - offset) ** 2, mask)


class MultiTaskLoss(nn.Module):
    """Weighted sum of the task losses, each averaged over the samples that have its target.

    Args:
        layout: names the channels of the prediction.
        weights: weight by task name; a task without one has weight 1.

    Raises:
        ValueError: if a weight names a task that is not in the layout.
    """

    def __init__(self, layout: TaskLayout, weights: Mapping[str, float] | None = None) -> None:
        super().__init__()
        unknown = sorted(set(weights or {}) - set(layout.tasks))
        if unknown:
            raise ValueError(f"MultiTaskLoss: 'weights' may name {list(layout.tasks)}, got {unknown}")
        self.layout = layout
        self.weights = dict(weights or {})
        self.components: dict[str, Tensor] = {}

    def forward(self, pred: Tensor, target: Mapping[str, Tensor]) -> Tensor:
        """Loss of a batch.

        Args:
            pred: shape (B, layout.channels, H, W, D).
            target: one entry for every task that at least one sample has; ``visible``, (B, 1, H, W, D), the field of view;
                optionally ``available_<task>``, (B,), 1 for samples that have the target, and ``valid_<task>``, (B, 1, H, W, D),
                1 where an image is not defaced.

        Returns:
            Scalar. ``components`` holds the unweighted loss of every task until the next call.
        """
        per_task = {}
        for name, output in self.layout.split(pred).items():
            if name in target:
                losses = self._loss(name, output, target)
                available = target.get(f"available_{name}", torch.ones_like(losses)).to(losses.dtype)
                per_task[name] = torch.where(available > 0, losses, 0.0).sum() / available.sum().clamp_min(1.0)
        self.components = {name: loss.detach() for name, loss in per_task.items()}
        return torch.stack([self.weights.get(name, 1.0) * loss for name, loss in per_task.items()]).sum()

    def _loss(self, name: str, output: Tensor, target: Mapping[str, Tensor]) -> Tensor:
        truth, visible = target[name], target["visible"]
        kind = self.layout.tasks[name].kind
        if kind == "labels":
            return compute_dice_ce(output, truth)
        if kind == "distance":
            return compute_distance_l1(output, truth, visible)
        if kind == "mask":
            return compute_mask_loss(output, truth, visible)
        visible = visible & target[f"valid_{name}"] if f"valid_{name}" in target else visible
        head = visible & (target["segmentation"] > 0) if "segmentation" in target else visible
        if kind == "log_field":
            return compute_centred_mse(output, truth, head)
        return compute_masked_l1(output, truth, head)
