"""Scans on the box of a subject, where ``ids`` are FreeSurfer ids, (H, W, D), and ``affine`` takes voxels to RAS mm."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from monai.transforms.utils import get_largest_connected_component_mask
from nibabel.affines import apply_affine, voxel_sizes
from scipy import ndimage
from scipy.spatial.distance import cdist
from scipy.spatial.transform import Rotation
from skimage.filters import threshold_otsu
from sklearn.cluster import KMeans

from brainfm_monai.anatomy import Protocol, is_brain
from brainfm_monai.data.labels import AIR_HU, WHITE, read_means
from brainfm_monai.data.registration import RIGID, register_linear, resample_to_box
from brainfm_monai.data.subjects import CONTRASTS, Image
from brainfm_monai.io import read_volume, refuse_if

logger = logging.getLogger(__name__)

UPPER_QUANTILE, CLOSING_VOX = 0.999, 4
CLUSTERS, CLUSTER_SAMPLES = 5, 50_000
LOWEST_HU = -1024.0  # scanners fill with less outside of their field of view
MINIMUM_AIR_SHARE = 0.01
SAME_PLACE_DICE = 0.5
MINIMUM_COVER = 0.8  # share of the labelled brain that must lie in the head of its scan; in real subjects 0.97 and more
SAME_GRID_MM = 0.1
SHELL_MM = (6, 14)  # skull and scalp around the brain
STRIPPED_SHARE, DEFACED_SHARE = 0.9, 0.7  # of a shell or of the face that must be exactly 0
# eyes, nose and cheeks, and what defacing tools clear in front of and below them: low and high corner in MNI152 mm
FACE_MNI_MM = ((-35, 55, -65), (35, 85, -30))
FRONT_MNI_MM = ((-90, 15, -140), (90, 130, 5))


class BoxScan(NamedTuple):
    """A scan on the box of its subject."""

    values: np.ndarray  # in the unit of the file, shape (H, W, D); air where the scan does not reach
    seen: np.ndarray  # mask of the field of view, same shape, bool
    motion: np.ndarray  # rigid map from RAS mm of the reference to RAS mm of this scan, shape (4, 4)
    corners: np.ndarray  # centres of the corner voxels of the file's grid in RAS mm, shape (8, 3)


def read_scan(path: Path) -> Image:
    """Read a scan or mask as stored, (H, W, D), float32, voxels that are not finite as 0, or a ScanError."""
    volume = read_volume(path)
    for warning in volume.warnings:
        logger.warning("%s: %s", path, warning)
    return np.nan_to_num(volume.values.astype(np.float32), posinf=0, neginf=0), volume.affine


def find_head(values: np.ndarray) -> np.ndarray:
    """The head in a scan (H, W, D), bool: the largest piece brighter than air (Otsu's threshold), without holes."""
    seen = values[values != 0]
    if not len(seen) or seen.min() == seen.max():
        return np.zeros(values.shape, dtype=bool)
    # the square root brings dark tissue and bright tissue closer together than either is to air
    floor = float(threshold_otsu(np.sqrt(np.clip(seen - min(seen.min(), 0), 0, None)))) ** 2 / 2
    closed = ndimage.binary_closing(np.pad(values > floor, CLOSING_VOX), iterations=CLOSING_VOX)
    filled = ndimage.binary_fill_holes(closed)[(slice(CLOSING_VOX, -CLOSING_VOX),) * 3]
    return np.asarray(get_largest_connected_component_mask(filled, connectivity=1))


def white_matter_level(contrast: str) -> float:
    """The intensity in [0, 1] of cerebral white matter in painted T1w, T2w or FLAIR, out of the contrast's table."""
    protocol = Protocol.load("synthseg_generation")
    white = np.array([protocol.label_of_id[i] for i in WHITE])
    return float(read_means(white, protocol, [contrast], contrast)[contrast][white].mean())


def scale_contrast(values: np.ndarray, contrast: str, ids: np.ndarray | None = None) -> np.ndarray:
    """Map a scan (H, W, D) to the scale of painted contrasts, float32: a CT stays in HU, others get to [0, 1].

    The minimum becomes 0, the median of cerebral white matter :func:`white_matter_level`, and what is brighter than 1
    is clipped: the picture of a brain does not depend on its scalp. Without ``ids`` of white matter, on the same grid,
    the 99.9 % quantile in the head becomes 1. A scan without contrast becomes 0.
    """
    if contrast == "CT":
        return values
    low, white = float(values.min()), values[:0] if ids is None else values[np.isin(ids, WHITE)]
    if len(white):
        span = (float(np.median(white)) - low) / white_matter_level(contrast)
    else:
        head = values[find_head(values)]
        span = float(np.quantile(head, UPPER_QUANTILE)) - low if len(head) else 0.0
    return (np.clip((values - low) / span, 0, 1) if span > 0 else np.zeros_like(values)).astype(np.float32)


def cluster_extracerebral(values: np.ndarray, brain: np.ndarray) -> np.ndarray:
    """Classes of the head in a scan (H, W, D) outside the brain, darkest first, uint8: 1 to 5, and 0 elsewhere."""
    rest = find_head(values) & ~brain
    classes = np.zeros(values.shape, dtype=np.uint8)
    seen = values[rest]
    sample = seen[:: max(1, len(seen) // CLUSTER_SAMPLES), None]
    if len(np.unique(sample)) < CLUSTERS:
        return classes
    start = np.quantile(sample, (np.arange(CLUSTERS) + 0.5) / CLUSTERS)[:, None]
    centres = np.sort(KMeans(CLUSTERS, init=start, n_init=1, random_state=0).fit(sample).cluster_centers_.ravel())
    classes[rest] = 1 + np.searchsorted((centres[1:] + centres[:-1]) / 2, seen)
    return classes


def gather_scans(files: Mapping[str, Path], ids: np.ndarray, affine: np.ndarray) -> dict[str, BoxScan]:
    """Every contrast among files by role, on the box; the first one is the reference, to which others are registered.

    ValueError if a file holds no scan, a CT is not in HU, or the labels do not lie on the head of the reference.
    """
    scans: dict[str, BoxScan] = {}
    for key, path in ((key, path) for key, path in files.items() if key in CONTRASTS):
        values, file_affine = read_scan(path)
        outside, motion, is_reference = AIR_HU if key == "CT" else 0.0, np.eye(4), not scans
        if key == "CT":
            values = check_hounsfield(values, str(path))
        if not is_reference:
            # bone would outweigh all soft tissue
            soft = np.clip(values, AIR_HU, 200.0) - AIR_HU if key == "CT" else values
            motion = align_scan((next(iter(scans.values())).values, affine), (soft, file_affine))
        grid = (motion @ affine, ids.shape)
        on_box = resample_to_box(values, file_affine, *grid, outside=outside)
        seen = resample_to_box(np.ones_like(values), file_affine, *grid) > 0.5
        scans[key] = BoxScan(on_box, seen, motion, _corners(values.shape, file_affine))
        brain = is_brain(ids) & seen
        cover = find_head(on_box - outside)[brain].mean() if is_reference and brain.any() else 0.0
        rule = f"{path}: a scan on whose head the labels of {files['labels'].name} lie is needed"
        refuse_if(is_reference and cover < MINIMUM_COVER, rule, f"{100 * cover:.0f} % of the labelled brain in it")
    return scans


def recognise_contrast(path: Path, ids: np.ndarray, affine: np.ndarray) -> str:
    """The contrast of a scan: CT if it is in HU, else that whose painted brain is most like it (by correlation)."""
    values, file_affine = read_scan(path)
    if (values < AIR_HU / 2).mean() > MINIMUM_AIR_SHARE and values.max() > -AIR_HU / 2:
        return "CT"
    protocol = Protocol.load("synthseg_generation")
    brain = np.isin(ids, protocol.freesurfer_ids[protocol.is_brain])
    labels, found = protocol.encode(ids[brain]), resample_to_box(values, file_affine, affine, ids.shape)[brain]
    means = read_means(labels, protocol, [name for name in CONTRASTS if name != "CT"], str(path))
    return max(means, key=lambda name: np.corrcoef(means[name][labels], found)[0, 1])


def align_scan(fixed: Image, moving: Image) -> np.ndarray:
    """Rigid map (4, 4) from points of the fixed scan in RAS mm to those of the moving one, by mutual information.

    It starts where the headers place the scans, or, if the heads, in air of 0, then hardly overlap, with the centres of
    gravity on each other. RuntimeError if elastix fails.
    """
    seen = resample_to_box(*moving, fixed[1], fixed[0].shape)
    head, other_head = find_head(fixed[0]), find_head(seen)
    dice = 2 * (head & other_head).sum() / max(1, head.sum() + other_head.sum())
    return register_linear(fixed, moving, RIGID, from_headers=bool(dice > SAME_PLACE_DICE))


def measure_motion(matrix: np.ndarray, centre_mm: np.ndarray) -> dict[str, float]:
    """Angle in degrees of a rigid map and how far it takes a point, in mm."""
    angle = np.rad2deg(Rotation.from_matrix(matrix[:3, :3]).magnitude())
    shift = np.linalg.norm(apply_affine(matrix, centre_mm) - centre_mm)
    return {"rotation_deg": round(float(angle), 2), "shift_mm": round(float(shift), 2)}


def check_hounsfield(values: np.ndarray, source: str) -> np.ndarray:
    """A CT in HU, with what lies below air's range lifted to it; ValueError if hardly a voxel is as dark as air."""
    dark = float((values < AIR_HU / 2).mean())
    rule = f"{source}: a CT in HU with air at about -1000 is needed"
    refuse_if(dark < MINIMUM_AIR_SHARE, rule, f"{100 * dark:.2f} % of it below -500")
    return np.maximum(values, LOWEST_HU)


def carry_lesion(
    files: Mapping[str, Path], contrast: str, scans: Mapping[str, BoxScan], affine: np.ndarray
) -> tuple[np.ndarray | None, str]:
    """Bring the mask of lesions, the file of the role ``lesion``, onto the box, from the scan on which it was drawn.

    That is the scan of ``contrast``; if this is empty, the scan whose grid the mask has, or the only one. Returns the
    mask, uint8, or None and why it is left out.
    """
    values, file_affine = read_scan(files["lesion"])
    corners, name = _corners(values.shape, file_affine), files["lesion"].name
    fits = [key for key, scan in scans.items() if cdist(corners, scan.corners).min(axis=1).max() < SAME_GRID_MM]
    drawn_on = contrast or next(iter(fits or (scans if len(scans) == 1 else ())), "")
    if drawn_on not in scans:
        needed = f"a scan of {contrast}" if contrast else f"that of {' or '.join(scans)}"
        return None, f"{name} is left out: its grid must be {needed}, or its name tell space-<contrast>"
    scan, drawn = scans[drawn_on], (values > 0.5).astype(np.float32)
    lesion = resample_to_box(drawn, file_affine, scan.motion @ affine, scan.values.shape) > 0.5
    if drawn.any() and not lesion.any():
        return None, f"{name} is left out: no lesion of it lies in the box"
    return lesion.astype(np.uint8), ""


def find_removed(
    contrast: str, scan: BoxScan, mask: Path | None, ids: np.ndarray, affine: np.ndarray, mni_mm: np.ndarray
) -> np.ndarray:
    """Where a scan on the box holds no data, bool (H, W, D): outside its field of view or the brain, or where defaced.

    A ``mask`` of the data set, 1 where the scan was defaced, decides. Without it: defacing and brain extraction set
    voxels to exactly 0, which the noise of air rarely is. A scan, not yet scaled, counts as brain-extracted if nine
    tenths of a shell around the brain are 0, and as defaced if seven tenths of the place of eyes and nose are.
    ``mni_mm`` are MNI152 coordinates on a grid of blocks of the box, (H / n, W / n, D / n, 3).
    """
    if mask is not None:
        return np.asarray(~scan.seen | (resample_to_box(*read_scan(mask), scan.motion @ affine, ids.shape) > 0.5))

    def find_between(low: tuple[int, ...], high: tuple[int, ...]) -> np.ndarray:
        inside = ((mni_mm > low) & (mni_mm < high)).all(axis=-1)
        return np.kron(inside, np.ones(np.floor_divide(ids.shape, inside.shape), dtype=bool))

    brain, empty = is_brain(ids), scan.values == (AIR_HU if contrast == "CT" else 0)
    away = ndimage.distance_transform_edt(~brain, sampling=voxel_sizes(affine))
    shell, face = (away > SHELL_MM[0]) & (away < SHELL_MM[1]) & scan.seen, find_between(*FACE_MNI_MM) & scan.seen
    removed = np.zeros(ids.shape, dtype=bool)
    if shell.any() and empty[shell].mean() > STRIPPED_SHARE:
        removed = empty & ~brain
    elif face.any() and empty[face].mean() > DEFACED_SHARE:
        removed = empty & ~brain & find_between(*FRONT_MNI_MM)
    return np.asarray(~scan.seen | removed)


def _corners(shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    """Centres of the corner voxels of a grid in RAS mm, shape (8, 3)."""
    return np.asarray(apply_affine(affine, np.indices((2, 2, 2)).reshape(3, -1).T * (np.array(shape) - 1)))
