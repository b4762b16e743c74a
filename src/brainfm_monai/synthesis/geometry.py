"""The shapes of a draw: where output voxels look in the source, and which of them are lesions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from brainfm_monai.functional import separable, spatial
from brainfm_monai.synthesis.ranges import GeometryParams

VELOCITY_STEP, LESION_STEP = 4, 2  # output voxels per point of the grids on which velocity and lesions are made
LESION_SPACING_MM = (64.0, 32.0, 16.0, 8.0)  # control points of the noise, by octaves, each with half the amplitude
LESION_FLOW_SPACING_MM = 24.0  # control points of the flow's potential


def make_coordinates(geometry: GeometryParams, source_size: Sequence[int]) -> Tensor:
    """Source voxel of every output voxel: x = A s (phi(i) - c_out) + c_source + t, i mirrored where the draw says so.

    The coordinates are (B, 3, H, W, D), in voxels of a source of a size (H, W, D); ``spatial.jacobian_determinant`` of
    them shows folds.
    """
    size, device = geometry.spatial_size, geometry.velocity.device
    counts = coarsen(size, 1 / VELOCITY_STEP)
    steps = [(n - 1) / (c - 1) for n, c in zip(size, counts, strict=True)]
    displacement = separable.interpolate_lattice(geometry.velocity, geometry.velocity_spacing, size, counts)
    if geometry.diffeomorphic:
        flow = spatial.integrate_velocity(torch.stack([displacement[:, i] / s for i, s in enumerate(steps)], 1))
        displacement = torch.stack([flow[:, i] * s for i, s in enumerate(steps)], 1)
    coarse = spatial.identity_grid(counts, device=device)
    points = torch.stack([coarse[:, i] * s for i, s in enumerate(steps)], 1) + displacement
    matrix, translation, stride = geometry.matrix, geometry.translation, geometry.stride
    coordinates = spatial.sampling_coordinates(matrix, translation, points, size, source_size, stride)
    # The coarse points span the volume from its first to its last voxel: what is linear between them stays exact.
    spread = [separable.spread_operator(n, c, device=device) for n, c in zip(size, counts, strict=True)]
    over_h = torch.where(geometry.mirror.reshape(-1, 1, 1), spread[0].flip(1), spread[0])
    return separable.apply_separable(coordinates, [over_h, *(o.expand(len(over_h), -1, -1) for o in spread[1:])])


def coarsen(size: Sequence[int], share: float) -> list[int]:
    """Points along each axis of a grid with a share of the points of another, at least 2."""
    return [max(2, math.ceil(n * share)) for n in size]


def make_lesion_maps(
    subject: Mapping[str, Tensor], geometry: GeometryParams, coordinates: Tensor, segmentation: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Lesions that a subject has, and lesions that it is given: two maps of 0 and 1, (B, 1, H, W, D), or None.

    Own lesions only move with the subject, because real images show them; given ones, out of noise or of another
    subject's shape, are carried by a flow of their own. There is None if neither can exist.

    Args:
        subject: ``lesion``, its own, and ``lesion_shape``, another subject's, if present; see ``render``.
        geometry: the draw.
        coordinates: of the output voxels in the source.
        segmentation: at the output's voxels, (B, 1, H, W, D).
    """
    if not geometry.lesion_noise and "lesion" not in subject:
        return None
    size, counts = geometry.spatial_size, coarsen(geometry.spatial_size, 1 / LESION_STEP)
    own = torch.zeros_like(segmentation, dtype=torch.float32)
    if "lesion" in subject:
        own = (spatial.gather_nearest(subject["lesion"], coordinates) > 0).float()
    if not geometry.lesion_noise:
        return own, torch.zeros_like(own)

    def spread(points: Tensor, spacing_mm: float) -> Tensor:
        spacing = torch.full((len(points), 3), spacing_mm / geometry.voxel_mm, device=points.device)
        return separable.interpolate_lattice(points, spacing, size, counts)

    region = geometry.lesion_region[segmentation]
    octaves = zip(geometry.lesion_noise, LESION_SPACING_MM, strict=True)
    noise = torch.stack([spread(points, spacing) * 0.5**i for i, (points, spacing) in enumerate(octaves)]).sum(0)
    shape = spatial.make_lesions(noise, separable.resize(region.float(), counts) > 0.5, geometry.lesion_coverage)
    if "lesion_shape" in subject:
        drawn = (spatial.gather_nearest(subject["lesion_shape"], coordinates) > 0).float()
        drawn = separable.resize(spatial.average_neighbours(drawn), counts)  # shares keep the edge where it was
        has_shape = drawn.amax((1, 2, 3, 4), keepdim=True) > 0
        has_lesion = geometry.lesion_coverage.reshape(-1, 1, 1, 1, 1) > 0
        shape = torch.where(has_shape, drawn * has_lesion, shape)
    velocity = spatial.compute_curl(spread(geometry.lesion_potential, LESION_FLOW_SPACING_MM))
    soft = spatial.carry(shape, velocity, geometry.lesion_flow / LESION_STEP)
    return own, ((separable.resize(soft, size) > 0.5) & region).float()
