"""Shapes of lesions: thresholded noise, carried by a flow that keeps volumes."""

from __future__ import annotations

import torch
from torch import Tensor

from brainfm_monai.functional import spatial

EDGE = 0.2  # width of a lesion's soft edge before it is carried, in stds of the noise


def compute_curl(potential: Tensor) -> Tensor:
    """Curl of a vector potential (B, 3, H, W, D) by central differences: a velocity without divergence, per voxel."""
    over_h, over_w, over_d = torch.gradient(potential, dim=(2, 3, 4))
    curl = [over_w[:, 2] - over_d[:, 1], over_d[:, 0] - over_h[:, 2], over_h[:, 1] - over_w[:, 0]]
    return torch.stack(curl, dim=1)


def threshold_share(field: Tensor, region: Tensor, share: Tensor) -> Tensor:
    """Level (B, 1, 1, 1, 1) of a field (B, 1, H, W, D) above which a share (B,) of a region, a mask of its shape, lies.

    The level is above everything where the share or the region is empty.
    """
    limits = torch.finfo(field.dtype)
    values = torch.where(region, field, limits.min).flatten(1).sort(dim=1, descending=True).values
    count = (share * region.flatten(1).sum(1)).round().long().clamp_max(values.shape[1] - 1)
    level = torch.gather(values, 1, (count - 1).clamp_min(0)[:, None]).reshape(-1, 1, 1, 1, 1)
    return torch.where(count.reshape(-1, 1, 1, 1, 1) > 0, level, limits.max)


def make_lesions(field: Tensor, region: Tensor, share: Tensor) -> Tensor:
    """Lesions with soft edges where a smooth field is highest in a region.

    Arguments as of :func:`threshold_share`. The map is in [0, 1]; a lesion is where it exceeds one half.

    Reference:
        Liu et al., PEPSI: pathology-enhanced pulse-sequence-invariant representations for brain MRI, MICCAI 2024.
    """
    scale = field.flatten(1).std(dim=1).reshape(-1, 1, 1, 1, 1).clamp_min(torch.finfo(field.dtype).tiny)
    level = threshold_share(field, region, share)
    return ((field - level) / (EDGE * scale) + 0.5).clamp(0, 1) * region


def carry(soft: Tensor, velocity: Tensor, distance: Tensor) -> Tensor:
    """Carry a map (B, C, H, W, D) along a flow.

    Args:
        soft: the map.
        velocity: stationary, shape (B, 3, H, W, D), any scale.
        distance: root mean square of the velocity after scaling, in voxels, shape (B,).

    Reference:
        PEPSI (above) advects by an ODE solver; the exponential of a velocity without divergence is such a flow too.
    """
    size = velocity.square().sum(1).flatten(1).mean(1).sqrt().clamp_min(torch.finfo(velocity.dtype).tiny)
    flow = spatial.integrate_velocity(velocity * (distance / size).reshape(-1, 1, 1, 1, 1))
    return spatial.warp(soft, spatial.identity_grid(soft.shape[2:], device=soft.device, dtype=soft.dtype) + flow)
