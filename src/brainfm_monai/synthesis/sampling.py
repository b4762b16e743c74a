"""Drawing: the one place where the generator is random."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from functools import cache
from importlib import resources

import torch
from torch import Tensor

from brainfm_monai.anatomy import Protocol
from brainfm_monai.functional import spatial
from brainfm_monai.synthesis.ranges import Range, SynthesisParams, SynthesisRanges

__all__ = ["sample"]

CONTROL_POINTS_SIZE = 160  # voxels at which the published fractions give their 5..10 and 3..6 control points
PROFILE_SIGMA = math.log(5) / math.pi  # std of the slice profile per thickness (BrainFM, after Brain-ID and SynthSR)
CSF_ID = 24  # FreeSurfer id; stands for the extracerebral fluid in SynthSeg's maps
FIRST_HEAD_ID = 500  # SynthSeg's head labels start above


class _Draws:
    """Draws for a batch, each sample from its own generator, so that a sample does not depend on its neighbours."""

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        self.generators = generators
        self.device = generators[0].device

    def normal(self, *shape: int) -> Tensor:
        return torch.stack([torch.randn(shape, generator=g, device=self.device) for g in self.generators])

    def uniform(self, limits: Range, *shape: int) -> Tensor:
        unit = torch.stack([torch.rand(shape, generator=g, device=self.device) for g in self.generators])
        return limits[0] + (limits[1] - limits[0]) * unit

    def chance(self, probability: float) -> Tensor:
        return self.uniform((0.0, 1.0)) < probability


def sample(
    ranges: SynthesisRanges,
    generators: Sequence[torch.Generator],
    *,
    source_size: Sequence[int],
    spatial_size: Sequence[int],
    protocol: Protocol,
    stride: int = 1,
    source_mm: float = 1.0,
) -> SynthesisParams:
    """Draw everything random of a batch.

    Args:
        ranges: the laws.
        generators: one generator for each sample, all on one device, where the result lies too.
        source_size: (H, W, D) of the subjects.
        spatial_size: (H, W, D) of the rendered samples.
        protocol: of the generation labels.
        stride: size of an output voxel in source voxels.
        source_mm: size of a source voxel.

    Returns:
        The draw, on the device of the generators.
    """
    draws, voxel_mm = _Draws(generators), stride * source_mm
    scaling = draws.uniform(ranges.scaling, 3)
    matrix = spatial.affine_matrix(draws.uniform(ranges.rotation_deg, 3), draws.uniform(ranges.shear, 3, 2), scaling)
    translation = draws.uniform(ranges.translation_mm, 3) / source_mm
    velocity_points = _control_points(draws, ranges.velocity_fraction)
    velocity_std = draws.uniform(ranges.velocity_std_mm) / voxel_mm
    columns = _columns(ranges.velocity_fraction)
    velocity = draws.normal(3, columns, columns, columns) * velocity_std.reshape(-1, 1, 1, 1, 1)
    mean, std = _sample_contrast(ranges, draws, protocol)
    bias_columns = _columns(ranges.bias_fraction)
    bias = draws.normal(1, bias_columns, bias_columns, bias_columns) * draws.uniform(ranges.bias_log_std).reshape(-1, 1, 1, 1, 1)
    spacing, sigma = _sample_resolution(ranges, draws, voxel_mm)
    return SynthesisParams(
        matrix=matrix,
        translation=translation,
        velocity=velocity,
        velocity_points=velocity_points,
        mirror=draws.chance(ranges.mirror_prob),
        mean=mean,
        std=std,
        paint_noise=draws.normal(1, *source_size),
        gamma=(ranges.gamma_log_std * draws.normal()).exp(),
        bias=bias,
        bias_points=_control_points(draws, ranges.bias_fraction),
        spacing=spacing,
        sigma=sigma,
        noise=draws.normal(1, *spatial_size),
        noise_std=draws.uniform(ranges.noise_std),
        kept=_sample_kept(ranges, draws, protocol),
        strip_threshold=draws.uniform(ranges.strip_threshold),
        field_of_view=_sample_field_of_view(ranges, draws, spatial_size),
        stride=stride,
    )


def _columns(fraction: Range) -> int:
    return max(2, math.ceil(fraction[1] * CONTROL_POINTS_SIZE))


def _control_points(draws: _Draws, fraction: Range) -> Tensor:
    return (draws.uniform(fraction, 1) * CONTROL_POINTS_SIZE).round().clamp(2, _columns(fraction)).expand(-1, 3)


def _contrast_priors(names: Sequence[str], protocol: Protocol, device: torch.device) -> tuple[Tensor, Tensor]:
    """Means and their stds, (N, L) each, out of the package's tables of contrasts."""
    tables = [_read_contrast(name) for name in names]
    mean, spread = ([[float(t[s.freesurfer_id][c]) for s in protocol.structures] for t in tables] for c in ("mean", "mean_std"))
    return torch.tensor(mean, device=device), torch.tensor(spread, device=device)


