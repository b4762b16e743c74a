"""Drawing: the one place where the generator is random."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from brainfm_monai.anatomy import Protocol
from brainfm_monai.functional import separable, spatial
from brainfm_monai.synthesis.acquisition import IMAGES, INTENSITY_TOP, QUARTILES
from brainfm_monai.synthesis.contrasts import read_contrasts
from brainfm_monai.synthesis.geometry import LESION_FLOW_SPACING_MM, LESION_SPACING_MM
from brainfm_monai.synthesis.ranges import AppearanceParams, GeometryParams, Range, SynthesisParams, SynthesisRanges

__all__ = ["sample"]

PROFILE_SIGMA = math.log(5) / math.pi  # std of the slice profile per thickness (BrainFM, after Brain-ID and SynthSR)
PHOTO_AXIS = 1  # dissected slices are coronal (BrainFM)
DARK_STD_SHARE = 0.2  # of its drawn std, which dark air keeps
CSF_ID, WHITE_ID, GREY_ID, CEREBELLUM_IDS = 24, 2, 3, (7, 8, 46, 47)
Tensors = tuple[Tensor, ...]
LARGEST_SEED = 2**62


class _Draws:
    """Draws for a batch, each sample from its own generator, so that a sample does not depend on its neighbours.

    Numbers are drawn on the host, where they are the same for every device; volumes on the device, from seeds out of them.
    """

    def __init__(self, generators: Sequence[torch.Generator], device: torch.device) -> None:
        self.generators, self.device, self.batch = generators, device, len(generators)

    def normal(self, *shape: int) -> Tensor:
        return torch.stack([torch.randn(shape, generator=g) for g in self.generators])

    def uniform(self, limits: Range, *shape: int) -> Tensor:
        unit = torch.stack([torch.rand(shape, generator=g) for g in self.generators])
        return limits[0] + (limits[1] - limits[0]) * unit

    def chance(self, probability: float) -> Tensor:
        return self.uniform((0.0, 1.0)) < probability

    def choose(self, weights: Tensor) -> Tensor:
        """An index per sample, (B,), by weights of shape (K,) or (B, K)."""
        cumulative = weights.expand(self.batch, -1).cumsum(1)
        level = self.uniform((0.0, 1.0), 1) * cumulative[:, -1:]
        return (level >= cumulative[:, :-1]).sum(1)

    def volume(self, *shape: int) -> Tensor:
        seeds = [int(torch.randint(LARGEST_SEED, (1,), generator=g)) for g in self.generators]
        own = [torch.Generator(self.device).manual_seed(seed) for seed in seeds]
        return torch.stack([torch.randn(shape, generator=g, device=self.device) for g in own])


def sample(
    ranges: SynthesisRanges | Sequence[SynthesisRanges],
    generators: Sequence[torch.Generator],
    *,
    spatial_size: Sequence[int],
    protocol: Protocol,
    generation_protocol: Protocol,
    stride: int = 1,
    source_mm: float = 1.0,
    available: Mapping[str, Tensor] | None = None,
    device: str | torch.device = "cpu",
) -> SynthesisParams:
    """Draw everything random of a batch.

    Args:
        ranges: the laws; several for several samples of each subject. The first ones decide what the samples share.
        generators: one generator for each subject, on the host.
        spatial_size: (H, W, D) of the rendered samples.
        protocol: of the segmentation.
        generation_protocol: of the generation labels.
        stride: size of an output voxel in source voxels.
        source_mm: size of a source voxel.
        available: which subjects have ``T1w``, ``T2w``, ``FLAIR``, ``CT``, (B,) bool on the host; none if not given.
        device: of the draw.

    Returns:
        The draw.
    """
    laws = [ranges] if isinstance(ranges, SynthesisRanges) else list(ranges)
    draws, voxel_mm = _Draws(generators, torch.device(device)), stride * source_mm
    geometry, photo_spacing = _sample_geometry(laws[0], draws, spatial_size, protocol, stride, source_mm)
    images = [(available or {}).get(name, torch.zeros(draws.batch, dtype=torch.bool)) for name in IMAGES]
    present = torch.stack([torch.ones(draws.batch, dtype=torch.bool), *images], 1)
    appearances = tuple(
        _sample_appearance(law, draws, geometry, generation_protocol, present, photo_spacing, voxel_mm) for law in laws
    )
    return SynthesisParams(geometry, appearances).to(torch.device(device))


def _ids(protocol: Protocol) -> Tensor:
    return torch.as_tensor(protocol.freesurfer_ids)


def _one_of(protocol: Protocol, ids: Sequence[int]) -> Tensor:
    return torch.isin(_ids(protocol), torch.tensor(ids))


def _columns(size: Sequence[int], smallest_spacing: float) -> list[int]:
    return [separable.count_control_points(n - 1, smallest_spacing) for n in size]


def _sample_geometry(
    ranges: SynthesisRanges, draws: _Draws, size: Sequence[int], protocol: Protocol, stride: int, source_mm: float
) -> tuple[GeometryParams, Tensor]:
    """Geometry, and the spacing of dissection photos in mm, (B,), 0 where there are none."""
    voxel_mm = stride * source_mm
    photo = draws.chance(ranges.dissection_photo_prob)
    photo_spacing = draws.uniform(ranges.dissection_photo_spacing_mm)
    spacing = draws.uniform(ranges.velocity_spacing_mm, 1).expand(-1, 3).clone()
    std = draws.uniform(ranges.velocity_std_mm, 1).expand(-1, 3).clone()
    columns = _columns(size, ranges.velocity_spacing_mm[0] / voxel_mm)
    if ranges.dissection_photo_prob > 0:
        columns[PHOTO_AXIS] = separable.count_control_points(
            size[PHOTO_AXIS] - 1, ranges.dissection_photo_spacing_mm[0] / voxel_mm
        )
        # Every slab lies in its own photo: it is displaced in its plane alone, whatever its neighbours do.
        spacing[:, PHOTO_AXIS] = torch.where(photo, photo_spacing, spacing[:, PHOTO_AXIS])
        std[:, PHOTO_AXIS] = torch.where(photo, 0.0, std[:, PHOTO_AXIS])
    velocity = draws.normal(3, *columns) * (std / voxel_mm).reshape(-1, 3, 1, 1, 1)
    mirror = draws.chance(ranges.mirror_prob)
    kept, stripped, hemispheres = _sample_kept(ranges, draws, protocol, photo)
    lesion_columns = [_columns(size, mm / voxel_mm) for mm in LESION_SPACING_MM] if ranges.lesion_prob > 0 else []
    geometry = GeometryParams(
        matrix=spatial.affine_matrix(
            draws.uniform(ranges.rotation_deg, 3), draws.uniform(ranges.shear, 3, 2), draws.uniform(ranges.scaling, 3)
        ),
        translation=draws.uniform(ranges.translation_mm, 3) / source_mm,
        velocity=velocity,
        velocity_spacing=spacing / voxel_mm,
        mirror=mirror,
        mirror_labels=torch.tensor(protocol.mirror_permutation),
        is_brain=torch.as_tensor(protocol.is_brain),
        hemispheres=hemispheres,
        kept=kept,
        strip_threshold=draws.uniform(ranges.strip_threshold),
        stripped=stripped,
        field_of_view=_sample_field_of_view(ranges, draws, size),
        face=_sample_face(ranges, draws),
        lesion_noise=tuple(draws.normal(1, *c) for c in lesion_columns),
        lesion_potential=draws.normal(3, *_columns(size, LESION_FLOW_SPACING_MM / voxel_mm)),
        lesion_flow=draws.uniform(ranges.lesion_flow_mm) / voxel_mm,
        lesion_region=torch.as_tensor(protocol.is_brain & ~protocol.is_fluid),
        lesion_coverage=draws.uniform(ranges.lesion_coverage) * draws.chance(ranges.lesion_prob),
        diffeomorphic=ranges.diffeomorphic,
        spatial_size=(size[0], size[1], size[2]),
        stride=stride,
        voxel_mm=voxel_mm,
    )
    return geometry, photo_spacing * photo


def _sample_kept(ranges: SynthesisRanges, draws: _Draws, protocol: Protocol, photo: Tensor) -> Tensors:
    """Labels that stay, (B, K), whether the rest is cut out of the image, (B,), and the hemispheres that stay, (B, 2)."""
    brain = torch.as_tensor(protocol.is_brain)
    strip, without_fluid = draws.chance(ranges.skull_strip_prob), draws.chance(0.5)
    head_removal = draws.chance(ranges.head_removal_prob) | photo
    single, right = draws.chance(ranges.hemisphere_prob), draws.chance(0.0 if ranges.left_hemisphere else 0.5)
    removed = (strip | head_removal | single)[:, None] & ~brain
    # What was outside the skull's fluid cannot be distinguished from it: half of the extractions lose it, dissected brains always do.
    removed |= ((strip & without_fluid) | head_removal)[:, None] & _one_of(protocol, (CSF_ID,))
    sides = torch.tensor([("none", "left", "right").index(s.side) for s in protocol.structures])
    cerebrum = (sides == torch.where(right, 2, 1)[:, None]) & ~_one_of(protocol, CEREBELLUM_IDS)
    removed |= single[:, None] & ~cerebrum
    hemispheres = torch.stack([~(single & right), ~(single & ~right)], 1)
    return (~removed).float(), strip & ~head_removal, hemispheres


def _sample_face(ranges: SynthesisRanges, draws: _Draws) -> Tensor:
    """Half-space in front of and below an oblique plane, which an MNI-based defacing removes."""
    angle = draws.uniform(ranges.deface_angle_deg) * (math.pi / 180)
    plane = torch.stack([angle.cos(), -angle.sin(), draws.uniform(ranges.deface_offset_mm)], 1)
    return plane * draws.chance(ranges.deface_prob)[:, None]


def _sample_field_of_view(ranges: SynthesisRanges, draws: _Draws, spatial_size: Sequence[int]) -> Tensor:
    size = torch.tensor(spatial_size, dtype=torch.float32)
    cut = draws.uniform(ranges.field_of_view_loss, 3, 2) * draws.chance(ranges.field_of_view_prob)[:, None, None]
    return torch.stack([cut[..., 0] * size, (1 - cut[..., 1]) * size - 1], dim=-1)


def _sample_appearance(
    ranges: SynthesisRanges,
    draws: _Draws,
    geometry: GeometryParams,
    protocol: Protocol,
    present: Tensor,
    photo_spacing: Tensor,
    voxel_mm: float,
) -> AppearanceParams:
    size = geometry.spatial_size
    window = torch.stack([draws.uniform(ranges.ct_low_hu), draws.uniform(ranges.ct_high_hu)], 1)
    mean, std, is_ct, brighter = _sample_contrast(ranges, draws, protocol, window, photo_spacing > 0)
    blend = _sample_blend(ranges, draws, present)
    is_ct = torch.where(blend[:, 0] > 0, is_ct, blend[:, -1] == 1)
    real = blend[:, 0] == 0
    dark_in_real = (blend[:, 1] > 0) | (blend[:, -1] > 0)  # T1w and CT; lesions are bright in T2w and FLAIR
    spacing, sigma = _sample_resolution(ranges, draws, voxel_mm, photo_spacing)
    ghost_axis = torch.arange(3) == torch.floor(draws.uniform((0.0, 3.0), 1))
    ghosts = ghost_axis & draws.chance(ranges.ghost_prob)[:, None]
    bias_columns = _columns(size, ranges.bias_spacing_mm[0] / voxel_mm)
    bias_std = draws.uniform(ranges.bias_log_std) * ~is_ct
    noise_std = torch.where(real, draws.uniform(ranges.real_noise_std), draws.uniform(ranges.noise_std))
    clusters = len(QUARTILES) + 1 if ranges.head_cluster_prob > 0 else 0
    cluster_std = draws.uniform(ranges.head_cluster_std, 1) * draws.chance(ranges.head_cluster_prob)[:, None]
    return AppearanceParams(
        mean=mean,
        # White noise of a voxel is less in a larger one: the law is that of 1 mm.
        std=std * voxel_mm**-1.5,
        cluster_field=draws.normal(1, *_columns(size, ranges.head_cluster_spacing_mm[0] / voxel_mm)),
        cluster_spacing=draws.uniform(ranges.head_cluster_spacing_mm, 1).expand(-1, 3) / voxel_mm,
        cluster_offset=draws.normal(clusters) * cluster_std,
        is_head=torch.as_tensor(protocol.is_head).float(),
        blend=blend,
        ct_window=window,
        lesion_goal=torch.where(torch.where(real, ~dark_in_real, brighter), INTENSITY_TOP, 0.0),
        lesion_change=draws.uniform(ranges.lesion_change),
        gamma=(ranges.gamma_log_std * draws.normal()).exp(),
        bias=draws.normal(1, *bias_columns) * bias_std.reshape(-1, 1, 1, 1, 1),
        bias_spacing=draws.uniform(ranges.bias_spacing_mm, 1).expand(-1, 3) / voxel_mm,
        spacing=spacing,
        sigma=sigma,
        ghost_count=torch.where(ghosts, draws.uniform(ranges.ghost_count, 1).round(), 1.0),
        ghost_strength=ghosts * draws.uniform(ranges.ghost_strength, 1),
        rician=draws.chance(ranges.rician_prob) & ~is_ct,
        noise_std=noise_std,
        paint_noise=draws.volume(1, *size),
        noise=draws.volume(2 if ranges.rician_prob > 0 else 1, *size),
    )


def _sample_contrast(
    ranges: SynthesisRanges, draws: _Draws, protocol: Protocol, window: Tensor, photo: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Means and stds per label, (B, L), whether they are those of a CT, and whether lesions are bright in them, (B,).

    Both sides of a structure share theirs; partial-volume codes mix those of their parts.
    """
    count, top = len(protocol), ranges.mean[1]
    mean, std = draws.uniform(ranges.mean, count), draws.uniform(ranges.std, count)
    jitter, use_prior = draws.normal(count), draws.chance(ranges.contrast_prior_prob)
    invert = draws.chance(ranges.contrast_inversion_prob)
    chosen = draws.choose(torch.ones(len(ranges.contrast_priors)))
    is_ct = torch.zeros_like(use_prior)
    if ranges.contrast_prior_prob > 0:
        prior, spread = (table[chosen] for table in read_contrasts(ranges.contrast_priors, protocol))
        is_ct = use_prior & torch.tensor([name == "CT" for name in ranges.contrast_priors])[chosen]
        like = prior + ranges.contrast_prior_spread * spread * jitter
        in_window = (like - window[:, :1]) / (window[:, 1:] - window[:, :1]) * top
        like = torch.where(is_ct[:, None], in_window, like).clamp(0, top)
        like = torch.where((invert & ~is_ct)[:, None], top - like, like)
        mean = torch.where(use_prior[:, None] & ~like.isnan(), like, mean)
    one_side = torch.tensor([min(s.label, s.mirror) for s in protocol.structures])
    mean, std = mean[:, one_side], std[:, one_side]
    dark = draws.chance(ranges.dark_background_prob) | use_prior | photo
    air = dark[:, None] & (torch.arange(count) == 0)
    mean, std = torch.where(air, 0.0, mean), torch.where(air, std * DARK_STD_SHARE, std)
    mixture = torch.as_tensor(protocol.mixture_weights)
    white, grey = (protocol.label_of_id[i] for i in (WHITE_ID, GREY_ID))
    return mean @ mixture.T, (std.square() @ mixture.T).sqrt(), is_ct, mean[:, grey] > mean[:, white]


