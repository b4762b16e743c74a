"""Losses of maps with a value at every voxel, and of numbers that are means of maps."""

from __future__ import annotations

import torch
from torch import Tensor

from brainfm_monai.tasks import MAX_DISTANCE_MM, bound_log_scale

__all__ = [
    "compute_banded_error",
    "compute_centred_mse",
    "compute_gradient_l1",
    "compute_laplace_nll",
    "compute_masked_mean",
    "compute_pooled_l1",
    "compute_roughness",
]


def compute_masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the mask's voxels and all channels; 0 where the mask is empty.

    Args:
        values: shape (B, C, H, W, D).
        mask: where they count, shape (B, 1, H, W, D).

    Returns:
        Mean per sample, shape (B,).
    """
    counted = mask.bool()
    total = torch.where(counted, values, 0.0).sum((1, 2, 3, 4))
    return total / (counted.sum((1, 2, 3, 4)) * values.shape[1]).clamp_min(1)


def compute_gradient_l1(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Absolute error of the forward differences along each axis, between two voxels that both count; the three means are added.

    Args:
        pred: shape (B, C, H, W, D).
        target: same shape and unit.
        mask: shape (B, 1, H, W, D).

    Returns:
        Loss per sample, shape (B,), units per voxel.

    Reference:
        BrainFM (arXiv 2509.00549), gradient loss of images and coordinates.
    """
    error, counted = (
        pred.float() - target,
        mask.bool(),
    )  # differences are linear: that of the error is the error of that
    steps = [
        compute_masked_mean(error.diff(dim=axis).abs(), _first(counted, axis, 1) & _last(counted, axis, 1))
        for axis in (2, 3, 4)
    ]
    return torch.stack(steps).sum(0)


def compute_roughness(pred: Tensor, mask: Tensor) -> Tensor:
    """Mean squared second difference along each axis, where three voxels in a row count; the three means are added.

    First differences would pull coordinates towards a constant; second ones leave every affine map alone.

    Args:
        pred: shape (B, C, H, W, D).
        mask: shape (B, 1, H, W, D).

    Returns:
        Loss per sample, shape (B,), squared units per voxel^4.

    Reference:
        Rueckert et al., IEEE Transactions on Medical Imaging 18, 1999 (bending energy), without the mixed derivatives.
    """
    values, counted = pred.float(), mask.bool()
    bends = []
    for axis in (2, 3, 4):
        middle = _first(_last(counted, axis, 1), axis, 1)
        inside = middle & _first(counted, axis, 2) & _last(counted, axis, 2)
        bends.append(compute_masked_mean(values.diff(n=2, dim=axis).square(), inside))
    return torch.stack(bends).sum(0)


def _first(mask: Tensor, axis: int, missing: int) -> Tensor:
    """All but the last voxels along an axis."""
    return mask.narrow(axis, 0, max(mask.shape[axis] - missing, 0))


def _last(mask: Tensor, axis: int, missing: int) -> Tensor:
    """All but the first voxels along an axis."""
    start = min(missing, mask.shape[axis])
    return mask.narrow(axis, start, mask.shape[axis] - start)


def compute_banded_error(pred: Tensor, target: Tensor) -> Tensor:
    """Absolute error of signed distances inside +-3 mm; beyond, only the side matters, and it keeps a gradient.

    Args:
        pred: shape (B, C, H, W, D), mm.
        target: same shape, mm.

    Returns:
        Error of the same shape, mm.
    """
    pred = pred.float()
    error = (pred - target).abs()
    error = torch.where(target >= MAX_DISTANCE_MM, (MAX_DISTANCE_MM - pred).clamp_min(0), error)
    return torch.where(target <= -MAX_DISTANCE_MM, (pred + MAX_DISTANCE_MM).clamp_min(0), error)


def compute_laplace_nll(error: Tensor, log_scale: Tensor, mask: Tensor) -> Tensor:
    """Mean negative log likelihood of absolute errors under a Laplace law of predicted scale b: ``error / b + log b``.

    The constant log 2 is left out. The loss may be negative: b is a length in the unit of the error.

    Args:
        error: absolute error, shape (B, C, H, W, D).
        log_scale: what the network gives for log b, same shape; see :func:`~brainfm_monai.tasks.bound_log_scale`.
        mask: shape (B, 1, H, W, D).

    Returns:
        Loss per sample, shape (B,).

    Reference:
        Kendall and Gal, What uncertainties do we need in Bayesian deep learning for computer vision?, NeurIPS 2017.
    """
    log_scale = bound_log_scale(log_scale)
    return compute_masked_mean(torch.addcmul(log_scale, error, (-log_scale).exp()), mask)


def compute_centred_mse(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error of two fields up to a constant, inside a mask: a scan does not determine its overall gain.

    Args:
        pred: shape (B, 1, H, W, D), log of a factor.
        target: same shape and unit.
        mask: shape (B, 1, H, W, D).

    Returns:
        Loss per sample, shape (B,).
    """
    difference = pred.float() - target
    offset = compute_masked_mean(difference, mask).reshape(-1, 1, 1, 1, 1)
    return compute_masked_mean((difference - offset).square(), mask)


def compute_pooled_l1(values: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Absolute error of the mean of a map inside a mask.

    Args:
        values: shape (B, 1, H, W, D).
        target: shape (B,), same unit.
        mask: shape (B, 1, H, W, D).

    Returns:
        Loss per sample, shape (B,).
    """
    return (compute_masked_mean(values.float(), mask) - target.reshape(-1)).abs()
