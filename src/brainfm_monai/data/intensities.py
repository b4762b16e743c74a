"""Scans of a subject on its box: resampling once, scaling to [0, 1], the head, and classes of what is not brain."""

import logging
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from nibabel.affines import voxel_sizes
from nibabel.processing import resample_from_to
from scipy import ndimage
from skimage.filters import threshold_otsu
from sklearn.cluster import KMeans

from brainfm_monai.anatomy import Protocol
from brainfm_monai.data.labels import FLUID_OR_NOTHING, GREY, WHITE, read_means
from brainfm_monai.data.subjects import Image
from brainfm_monai.functional.intensity import antialias
from brainfm_monai.io import read_volume

logger = logging.getLogger(__name__)

UPPER_QUANTILE, CLOSING_VOX = 0.999, 4
CLUSTERS, CLUSTER_SAMPLES = 5, 50_000
FLUID, VENTRICLES = 24, (4, 43)  # FreeSurfer ids
# Of borders of the cortex that a scan moves, chosen by eye on two T1w scans: std of the neighbourhood in which a
# tissue's mean intensity is taken, std against noise, and voxels by which a border moves at most
BORDER_MM, BORDER_SMOOTHING_MM, BORDER_STEPS = 10.0, 0.5, 2


def read_scan(path: Path) -> Image:
    """Read one volume of real numbers, with NaN and infinite voxels as 0; warnings of the reader are logged.

    Returns values, shape (H, W, D), float32, in the file's own axes, and the affine to RAS mm; else a ScanError.
    """
    volume = read_volume(path)
    for warning in volume.warnings:
        logger.warning("%s: %s", path, warning)
    return np.nan_to_num(volume.values.astype(np.float32), posinf=0, neginf=0), volume.affine


def resample_to_box(
    values: np.ndarray, affine: np.ndarray, box_affine: np.ndarray, shape: tuple[int, int, int], outside: float = 0.0
) -> np.ndarray:
    """Bring a volume (H, W, D) onto a box of size ``shape`` with voxels of 1 mm in one linear interpolation, float32.

    Axes along which the scan is finer than the box are smoothed first, to the width of the box's voxels. Both affines
    take voxels to mm, the box's with any rigid motion in it; ``outside`` is the value where the scan does not reach.
    """
    target_mm = [float(voxel_sizes(box_affine).mean())] * 3
    volume = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
    image = nib.Nifti1Image(antialias(volume, voxel_sizes(affine).tolist(), target_mm).numpy(), affine)
    moved = resample_from_to(image, (shape, box_affine), order=1, mode="constant", cval=outside)
    return np.asarray(moved.dataobj, dtype=np.float32)


def find_head(values: np.ndarray) -> np.ndarray:
    """The head in a scan (H, W, D): the largest piece brighter than air (Otsu's threshold), closed, without holes.

    The mask is bool, and empty for a constant scan.
    """
    seen = values[values != 0]
    if not len(seen) or seen.min() == seen.max():
        return np.zeros(values.shape, dtype=bool)
    # the square root brings dark tissue and bright tissue closer together than either is to air
    floor = float(threshold_otsu(np.sqrt(np.clip(seen - min(seen.min(), 0), 0, None)))) ** 2 / 2
    closed = ndimage.binary_closing(np.pad(values > floor, CLOSING_VOX), iterations=CLOSING_VOX)
    inner = (slice(CLOSING_VOX, -CLOSING_VOX),) * 3
    regions, count = ndimage.label(ndimage.binary_fill_holes(closed)[inner])
    largest = 1 + np.bincount(regions.ravel())[1:].argmax() if count else 1
    return np.asarray(regions == largest)


def white_matter_level(contrast: str) -> float:
    """The intensity in [0, 1] of cerebral white matter in painted T1w, T2w or FLAIR, out of the contrast's table."""
    protocol = Protocol.load("synthseg_generation")
    white = np.array([protocol.label_of_id[i] for i in WHITE])
    return float(read_means(white, protocol, [contrast], contrast)[contrast][white].mean())


