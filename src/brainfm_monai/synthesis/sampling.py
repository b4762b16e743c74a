"""Drawing: the one place where the generator is random."""

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from brainfm_monai.anatomy import Protocol
from brainfm_monai.functional import separable, spatial
from brainfm_monai.synthesis import ranges
from brainfm_monai.synthesis.ranges import SynthesisRanges

PROFILE_SIGMA = math.log(5) / math.pi  # std of the slice profile per thickness (BrainFM, after Brain-ID and SynthSR)
PHOTO_AXIS = 1  # dissected slices are coronal (BrainFM)
DARK_STD_SHARE = 0.2  # of its drawn std, which dark air keeps
CSF_ID, WHITE_ID, GREY_ID, CEREBELLUM_IDS = 24, 2, 3, (7, 8, 46, 47)
LARGEST_SEED = 2**62


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
        seeds = [int(torch.randint(LARGEST_SEED, (1,), generator=g)) for g in self.generators]
        own = [torch.Generator(self.device).manual_seed(seed) for seed in seeds]
        return torch.stack([torch.randn(shape, generator=g, device=self.device) for g in own])


class Geometry:
    """What the samples of one of B subjects share: its shape and what of it is there. K: labels of the segmentation."""

    def __init__(
        self, laws: SynthesisRanges, draws: _Draws, size: Sequence[int], protocol: Protocol, stride: int,
        source_mm: float,
    ) -> None:  # fmt: skip
        self.spatial_size, self.stride = tuple(size), stride  # (H, W, D) of the output; its voxel in source voxels
        self.voxel_mm = stride * source_mm  # size of an output voxel
        photo, photo_mm = draws.chance(laws.dissection_photo_prob), draws.uniform(laws.dissection_photo_spacing_mm)
        self.photo_mm = photo_mm * photo  # distance of the slices of a dissection photo, (B,); 0 for none
        # Every slab lies in its own photo: it is displaced in its plane alone, whatever its neighbours do.
        across = photo[:, None] & (torch.arange(3) == PHOTO_AXIS)
        spacing_mm = torch.where(across, photo_mm[:, None], draws.uniform(laws.velocity_spacing_mm, 1))
        std_mm = torch.where(across, 0.0, draws.uniform(laws.velocity_std_mm, 1))
        columns = separable.count_control_points(size, laws.velocity_spacing_mm[0] / self.voxel_mm)
        if laws.dissection_photo_prob > 0:
            smallest = laws.dissection_photo_spacing_mm[0] / self.voxel_mm
            columns[PHOTO_AXIS] = separable.count_control_points(size, smallest)[PHOTO_AXIS]
        # control points, (B, 3, P, Q, R), and their distances, (B, 3), both in output voxels
        self.velocity = draws.normal(3, *columns) * (std_mm / self.voxel_mm).reshape(-1, 3, 1, 1, 1)
        self.velocity_spacing = spacing_mm / self.voxel_mm
        self.mirror = draws.chance(laws.mirror_prob)  # (B,), bool
        self.mirror_labels = torch.tensor(protocol.mirror_permutation)  # label on the other side, (K,), int64
        self.is_brain = torch.as_tensor(protocol.is_brain)  # (K,), bool
        # The removed is exactly 0 in the image if it is stripped; otherwise it is painted as background.
        self.kept, self.stripped, self.hemispheres = _sample_kept(laws, draws, protocol, photo)
        rotation, shear = draws.uniform(laws.rotation_deg, 3), draws.uniform(laws.shear, 3, 2)
        # linear map from output to source, (B, 3, 3), and translation in source voxels, (B, 3)
        self.matrix = spatial.affine_matrix(rotation, shear, draws.uniform(laws.scaling, 3))
        self.translation = draws.uniform(laws.translation_mm, 3) / source_mm
        self.strip_threshold = draws.uniform(laws.strip_threshold)  # share of kept voxels around one that stays, (B,)
        cut = draws.uniform(laws.field_of_view_loss, 3, 2) * draws.chance(laws.field_of_view_prob)[:, None, None]
        extent = torch.tensor(size, dtype=torch.float32)
        # first and last visible output voxel on each axis, (B, 3, 2)
        self.field_of_view = torch.stack([cut[..., 0] * extent, (1 - cut[..., 1]) * extent - 1], dim=-1)
        # A face is removed as MNI-based defacing does it, in front of and below an oblique plane: (a, b, d) of the
        # half-space a y + b z > d, MNI mm, (B, 3); or all 0.
        angle = draws.uniform(laws.deface_angle_deg) * (math.pi / 180)
        plane = torch.stack([angle.cos(), -angle.sin(), draws.uniform(laws.deface_offset_mm)], 1)
        self.face = plane * draws.chance(laws.deface_prob)[:, None]
        # control points: of the shape of lesions, coarse to fine, (B, 1, P, P, P), and of the flow's vector potential
        octaves_mm = ranges.LESION_NOISE_MM if laws.lesion_prob > 0 else ()
        self.lesion_noise = [draws.control_points(1, size, mm / self.voxel_mm) for mm in octaves_mm]
        self.lesion_potential = draws.control_points(3, size, ranges.LESION_FLOW_MM / self.voxel_mm)
        self.lesion_flow = draws.uniform(laws.lesion_flow_mm) / self.voxel_mm  # its root mean square, (B,)
        self.lesion_region = torch.as_tensor(protocol.is_brain & ~protocol.is_fluid)  # labels that may have some, (K,)
        self.lesion_coverage = draws.uniform(laws.lesion_coverage) * draws.chance(laws.lesion_prob)  # of the region


