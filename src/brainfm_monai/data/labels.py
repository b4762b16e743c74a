"""Label maps on the grid of a prepared subject (RAS+, 1 mm, a box around the brain), and what is made of them."""

import logging
from collections.abc import Container, Mapping, Sequence
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Orientation, Spacing, generate_spatial_bounding_box
from nibabel.affines import apply_affine, from_matvec, voxel_sizes
from scipy import ndimage

from brainfm_monai.anatomy import Protocol
from brainfm_monai.data.subjects import Image, Source
from brainfm_monai.io import SCAN_SUFFIXES, ScanError, find_repeated, read_labels, read_table, refuse_if, scan_stem
from brainfm_monai.synthesis.ranges import CONTRASTS, INTENSITY_TOP, read_contrasts

logger = logging.getLogger(__name__)

SPACING_TOLERANCE_MM = 1e-3
# What FreeSurfer's white surface encloses: white matter, ventricles, deep grey matter, lesions, vessels in them, and
# the patches of SynthSeg's maps. Its surface passes around hippocampus and amygdala without following them, so both
# count as inside, too. Midline structures (third ventricle), brainstem and cerebellum belong to no hemisphere.
WHITE_IDS: dict[str, tuple[int, ...]] = {
    "left": (2, 4, 5, 10, 11, 12, 13, 17, 18, 25, 26, 28, 30, 31, 78, 136, 137),
    "right": (41, 43, 44, 49, 50, 51, 52, 53, 54, 57, 58, 60, 62, 63, 79, 163, 164),
}
PIAL_IDS: dict[str, tuple[int, ...]] = {"left": (*WHITE_IDS["left"], 3), "right": (*WHITE_IDS["right"], 42)}
COARSE_MM = 1.5  # larger voxels of a label map are warned of
# parcels of the cortex and of the white matter below it, hypointensities and the corpus callosum, by first and last id
# of FreeSurfer's colour table, and what they become on the left and on the right
FOLDED = [
    [int(row[key]) for key in ("first", "last", "left", "right")]
    for row in read_table(str(resources.files("brainfm_monai") / "datasets" / "folded.tsv"))
]
BOX_IDS = (*PIAL_IDS["left"], *PIAL_IDS["right"], 7, 8, 46, 47)  # cerebrum and cerebellum, which place the box
# of what the generator paints
PROTOCOL, HEAD_PROTOCOL = "brainfm_generation", "synthseg_generation"
FIRST_HEAD_ID = 500
WHITE, GREY, FLUID_OR_NOTHING = (2, 41), (3, 42), (0, 24)
WHITE_TO_GREY, GREY_TO_FLUID, STEPS = 150, 200, 50  # first codes of the two ramps, and steps of 2 %
FIRST_CLUSTER = 251
HYPOINTENSITIES, HYPOINTENSITY_CODE = (77, 78, 79), 77
TRANSITION_MM = 1.0  # a voxel: the ramp of a boundary that runs through its centre
AIR_HU = -1000.0
# Labels end in steps of a voxel, where a scan's profile blends the tissues of a voxel. A Gaussian of this width,
# chosen, has a full width at half maximum of 1.2 mm, about a voxel: it takes the steps away and leaves sulci and bone.
SMOOTHING_MM = 0.5


def find_label_maps(path: Path) -> list[Source]:
    """A label map, or those of a folder, which is the data set, in alphabetical order; ValueError if there is none."""
    files = [path]
    if path.is_dir():
        files = sorted(f for f in path.iterdir() if f.name.lower().endswith(SCAN_SUFFIXES) and f.name[0] != ".")
    refuse_if(not files, f"{path}: label maps ({', '.join(SCAN_SUFFIXES)}) are needed", "none")
    return [Source(scan_stem(file), {"labels": file}, {"dataset": file.resolve().parent.name}) for file in files]


