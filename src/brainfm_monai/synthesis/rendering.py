"""Rendering: deformation, lesions, images and targets out of a draw, pure and of fixed shape; and both in one call."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from brainfm_monai.anatomy import Protocol
from brainfm_monai.functional import intensity, separable, spatial
from brainfm_monai.io import refuse_if
from brainfm_monai.synthesis.acquisition import acquire, paint
from brainfm_monai.synthesis.ranges import IMAGES, LESION_FLOW_MM, LESION_NOISE_MM, SynthesisRanges
from brainfm_monai.synthesis.sampling import Geometry, SynthesisParams
from brainfm_monai.tasks import MAX_DISTANCE_MM, TASKS, TaskLayout

VELOCITY_STEP, LESION_STEP = 4, 2  # output voxels per point of the grids on which velocity and lesions are made
MNI_STEP_MM = 2.0  # distance of the points at which MNI coordinates are read
FAR_MM = 2 * MAX_DISTANCE_MM  # signed distance of what is absent
LARGEST_SEED = 2**31 - 1
VOXEL_TOLERANCE_MM = 1e-4
MAPS = ("distance", "mni", "lesion", "lesion_shape", "age")
SUBJECT_KEYS = ("generation_labels", "segmentation", *IMAGES, *(f"{name}_defacing_mask" for name in IMAGES), *MAPS)
# Before a key of a subject: 1 if the subject has it; for an image, 1 if a scanner made it, so that it may be an input.
FLAGS = ("available_", "real_")

_load_protocol = cache(Protocol.load)


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
        is_off = abs(self.stride * self.source_mm - self.scan_mm) > VOXEL_TOLERANCE_MM
        refuse_if(is_off, f"Synthesizer: 'label_mm' must divide 'scan_mm' {self.scan_mm}", self.source_mm)
        self.laws = [self.ranges.make_mild()] * mild + [self.ranges] * severe

    def draw(
        self, subject: Mapping[str, Tensor], seeds: Sequence[int], generation_protocol: str | None = None,
        device: str | torch.device | None = None,
    ) -> SynthesisParams:  # fmt: skip
        """Everything random of the subjects' samples, on a device, for which their flags suffice, or where they are."""
        device = torch.device(device or subject["generation_labels"].device)
        present = [every := torch.ones(len(seeds), dtype=torch.bool)]
        for name in IMAGES:
            flags = [subject[f"{flag}{name}"].bool() for flag in FLAGS if f"{flag}{name}" in subject]
            present.append(torch.stack([every, *flags]).all(0) if flags or name in subject else ~every)
        protocols = self.layout.protocol, _load_protocol(generation_protocol or self.generation_protocol)
        images, size = torch.stack(present, 1), self.spatial_size
        drawn = SynthesisParams(self.laws, seeds, images, size, protocols, self.stride, self.source_mm, device)
        return drawn.to(device)

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


