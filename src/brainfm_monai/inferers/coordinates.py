"""Geometry of the second stage: the box around the brain, its weight, and coordinates that are smooth."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as nnf
from monai.networks.layers import GaussianFilter
from torch import Tensor

__all__ = ["centre_box", "edge_ramp", "smooth_coordinates"]

STEP_MM = 4.0  # from point to point of the grid on which coordinates are smoothed
MINIMUM_WEIGHT = 1e-6  # of the brain around a point, below which the rest is taken as 0


def centre_box(mask: Tensor, size: Sequence[int]) -> tuple[slice, ...]:
    """Box of a given size around the middle of a mask, (H, W, D), within the volume; an empty mask has its middle there."""
    sides = []
    for axis, (length, total) in enumerate(zip(size, mask.shape, strict=True)):
        other_axes = [a for a in range(3) if a != axis]
        occupied = mask.any(other_axes[1]).any(other_axes[0]).nonzero()
        twice_middle = int(occupied[0]) + int(occupied[-1]) + 1 if len(occupied) else total
        first = min(max((twice_middle - length) // 2, 0), max(total - length, 0))
        sides.append(slice(first, min(first + length, total)))
    return tuple(sides)


def edge_ramp(size: Sequence[int], width: float) -> Tensor:
    """Weight that rises from near 0 at the faces of a box to 1 within ``width`` voxels, shape ``size``."""
    weight = torch.ones(())
    for n in size:
        centres = torch.arange(n) + 0.5
        weight = weight[..., None] * (torch.minimum(centres, n - centres) / width).clamp_max(1)
    return weight


def smooth_coordinates(coordinates: Tensor, known: Tensor, sigma: float, voxel_mm: float) -> Tensor:
    """The affine map that fits coordinates best, plus what a Gaussian over the known voxels leaves of the rest.

    Args:
        coordinates: of the template, shape (3, H, W, D).
        known: mask of the voxels that count, shape (H, W, D).
        sigma: standard deviation of the Gaussian, in voxels.
        voxel_mm: size of a voxel.

    Returns:
        Shape (3, H, W, D), defined everywhere.
    """
    step = max(round(STEP_MM / voxel_mm), 1)
    axes = (torch.arange(n, device=known.device) for n in known.shape)
    index = torch.stack(torch.meshgrid(*axes, indexing="ij")).float()
    points = torch.cat([index, torch.ones_like(index[:1])])
    # The host's solver takes coordinates that do not span space (an untrained network's), a GPU's does not.
    matrix, target = (x[:, known].T.double().cpu() for x in (points, coordinates))
    fit = torch.linalg.lstsq(matrix, target).solution.T.to(points)
    affine = torch.einsum("ij,jhwd->ihwd", fit, points)
    weighted = torch.cat([(coordinates - affine) * known, known[None].float()])[None]
    padding = [extra for size in reversed(known.shape) for extra in (0, -size % step)]
    coarse = GaussianFilter(3, sigma / step)(nnf.avg_pool3d(nnf.pad(weighted, padding), step))
    values = coarse[:, :3] / coarse[:, 3:].clamp_min(MINIMUM_WEIGHT)
    rest = nnf.interpolate(values, scale_factor=step, mode="trilinear", align_corners=False)[0]
    return affine + rest[:, *(slice(size) for size in known.shape)]