def scale_contrast(values: np.ndarray, contrast: str, ids: np.ndarray | None = None) -> np.ndarray:
    """Map a scan (H, W, D) to the scale of painted contrasts, float32: a CT stays in HU, others get to [0, 1].

    The minimum of T1w, T2w or FLAIR becomes 0, the median of its cerebral white matter, FreeSurfer ids of the same
    shape, :func:`white_matter_level`, and what is brighter than 1 is clipped: the picture of a brain does not depend on
    its scalp. Without white matter, the 99.9 % quantile in the head becomes 1. A scan without contrast becomes 0.
    """
    if contrast == "CT":
        return values
    low, white = float(values.min()), values[:0] if ids is None else values[np.isin(ids, WHITE)]
    if len(white):
        span = (float(np.median(white)) - low) / white_matter_level(contrast)
    else:
        head = find_head(values)
        span = float(np.quantile(values[head], UPPER_QUANTILE)) - low if head.any() else 0.0
    if span <= 0:
        return np.zeros(values.shape, dtype=np.float32)
    return np.clip((values - low) / span, 0, 1).astype(np.float32)


def cluster_extracerebral(values: np.ndarray, brain: np.ndarray) -> np.ndarray:
    """Classes of the head outside the brain by brightness, the darkest first.

    ``values`` is a scan (H, W, D), ``brain`` the mask of what has labels already. The classes, uint8, are 0 in the air
    and in the brain and 1 to 5 elsewhere in the head; all are 0 for a brain-extracted scan.
    """
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


def sharpen_cortex(ids: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Move the borders of the cortex to where a T1w scan shows them, by two voxels at most.

    That is where its intensity crosses the middle between white matter and cortex, and between cortex and fluid. The
    intensities of white matter and cortex are means of what lies within :data:`BORDER_MM`, so that a bias field does
    not move the borders. FreeSurfer ids and scan, air at 0, have one shape (H, W, D) and voxels of 1 mm. Where the scan
    does not show the three in this order of brightness, nothing is changed.
    """
    sharp, smooth = ids.copy(), ndimage.gaussian_filter(values.astype(np.float32), BORDER_SMOOTHING_MM)
    white, grey = np.isin(ids, WHITE), np.isin(ids, GREY)
    fluid = ndimage.binary_erosion(np.isin(ids, VENTRICLES))
    if not (white.any() and grey.any() and fluid.any()):
        return sharp

    def mean_near(mask: np.ndarray) -> np.ndarray:
        parts = (part.astype(np.float32) for part in (mask, mask * smooth))
        weight, total = (ndimage.gaussian_filter(part, BORDER_MM) for part in parts)
        return np.asarray(total / np.maximum(weight, 1e-6))

    core_white, core_grey = ndimage.binary_erosion(white, iterations=2), ndimage.binary_erosion(grey)
    of_white, of_grey, of_fluid = mean_near(core_white), mean_near(core_grey), float(np.median(smooth[fluid]))
    ordered = (of_white > of_grey) & (of_grey > of_fluid)
    bright, dark = smooth > (of_white + of_grey) / 2, smooth < (of_grey + of_fluid) / 2
    for _ in range(BORDER_STEPS):
        white, grey = np.isin(sharp, WHITE), np.isin(sharp, GREY)
        outside = np.isin(sharp, FLUID_OR_NOTHING)
        near_white, near_grey, near_outside = (ndimage.binary_dilation(mask) for mask in (white, grey, outside))
        to_white = ordered & bright & grey & near_white
        to_grey = ordered & ~bright & white & near_grey
        to_fluid = ordered & dark & grey & near_outside & ~near_white
        for i_grey, i_white in zip(GREY, WHITE, strict=True):
            sharp[to_white & (sharp == i_grey)] = i_white
            sharp[to_grey & (sharp == i_white)] = i_grey
        sharp[to_fluid] = FLUID
    return sharp
