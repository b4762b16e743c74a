"""Shapes of lesions: thresholded noise, carried by a flow that keeps volumes."""

from __future__ import annotations

import torch
from torch import Tensor

from brainfm_monai.functional import spatial

__all__ = ["carry", "compute_curl", "make_lesions", "threshold_share"]

EDGE = 0.2  # width of a lesion's soft edge before it is carried, in stds of the noise


def compute_curl(potential: Tensor) -> Tensor:
    """Curl of a vector potential by central differences: a field without divergence.

    Args:
        potential: shape (B, 3, H, W, D), channel i along axis i.

    Returns:
        Velocity of the same shape, per voxel.
    """
    over_h, over_w, over_d = torch.gradient(potential, dim=(2, 3, 4))
    return torch.stack(
        [over_w[:, 2] - over_d[:, 1], over_d[:, 0] - over_h[:, 2], over_h[:, 1] - over_w[:, 0]],
        dim=1,
    )


def threshold_share(field: Tensor, region: Tensor, share: Tensor) -> Tensor:
    """Level above which a share of a region lies.

    Args:
        field: shape (B, 1, H, W, D).
        region: same shape, bool.
        share: shape (B,), in [0, 1].

    Returns:
        Level per sample, shape (B, 1, 1, 1, 1); above everything where the share or the region is empty.
    """
    lowest = torch.finfo(field.dtype).min
    values = torch.where(region, field, lowest).flatten(1).sort(dim=1, descending=True).values
    count = (share * region.flatten(1).sum(1)).round().long().clamp_max(values.shape[1] - 1)
    level = torch.gather(values, 1, (count - 1).clamp_min(0)[:, None]).reshape(-1, 1, 1, 1, 1)
    return torch.where(count.reshape(-1, 1, 1, 1, 1) > 0, level, torch.finfo(field.dtype).max)


def make_lesions(field: Tensor, region: Tensor, share: Tensor) -> Tensor:
    """Lesions with soft edges where a field is highest in a region.

    Args:
        field: smooth, shape (B, 1, H, W, D).
        region: where lesions may lie, same shape, bool.
        share: of the region that becomes lesion, shape (B,).

    Returns:
        Map in [0, 1] of the shape of ``field``; a lesion is where it exceeds one half.

    Reference:
        Liu et al., PEPSI: pathology-enhanced pulse-sequence-invariant representations for brain MRI, MICCAI 2024.
    """
    scale = field.flatten(1).std(dim=1).reshape(-1, 1, 1, 1, 1).clamp_min(torch.finfo(field.dtype).tiny)
    level = threshold_share(field, region, share)
    return ((field - level) / (EDGE * scale) + 0.5).clamp(0, 1) * region


def carry(soft: Tensor, velocity: Tensor, distance: Tensor) -> Tensor:
    """Carry a map along a flow.

    Args:
        soft: shape (B, C, H, W, D).
        velocity: stationary, shape (B, 3, H, W, D), any scale.
        distance: root mean square of the velocity after scaling, in voxels, shape (B,).

    Returns:
        Map of the shape of ``soft``.

    Reference:
        PEPSI (above) advects by an ODE solver; the exponential of a stationary velocity without divergence is such a flow too.
    """
    size = velocity.square().sum(1).flatten(1).mean(1).sqrt().clamp_min(torch.finfo(velocity.dtype).tiny)
    flow = spatial.integrate_velocity(velocity * (distance / size).reshape(-1, 1, 1, 1, 1))
    grid = spatial.identity_grid(soft.shape[2:], device=soft.device, dtype=soft.dtype)
    return spatial.warp(soft, grid + flow)