def _sample_kept(laws: SynthesisRanges, draws: _Draws, protocol: Protocol, photo: Tensor) -> tuple[Tensor, ...]:
    """Labels that stay, (B, K), whether the rest is stripped, (B,), and whether left and right brain stay, (B, 2)."""
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


class Appearance:
    """What one sample of each subject looks like. L: generation labels; spacings are in output voxels."""

    def __init__(
        self, laws: SynthesisRanges, draws: _Draws, geometry: Geometry, protocol: Protocol, present: Tensor
    ) -> None:
        size, voxel_mm = geometry.spatial_size, geometry.voxel_mm
        # low and high end of the window of CT, (B, 2), HU
        self.ct_window = torch.stack([draws.uniform(laws.ct_low_hu), draws.uniform(laws.ct_high_hu)], 1)
        contrast = _sample_contrast(laws, draws, protocol, self.ct_window, geometry.photo_mm > 0)
        self.mean, std, is_ct, brighter = contrast  # (B, L)
        self.std = std * voxel_mm**-1.5  # white noise of a voxel is less in a larger one: the law is that of 1 mm
        self.is_head = torch.as_tensor(protocol.is_head).float()  # 1 for generation labels of the head, (L,)
        # The synthetic image or one of the present real ones, or a mixture in place of the synthetic image.
        chosen = draws.choose(torch.tensor(laws.input_weights) * present + torch.tensor([1e-9, 0, 0, 0, 0]))
        alone = torch.nn.functional.one_hot(chosen, present.shape[1]).float()
        shares = draws.uniform((0.0, 1.0), present.shape[1]) * present
        mixed = draws.chance(laws.mixup_prob) & (chosen == 0)
        # share of the synthetic image, T1w, T2w, FLAIR and CT in the image, (B, 5); rows sum to 1
        self.blend = torch.where(mixed[:, None], shares / shares.sum(1, keepdim=True), alone)
        real = self.blend[:, 0] == 0
        is_ct = torch.where(real, self.blend[:, -1] == 1, is_ct)
        self.spacing, self.sigma = _sample_resolution(laws, draws, voxel_mm, geometry.photo_mm)
        ghosts = draws.one_axis() & draws.chance(laws.ghost_prob)[:, None]
        bias_std = draws.uniform(laws.bias_log_std) * ~is_ct
        self.noise_std = torch.where(real, draws.uniform(laws.real_noise_std), draws.uniform(laws.noise_std))  # (B,)
        cluster_std = draws.uniform(laws.head_cluster_std, 1) * draws.chance(laws.head_cluster_prob)[:, None]
        # control points of a field that divides the head, (B, 1, P, P, P), their distance, (B, 3), and the offset of
        # the intensity in each cluster, (B, clusters); no columns where heads are never divided
        self.cluster_field = draws.control_points(1, size, laws.head_cluster_spacing_mm[0] / voxel_mm)
        self.cluster_spacing = draws.uniform(laws.head_cluster_spacing_mm, 1).expand(-1, 3) / voxel_mm
        clusters = len(ranges.QUARTILES) + 1 if laws.head_cluster_prob > 0 else 0
        self.cluster_offset = draws.normal(clusters) * cluster_std
        # intensity towards which lesions change: bright in T2w and FLAIR, dark in T1w and CT; and the share of the way
        bright = torch.where(real, (self.blend[:, [1, -1]] == 0).all(1), brighter)
        self.lesion_goal = torch.where(bright, ranges.INTENSITY_TOP, 0.0)
        self.lesion_change = draws.uniform(laws.lesion_change)
        self.gamma = (laws.gamma_log_std * draws.normal()).exp()  # (B,)
        # control points of the log field, (B, 1, P, P, P), and their distance, (B, 3)
        self.bias = draws.control_points(1, size, laws.bias_spacing_mm[0] / voxel_mm) * bias_std.reshape(-1, 1, 1, 1, 1)
        self.bias_spacing = draws.uniform(laws.bias_spacing_mm, 1).expand(-1, 3) / voxel_mm
        # copies along each axis, (B, 3), 1 for none; share by which lines of k-space are weakened, (B, 3)
        self.ghost_count = torch.where(ghosts, draws.uniform(laws.ghost_count, 1).round(), 1.0)
        self.ghost_strength = ghosts * draws.uniform(laws.ghost_strength, 1)
        self.rician = draws.chance(laws.rician_prob) & ~is_ct  # (B,), bool
        self.paint_noise = draws.volume(1, *size)  # standard normal, (B, 1, H, W, D)
        self.noise = draws.volume(2 if laws.rician_prob > 0 else 1, *size)  # of both parts of a complex signal


