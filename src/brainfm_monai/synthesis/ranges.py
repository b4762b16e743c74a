"""The laws of the generator's random quantities, and what one draw of them consists of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "AppearanceParams",
    "GeometryParams",
    "Range",
    "SynthesisParams",
    "SynthesisRanges",
    "make_mild",
    "parse_ranges",
]

Range = tuple[float, float]


@dataclass(frozen=True)
class SynthesisRanges:
    """Laws of the random quantities; pairs are (low, high) of a uniform law unless said otherwise.

    The numbers are those of the published BrainFM configuration, except where ``docs/sampling.md``, which has a row for every
    field, says why not.

    Raises:
        ValueError: if a pair is not two ascending numbers, a probability is outside [0, 1], or weights are negative or all 0.
    """

    rotation_deg: Range = (-15.0, 15.0)
    shear: Range = (-0.2, 0.2)
    scaling: Range = (0.8, 1.2)
    translation_mm: Range = (-20.0, 20.0)
    velocity_spacing_mm: Range = (18.0, 40.0)
    velocity_std_mm: Range = (0.0, 4.0)
    diffeomorphic: bool = True
    mirror_prob: float = 0.5
    mean: Range = (25.0, 225.0)
    std: Range = (5.0, 25.0)
    dark_background_prob: float = 0.5
    contrast_prior_prob: float = 0.0
    contrast_priors: tuple[str, ...] = ("T1w", "T2w", "FLAIR", "CT")
    contrast_prior_spread: float = 2.0
    contrast_inversion_prob: float = 0.3
    head_cluster_prob: float = 0.3
    head_cluster_spacing_mm: Range = (20.0, 60.0)
    head_cluster_std: Range = (5.0, 40.0)
    input_weights: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0, 1.0)
    mixup_prob: float = 0.2
    ct_low_hu: Range = (0.0, 0.0)
    ct_high_hu: Range = (80.0, 80.0)
    gamma_log_std: float = 0.1
    bias_spacing_mm: Range = (32.0, 80.0)
    bias_log_std: Range = (0.1, 0.6)
    resolution_weights: tuple[float, ...] = (0.25, 0.25, 0.25, 0.25)
    clinical_spacing_mm: Range = (2.5, 8.5)
    clinical_thickness_mm: Range = (4.0, 6.0)
    low_field_spacing_mm: tuple[float, float, float] = (1.3, 1.3, 4.8)
    low_field_extra_mm: Range = (0.0, 0.4)
    coarse_spacing_mm: Range = (2.0, 5.0)
    dissection_photo_prob: float = 0.0
    dissection_photo_spacing_mm: Range = (2.5, 12.5)
    profile_factor: Range = (0.85, 1.15)
    ghost_prob: float = 0.0
    ghost_count: Range = (2.0, 5.0)
    ghost_strength: Range = (0.1, 0.5)
    noise_std: Range = (5.0, 15.0)
    real_noise_std: Range = (0.0, 5.0)
    rician_prob: float = 0.5
    skull_strip_prob: float = 0.3
    strip_threshold: Range = (0.3, 0.7)
    head_removal_prob: float = 0.05
    hemisphere_prob: float = 0.0
    left_hemisphere: bool = False
    deface_prob: float = 0.1
    deface_angle_deg: Range = (35.0, 55.0)
    deface_offset_mm: Range = (55.0, 75.0)
    field_of_view_prob: float = 0.2
    field_of_view_loss: Range = (0.0, 0.2)
    lesion_prob: float = 0.0
    lesion_coverage: Range = (0.001, 0.15)
    lesion_flow_mm: Range = (0.0, 10.0)
    lesion_change: Range = (0.3, 0.9)

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("_prob") and not 0 <= value <= 1:
                raise ValueError(f"SynthesisRanges: '{field.name}' must be in [0, 1], got {value}")
            if field.type == "Range":
                object.__setattr__(self, field.name, _ascending(field.name, value))
            if field.name.endswith("_weights"):
                object.__setattr__(self, field.name, _weights(field.name, value, len(field.default)))  # type: ignore[arg-type]


def parse_ranges(values: Mapping[str, Any]) -> SynthesisRanges:
    """Laws out of names and values, as a command line gives them.

    Raises:
        ValueError: if a name is not one of a field, or a value does not fit.
    """
    unknown = sorted(set(values) - {field.name for field in fields(SynthesisRanges)})
    if unknown:
        raise ValueError(f"SynthesisRanges: docs/sampling.md lists the fields, found no {', '.join(unknown)}")
    laws: dict[str, Any] = {name: tuple(v) if isinstance(v, list | tuple) else v for name, v in values.items()}
    return SynthesisRanges(**laws)


def make_mild(ranges: SynthesisRanges, **changes: Any) -> SynthesisRanges:
    """Laws of the mild samples of a subject: hardly any bias, gamma and noise, at the full resolution.

    Args:
        ranges: the laws of the severe samples.
        changes: further fields that differ.

    Returns:
        A new instance; ``ranges`` stays as it is.

    Reference:
        BrainFM (arXiv 2509.00549) and Brain-ID (ECCV 2024), configuration of the mild samples: log-bias std up to 0.02, gamma
        0.01,
        noise up to 0.02 of the intensity range.
    """
    mild: dict[str, Any] = {
        "bias_log_std": (0.0, 0.02),
        "gamma_log_std": 0.01,
        "noise_std": (0.0, 5.0),
        "real_noise_std": (0.0, 5.0),
    }
    mild |= {"resolution_weights": (1.0, 0.0, 0.0, 0.0), "ghost_prob": 0.0, "mixup_prob": 0.0}
    return replace(ranges, **{**mild, **changes})


def _ascending(name: str, value: Sequence[float]) -> Range:
    if len(value) != 2 or not value[0] <= value[1]:
        raise ValueError(f"SynthesisRanges: '{name}' must be two ascending numbers, got {tuple(value)}")
    return float(value[0]), float(value[1])


def _weights(name: str, value: Sequence[float], count: int) -> tuple[float, ...]:
    if len(value) != count or min(value) < 0 or sum(value) <= 0:
        raise ValueError(
            f"SynthesisRanges: '{name}' must be {count} numbers of at least 0, not all 0, got {tuple(value)}"
        )
    return tuple(float(v) for v in value)


def _move(value: Any, device: torch.device) -> Any:
    """A value with all tensors in it on another device, without waiting for the copies."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, tuple):
        return tuple(_move(item, device) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: _move(getattr(value, field.name), device) for field in fields(value)})
    return value