def _sample_blend(ranges: SynthesisRanges, draws: _Draws, present: Tensor) -> Tensor:
    """Share of the synthetic image and of each real one: one of the present ones, or a mixture instead of the synthetic."""
    chosen = draws.choose(torch.tensor(ranges.input_weights) * present + torch.tensor([1e-9, 0, 0, 0, 0]))
    alone = torch.nn.functional.one_hot(chosen, len(IMAGES) + 1).float()
    shares = draws.uniform((0.0, 1.0), len(IMAGES) + 1) * present
    mixed = shares / shares.sum(1, keepdim=True)
    return torch.where((draws.chance(ranges.mixup_prob) & (chosen == 0))[:, None], mixed, alone)


def _sample_resolution(ranges: SynthesisRanges, draws: _Draws, voxel_mm: float, photo_mm: Tensor) -> Tensors:
    """Spacing and profile width in output voxels, (B, 3), out of the families isotropic, clinical, low-field and coarse."""
    family = draws.choose(torch.tensor(ranges.resolution_weights))
    through_plane = torch.arange(3) == torch.floor(draws.uniform((0.0, 3.0), 1))
    voxel = torch.full((draws.batch, 3), voxel_mm)
    clinical = torch.where(through_plane, draws.uniform(ranges.clinical_spacing_mm, 1), voxel)
    slab = torch.minimum(clinical, draws.uniform(ranges.clinical_thickness_mm, 1))
    low_field = torch.tensor(ranges.low_field_spacing_mm) + draws.uniform(ranges.low_field_extra_mm, 3)
    coarse = draws.uniform(ranges.coarse_spacing_mm, 3)
    spacing_mm = torch.stack([voxel, clinical, low_field, coarse], 1)
    thickness_mm = torch.stack([voxel, torch.where(through_plane, slab, voxel), low_field, coarse], 1)
    row = family[:, None, None].expand(-1, 1, 3)
    spacing_mm, thickness_mm = (values.gather(1, row)[:, 0] for values in (spacing_mm, thickness_mm))
    photo = (photo_mm > 0)[:, None]
    across = torch.arange(3) == PHOTO_AXIS
    spacing_mm = torch.where(photo, torch.where(across, photo_mm[:, None], voxel), spacing_mm)
    thickness_mm = torch.where(photo, voxel, thickness_mm)  # a photo shows the face of a slab, not its inside
    factor = draws.uniform(ranges.profile_factor, 3)
    sigma = torch.where(thickness_mm > voxel_mm, factor * PROFILE_SIGMA * thickness_mm / voxel_mm, 0.0)
    return (spacing_mm / voxel_mm).clamp_min(1), sigma
