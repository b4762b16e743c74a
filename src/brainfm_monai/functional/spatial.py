"""Grids, affine matrices, velocity integration and warping, in voxel coordinates."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as nnf
from torch import Tensor

__all__ = [
    "affine_matrix",
    "gather_nearest",
    "identity_grid",
    "integrate_velocity",
    "jacobian_determinant",
    "sampling_coordinates",
    "warp",
]


def identity_grid(size: Sequence[int], *, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Voxel coordinates of a grid.

    Args:
        size: (H, W, D).
        device: device of the result.
        dtype: floating type of the result.

    Returns:
        Tensor of shape (1, 3, H, W, D); channel i holds the index along axis i, in voxels.
    """
    axes = [torch.arange(n, device=device, dtype=dtype) for n in size]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))[None]


def affine_matrix(rotation_deg: Tensor, shear: Tensor, scaling: Tensor) -> Tensor:
    """Linear part of an affine map: shears, then rotations, rows multiplied by the scalings.

    A = diag(s) SHx SHy SHz Rx Ry Rz, where SHi adds its two shears of the other axes to row i.

    Args:
        rotation_deg: angles about the axes H, W, D in degrees, shape (B, 3).
        shear: two off-diagonal shears for each axis, dimensionless, shape (B, 3, 2).
        scaling: factors of the three rows, shape (B, 3).

    Returns:
        Matrices of shape (B, 3, 3).

    Reference:
        BrainFM (arXiv 2509.00549), generator of the published configuration.
    """
    angle = rotation_deg * (math.pi / 180.0)
    matrix = torch.diag_embed(scaling)
    eye = torch.eye(3, device=scaling.device, dtype=scaling.dtype)
    unit = torch.eye(9, device=scaling.device, dtype=scaling.dtype).reshape(9, 3, 3)
    for i in range(3):
        j, k = (n for n in range(3) if n != i)
        matrix = matrix @ (eye + shear[:, i, 0, None, None] * unit[3 * i + j] + shear[:, i, 1, None, None] * unit[3 * i + k])
    for i in range(3):
        j, k = (i + 1) % 3, (i + 2) % 3
        cos, sin = angle[:, i].cos()[:, None, None], angle[:, i].sin()[:, None, None]
        rotation = unit[4 * i] + cos * (unit[4 * j] + unit[4 * k]) + sin * (unit[3 * k + j] - unit[3 * j + k])
        matrix = matrix @ rotation
    return matrix


def sampling_coordinates(
    matrix: Tensor, displacement: Tensor, translation: Tensor, source_size: Sequence[int], stride: int
) -> Tensor:
    """Where in the source each output voxel looks: x = A (s (i + u(i) - c_out)) + c_source + t.

    Args:
        matrix: linear maps A from output to source, shape (B, 3, 3).
        displacement: u, shape (B, 3, H, W, D), in output voxels.
        translation: t, shape (B, 3), in source voxels.
        source_size: (H, W, D) of the source.
        stride: s, the size of an output voxel in source voxels.

    Returns:
        Coordinates of shape (B, 3, H, W, D), in source voxels.
    """
    size = displacement.shape[2:]
    centre_out = displacement.new_tensor([(n - 1) / 2 for n in size]).reshape(1, 3, 1, 1, 1)
    centre = displacement.new_tensor([(n - 1) / 2 for n in source_size])
    moved = (identity_grid(size, device=displacement.device, dtype=displacement.dtype) - centre_out + displacement) * stride
    turned = torch.bmm(matrix, moved.flatten(2))
    return (turned + (centre + translation)[:, :, None]).reshape(displacement.shape)


def warp(source: Tensor, coordinates: Tensor, *, mode: str = "bilinear", padding_mode: str = "zeros") -> Tensor:
    """Sample a source at voxel coordinates. The one place where (H, W, D) order turns into grid_sample's xyz.

    Args:
        source: shape (B, C, h, w, d), floating.
        coordinates: shape (B, 3, H, W, D), in voxels of the source, channel i along axis i.
        mode: ``"bilinear"`` (trilinear here) or ``"nearest"``.
        padding_mode: ``"zeros"`` or ``"border"``.

    Returns:
        Tensor of shape (B, C, H, W, D).

    Raises:
        ValueError: if ``coordinates`` has not three channels.
    """
    if coordinates.shape[1] != 3:
        raise ValueError(f"warp: 'coordinates' must have shape (B, 3, H, W, D), got {tuple(coordinates.shape)}")
    last = source.new_tensor([max(n - 1, 1) for n in source.shape[2:]]).reshape(1, 3, 1, 1, 1)
    grid = (coordinates.to(source.dtype) * (2 / last) - 1).flip(1).movedim(1, -1)
    return nnf.grid_sample(source, grid, mode=mode, padding_mode=padding_mode, align_corners=True)


def gather_nearest(source: Tensor, coordinates: Tensor) -> Tensor:
    """Values of the nearest voxels, without turning an integer map into a floating one; 0 outside.

    Args:
        source: shape (B, C, h, w, d), any type.
        coordinates: shape (B, 3, H, W, D), in voxels of the source, channel i along axis i.

    Returns:
        Tensor of shape (B, C, H, W, D) and of the source's type.
    """
    h, w, d = source.shape[2:]
    x, y, z = coordinates.round().long().unbind(1)
    inside = (x >= 0) & (x < h) & (y >= 0) & (y < w) & (z >= 0) & (z < d)
    index = (x.clamp(0, h - 1) * w + y.clamp(0, w - 1)) * d + z.clamp(0, d - 1)
    values = torch.gather(source.flatten(2), 2, index.flatten(1)[:, None].expand(-1, source.shape[1], -1))
    return values.reshape(*source.shape[:2], *index.shape[1:]) * inside[:, None]


def integrate_velocity(velocity: Tensor, steps: int = 6) -> Tensor:
    """Displacement of a stationary velocity field by scaling and squaring.

    Args:
        velocity: shape (B, 3, H, W, D), in voxels per unit time.
        steps: number of squarings.

    Returns:
        Displacement of the flow at time 1, shape (B, 3, H, W, D), in voxels.

    Reference:
        Arsigny et al., A Log-Euclidean framework for statistics on diffeomorphisms, MICCAI 2006.
    """
    grid = identity_grid(velocity.shape[2:], device=velocity.device, dtype=velocity.dtype)
    displacement = velocity / 2**steps
    for _ in range(steps):
        displacement = displacement + warp(displacement, grid + displacement, padding_mode="border")
    return displacement


def jacobian_determinant(coordinates: Tensor) -> Tensor:
    """Determinant of the derivative of a coordinate map, by central differences.

    Args:
        coordinates: shape (B, 3, H, W, D), in voxels, channel i along axis i.

    Returns:
        Determinant per voxel, shape (B, 1, H, W, D).
    """
    rows = torch.gradient(coordinates, dim=(2, 3, 4))
    jacobian = torch.stack(rows, dim=-1).movedim(1, -2)
    return torch.linalg.det(jacobian)[:, None]
