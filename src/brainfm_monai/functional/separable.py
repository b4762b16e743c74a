"""Per-axis linear operators of shape (B, n_out, n_in), and their application to a volume."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def apply_separable(volume: Tensor, operators: Sequence[Tensor]) -> Tensor:
    """Apply matrices (B, H, h), (B, W, w) and (B, D, d) to the axes of a volume (B, C, h, w, d): (B, C, H, W, D)."""
    over_h, over_w, over_d = operators
    batch, channels, h, w, d = volume.shape
    out = torch.matmul(volume.reshape(batch, -1, d), over_d.transpose(1, 2)).reshape(batch, channels, h, w, -1)
    out = torch.matmul(over_w[:, None, None], out)
    return torch.matmul(over_h[:, None], out.flatten(3)).reshape(batch, channels, -1, *out.shape[3:])


def hat(position: Tensor, columns: int) -> Tensor:
    """Weights of linear interpolation at positions (...) along an axis, (..., columns); what lies beyond is 0."""
    index = torch.arange(columns, device=position.device, dtype=position.dtype)
    return (1 - (position[..., None] - index).abs()).clamp_min(0)


def spread_operator(size: int, count: int, *, device: torch.device | None = None) -> Tensor:
    """Linear interpolation of at least 2 points from the first to the last voxel of an axis, (1, size, count)."""
    return hat(torch.linspace(0, count - 1, size, device=device)[None], count)


def resize(volume: Tensor, size: Sequence[int]) -> Tensor:
    """Linear interpolation from the first to the last voxel of each axis, (B, C, h, w, d) to (B, C, *size)."""
    pairs = zip(size, volume.shape[2:], strict=True)
    operators = [spread_operator(n, m, device=volume.device).expand(len(volume), -1, -1) for n, m in pairs]
    return apply_separable(volume, operators)


def count_control_points(size: Sequence[int], smallest_spacing: float) -> list[int]:
    """Control points that cover the axes of a grid, first to last voxel, at any spacing of at least the smallest."""
    return [2 * math.ceil((n - 1) / 2 / smallest_spacing) + 1 for n in size]


def lattice_operator(spacing: Tensor, size: int, columns: int, count: int | None = None) -> Tensor:
    """Linear interpolation of control points at distances (B,), in voxels, that are centred on an axis of a size.

    The operator is (B, count, columns), for ``count`` places from the first to the last voxel, or every voxel.
    """
    half = (size - 1) / 2
    position = torch.linspace(-half, half, count or size, device=spacing.device, dtype=spacing.dtype)
    return hat((position / spacing[:, None] + (columns - 1) / 2).clamp(0, columns - 1), columns)


def interpolate_lattice(
    points: Tensor, spacing: Tensor, size: Sequence[int], counts: Sequence[int | None] = (None, None, None)
) -> Tensor:
    """Field (B, C, *size), or at ``counts`` places, of control points (B, C, P, Q, R) at distances (B, 3), voxels."""
    axes = zip(size, points.shape[2:], counts, strict=True)
    return apply_separable(points, [lattice_operator(spacing[:, i], *axis) for i, axis in enumerate(axes)])


def ghost_operator(count: Tensor, strength: Tensor, size: int) -> Tensor:
    """Ghosts along an axis: every ``count``-th line of k-space, (B,), is weakened by a share ``strength``, (B,).

    The transform of a comb is a comb: I' = I - (strength / count) sum_j I shifted by j size / count, circularly and
    linearly interpolated. A count of 1 only scales the image, so its strength is 0.
    """
    index = torch.arange(size, device=count.device, dtype=strength.dtype)
    step = size / count.reshape(-1, 1, 1)
    offset = torch.remainder(index[:, None] - index, size)
    # Distance to the nearest multiple of the step; the circle closes after `count` of them.
    away = (offset - (offset / step).round() * step).abs()
    comb = (1 - away).clamp_min(0)
    eye = (index[:, None] == index).to(strength.dtype)
    return eye - (strength / count).reshape(-1, 1, 1) * comb


def slice_operator(spacing: Tensor, sigma: Tensor, size: int) -> Tensor:
    """Acquisition along an axis: a Gaussian profile, sampled every ``spacing`` voxels; rows sum to 1.

    Spacing, at least 1, and std ``sigma`` of the profile are (B,), in voxels; 0 means linear interpolation. Row j is
    the slice centred at (j + 0.5) spacing - 0.5; rows beyond the last whole slice repeat the last voxel and are never
    read by :func:`upsampling_operator`. (Billot et al., MICCAI 2020, on partial volumes.)
    """
    index = torch.arange(size, device=spacing.device, dtype=spacing.dtype)
    centre = ((index + 0.5) * spacing[:, None] - 0.5).clamp(0, size - 1)
    sigma = sigma[:, None, None]
    offset = (centre[..., None] - index) / sigma.clamp_min(torch.finfo(sigma.dtype).eps)
    # Below a third of a voxel the sampled Gaussian is narrower than the grid: linear interpolation is exact there.
    operator = torch.where(sigma > 1 / 3, torch.exp(-0.5 * offset**2), hat(centre, size))
    return operator / operator.sum(-1, keepdim=True)


def upsampling_operator(spacing: Tensor, size: int) -> Tensor:
    """Linear interpolation from slices of :func:`slice_operator` back to the axis, shape (B, size, size)."""
    index = torch.arange(size, device=spacing.device, dtype=spacing.dtype)
    slices = (size / spacing).floor().clamp_min(1)
    position = ((index + 0.5) / spacing[:, None] - 0.5).clamp_min(0)
    return hat(torch.minimum(position, slices[:, None] - 1), size)
