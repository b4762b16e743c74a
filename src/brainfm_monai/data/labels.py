"""Label maps on disk to the grid of a prepared subject: RAS+, 1 mm isotropic, a box of fixed size around the brain."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Orientation, Spacing
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

__all__ = ["crop_to_box", "find_brain_centre", "load_label_map"]

SPACING_TOLERANCE_MM = 1e-3
WHOLE_TOLERANCE = 1e-3


def load_label_map(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read a label map, turn it to RAS+ and resample it to 1 mm isotropic voxels (nearest neighbour) if it is not.

    An oblique grid stays oblique: its axes are permuted and flipped to the closest to RAS+, and the affine keeps the rest.

    Args:
        path: NIfTI or MGH file with one volume of integer ids.

    Returns:
        The ids, shape (H, W, D), int32, and the affine from voxels to RAS mm, shape (4, 4).

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if the file is no image, has no single volume, or holds values that are no ids.
    """
    values, affine = _read_volume(path)
    ids: Any = MetaTensor(torch.from_numpy(values)[None], affine=torch.from_numpy(affine))
    ids = Orientation(axcodes="RAS", labels=None)(ids)
    if np.abs(ids.pixdim.numpy() - 1).max() > SPACING_TOLERANCE_MM:
        # float64 holds every id of 32 bits
        ids = Spacing(pixdim=1.0, mode="nearest", padding_mode="border", scale_extent=True, dtype=np.float64)(ids.double())
    return ids.as_tensor()[0].round().int().numpy(), ids.affine.numpy().astype(np.float64)


def _read_volume(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The one volume of a file as int32, in the file's own axes, and its affine."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: a label map is needed, no such file")
    try:
        image: Any = nib.load(path)
        values = np.asarray(image.dataobj)
        affine = np.asarray(image.affine, dtype=np.float64)
    except (ImageFileError, HeaderDataError, OSError, EOFError, ValueError, AttributeError, zlib.error) as error:
        raise ValueError(f"{path}: a readable NIfTI or MGH image is needed, found: {' '.join(str(error).split())}") from error
    shape = values.shape
    if len(shape) > 3 and all(n == 1 for n in shape[3:]):
        values = values.reshape(shape[:3])
    if values.ndim != 3 or values.size == 0:
        raise ValueError(f"{path}: one 3-D volume of labels is needed, found data of shape {shape}")
    if not np.isfinite(values).all() or values.min() < 0:
        raise ValueError(f"{path}: ids must be whole numbers from 0 on, found values that are negative or not finite")
    fraction = np.abs(values - np.rint(values)).max()
    if fraction > WHOLE_TOLERANCE:
        raise ValueError(f"{path}: ids must be whole numbers from 0 on, found values up to {fraction:.2g} off one")
    return np.rint(values).astype(np.int32), affine


def find_brain_centre(ids: np.ndarray, brain_ids: Iterable[int], source: str = "label map") -> np.ndarray:
    """Centre of the bounding box of the brain.

    Args:
        ids: map of ids, shape (H, W, D).
        brain_ids: the ids that make the box; without those that reach down the neck.
        source: name for messages.

    Returns:
        The centre in voxels, shape (3,), a multiple of one half.

    Raises:
        ValueError: if none of the ids is there.
    """
    brain = np.isin(ids, list(brain_ids))
    if not brain.any():
        raise ValueError(f"{source}: cerebrum or cerebellum labels are needed to place the box, found none")
    bounds = []
    for axis in range(3):
        inside = np.flatnonzero(brain.any(axis=tuple(other for other in range(3) if other != axis)))
        bounds.append((inside[0] + inside[-1]) / 2)
    return np.array(bounds)


def crop_to_box(
    volume: np.ndarray, affine: np.ndarray, centre: np.ndarray, spatial_size: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Cut a box of fixed size, with zeros where it leaves the volume, and move the affine with it.

    Args:
        volume: shape (H, W, D).
        affine: voxels to mm, shape (4, 4).
        centre: centre of the box in voxels, shape (3,).
        spatial_size: size of the box in voxels.

    Returns:
        The box, of shape ``spatial_size``, and its affine.
    """
    start = np.floor(np.asarray(centre) - (np.asarray(spatial_size) - 1) / 2).astype(int)
    box = np.zeros(tuple(spatial_size), dtype=volume.dtype)
    low, high = np.maximum(start, 0), np.minimum(start + np.asarray(spatial_size), volume.shape)
    if (high > low).all():
        source = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        target = tuple(slice(a, b) for a, b in zip(low - start, high - start, strict=True))
        box[target] = volume[source]
    moved = affine.copy()
    moved[:3, 3] = affine[:3, :3] @ start + affine[:3, 3]
    return box, moved