@dataclass(frozen=True)
class GeometryParams:
    """What the samples of one subject share: its shape and what of it is there. B subjects, K labels of the segmentation.

    Attributes:
        matrix: linear map from output to source, (B, 3, 3).
        translation: (B, 3), source voxels.
        velocity: control points, (B, 3, P, Q, R), output voxels.
        velocity_spacing: distance of the control points, (B, 3), output voxels.
        mirror: (B,), bool.
        mirror_labels: label of the segmentation on the other side, (K,), int64.
        is_brain: labels of the segmentation that are brain, (K,), bool.
        hemispheres: whether the left and the right cerebrum stay, (B, 2), bool.
        kept: 1 for labels of the segmentation that stay, 0 for removed ones, (B, K).
        strip_threshold: (B,), share of kept voxels around a voxel above which it stays.
        stripped: (B,), bool, the removed is exactly 0 in the image; otherwise it is painted as background.
        field_of_view: first and last visible output voxel on each axis, (B, 3, 2).
        face: (a, b, d) of the half-space a y + b z > d, in MNI mm, in which a face is removed, (B, 3); all 0 for none.
        lesion_noise: control points of the lesion's shape, coarse to fine, each (B, 1, P, P, P); none without lesions.
        lesion_potential: standard normal control points of its flow's vector potential, (B, 3, P, P, P).
        lesion_flow: root mean square of the flow, (B,), output voxels.
        lesion_region: labels of the segmentation in which lesions may lie, (K,), bool.
        lesion_coverage: share of the region, (B,); 0 for none.
        diffeomorphic: the velocity is integrated; otherwise it is the displacement.
        spatial_size: (H, W, D) of the output.
        stride: output voxel in source voxels.
        voxel_mm: size of an output voxel.
    """

    matrix: Tensor
    translation: Tensor
    velocity: Tensor
    velocity_spacing: Tensor
    mirror: Tensor
    mirror_labels: Tensor
    is_brain: Tensor
    hemispheres: Tensor
    kept: Tensor
    strip_threshold: Tensor
    stripped: Tensor
    field_of_view: Tensor
    face: Tensor
    lesion_noise: tuple[Tensor, ...]
    lesion_potential: Tensor
    lesion_flow: Tensor
    lesion_region: Tensor
    lesion_coverage: Tensor
    diffeomorphic: bool
    spatial_size: tuple[int, int, int]
    stride: int
    voxel_mm: float


@dataclass(frozen=True)
class AppearanceParams:
    """What one sample of each subject looks like. L is the number of generation labels.

    Attributes:
        mean: (B, L).
        std: (B, L).
        paint_noise: standard normal, (B, 1, *spatial_size).
        cluster_field: control points of the head's clusters, (B, 1, P, P, P).
        cluster_spacing: distance of those, (B, 3), output voxels.
        cluster_offset: intensity offset of each cluster, (B, clusters); without columns where heads are never divided.
        is_head: 1 for generation labels of the head, 0 for others, (L,).
        blend: share of the synthetic image, T1w, T2w, FLAIR and CT in the image, (B, 5); rows sum to 1.
        ct_window: low and high end, (B, 2), HU.
        lesion_goal: intensity towards which lesions change, (B,).
        lesion_change: share of the way to it, (B,).
        gamma: (B,).
        bias: control points of the log field, (B, 1, P, P, P).
        bias_spacing: distance of those, (B, 3), output voxels.
        spacing: of the acquisition, (B, 3), output voxels, at least 1.
        sigma: of the acquisition profile, (B, 3), output voxels.
        ghost_count: copies along each axis, (B, 3); 1 for none.
        ghost_strength: (B,).
        noise: standard normal, (B, 2, *spatial_size); one channel where Rician noise cannot be drawn.
        noise_std: (B,).
        rician: (B,), bool.
    """

    mean: Tensor
    std: Tensor
    paint_noise: Tensor
    cluster_field: Tensor
    cluster_spacing: Tensor
    cluster_offset: Tensor
    is_head: Tensor
    blend: Tensor
    ct_window: Tensor
    lesion_goal: Tensor
    lesion_change: Tensor
    gamma: Tensor
    bias: Tensor
    bias_spacing: Tensor
    spacing: Tensor
    sigma: Tensor
    ghost_count: Tensor
    ghost_strength: Tensor
    noise: Tensor
    noise_std: Tensor
    rician: Tensor


@dataclass(frozen=True)
class SynthesisParams:
    """One draw for B subjects: a geometry, and one appearance for each of their S samples."""

    geometry: GeometryParams
    appearances: tuple[AppearanceParams, ...]

    def to(self, device: torch.device) -> SynthesisParams:
        """The same draw on another device, without waiting for it."""
        moved: SynthesisParams = _move(self, device)
        return moved