@cache
def _read_contrast(name: str) -> dict[int, dict[str, str]]:
    text = (resources.files("brainfm_monai") / "contrasts" / f"{name}.tsv").read_text(encoding="utf-8")
    return {int(row["freesurfer_id"]): row for row in csv.DictReader(text.splitlines(), delimiter="\t")}


def _sample_contrast(ranges: SynthesisRanges, draws: _Draws, protocol: Protocol) -> tuple[Tensor, Tensor]:
    """Means and stds per label; both sides of a structure share theirs."""
    count = len(protocol)
    mean, std = draws.uniform(ranges.mean, count), draws.uniform(ranges.std, count)
    jitter, use_prior = draws.normal(count), draws.chance(ranges.contrast_prior_prob)
    invert = draws.chance(ranges.contrast_inversion_prob)
    chosen = draws.uniform((0.0, float(len(ranges.contrast_priors)))).long()
    if ranges.contrast_prior_prob > 0:
        prior, spread = _contrast_priors(ranges.contrast_priors, protocol, draws.device)
        like = (prior[chosen] + ranges.contrast_prior_spread * spread[chosen] * jitter).clamp(0, ranges.mean[1])
        like = torch.where(invert[:, None], ranges.mean[1] - like, like)
        mean = torch.where(use_prior[:, None], like, mean)
    one_side = torch.tensor([min(s.label, s.mirror) for s in protocol.structures], device=draws.device)
    mean, std = mean[:, one_side], std[:, one_side]
    dark = draws.chance(ranges.dark_background_prob) | use_prior
    background = torch.arange(count, device=draws.device) == 0
    return torch.where(dark[:, None] & background, 0.0, mean), torch.where(dark[:, None] & background, std / 5, std)


def _sample_resolution(ranges: SynthesisRanges, draws: _Draws, voxel_mm: float) -> tuple[Tensor, Tensor]:
    """Spacing and profile width in output voxels, out of four families: isotropic, clinical, low-field, coarse."""
    family = draws.uniform((0.0, 1.0), 1)
    axis = torch.floor(draws.uniform((0.0, 3.0), 1))
    through_plane = torch.arange(3, device=draws.device) == axis
    voxel = torch.full_like(through_plane, voxel_mm, dtype=torch.float32)
    clinical = torch.where(through_plane, draws.uniform(ranges.clinical_spacing_mm, 1), voxel)
    slab = torch.minimum(clinical, draws.uniform(ranges.clinical_thickness_mm, 1))
    clinical_thickness = torch.where(through_plane, slab, voxel)
    low_field = torch.tensor(ranges.low_field_spacing_mm, device=draws.device) + draws.uniform(ranges.low_field_extra_mm, 3)
    coarse = draws.uniform(ranges.coarse_spacing_mm, 3)
    step = (1 - ranges.isotropic_prob) / 3
    isotropic, is_clinical, is_low_field = (family < ranges.isotropic_prob + n * step for n in range(3))
    through = torch.where(is_low_field, low_field, coarse)
    spacing_mm = torch.where(isotropic, voxel, torch.where(is_clinical, clinical, through))
    thickness_mm = torch.where(isotropic, voxel, torch.where(is_clinical, clinical_thickness, through))
    factor = draws.uniform(ranges.profile_factor, 3)
    sigma = torch.where(thickness_mm > voxel_mm, factor * PROFILE_SIGMA * thickness_mm / voxel_mm, 0.0)
    return (spacing_mm / voxel_mm).clamp_min(1), sigma


def _sample_kept(ranges: SynthesisRanges, draws: _Draws, protocol: Protocol) -> Tensor:
    """Which labels stay in the image: all, or the brain with or without the fluid around it."""
    ids = torch.as_tensor(protocol.freesurfer_ids, device=draws.device)
    brain = (ids > 0) & (ids < FIRST_HEAD_ID)
    strip, without_fluid = draws.chance(ranges.skull_strip_prob), draws.chance(0.5)
    removed = ~brain | (without_fluid[:, None] & (ids == CSF_ID))
    return (~(strip[:, None] & removed)).float()


def _sample_field_of_view(ranges: SynthesisRanges, draws: _Draws, spatial_size: Sequence[int]) -> Tensor:
    size = torch.tensor(spatial_size, device=draws.device, dtype=torch.float32)
    cut = draws.uniform(ranges.field_of_view_loss, 3, 2) * draws.chance(ranges.field_of_view_prob)[:, None, None]
    return torch.stack([cut[..., 0] * size, (1 - cut[..., 1]) * size - 1], dim=-1)
