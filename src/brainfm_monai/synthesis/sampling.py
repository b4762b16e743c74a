"""Drawing, the one place where the generator is random, and both steps of the generator behind one call."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from brainfm_monai.anatomy import Protocol
from brainfm_monai.functional import separable, spatial
from brainfm_monai.io import refuse_if
from brainfm_monai.synthesis import acquisition
from brainfm_monai.synthesis.ranges import CONTRASTS, AppearanceParams, GeometryParams, SynthesisParams, SynthesisRanges
from brainfm_monai.synthesis.rendering import render
from brainfm_monai.tasks import TaskLayout

PROFILE_SIGMA = math.log(5) / math.pi  # std of the slice profile per thickness (BrainFM, after Brain-ID and SynthSR)
PHOTO_AXIS = 1  # dissected slices are coronal (BrainFM)
DARK_STD_SHARE = 0.2  # of its drawn std, which dark air keeps
CSF_ID, WHITE_ID, GREY_ID, CEREBELLUM_IDS = 24, 2, 3, (7, 8, 46, 47)
LARGEST_VOLUME_SEED = 2**62
LARGEST_SEED = 2**31 - 1
VOXEL_TOLERANCE_MM = 1e-4
MAPS = ("distance", "mni", "lesion", "lesion_shape", "age")
MASKS = tuple(f"{name}_defacing_mask" for name in CONTRASTS)
SUBJECT_KEYS = ("generation_labels", "segmentation", *CONTRASTS, *MASKS, *MAPS)
# Before a key of a subject: 1 if the subject has it; for an image, 1 if a scanner made it, so that it may be an input.
FLAGS = ("available_", "real_")

_load_protocol = cache(Protocol.load)


class _Draws:
    """Draws for a batch, each sample from its own generator, so that a sample does not depend on its neighbours.

    Numbers are drawn on the host, where they are the same for every device; volumes on the device, from seeds of them.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.device, self.batch = device, len(seeds)

    def normal(self, *shape: int) -> Tensor:
        return torch.stack([torch.randn(shape, generator=g) for g in self.generators])

    def control_points(self, channels: int, size: Sequence[int], smallest_spacing: float) -> Tensor:
        return self.normal(channels, *separable.count_control_points(size, smallest_spacing))

    def uniform(self, limits: tuple[float, float], *shape: int) -> Tensor:
        unit = torch.stack([torch.rand(shape, generator=g) for g in self.generators])
        return limits[0] + (limits[1] - limits[0]) * unit

    def chance(self, probability: float) -> Tensor:
        return self.uniform((0.0, 1.0)) < probability

    def one_axis(self) -> Tensor:
        """One of the three axes for each sample, (B, 3), bool."""
        return torch.arange(3) == torch.floor(self.uniform((0.0, 3.0), 1))

    def choose(self, weights: Tensor) -> Tensor:
        """An index per sample, (B,), by weights of shape (K,) or (B, K)."""
        cumulative = weights.expand(self.batch, -1).cumsum(1)
        level = self.uniform((0.0, 1.0), 1) * cumulative[:, -1:]
        return (level >= cumulative[:, :-1]).sum(1)

    def volume(self, *shape: int) -> Tensor:
        seeds = [int(torch.randint(LARGEST_VOLUME_SEED, (1,), generator=g)) for g in self.generators]
        own = [torch.Generator(self.device).manual_seed(seed) for seed in seeds]
        return torch.stack([torch.randn(shape, generator=g, device=self.device) for g in own])