def _sample_contrast(
    laws: SynthesisRanges, draws: _Draws, protocol: Protocol, window: Tensor, photo: Tensor
) -> tuple[Tensor, ...]:
    """Means and stds per label, (B, L), whether they are those of a CT, and whether lesions are bright there, (B,)."""
    count, top = len(protocol), laws.mean[1]
    mean, std = draws.uniform(laws.mean, count), draws.uniform(laws.std, count)
    jitter, use_prior = draws.normal(count), draws.chance(laws.contrast_prior_prob)
    invert = draws.chance(laws.contrast_inversion_prob)
    chosen = draws.choose(torch.ones(len(laws.contrast_priors)))
    is_ct = torch.zeros_like(use_prior)
    if laws.contrast_prior_prob > 0:
        prior, spread = (table[chosen] for table in ranges.read_contrasts(laws.contrast_priors, protocol))
        is_ct = use_prior & torch.tensor([name == "CT" for name in laws.contrast_priors])[chosen]
        like = prior + laws.contrast_prior_spread * spread * jitter
        in_window = (like - window[:, :1]) / (window[:, 1:] - window[:, :1]) * top
        like = torch.where(is_ct[:, None], in_window, like).clamp(0, top)
        like = torch.where((invert & ~is_ct)[:, None], top - like, like)
        mean = torch.where(use_prior[:, None] & ~like.isnan(), like, mean)
    # both sides of a structure share theirs; partial-volume codes, below, mix those of their parts
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
    spacings = [voxel, clinical, low_field, coarse, photo]  # a photo shows the face of a slab, not its inside
    thicknesses = [voxel, torch.where(through_plane, slab, voxel), low_field, coarse, voxel]
    every = torch.arange(draws.batch)
    spacing_mm, thickness_mm = (torch.stack(choices)[family, every] for choices in (spacings, thicknesses))
    factor = draws.uniform(laws.profile_factor, 3)
    sigma = torch.where(thickness_mm > voxel_mm, factor * PROFILE_SIGMA * thickness_mm / voxel_mm, 0.0)
    return (spacing_mm / voxel_mm).clamp_min(1), sigma


class SynthesisParams:
    """One draw for B subjects, by their seeds: a geometry, by the first law, and an appearance by each of S laws.

    ``present``, (B, 5), says which images may be inputs; protocols are those of the segmentation and of the painting.
    """

    def __init__(
        self, laws: Sequence[SynthesisRanges], seeds: Sequence[int], present: Tensor, size: Sequence[int],
        protocols: tuple[Protocol, Protocol], stride: int, source_mm: float, device: torch.device,
    ) -> None:  # fmt: skip
        draws = _Draws(seeds, device)
        self.geometry = Geometry(laws[0], draws, size, protocols[0], stride, source_mm)
        self.appearances = [Appearance(law, draws, self.geometry, protocols[1], present) for law in laws]

    def to(self, device: torch.device) -> "SynthesisParams":
        """The same draw on another device, without waiting for it."""
        moved = copy.copy(self)
        moved.geometry, moved.appearances = copy.copy(self.geometry), [copy.copy(look) for look in self.appearances]
        for part in (moved.geometry, *moved.appearances):
            vars(part).update(tree_map_only(Tensor, lambda values: values.to(device, non_blocking=True), vars(part)))
        return moved

    def describe(self) -> str:
        """What was drawn for the first sample of the first subject, in a few lines."""
        geometry, look = self.geometry, self.appearances[0]
        shares = zip(("synthetic", *ranges.CONTRASTS), look.blend[0], strict=True)
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
