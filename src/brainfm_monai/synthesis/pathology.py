"""Lesions of a draw: their maps, and what they do to an image."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from brainfm_monai.functional import lesion, separable, spatial
from brainfm_monai.synthesis.ranges import AppearanceParams, GeometryParams

__all__ = ["LESION_FLOW_SPACING_MM", "LESION_SPACING_MM", "make_lesion_maps", "paint_lesions"]

LESION_STEP = 2  # output voxels per point of the grid on which lesions are made
LESION_SPACING_MM = (
    64.0,
    32.0,
    16.0,
    8.0,
)  # control points of the noise, octave by octave, each with half the amplitude
LESION_FLOW_SPACING_MM = 24.0  # control points of the flow's potential


def make_lesion_maps(
    subject: Mapping[str, Tensor], geometry: GeometryParams, coordinates: Tensor, segmentation: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Lesions that a subject has, and lesions that it is given.

    Args:
        subject: ``lesion``, its own, and ``lesion_shape``, another subject's, if present; see ``render``.
        geometry: the draw.
        coordinates: of the output voxels in the source.
        segmentation: at the output's voxels, (B, 1, H, W, D).

    Returns:
        Two maps of 0 and 1, (B, 1, H, W, D), or None if neither can exist. Own lesions only move with the subject, because
        real images show them; given ones, out of noise or of another subject's shape, are carried by a flow of their own.
    """
    if not geometry.lesion_noise and "lesion" not in subject:
        return None
    own = given = torch.zeros_like(segmentation, dtype=torch.float32)
    if "lesion" in subject:
        own = (spatial.gather_nearest(subject["lesion"], coordinates) > 0).float()
    if geometry.lesion_noise:
        given = _give_lesions(subject, geometry, coordinates, segmentation)
    return own, given


def paint_lesions(image: Tensor, lesions: tuple[Tensor, Tensor] | None, appearance: AppearanceParams) -> Tensor:
    """Make lesions brighter or darker; real images already show the subject's own.

    Args:
        image: (B, 1, H, W, D), in [0, 255] or a little above.
        lesions: own and given ones, same shape, or None.
        appearance: the draw.

    Returns:
        Image of the same shape.
    """
    if lesions is None:
        return image
    goal, change, synthetic = (
        v.reshape(-1, 1, 1, 1, 1) for v in (appearance.lesion_goal, appearance.lesion_change, appearance.blend[:, 0])
    )
    amount = torch.maximum(lesions[0] * synthetic, lesions[1])
    return torch.lerp(image, goal.expand_as(image), amount * change)


def _give_lesions(
    subject: Mapping[str, Tensor], geometry: GeometryParams, coordinates: Tensor, segmentation: Tensor
) -> Tensor:
    size = geometry.spatial_size
    counts = [max(2, math.ceil(n / LESION_STEP)) for n in size]
    region = geometry.lesion_region[segmentation]
    octaves = zip(geometry.lesion_noise, LESION_SPACING_MM, strict=True)
    noise = [_spread(points, spacing, counts, geometry) * 0.5**i for i, (points, spacing) in enumerate(octaves)]
    shape = lesion.make_lesions(
        torch.stack(noise).sum(0), separable.resize(region.float(), counts) > 0.5, geometry.lesion_coverage
    )
    if "lesion_shape" in subject:
        drawn = (spatial.gather_nearest(subject["lesion_shape"], coordinates) > 0).float()
        drawn = separable.resize(
            spatial.average_neighbours(drawn), counts
        )  # shares of a voxel keep the edge where it was
        has_shape = drawn.amax((1, 2, 3, 4), keepdim=True) > 0
        has_lesion = geometry.lesion_coverage.reshape(-1, 1, 1, 1, 1) > 0
        shape = torch.where(has_shape, drawn * has_lesion, shape)
    velocity = lesion.compute_curl(_spread(geometry.lesion_potential, LESION_FLOW_SPACING_MM, counts, geometry))
    soft = lesion.carry(shape, velocity, geometry.lesion_flow / LESION_STEP)
    return ((separable.resize(soft, size) > 0.5) & region).float()


def _spread(points: Tensor, spacing_mm: float, counts: list[int], geometry: GeometryParams) -> Tensor:
    """Control points of a physical distance at the points of the coarse grid."""
    spacing = torch.full((len(points),), spacing_mm / geometry.voxel_mm, device=points.device)
    operators = [
        separable.lattice_operator(spacing, size, points.shape[2 + i], counts[i])
        for i, size in enumerate(geometry.spatial_size)
    ]
    return separable.apply_separable(points, operators)