@dataclass(eq=False)
class Synthesizer:
    """Generates scans and targets from a batch of subjects: the same for the same seeds, whatever the batch."""

    ranges: SynthesisRanges  # laws of the (severe) samples
    layout: TaskLayout  # tasks whose targets are made
    spatial_size: Sequence[int]  # (H, W, D) of the generated scans
    scan_mm: float = 1.0  # voxel of the generated scans
    label_mm: float | None = None  # voxel of the subjects' labels, a whole fraction of scan_mm; None: the same
    generation_protocol: str = "synthseg_generation"  # of the generation labels of subjects that name none
    samples: int = 1  # scans of each subject; they share its deformation and targets, and differ in everything else
    mild_samples: int = 0  # how many of them, the first ones, are mild

    def __post_init__(self) -> None:
        severe, mild = self.samples - self.mild_samples, self.mild_samples
        rule = f"Synthesizer: 'mild_samples' must be in [0, {self.samples}] of at least one sample"
        refuse_if(not 0 <= mild <= self.samples or self.samples < 1, rule, mild)
        self.source_mm = self.scan_mm if self.label_mm is None else self.label_mm
        self.stride = round(self.scan_mm / self.source_mm)
        off_mm = abs(self.stride * self.source_mm - self.scan_mm)
        rule = f"Synthesizer: 'label_mm' must divide 'scan_mm' {self.scan_mm}"
        refuse_if(off_mm > VOXEL_TOLERANCE_MM, rule, self.source_mm)
        self.laws = [self.ranges.make_mild()] * mild + [self.ranges] * severe

    def draw(
        self, subject: Mapping[str, Tensor], seeds: Sequence[int], generation_protocol: str | None = None,
        device: str | torch.device | None = None,
    ) -> SynthesisParams:  # fmt: skip
        """Everything random of the subjects' samples, on a device, for which their flags suffice, or where they are."""
        draws = _Draws(seeds, torch.device(device or subject["generation_labels"].device))
        present = [every := torch.ones(draws.batch, dtype=torch.bool)]
        for name in CONTRASTS:
            flags = [subject[f"{flag}{name}"].bool() for flag in FLAGS if f"{flag}{name}" in subject]
            present.append(torch.stack([every, *flags]).all(0) if flags or name in subject else ~every)
        protocol, painted = self.layout.protocol, _load_protocol(generation_protocol or self.generation_protocol)
        # What the samples share is drawn by the severe law: a mild law differs in the appearance alone.
        geometry = _sample_geometry(self.ranges, draws, self.spatial_size, protocol, self.stride, self.source_mm)
        looks = [_sample_appearance(law, draws, geometry, painted, torch.stack(present, 1)) for law in self.laws]
        return SynthesisParams(geometry, tuple(looks)).to(draws.device)

    @torch.no_grad()
    def __call__(
        self, subject: Mapping[str, Tensor], seeds: Sequence[int], generation_protocol: str | None = None
    ) -> dict[str, Tensor]:
        """Scans and targets of a batch of subjects, each with a seed; see :func:`render` for both.

        Flags of the subjects are on the host, (B,): ``available_<key>``, 0 for subjects without the key, and
        ``real_<image>``, 0 for images that are targets but no inputs. The generation protocol may be the subjects' own.
        """
        parts = [(subject, seeds)]
        if subject["generation_labels"].device.type == "cpu":
            # One after the other: the same numbers, and a subject's volumes stay in the processor's cache.
            parts = [({k: v[i : i + 1] for k, v in subject.items()}, seeds[i : i + 1]) for i in range(len(seeds))]
        made = [render(some, self.draw(some, own, generation_protocol), self.layout) for some, own in parts]
        return {name: torch.cat([part[name] for part in made]) for name in made[0]} if len(made) > 1 else made[0]