def render(subject: Mapping[str, Tensor], params: SynthesisParams, layout: TaskLayout) -> dict[str, Tensor]:
    """Make images and targets of a batch: pure, of fixed shape, batch element by batch element the same as alone.

    Subjects have ``generation_labels`` and ``segmentation``, (B, 1, h, w, d) integer; where there are any, ``T1w``,
    ``T2w``, ``FLAIR``, ``CT``, ``distance`` and ``mni`` in the unit of their files, on the same grid or on a coarser
    one that covers the same box; masks ``<image>_defacing_mask``, ``lesion`` (the subject's own) and ``lesion_shape``
    (somebody else's); ``age`` in years and ``available_<task>``, (B,).

    The result is ``image`` in [0, 1], (B S, 1, H, W, D), the S samples of a subject one after the other, and for every
    task of the layout its target in the unit of the task table. ``visible`` marks the field of view without a removed
    face, ``valid_<image>`` what a given defacing mask leaves of a target. ``super_resolution`` is the sample with gamma
    and bias field, before slices and noise. ``age``, (B S,), only changes its unit: leave scaling and shear out.
    """
    geometry, tasks, count = params.geometry, layout.tasks, len(params.appearances)
    coordinates = make_coordinates(geometry, subject["generation_labels"].shape[2:])
    read, mni = _read(subject, params, coordinates), _read_mni(subject, coordinates, geometry)
    labels = spatial.gather_nearest(subject["segmentation"], coordinates).long()
    segmentation = torch.where(_voxelwise(geometry.mirror), geometry.mirror_labels[labels], labels)
    visible, stays = _look(geometry, mni, segmentation)
    lesions = make_lesion_maps(subject, geometry, coordinates, segmentation)
    images = {name: read[name] for name in IMAGES if name in read}
    stripped = _voxelwise(geometry.stripped)
    seen, removed = visible & (stays | ~stripped), ~(stays | stripped)
    samples: dict[str, list[Tensor]] = {"image": [], "log_bias_field": [], "super_resolution": []}
    for i, appearance in enumerate(params.appearances):
        image = paint(read["painted"], i, images, lesions, removed, appearance)
        scan, field, sharp = acquire(image, appearance)
        samples["image"].append(intensity.normalise_percentiles(scan * seen))
        samples["log_bias_field"].append(field)
        if "super_resolution" in tasks:
            samples["super_resolution"].append(intensity.normalise_percentiles(sharp * seen))
    targets = {"segmentation": segmentation * (visible & stays), "visible": visible}
    targets |= {n: torch.where(stays, image, IMAGES[n]) / TASKS[n].scale for n, image in images.items()}
    if "distance" in read:  # distances of a removed hemisphere are far
        present = geometry.hemispheres.repeat_interleave(2, dim=1)[..., None, None, None]  # channels lp, lw, rp, rw
        targets["distance"] = torch.where(present, read["distance"], FAR_MM)
    if mni is not None:
        targets["mni"] = mni / TASKS["mni"].scale
    if "lesion" in tasks:
        both = torch.zeros_like(visible) if lesions is None else torch.maximum(*lesions) > 0.5
        targets["lesion"] = both & visible & stays
    if "age" in subject:
        targets["age"] = subject["age"].float().reshape(-1) / TASKS["age"].scale
    masks = {name: subject[f"{name}_defacing_mask"] for name in IMAGES if f"{name}_defacing_mask" in subject}
    targets |= {f"valid_{n}": spatial.gather_nearest(mask, coordinates) == 0 for n, mask in masks.items()}
    targets |= {key: subject[key] for key in (f"available_{name}" for name in tasks) if key in subject}
    # What the samples of a subject share is repeated for each; what each has of its own has the same order.
    made = {name: value for name, value in targets.items() if name not in TASKS or name in tasks}
    if count > 1:
        made = {name: value.repeat_interleave(count, 0) for name, value in made.items()}
    return made | {n: torch.stack(v, 1).flatten(0, 1) for n, v in samples.items() if n == "image" or n in tasks}


def make_coordinates(geometry: Geometry, source_size: Sequence[int]) -> Tensor:
    """Source voxel of every output voxel, (B, 3, H, W, D); their Jacobian determinants show folds.

    x = A s (phi(i) - c_out) + c_source + t, i mirrored where the draw says so, of a source of a size (H, W, D).
    """
    size, device = geometry.spatial_size, geometry.velocity.device
    counts = _coarsen(size, 1 / VELOCITY_STEP)
    steps = [(n - 1) / (c - 1) for n, c in zip(size, counts, strict=True)]
    velocity = separable.interpolate_lattice(geometry.velocity, geometry.velocity_spacing, size, counts)
    flow = spatial.integrate_velocity(torch.stack([velocity[:, i] / s for i, s in enumerate(steps)], 1))
    coarse = spatial.identity_grid(counts, device=device)
    points = torch.stack([coarse[:, i] * s + flow[:, i] * s for i, s in enumerate(steps)], 1)
    matrix, translation, stride = geometry.matrix, geometry.translation, geometry.stride
    coordinates = spatial.sampling_coordinates(matrix, translation, points, size, source_size, stride)
    # The coarse points span the volume from its first to its last voxel: what is linear between them stays exact.
    spread = [separable.spread_operator(n, c, device=device) for n, c in zip(size, counts, strict=True)]
    over_h = torch.where(geometry.mirror.reshape(-1, 1, 1), spread[0].flip(1), spread[0])
    return separable.apply_separable(coordinates, [over_h, *(o.expand(len(over_h), -1, -1) for o in spread[1:])])


