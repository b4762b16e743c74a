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

from brainfm_monai.data.subjects import Image
from brainfm_monai.functional.intensity import antialias
from brainfm_monai.io import read_volume

logger = logging.getLogger(__name__)

AIR_HU = -1000.0
UPPER_QUANTILE, CLOSING_VOX = 0.999, 4
CLUSTERS, CLUSTER_SAMPLES = 5, 50_000


def read_scan(path: Path) -> Image:
    """Read one volume of real numbers, with NaN and infinite voxels as 0; warnings of the reader are logged.

    Returns values, shape (H, W, D), float32, in the file's own axes, and the affine to RAS mm; ScanError if there is no
    such volume.
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
    take voxels to mm, that of the scan with any rigid motion to the reference already in it; ``outside`` is the value
    where it does not reach.
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


def scale_intensities(values: np.ndarray) -> np.ndarray:
    """Map a magnitude scan (H, W, D) to [0, 1], float32, clipped: its minimum to 0, the head's 99.9 % quantile to 1.

    A scan without contrast becomes 0.
    """
    head, low = find_head(values), float(values.min())
    high = float(np.quantile(values[head], UPPER_QUANTILE)) if head.any() else low
    if high <= low:
        return np.zeros(values.shape, dtype=np.float32)
    return np.clip((values - low) / (high - low), 0, 1).astype(np.float32)


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