def _sample_geometry(
    laws: SynthesisRanges, draws: _Draws, size: Sequence[int], protocol: Protocol, stride: int, source_mm: float
) -> GeometryParams:
    voxel_mm, extent = stride * source_mm, torch.tensor(size, dtype=torch.float32)
    photo, photo_mm = draws.chance(laws.dissection_photo_prob), draws.uniform(laws.dissection_photo_spacing_mm)
    # Every slab lies in its own photo: it is displaced in its plane alone, whatever its neighbours do.
    across = photo[:, None] & (torch.arange(3) == PHOTO_AXIS)
    spacing = torch.where(across, photo_mm[:, None], draws.uniform(laws.velocity_spacing_mm, 1))
    std = torch.where(across, 0.0, draws.uniform(laws.velocity_std_mm, 1))
    columns = separable.count_control_points(size, laws.velocity_spacing_mm[0] / voxel_mm)
    if laws.dissection_photo_prob > 0:
        smallest = laws.dissection_photo_spacing_mm[0] / voxel_mm
        columns[PHOTO_AXIS] = separable.count_control_points(size, smallest)[PHOTO_AXIS]
    velocity = draws.normal(3, *columns) * (std / voxel_mm).reshape(-1, 3, 1, 1, 1)
    mirror = draws.chance(laws.mirror_prob)
    kept, stripped, hemispheres = _sample_kept(laws, draws, protocol, photo)
    rotation, shear = draws.uniform(laws.rotation_deg, 3), draws.uniform(laws.shear, 3, 2)
    matrix = spatial.affine_matrix(rotation, shear, draws.uniform(laws.scaling, 3))
    translation, threshold = draws.uniform(laws.translation_mm, 3) / source_mm, draws.uniform(laws.strip_threshold)
    cut = draws.uniform(laws.field_of_view_loss, 3, 2) * draws.chance(laws.field_of_view_prob)[:, None, None]
    # A face is removed as MNI-based defacing does it, in front of and below an oblique plane.
    angle = draws.uniform(laws.deface_angle_deg) * (math.pi / 180)
    plane = torch.stack([angle.cos(), -angle.sin(), draws.uniform(laws.deface_offset_mm)], 1)
    lesions_mm = acquisition.LESION_NOISE_MM if laws.lesion_prob > 0 else ()
    return GeometryParams(
        photo_mm=photo_mm * photo,
        velocity=velocity,
        velocity_spacing=spacing / voxel_mm,
        mirror=mirror,
        mirror_labels=torch.tensor(protocol.mirror_permutation),
        is_brain=torch.as_tensor(protocol.is_brain),
        kept=kept,
        stripped=stripped,
        hemispheres=hemispheres,
        matrix=matrix,
        translation=translation,
        strip_threshold=threshold,
        field_of_view=torch.stack([cut[..., 0] * extent, (1 - cut[..., 1]) * extent - 1], dim=-1),
        face=plane * draws.chance(laws.deface_prob)[:, None],
        lesion_noise=tuple(draws.control_points(1, size, mm / voxel_mm) for mm in lesions_mm),
        lesion_potential=draws.control_points(3, size, acquisition.LESION_FLOW_MM / voxel_mm),
        lesion_flow=draws.uniform(laws.lesion_flow_mm) / voxel_mm,
        lesion_region=torch.as_tensor(protocol.is_brain & ~protocol.is_fluid),
        lesion_coverage=draws.uniform(laws.lesion_coverage) * draws.chance(laws.lesion_prob),
        spatial_size=tuple(size),
        stride=stride,
        voxel_mm=voxel_mm,
    )


def _sample_kept(laws: SynthesisRanges, draws: _Draws, protocol: Protocol, photo: Tensor) -> tuple[Tensor, ...]:
    """Labels that stay, (B, K), whether the rest is cut out of the image, (B,), and hemispheres that stay, (B, 2)."""
    ids = torch.as_tensor(protocol.freesurfer_ids)
    strip, without_fluid = draws.chance(laws.skull_strip_prob), draws.chance(0.5)
    head_removal = draws.chance(laws.head_removal_prob) | photo
    single, right = draws.chance(laws.hemisphere_prob), draws.chance(0.0 if laws.left_hemisphere else 0.5)
    removed = (strip | head_removal | single)[:, None] & ~torch.as_tensor(protocol.is_brain)
    # Fluid around the brain looks like what is outside: half of the extractions lose it, dissected brains always do.
    removed |= ((strip & without_fluid) | head_removal)[:, None] & (ids == CSF_ID)
    sides = torch.tensor([("none", "left", "right").index(s.side) for s in protocol.structures])
    cerebrum = (sides == torch.where(right, 2, 1)[:, None]) & ~torch.isin(ids, torch.tensor(CEREBELLUM_IDS))
    removed |= single[:, None] & ~cerebrum
    hemispheres = torch.stack([~(single & right), ~(single & ~right)], 1)
    return (~removed).float(), strip & ~head_removal, hemispheres


