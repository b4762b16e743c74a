"""The deformation of a draw: where output voxels look in the source, and the way back."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from brainfm_monai.functional import separable, spatial
from brainfm_monai.synthesis.ranges import GeometryParams

__all__ = ["make_coordinates", "make_inverse_coordinates"]

VELOCITY_STEP = 4  # output voxels per point of the grid on which the velocity is integrated
INVERSE_STEPS = 8  # of Newton's method; the residual falls by a half or more at each


def make_coordinates(geometry: GeometryParams, source_size: Sequence[int]) -> Tensor:
    """Source voxel of every output voxel: x = A s (phi(i) - c_out) + c_source + t, i mirrored where the draw says so.

    Args:
        geometry: the draw.
        source_size: (H, W, D) of the subject.

    Returns:
        Coordinates, (B, 3, H, W, D), in source voxels. ``spatial.jacobian_determinant`` of them tells of folds.
    """
    return _make_forward(geometry, source_size, geometry.mirror)


def make_inverse_coordinates(geometry: GeometryParams, source_size: Sequence[int]) -> Tensor:
    """Output voxel of every source voxel: the inverse of :func:`make_coordinates`.

    The flow of the opposite velocity is close to it; a few steps of Newton's method with the linear part as derivative then
    make it the inverse of what is interpolated.

    Args:
        geometry: the draw, of a diffeomorphic field.
        source_size: (H, W, D) of the subject.

    Returns:
        Coordinates, (B, 3, *source_size), in output voxels; true where they lie in the output's volume.

    Raises:
        ValueError: if the field was not integrated, and so need not have an inverse.
    """
    if not geometry.diffeomorphic:
        raise ValueError(
            "make_inverse_coordinates: a 'diffeomorphic' deformation is needed, got one that is not integrated"
        )
    size = geometry.spatial_size
    target = spatial.identity_grid(source_size, device=geometry.matrix.device)
    linear = torch.linalg.inv(geometry.matrix) / geometry.stride
    centred = torch.stack([target[:, i] - (n - 1) / 2 for i, n in enumerate(source_size)], 1).flatten(2)
    points = torch.bmm(linear, centred - geometry.translation[:, :, None]).reshape(-1, 3, *source_size)
    points = torch.stack([points[:, i] + (n - 1) / 2 for i, n in enumerate(size)], 1)
    coarse, back = _displace(geometry, sign=-1.0)
    steps = [(n - 1) / (c - 1) for n, c in zip(size, coarse.shape[2:], strict=True)]
    places = torch.stack([points[:, i] / step for i, step in enumerate(steps)], 1)
    points = points + spatial.warp(back, places, padding_mode="border")
    forward = _make_forward(geometry, source_size, torch.zeros_like(geometry.mirror))
    for _ in range(INVERSE_STEPS):
        missed = target - spatial.warp(forward, points, padding_mode="border")
        points = points + torch.bmm(linear, missed.flatten(2)).reshape(points.shape)
    mirrored = torch.stack([size[0] - 1 - points[:, 0], points[:, 1], points[:, 2]], 1)
    return torch.where(geometry.mirror.reshape(-1, 1, 1, 1, 1), mirrored, points)


def _make_forward(geometry: GeometryParams, source_size: Sequence[int], mirror: Tensor) -> Tensor:
    size = geometry.spatial_size
    grid, displacement = _displace(geometry, sign=1.0)
    coordinates = spatial.sampling_coordinates(
        geometry.matrix, geometry.translation, grid + displacement, size, source_size, geometry.stride
    )
    # The coarse points span the volume from its first to its last voxel: what is linear between them stays exact.
    pairs = zip(size, coordinates.shape[2:], strict=True)
    spread = [separable.spread_operator(n, c, device=coordinates.device) for n, c in pairs]
    over_h = torch.where(mirror.reshape(-1, 1, 1), spread[0].flip(1), spread[0])
    batch = len(coordinates)
    return separable.apply_separable(coordinates, [over_h, *(o.expand(batch, -1, -1) for o in spread[1:])])


def _displace(geometry: GeometryParams, sign: float) -> tuple[Tensor, Tensor]:
    """Coarse grid over the output, in output voxels, and the displacement there, both (B or 1, 3, h, w, d)."""
    size = geometry.spatial_size
    counts = [max(2, math.ceil(n / VELOCITY_STEP)) for n in size]
    steps = [(n - 1) / (c - 1) for n, c in zip(size, counts, strict=True)]
    columns = geometry.velocity.shape[2:]
    lattice = [
        separable.lattice_operator(geometry.velocity_spacing[:, i], size[i], columns[i], counts[i]) for i in range(3)
    ]
    velocity = sign * separable.apply_separable(geometry.velocity, lattice)
    coarse = spatial.identity_grid(counts, device=velocity.device)
    grid = torch.stack([coarse[:, i] * s for i, s in enumerate(steps)], 1)
    if not geometry.diffeomorphic:
        return grid, velocity
    flow = spatial.integrate_velocity(torch.stack([velocity[:, i] / s for i, s in enumerate(steps)], 1))
    return grid, torch.stack([flow[:, i] * s for i, s in enumerate(steps)], 1)
