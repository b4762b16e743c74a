"""The deformation of a draw: where output voxels look in the source."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from brainfm_monai.functional import separable, spatial
from brainfm_monai.synthesis.ranges import GeometryParams

__all__ = ["make_coordinates"]

VELOCITY_STEP = 4  # output voxels per point of the grid on which the velocity is integrated


def make_coordinates(geometry: GeometryParams, source_size: Sequence[int]) -> Tensor:
    """Source voxel of every output voxel: x = A s (phi(i) - c_out) + c_source + t, i mirrored where the draw says so.

    Args:
        geometry: the draw.
        source_size: (H, W, D) of the subject.

    Returns:
        Coordinates, (B, 3, H, W, D), in source voxels. ``spatial.jacobian_determinant`` of them shows folds.
    """
    size = geometry.spatial_size
    grid, displacement = _displace(geometry)
    coordinates = spatial.sampling_coordinates(
        geometry.matrix, geometry.translation, grid + displacement, size, source_size, geometry.stride
    )
    # The coarse points span the volume from its first to its last voxel: what is linear between them stays exact.
    pairs = zip(size, coordinates.shape[2:], strict=True)
    spread = [separable.spread_operator(n, c, device=coordinates.device) for n, c in pairs]
    over_h = torch.where(geometry.mirror.reshape(-1, 1, 1), spread[0].flip(1), spread[0])
    batch = len(coordinates)
    return separable.apply_separable(coordinates, [over_h, *(o.expand(batch, -1, -1) for o in spread[1:])])


def _displace(geometry: GeometryParams) -> tuple[Tensor, Tensor]:
    """Coarse grid over the output, in output voxels, and the displacement there, both (B or 1, 3, h, w, d)."""
    size = geometry.spatial_size
    counts = [max(2, math.ceil(n / VELOCITY_STEP)) for n in size]
    steps = [(n - 1) / (c - 1) for n, c in zip(size, counts, strict=True)]
    columns = geometry.velocity.shape[2:]
    lattice = [
        separable.lattice_operator(geometry.velocity_spacing[:, i], size[i], columns[i], counts[i]) for i in range(3)
    ]
    velocity = separable.apply_separable(geometry.velocity, lattice)
    coarse = spatial.identity_grid(counts, device=velocity.device)
    grid = torch.stack([coarse[:, i] * s for i, s in enumerate(steps)], 1)
    if not geometry.diffeomorphic:
        return grid, velocity
    flow = spatial.integrate_velocity(torch.stack([velocity[:, i] / s for i, s in enumerate(steps)], 1))
    return grid, torch.stack([flow[:, i] * s for i, s in enumerate(steps)], 1)