def _coarsen(size: Sequence[int], share: float) -> list[int]:
    """Points along each axis of a grid with a share of the points of another, at least 2."""
    return [max(2, math.ceil(n * share)) for n in size]


def make_lesion_maps(
    subject: Mapping[str, Tensor], geometry: Geometry, coordinates: Tensor, segmentation: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Lesions that a subject has, and lesions that it is given: two maps of 0 and 1, (B, 1, H, W, D), or None.

    Own lesions, ``lesion`` of the subject, only move with it, because real images show them; given ones, out of noise
    or of another subject's ``lesion_shape``, are carried by a flow of their own. There is None if neither can exist.
    """
    size, counts = geometry.spatial_size, _coarsen(geometry.spatial_size, 1 / LESION_STEP)
    masks = {key: subject[key] for key in ("lesion", "lesion_shape") if key in subject}
    maps = {key: (spatial.gather_nearest(mask, coordinates) > 0).float() for key, mask in masks.items()}
    if not geometry.lesion_noise:
        return (maps["lesion"], torch.zeros_like(maps["lesion"])) if "lesion" in maps else None

    def spread(points: Tensor, spacing_mm: float) -> Tensor:
        spacing = torch.full((len(points), 3), spacing_mm / geometry.voxel_mm, device=points.device)
        return separable.interpolate_lattice(points, spacing, size, counts)

    region = geometry.lesion_region[segmentation]
    octaves = zip(geometry.lesion_noise, LESION_NOISE_MM, strict=True)
    noise = torch.stack([spread(points, spacing) * 0.5**i for i, (points, spacing) in enumerate(octaves)]).sum(0)
    shape = spatial.make_lesions(noise, separable.resize(region.float(), counts) > 0.5, geometry.lesion_coverage)
    if "lesion_shape" in maps:  # shares keep the edge where it was
        drawn = separable.resize(spatial.average_neighbours(maps["lesion_shape"]), counts)
        has_shape = drawn.amax((1, 2, 3, 4), keepdim=True) > 0
        shape = torch.where(has_shape, drawn * (_voxelwise(geometry.lesion_coverage) > 0), shape)
    velocity = spatial.compute_curl(spread(geometry.lesion_potential, LESION_FLOW_MM))
    soft = spatial.carry(shape, velocity, geometry.lesion_flow / LESION_STEP)
    given = ((separable.resize(soft, size) > 0.5) & region).float()
    return maps.get("lesion", torch.zeros_like(given)), given


def _voxelwise(values: Tensor) -> Tensor:
    """A number for each sample, (B,), as (B, 1, 1, 1, 1)."""
    return values.reshape(-1, 1, 1, 1, 1)


def _coarser(coordinates: Tensor, fine: Tensor, coarse: Tensor) -> Tensor:
    """Coordinates in a map that covers the same box as ``fine`` with fewer, larger voxels."""
    if fine.shape[2:] == coarse.shape[2:]:
        return coordinates
    ratios = [n / m for n, m in zip(fine.shape[2:], coarse.shape[2:], strict=True)]
    return torch.stack([(coordinates[:, i] - (r - 1) / 2) / r for i, r in enumerate(ratios)], 1)


def _read(subject: Mapping[str, Tensor], params: SynthesisParams, coordinates: Tensor) -> dict[str, Tensor]:
    """Everything dense at the output's voxels: painted means and stds, real images, distances."""
    geometry, labels, first = params.geometry, subject["generation_labels"], params.appearances[0]
    columns = [torch.ones_like(first.mean), first.is_head.expand_as(first.mean)]
    values = torch.stack([*columns, *(v for a in params.appearances for v in (a.mean, a.std))], -1)
    sources = {name: subject[name].float() for name in (*IMAGES, "distance") if name in subject}
    read: dict[str, Tensor] = {}
    if geometry.stride > 1:
        # Where the source voxels lie that an output voxel would hold if nothing bent it, (B, 3, stride^3)
        along = torch.arange(geometry.stride, device=geometry.matrix.device, dtype=geometry.matrix.dtype)
        places = geometry.matrix @ torch.cartesian_prod(*[along - (geometry.stride - 1) / 2] * 3).T
        read["painted"] = intensity.paint_voxels(labels, values, coordinates, places)
    else:
        sources["painted"] = intensity.paint_labels(labels, values)
    for size in dict.fromkeys(source.shape[2:] for source in sources.values()):
        together = {name: source for name, source in sources.items() if source.shape[2:] == size}
        places = _coarser(coordinates, labels, next(iter(together.values())))
        warped = spatial.warp_all(list(together.values()), places, padding_mode="zeros")
        read |= dict(zip(together, warped, strict=True))
    # The first painted channel is 1 in the subject's box: what lies outside is air, far from everything.
    outside = 1 - read["painted"][:, :1]
    read |= {name: read[name] + air * outside for name, air in IMAGES.items() if name in read and air != 0}
    if "distance" in read:
        shrink = _voxelwise(torch.linalg.det(geometry.matrix).abs().pow(-1 / 3))
        distance = read["distance"] * shrink + FAR_MM * outside
        read["distance"] = torch.where(_voxelwise(geometry.mirror), TASKS["distance"].mirror(distance), distance)
    return read


def _read_mni(subject: Mapping[str, Tensor], coordinates: Tensor, geometry: Geometry) -> Tensor | None:
    """MNI coordinates in mm; the subject's box is continued by its border."""
    if "mni" not in subject:
        return None
    # Maps and deformation are smooth: reading every 2 mm is 0.02 mm off on average, for an eighth of the cost at 1 mm.
    source, counts = subject["mni"].float(), _coarsen(geometry.spatial_size, min(1.0, geometry.voxel_mm / MNI_STEP_MM))
    places = _coarser(separable.resize(coordinates, counts), subject["generation_labels"], source)
    read = separable.resize(spatial.warp_all([source], places)[0], geometry.spatial_size)
    return torch.where(_voxelwise(geometry.mirror), TASKS["mni"].mirror(read), read)


def _look(geometry: Geometry, mni: Tensor | None, segmentation: Tensor) -> tuple[Tensor, Tensor]:
    """What is in the field of view and not defaced, and what of the anatomy stays, two masks of (B, 1, H, W, D)."""
    grid = spatial.identity_grid(segmentation.shape[2:], device=segmentation.device)
    first, last = geometry.field_of_view[:, :, None, None, None].unbind(-1)
    visible = ((grid >= first) & (grid <= last)).all(dim=1, keepdim=True)
    if mni is not None:
        along_y, along_z, offset = geometry.face.reshape(-1, 3, 1, 1, 1, 1).unbind(1)
        face = mni[:, 1:2] * along_y + mni[:, 2:3] * along_z > offset
        visible = visible & ~(face & ~geometry.is_brain[segmentation])
    kept = torch.gather(geometry.kept, 1, segmentation.flatten(1)).reshape(segmentation.shape)
    return visible, spatial.average_neighbours(kept) > _voxelwise(geometry.strip_threshold)