def load_label_map(path: Path, table: Mapping[int, int] | None = None) -> Image:
    """Read a label map, turn it to RAS+ and resample it to 1 mm isotropic voxels (nearest neighbour) if it is not.

    An oblique grid stays oblique. ``table`` has the FreeSurfer id of each id in the file, if these are others. Returns
    ids, (H, W, D), int32, and the affine to RAS mm. ValueError if the file is no label map with an orientation, or an
    id is not in the table.
    """
    volume = read_labels(path)
    rule = f"{path}: a label map that states which side is left is needed"
    refuse_if(not volume.is_oriented, rule, "no orientation in its header", ScanError)
    for warning in volume.warnings:
        logger.warning("%s: %s", path, warning)
    values, sizes = volume.values, voxel_sizes(volume.affine)
    if table:
        present, inverse = np.unique(values, return_inverse=True)
        unknown = [int(i) for i in present if i not in table and i]
        refuse_if(unknown, f"{path}: every id must be in the table of ids", f"unknown ids {unknown[:10]}")
        values = np.array([table.get(i, 0) for i in present], dtype=np.int32)[inverse].reshape(values.shape)
    if sizes.max() > COARSE_MM:
        found = " x ".join(f"{size:.3g}" for size in sizes)
        logger.warning("%s: voxels of about 1 mm are needed, found %s mm: boundaries get their steps", path, found)
    ids: Any = MetaTensor(torch.from_numpy(values)[None], affine=torch.from_numpy(volume.affine))
    ids = Orientation(axcodes="RAS", labels=None)(ids)
    if np.abs(ids.pixdim.numpy() - 1).max() > SPACING_TOLERANCE_MM:  # float64 holds every id of 32 bits
        resample = Spacing(pixdim=1.0, mode="nearest", padding_mode="border", scale_extent=True, dtype=np.float64)
        ids = resample(ids.double())
    return ids.as_tensor()[0].round().int().numpy(), ids.affine.numpy().astype(np.float64)


def read_id_table(path: Path) -> dict[int, int]:
    """FreeSurfer ids by id, out of a table with these columns; OSError or ValueError if it is none, or one is twice."""
    try:
        pairs = [(int(row["id"]), int(row["freesurfer_id"])) for row in read_table(path)]
    except (KeyError, ValueError) as error:
        needed = f"{path}: whole numbers in the columns 'id' and 'freesurfer_id' are needed"
        raise ValueError(f"{needed}, found {error}") from error
    twice = find_repeated(key for key, _ in pairs)
    refuse_if(twice or not pairs, f"{path}: each id must stand once", f"twice: {twice}" if twice else "no rows")
    return dict(pairs)


def fold_ids(ids: np.ndarray) -> np.ndarray:
    """Parcels as the structures that they are parts of, and ids of both sides as those of their side, :data:`FOLDED`.

    A voxel, isotropic, is on the side of the plane halfway between the centroids of left and right white matter.
    """
    present = np.unique(ids).tolist()
    sides = {i: both for first, last, *both in FOLDED for i in present if first <= i <= last}
    if not sides:
        return ids
    folded = ids.copy()
    for i, (left, right) in sides.items():
        folded[ids == i] = left if left == right else i
    where = np.isin(ids, [i for i, (left, right) in sides.items() if left != right])
    whites = [np.argwhere(folded == white) for white in WHITE]
    if where.any() and all(map(len, whites)):
        start, end = (white.mean(axis=0) for white in whites)
        on_right = ((np.argwhere(where) - (start + end) / 2) @ (end - start) > 0).astype(int)
        folded[where] = [sides[int(i)][side] for i, side in zip(ids[where], on_right, strict=True)]
    return folded


def crop_to_brain(ids: np.ndarray, affine: np.ndarray, spatial_size: Sequence[int], source: str = "labels") -> Image:
    """Cut a box around cerebrum and cerebellum out of a map, 0 outside, and move the affine; an error without them."""
    brain, size = np.isin(ids, BOX_IDS), np.asarray(spatial_size)
    refuse_if(not brain.any(), f"{source}: cerebrum or cerebellum labels are needed to place the box", "none")
    first, last = map(np.array, generate_spatial_bounding_box(brain[None]))
    start = np.floor((first + last - 1) / 2 - (size - 1) / 2).astype(int)
    before, after = np.maximum(-start, 0), np.maximum(start + size - ids.shape, 0)
    padded = np.pad(ids, list(zip(before, after, strict=True)))
    box = tuple(slice(a, a + n) for a, n in zip(start + before, size, strict=True))
    return padded[box].copy(), from_matvec(affine[:3, :3], apply_affine(affine, start))


def compute_signed_distance(inside: np.ndarray, spacing_mm: float = 1.0) -> np.ndarray:
    """Signed Euclidean distance to the boundary of a region (H, W, D), bool, in mm, float32, negative inside.

    The transform measures from voxel centre to voxel centre across the boundary, which lies between them: half a voxel
    of ``spacing_mm`` is taken off on both sides. It is +inf everywhere for an empty region, -inf for a full one.
    """
    import edt  # of the extra "prepare": a training on prepared subjects does without it, as in the zip for a model zoo

    region = np.ascontiguousarray(inside, dtype=bool)
    if not region.any() or region.all():
        return np.full(region.shape, -np.inf if region.any() else np.inf, dtype=np.float32)
    within, beyond = (edt.edt(part, anisotropy=(spacing_mm,) * 3, parallel=1) for part in (region, ~region))
    return np.where(region, spacing_mm / 2 - within, beyond - spacing_mm / 2).astype(np.float32)