def _sample_appearance(
    laws: SynthesisRanges, draws: _Draws, geometry: GeometryParams, protocol: Protocol, present: Tensor
) -> AppearanceParams:
    size, voxel_mm = geometry.spatial_size, geometry.voxel_mm
    window = torch.stack([draws.uniform(laws.ct_low_hu), draws.uniform(laws.ct_high_hu)], 1)
    mean, std, is_ct, brighter = _sample_contrast(laws, draws, protocol, window, geometry.photo_mm > 0)
    # The synthetic image or one of the present real ones, or a mixture in place of the synthetic image.
    chosen = draws.choose(torch.tensor(laws.input_weights) * present + torch.tensor([1e-9, 0, 0, 0, 0]))
    alone = torch.nn.functional.one_hot(chosen, len(CONTRASTS) + 1).float()
    shares = draws.uniform((0.0, 1.0), len(CONTRASTS) + 1) * present
    mixed = draws.chance(laws.mixup_prob) & (chosen == 0)
    blend = torch.where(mixed[:, None], shares / shares.sum(1, keepdim=True), alone)
    is_ct = torch.where(blend[:, 0] > 0, is_ct, blend[:, -1] == 1)
    real = blend[:, 0] == 0
    dark_in_real = (blend[:, 1] > 0) | (blend[:, -1] > 0)  # T1w and CT; lesions are bright in T2w and FLAIR
    spacing, sigma = _sample_resolution(laws, draws, voxel_mm, geometry.photo_mm)
    ghosts = draws.one_axis() & draws.chance(laws.ghost_prob)[:, None]
    bias_std = draws.uniform(laws.bias_log_std) * ~is_ct
    noise_std = torch.where(real, draws.uniform(laws.real_noise_std), draws.uniform(laws.noise_std))
    clusters = len(acquisition.QUARTILES) + 1 if laws.head_cluster_prob > 0 else 0
    cluster_std = draws.uniform(laws.head_cluster_std, 1) * draws.chance(laws.head_cluster_prob)[:, None]
    return AppearanceParams(
        mean=mean,
        std=std * voxel_mm**-1.5,  # white noise of a voxel is less in a larger one: the law is that of 1 mm
        cluster_field=draws.control_points(1, size, laws.head_cluster_spacing_mm[0] / voxel_mm),
        cluster_spacing=draws.uniform(laws.head_cluster_spacing_mm, 1).expand(-1, 3) / voxel_mm,
        cluster_offset=draws.normal(clusters) * cluster_std,
        is_head=torch.as_tensor(protocol.is_head).float(),
        blend=blend,
        ct_window=window,
        lesion_goal=torch.where(torch.where(real, ~dark_in_real, brighter), acquisition.INTENSITY_TOP, 0.0),
        lesion_change=draws.uniform(laws.lesion_change),
        gamma=(laws.gamma_log_std * draws.normal()).exp(),
        bias=draws.control_points(1, size, laws.bias_spacing_mm[0] / voxel_mm) * bias_std.reshape(-1, 1, 1, 1, 1),
        bias_spacing=draws.uniform(laws.bias_spacing_mm, 1).expand(-1, 3) / voxel_mm,
        spacing=spacing,
        sigma=sigma,
        ghost_count=torch.where(ghosts, draws.uniform(laws.ghost_count, 1).round(), 1.0),
        ghost_strength=ghosts * draws.uniform(laws.ghost_strength, 1),
        rician=draws.chance(laws.rician_prob) & ~is_ct,
        noise_std=noise_std,
        paint_noise=draws.volume(1, *size),
        noise=draws.volume(2 if laws.rician_prob > 0 else 1, *size),
    )


