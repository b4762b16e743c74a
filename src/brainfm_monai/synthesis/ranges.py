"""The laws of the generator's random quantities, and what one draw of them consists of."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from brainfm_monai.io import refuse_if

Range = tuple[float, float]
CONTRASTS = ("T1w", "T2w", "FLAIR", "CT")  # real images, and tables of the mean intensity of every tissue


@dataclass(frozen=True)
class SynthesisRanges:
    """Laws of the random quantities; pairs are (low, high) of a uniform law unless said otherwise.

    The numbers are those of the published BrainFM configuration, except where ``docs/sampling.md``, which has a row for
    every field, says why not. ValueError if a pair does not ascend, a probability is outside [0, 1], or weights are
    negative or all 0.
    """

    rotation_deg: Range = (-15.0, 15.0)
    shear: Range = (-0.2, 0.2)
    scaling: Range = (0.8, 1.2)
    translation_mm: Range = (-20.0, 20.0)
    velocity_spacing_mm: Range = (18.0, 40.0)
    velocity_std_mm: Range = (0.0, 4.0)
    mirror_prob: float = 0.5
    mean: Range = (25.0, 225.0)
    std: Range = (5.0, 25.0)
    dark_background_prob: float = 0.5
    contrast_prior_prob: float = 0.0
    contrast_priors: tuple[str, ...] = CONTRASTS
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
            name, value = field.name, getattr(self, field.name)
            if isinstance(value, list):  # of a config or a command line
                value = tuple(value)
                object.__setattr__(self, name, value)
            if name.endswith("_prob"):
                rule, valid = "in [0, 1]", 0 <= value <= 1
            elif field.type == Range:
                rule, valid = "two ascending numbers", len(value) == 2 and value[0] <= value[1]
            elif name.endswith("_weights"):
                count = len(getattr(SynthesisRanges, name))
                rule = f"{count} numbers of at least 0, not all 0"
                valid = len(value) == count and min(value) >= 0 and sum(value) > 0
            else:
                continue
            refuse_if(not valid, f"SynthesisRanges: '{name}' must be {rule}", value)

    def make_mild(self) -> "SynthesisRanges":
        """Laws of the mild samples of a subject, out of these of the severe ones: hardly any bias, gamma and noise.

        Source: configuration of the mild samples of BrainFM (arXiv 2509.00549) and Brain-ID (ECCV 2024), with a
        log-bias std up to 0.02, gamma 0.01, noise up to 0.02 of the intensity range, at the full resolution.
        """
        still: dict[str, Any] = {"gamma_log_std": 0.01, "ghost_prob": 0.0, "mixup_prob": 0.0}
        still |= {"noise_std": (0.0, 5.0), "real_noise_std": (0.0, 5.0), "resolution_weights": (1.0, 0.0, 0.0, 0.0)}
        return replace(self, bias_log_std=(0.0, 0.02), **still)


def parse_ranges(values: Mapping[str, Any]) -> SynthesisRanges:
    """Laws out of names and values, as a command line gives them; ValueError if a name or a value does not fit."""
    unknown = sorted(set(values) - {field.name for field in fields(SynthesisRanges)})
    refuse_if(unknown, "SynthesisRanges: docs/sampling.md lists the fields", f"no {', '.join(unknown)}")
    return SynthesisRanges(**values)


class GeometryParams(NamedTuple):
    """What the samples of one of B subjects share: its shape and what of it is there. K: labels of the segmentation."""

    photo_mm: Tensor  # distance of the slices of a dissection photo, (B,); 0 for none
    velocity: Tensor  # control points, (B, 3, P, Q, R), output voxels
    velocity_spacing: Tensor  # distance of the control points, (B, 3), output voxels
    mirror: Tensor  # (B,), bool
    mirror_labels: Tensor  # label of the segmentation on the other side, (K,), int64
    is_brain: Tensor  # labels of the segmentation that are brain, (K,), bool
    kept: Tensor  # 1 for labels of the segmentation that stay, 0 for removed ones, (B, K)
    stripped: Tensor  # (B,), bool, the removed is exactly 0 in the image; otherwise it is painted as background
    hemispheres: Tensor  # whether the left and the right cerebrum stay, (B, 2), bool
    matrix: Tensor  # linear map from output to source, (B, 3, 3)
    translation: Tensor  # (B, 3), source voxels
    strip_threshold: Tensor  # (B,), share of kept voxels around a voxel above which it stays
    field_of_view: Tensor  # first and last visible output voxel on each axis, (B, 3, 2)
    face: Tensor  # (a, b, d) of the half-space a y + b z > d, MNI mm, in which a face is removed, (B, 3); or all 0
    lesion_noise: tuple[Tensor, ...]  # control points of the shape, coarse to fine, (B, 1, P, P, P); or empty
    lesion_potential: Tensor  # standard normal control points of the flow's vector potential, (B, 3, P, P, P)
    lesion_flow: Tensor  # root mean square of the flow, (B,), output voxels
    lesion_region: Tensor  # labels of the segmentation in which lesions may lie, (K,), bool
    lesion_coverage: Tensor  # share of the region, (B,); 0 for none
    spatial_size: tuple[int, ...]  # (H, W, D) of the output
    stride: int  # output voxel in source voxels
    voxel_mm: float  # size of an output voxel


class AppearanceParams(NamedTuple):
    """What one sample of each subject looks like. L: generation labels; spacings are in output voxels."""

    mean: Tensor  # (B, L)
    std: Tensor  # (B, L)
    cluster_field: Tensor  # control points of the head's clusters, (B, 1, P, P, P)
    cluster_spacing: Tensor  # distance of those, (B, 3)
    cluster_offset: Tensor  # intensity offset of each cluster, (B, clusters); no columns where heads are never divided
    is_head: Tensor  # 1 for generation labels of the head, 0 for others, (L,)
    blend: Tensor  # share of the synthetic image, T1w, T2w, FLAIR and CT in the image, (B, 5); rows sum to 1
    ct_window: Tensor  # low and high end, (B, 2), HU
    lesion_goal: Tensor  # intensity towards which lesions change, (B,)
    lesion_change: Tensor  # share of the way to it, (B,)
    gamma: Tensor  # (B,)
    bias: Tensor  # control points of the log field, (B, 1, P, P, P)
    bias_spacing: Tensor  # distance of those, (B, 3)
    spacing: Tensor  # of the acquisition, (B, 3), at least 1
    sigma: Tensor  # of the acquisition profile, (B, 3), output voxels
    ghost_count: Tensor  # copies along each axis, (B, 3); 1 for none
    ghost_strength: Tensor  # (B, 3)
    rician: Tensor  # (B,), bool
    noise_std: Tensor  # (B,)
    paint_noise: Tensor  # standard normal, (B, 1, *spatial_size)
    noise: Tensor  # standard normal, (B, 2, *spatial_size); one channel where Rician noise cannot be drawn


class SynthesisParams(NamedTuple):
    """One draw for B subjects: a geometry, and one appearance for each of their S samples."""

    geometry: GeometryParams
    appearances: tuple[AppearanceParams, ...]

    def to(self, device: torch.device) -> "SynthesisParams":
        """The same draw on another device, without waiting for it."""
        return tree_map_only(Tensor, lambda tensor: tensor.to(device, non_blocking=True), self)

    def describe(self) -> str:
        """What was drawn for the first sample of the first subject, in a few lines."""
        geometry, look = self.geometry, self.appearances[0]
        shares = zip(("synthetic", *CONTRASTS), look.blend[0], strict=True)
        left, _, right = torch.linalg.svd(geometry.matrix[0])  # the nearest rotation, by the polar decomposition
        turn = math.degrees(math.acos(max(-1.0, min(1.0, float(((left @ right).trace() - 1) / 2)))))
        events = {"mirrored": geometry.mirror[0], "stripped": geometry.stripped[0], "defaced": geometry.face[0].any()}
        events |= {"ghosts": look.ghost_strength[0].any(), "lesions": geometry.lesion_coverage[0] > 0}
        facts = [
            " + ".join(f"{float(share):.2f} {name}" if share < 1 else name for name, share in shares if share > 0),
            " x ".join(f"{float(v) * geometry.voxel_mm:.1f}" for v in look.spacing[0]) + " mm",
            f"turned {turn:.0f} deg, scaled {float(torch.linalg.det(geometry.matrix[0])) ** (1 / 3):.2f}",
            f"velocity {float(geometry.velocity[0].std()) * geometry.voxel_mm:.1f} mm",
            f"bias {float(look.bias[0].std()):.2f}, gamma {float(look.gamma[0]):.2f}",
            f"noise {float(look.noise_std[0]):.1f}{' Rician' if look.rician[0] else ''}",
            ", ".join(name for name, happened in events.items() if happened),
        ]
        return "\n".join(facts)
