"""Scans of a subject on its box: resampling once, scaling to [0, 1], the head, and classes of what is not brain."""

from __future__ import annotations

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

from brainfm_monai.functional.intensity import antialias
from brainfm_monai.io import read_volume

__all__ = ["cluster_extracerebral", "find_head", "read_scan", "resample_to_box", "scale_intensities"]

logger = logging.getLogger(__name__)

AIR_HU = -1000.0
UPPER_QUANTILE = 0.999
CLUSTERS, CLUSTER_SAMPLES = 5, 50_000
CLOSING_VOX = 4


def read_scan(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read one volume of real numbers, with NaN and infinite voxels as 0; warnings of the reader are logged.

    Returns:
        Values, shape (H, W, D), float32, in the file's own axes, and the affine to RAS mm.

    Raises:
        ScanError: if the file holds no such volume.
    """
    volume = read_volume(path)
    for warning in volume.warnings:
        logger.warning("%s: %s", path, warning)
    return np.nan_to_num(volume.values.astype(np.float32), posinf=0, neginf=0), volume.affine


def resample_to_box(
    values: np.ndarray, affine: np.ndarray, box_affine: np.ndarray, shape: tuple[int, int, int], outside: float = 0.0
) -> np.ndarray:
    """Bring a volume onto a box of 1 mm voxels in one linear interpolation.

    Axes along which the scan is finer than the box are smoothed first, to the width of the box's voxels.

    Args:
        values: shape (H, W, D).
        affine: voxels of the scan to mm, with any rigid motion to the reference already in it.
        box_affine: voxels of the box to mm.
        shape: size of the box.
        outside: value where the scan does not reach.

    Returns:
        Values on the box, float32.
    """
    target_mm = [float(voxel_sizes(box_affine).mean())] * 3
    volume = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
    image = nib.Nifti1Image(antialias(volume, voxel_sizes(affine).tolist(), target_mm).numpy(), affine)
    moved = resample_from_to(image, (shape, box_affine), order=1, mode="constant", cval=outside)
    return np.asarray(moved.dataobj, dtype=np.float32)


def find_head(values: np.ndarray) -> np.ndarray:
    """The head in a scan: what is brighter than air (Otsu's threshold), closed, without holes, in its largest piece.

    Args:
        values: shape (H, W, D).

    Returns:
        Mask, shape (H, W, D), bool; empty for a constant scan.
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
    """Map a scan to [0, 1]: its minimum to 0, the 99.9 % quantile in the head to 1; what is brighter is clipped.

    Args:
        values: magnitude scan, shape (H, W, D).

    Returns:
        float32, same shape; 0 for a scan without contrast.
    """
    head = find_head(values)
    low = float(values.min())
    high = float(np.quantile(values[head], UPPER_QUANTILE)) if head.any() else low
    if high <= low:
        return np.zeros(values.shape, dtype=np.float32)
    return np.clip((values - low) / (high - low), 0, 1).astype(np.float32)


def cluster_extracerebral(values: np.ndarray, brain: np.ndarray) -> np.ndarray:
    """Classes of the head outside the brain by brightness, the darkest first.

    Args:
        values: scan, shape (H, W, D).
        brain: mask of what has labels already, shape (H, W, D), bool.

    Returns:
        0 in the air and in the brain, 1 to 5 elsewhere in the head, shape (H, W, D), uint8; all 0 for a brain-extracted scan.
    """
    rest = find_head(values) & ~brain
    classes = np.zeros(values.shape, dtype=np.uint8)
    seen = values[rest]
    if len(np.unique(seen[:: max(1, len(seen) // CLUSTER_SAMPLES)])) < CLUSTERS:
        return classes
    sample = seen[:: max(1, len(seen) // CLUSTER_SAMPLES), None]
    start = np.quantile(sample, (np.arange(CLUSTERS) + 0.5) / CLUSTERS)[:, None]
    centres = np.sort(KMeans(CLUSTERS, init=start, n_init=1, random_state=0).fit(sample).cluster_centers_.ravel())
    classes[rest] = 1 + np.searchsorted((centres[1:] + centres[:-1]) / 2, seen)
    return classes