def _sample_contrast(
    laws: SynthesisRanges, draws: _Draws, protocol: Protocol, window: Tensor, photo: Tensor
) -> tuple[Tensor, ...]:
    """Means and stds per label, (B, L), whether they are those of a CT, and whether lesions are bright in them, (B,).

    Both sides of a structure share theirs; partial-volume codes mix those of their parts.
    """
    count, top = len(protocol), laws.mean[1]
    mean, std = draws.uniform(laws.mean, count), draws.uniform(laws.std, count)
    jitter, use_prior = draws.normal(count), draws.chance(laws.contrast_prior_prob)
    invert = draws.chance(laws.contrast_inversion_prob)
    chosen = draws.choose(torch.ones(len(laws.contrast_priors)))
    is_ct = torch.zeros_like(use_prior)
    if laws.contrast_prior_prob > 0:
        prior, spread = (table[chosen] for table in acquisition.read_contrasts(laws.contrast_priors, protocol))
        is_ct = use_prior & torch.tensor([name == "CT" for name in laws.contrast_priors])[chosen]
        like = prior + laws.contrast_prior_spread * spread * jitter
        in_window = (like - window[:, :1]) / (window[:, 1:] - window[:, :1]) * top
        like = torch.where(is_ct[:, None], in_window, like).clamp(0, top)
        like = torch.where((invert & ~is_ct)[:, None], top - like, like)
        mean = torch.where(use_prior[:, None] & ~like.isnan(), like, mean)
    one_side = torch.tensor([min(s.label, s.mirror) for s in protocol.structures])
    mean, std = mean[:, one_side], std[:, one_side]
    dark = draws.chance(laws.dark_background_prob) | use_prior | photo
    air = dark[:, None] & (torch.arange(count) == 0)
    mean, std = torch.where(air, 0.0, mean), torch.where(air, std * DARK_STD_SHARE, std)
    mixture = torch.as_tensor(protocol.mixture_weights)
    white, grey = (protocol.label_of_id[i] for i in (WHITE_ID, GREY_ID))
    return mean @ mixture.T, (std.square() @ mixture.T).sqrt(), is_ct, mean[:, grey] > mean[:, white]


def _sample_resolution(laws: SynthesisRanges, draws: _Draws, voxel_mm: float, photo_mm: Tensor) -> tuple[Tensor, ...]:
    """Spacing and profile width in output voxels, (B, 3): isotropic, clinical, low-field, coarse, or of a photo."""
    family = torch.where(photo_mm > 0, 4, draws.choose(torch.tensor(laws.resolution_weights)))
    through_plane, voxel = draws.one_axis(), torch.full((draws.batch, 3), voxel_mm)
    clinical = torch.where(through_plane, draws.uniform(laws.clinical_spacing_mm, 1), voxel)
    slab = torch.minimum(clinical, draws.uniform(laws.clinical_thickness_mm, 1))
    low_field = torch.tensor(laws.low_field_spacing_mm) + draws.uniform(laws.low_field_extra_mm, 3)
    coarse = draws.uniform(laws.coarse_spacing_mm, 3)
    photo = torch.where(torch.arange(3) == PHOTO_AXIS, photo_mm[:, None], voxel)
    spacings = [voxel, clinical, low_field, coarse, photo]
    # a photo shows the face of a slab, not its inside
    thicknesses = [voxel, torch.where(through_plane, slab, voxel), low_field, coarse, voxel]
    every = torch.arange(draws.batch)
    spacing_mm, thickness_mm = (torch.stack(choices)[family, every] for choices in (spacings, thicknesses))
    factor = draws.uniform(laws.profile_factor, 3)
    sigma = torch.where(thickness_mm > voxel_mm, factor * PROFILE_SIGMA * thickness_mm / voxel_mm, 0.0)
    return (spacing_mm / voxel_mm).clamp_min(1), sigma
