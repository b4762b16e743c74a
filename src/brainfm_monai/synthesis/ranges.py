"""The laws of the generator's random quantities, and one draw of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from torch import Tensor

__all__ = ["Range", "SynthesisParams", "SynthesisRanges"]

Range = tuple[float, float]


@dataclass(frozen=True)
class SynthesisRanges:
    """Laws of the random quantities; pairs are (low, high) of a uniform law unless said otherwise.

    The numbers are those of the published BrainFM configuration, except where ``docs/sampling.md`` says why not.

    Raises:
        ValueError: if a pair is not two ascending numbers or a probability is outside [0, 1].
    """

    rotation_deg: Range = (-15.0, 15.0)
    shear: Range = (-0.2, 0.2)
    scaling: Range = (0.8, 1.2)
    translation_mm: Range = (-20.0, 20.0)
    velocity_fraction: Range = (0.03, 0.06)
    velocity_std_mm: Range = (0.0, 4.0)
    mirror_prob: float = 0.5
    mean: Range = (25.0, 225.0)
    std: Range = (5.0, 25.0)
    dark_background_prob: float = 0.5
    contrast_prior_prob: float = 0.0
    contrast_priors: tuple[str, ...] = ("T1w", "T2w", "FLAIR")
    contrast_prior_spread: float = 2.0
    contrast_inversion_prob: float = 0.3
    gamma_log_std: float = 0.1
    bias_fraction: Range = (0.02, 0.04)
    bias_log_std: Range = (0.1, 0.6)
    isotropic_prob: float = 0.25
    clinical_spacing_mm: Range = (2.5, 8.5)
    clinical_thickness_mm: Range = (4.0, 6.0)
    low_field_spacing_mm: tuple[float, float, float] = (1.3, 1.3, 4.8)
    low_field_extra_mm: Range = (0.0, 0.4)
    coarse_spacing_mm: Range = (2.0, 5.0)
    profile_factor: Range = (0.85, 1.15)
    noise_std: Range = (5.0, 15.0)
    skull_strip_prob: float = 0.3
    strip_threshold: Range = (0.3, 0.7)
    field_of_view_prob: float = 0.2
    field_of_view_loss: Range = (0.0, 0.2)

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("_prob") and not 0 <= value <= 1:
                raise ValueError(f"SynthesisRanges: '{field.name}' must be in [0, 1], got {value}")
            if field.type == "Range":
                object.__setattr__(self, field.name, _ascending(field.name, value))


def _ascending(name: str, value: Sequence[float]) -> Range:
    if len(value) != 2 or not value[0] <= value[1]:
        raise ValueError(f"SynthesisRanges: '{name}' must be two ascending numbers, got {tuple(value)}")
    return float(value[0]), float(value[1])


@dataclass(frozen=True)
class SynthesisParams:
    """One draw for a batch of B samples; every tensor has the batch in front. L is the number of generation labels.

    Attributes:
        matrix: linear map from output to source, (B, 3, 3).
        translation: (B, 3), source voxels.
        velocity: control points, (B, 3, P, P, P), output voxels.
        velocity_points: control points in use on each axis, (B, 3).
        mirror: (B,), bool.
        mean: (B, L).
        std: (B, L).
        paint_noise: standard normal, (B, 1, *source_size).
        gamma: (B,).
        bias: control points of the log field, (B, 1, Q, Q, Q).
        bias_points: control points in use on each axis, (B, 3).
        spacing: of the acquisition, (B, 3), output voxels, at least 1.
        sigma: of the acquisition profile, (B, 3), output voxels.
        noise: standard normal, (B, 1, *spatial_size).
        noise_std: (B,).
        kept: 1 for labels that stay in the image, 0 for removed ones, (B, L).
        strip_threshold: (B,), share of kept voxels around a voxel above which it stays.
        field_of_view: first and last visible output voxel on each axis, (B, 3, 2).
        stride: output voxel in source voxels.
    """

    matrix: Tensor
    translation: Tensor
    velocity: Tensor
    velocity_points: Tensor
    mirror: Tensor
    mean: Tensor
    std: Tensor
    paint_noise: Tensor
    gamma: Tensor
    bias: Tensor
    bias_points: Tensor
    spacing: Tensor
    sigma: Tensor
    noise: Tensor
    noise_std: Tensor
    kept: Tensor
    strip_threshold: Tensor
    field_of_view: Tensor
    stride: int