def compute_hemisphere_distances(ids: np.ndarray, spacing_mm: float = 1.0) -> np.ndarray:
    """Distances in mm, (H, W, D, 4), to left pial, left white, right pial, right white in a map of FreeSurfer ids."""
    regions = [table[side] for side in ("left", "right") for table in (PIAL_IDS, WHITE_IDS)]
    return np.stack([compute_signed_distance(np.isin(ids, region), spacing_mm) for region in regions], axis=-1)


def make_generation_labels(
    ids: np.ndarray, distance: np.ndarray | None = None, clusters: np.ndarray | None = None
) -> tuple[np.ndarray, str]:
    """Labels for the generator, uint8, and their protocol's name, out of FreeSurfer ids (H, W, D) with parcels folded.

    A map that labels the head outside the brain follows ``synthseg_generation``, any other ``brainfm_generation``.
    There, where a surface passes through a voxel of white matter and cortex, or of cortex and fluid, the label is the
    code of their mixture: the share goes from 0 to 1 over one millimetre around the surface. ``distance`` is in mm to
    left pial, left white, right pial and right white surfaces, shape (H, W, D, 4); without it no voxel is mixed.
    ``clusters`` are classes 1 to 5 of the head outside the brain. ValueError if an id is not in the protocol.
    """
    if (ids >= FIRST_HEAD_ID).any():
        return Protocol.load(HEAD_PROTOCOL).encode(ids, "generation labels"), HEAD_PROTOCOL
    brain_ids = np.where(np.isin(ids, HYPOINTENSITIES), HYPOINTENSITY_CODE, ids)
    too_large = np.unique(ids[brain_ids >= 100])[:10]  # from there on the codes are mixtures, and no ids of structures
    refuse_if(len(too_large), "generation labels: FreeSurfer ids below 100 are needed", too_large)
    labels = Protocol.load(PROTOCOL).encode(brain_ids, "generation labels")
    if clusters is not None:
        outside = (labels == 0) & (clusters > 0)
        labels[outside] = clusters[outside] + FIRST_CLUSTER - 1
    if distance is None:
        return labels, PROTOCOL
    pial, white = distance[..., [0, 2]].min(axis=-1), distance[..., [1, 3]].min(axis=-1)
    share_grey, share_fluid = (np.clip(d / TRANSITION_MM + 0.5, 0, 1) for d in (white, pial))
    at_white = np.isin(ids, WHITE + GREY) & (share_grey > 0) & (share_grey < 1)
    at_pial = np.isin(ids, GREY + FLUID_OR_NOTHING) & (share_fluid > 0) & (share_fluid < 1)
    at_pial &= white > TRANSITION_MM / 2
    labels[at_white] = WHITE_TO_GREY + np.rint(share_grey[at_white] * STEPS)
    labels[at_pial] = GREY_TO_FLUID + np.rint(share_fluid[at_pial] * STEPS)
    return labels, PROTOCOL


def read_means(labels: np.ndarray, protocol: Protocol, names: Sequence[str], source: str) -> dict[str, np.ndarray]:
    """The intensity of every label in some contrasts: HU for CT, [0, 1] for the others, by contrast float32 (L,).

    Mixtures get the weighted means of their parts, and the background is air: 0, or -1000 HU. ValueError, which names
    the ``source``, if a table does not know an id that the labels hold, or a mixture mixes.
    """
    painted, means = (protocol.mixture_weights[np.unique(labels)] > 0).any(axis=0), {}
    for name, mean in zip(names, read_contrasts(names, protocol)[0].numpy(), strict=True):
        unknown = protocol.freesurfer_ids[painted & np.isnan(mean)].tolist()
        rule = f"{source}: the table of {name} must know every id that is painted"
        refuse_if(unknown, rule, f"no {unknown[:10]}")
        air, top = (AIR_HU, 1.0) if name == "CT" else (0.0, INTENSITY_TOP)
        pure = np.where(protocol.freesurfer_ids == 0, air, np.nan_to_num(mean)) / top
        means[name] = (protocol.mixture_weights @ pure).astype(np.float32)
    return means


def find_paintable(labels: np.ndarray, protocol: str, has: Container[str]) -> list[str]:
    """The contrasts that a subject lacks and whose tables know all of its labels."""
    names = []
    for name in CONTRASTS:
        with suppress(ValueError):
            if name not in has and read_means(labels, Protocol.load(protocol), [name], ""):
                names.append(name)
    return names


def simulate_contrasts(
    labels: np.ndarray, affine: np.ndarray, protocol: Protocol, names: Sequence[str], source: str
) -> dict[str, np.ndarray]:
    """Paint contrasts on generation labels (H, W, D): each label's mean, see :func:`read_means`, a little smoothed."""
    sigma_vox = SMOOTHING_MM / voxel_sizes(affine)
    means = read_means(labels, protocol, names, source)
    return {name: ndimage.gaussian_filter(mean[labels], sigma_vox, mode="nearest") for name, mean in means.items()}
