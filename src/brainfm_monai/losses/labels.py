"""Losses of label maps and of masks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor
from torch.autograd.function import once_differentiable

from brainfm_monai.losses.dense import compute_masked_mean

__all__ = ["compute_dice_ce", "compute_mask_loss"]


class _DiceCrossEntropy(torch.autograd.Function):
    """Both losses and their gradient written out: beside the logits, one volume of their size exists at a time, not five."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, index: Tensor) -> Tensor:
        """Loss per sample, (B,), of logits (B, L, N) in float32 and labels (B, 1, N) in int64."""
        batch, classes, voxels = logits.shape
        normaliser = logits.logsumexp(1, keepdim=True)
        log_true = logits.gather(1, index) - normaliser
        predicted = (logits - normaliser).exp_().square_().sum(2)
        zeros = logits.new_zeros(batch, classes)
        truth = zeros.scatter_add(1, index[:, 0], torch.ones_like(log_true[:, 0]))
        overlap = zeros.scatter_add(1, index[:, 0], log_true[:, 0].exp())
        size = (truth + predicted).clamp_min(1.0)
        present = (truth > 0) & (torch.arange(classes, device=truth.device) > 0)
        weight = present / present.sum(1, keepdim=True).clamp_min(1)
        ctx.save_for_backward(logits, normaliser, index, overlap, size, weight)
        return ((1 - 2 * overlap / size) * weight).sum(1) - log_true.sum((1, 2)) / voxels

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Gradient of the logits, from those of the probabilities p by p (g - sum p g)."""
        logits, normaliser, index, overlap, size, weight = ctx.saved_tensors
        weight = weight * gradient[:, None]
        of_overlap, of_square = -2 * weight / size, 2 * weight * overlap / size.square()
        entropy = gradient[:, None] / logits.shape[2]
        probability = (logits - normaliser).exp_()
        mean = at_truth = probability.gather(1, index)[:, 0] * of_overlap.gather(1, index[:, 0])
        for label in range(logits.shape[1]):  # a class at a time, and below in place: no second volume is needed
            mean = torch.addcmul(mean, probability[:, label].square(), of_square[:, label, None], value=2)
        for label in range(logits.shape[1]):
            of_class = torch.addcmul(entropy - mean, probability[:, label], of_square[:, label, None], value=2)
            probability[:, label].mul_(of_class)
        return probability.scatter_add_(1, index, (at_truth - entropy)[:, None]), None


def compute_dice_ce(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy plus soft Dice over the foreground classes that are present, without a one-hot volume.

    The sizes of the Dice are sums of squares, ``2 sum(p t) / (sum(p^2) + sum(t))``. Where a voxel is uncertain, the best p is
    then near the probability, as it is for the cross entropy; with plain sums it is 0 or 1, the latter already from half the
    Dice on, so that thin structures come out too large.

    Args:
        logits: shape (B, L, H, W, D).
        labels: shape (B, 1, H, W, D), integer, in [0, L).

    Returns:
        Loss per sample, shape (B,), in float32.

    Reference:
        Milletari et al., V-Net, 3DV 2016 (Dice, with squares); averaged over present classes, as an absent one adds a constant.
    """
    loss: Tensor = _DiceCrossEntropy.apply(logits.float().flatten(2), labels.flatten(2).long())
    return loss


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
    cross_entropy = compute_masked_mean(nnf.binary_cross_entropy_with_logits(logits, truth, reduction="none"), mask)
    pred, truth = (logits.sigmoid() * mask).flatten(1), (truth * mask).flatten(1)
    dice = (2 * (pred * truth).sum(1) + 1) / (pred.sum(1) + truth.sum(1) + 1)
    return cross_entropy + 1 - dice
