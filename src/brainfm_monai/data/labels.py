"""Label maps on disk to the grid of a prepared subject: RAS+, 1 mm isotropic, a box of fixed size around the brain."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Orientation, Spacing, generate_spatial_bounding_box
from nibabel.affines import apply_affine

from brainfm_monai.anatomy import Protocol
from brainfm_monai.data.distances import PIAL_IDS
from brainfm_monai.io import ScanError, read_labels, read_table

__all__ = ["crop_to_box", "cut_to_brain", "find_brain_centre", "fold_ids", "load_label_map", "read_id_table"]

logger = logging.getLogger(__name__)

SPACING_TOLERANCE_MM = 1e-3
# FreeSurfer's colour table: parcels of the cortex and of the white matter below it, as (first, last, structure)
PARCELS = (
    (1000, 1999, 3), (2000, 2999, 42), (3000, 3999, 2), (4000, 4999, 41), (5001, 5001, 2), (5002, 5002, 41),
    (11000, 11999, 3), (12000, 12999, 42), (13000, 13999, 2), (14000, 14999, 41),
)  # fmt: skip
# ids of both sides, and what they become on the left and on the right: hypointensities, and the parts of the corpus callosum
UNSIDED = {77: (78, 79), 80: (78, 79), 81: (78, 78), 82: (79, 79), **dict.fromkeys(range(250, 256), (2, 41))}
WHITE_MATTER = (2, 41)
BOX_IDS = (*PIAL_IDS["left"], *PIAL_IDS["right"], 7, 8, 46, 47)  # cerebrum and cerebellum, which place the box


def load_label_map(path: Path, table: Mapping[int, int] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Read a label map, turn it to RAS+ and resample it to 1 mm isotropic voxels (nearest neighbour) if it is not.

    An oblique grid stays oblique: its axes are permuted and flipped to the closest to RAS+, and the affine keeps the rest.

    Args:
        path: NIfTI or MGH file with one volume of integer ids.
        table: FreeSurfer id of each id in the file; without it, the file holds FreeSurfer ids.

    Returns:
        The ids, shape (H, W, D), int32, and the affine from voxels to RAS mm, shape (4, 4).

    Raises:
        ScanError: if the file has no single volume or states no orientation, or a value is no id.
    """
    volume = read_labels(path)
    if not volume.is_oriented:
        needed = f"{path}: a label map that states which side is left is needed"
        raise ScanError(f"{needed}, found no orientation in its header")
    for warning in volume.warnings:
        logger.warning("%s: %s", path, warning)
    values = volume.values
    if table is not None:
        present, inverse = np.unique(values, return_inverse=True)
        unknown = [int(i) for i in present if int(i) not in table and i]
        if unknown:
            raise ValueError(f"{path}: every id must be in the table of ids, found unknown ids {unknown[:10]}")
        values = np.array([table.get(int(i), 0) for i in present], dtype=np.int32)[inverse].reshape(values.shape)
    ids: Any = MetaTensor(torch.from_numpy(values)[None], affine=torch.from_numpy(volume.affine))
    ids = Orientation(axcodes="RAS", labels=None)(ids)
    if np.abs(ids.pixdim.numpy() - 1).max() > SPACING_TOLERANCE_MM:  # float64 holds every id of 32 bits
        resample = Spacing(pixdim=1.0, mode="nearest", padding_mode="border", scale_extent=True, dtype=np.float64)
        ids = resample(ids.double())
    return ids.as_tensor()[0].round().int().numpy(), ids.affine.numpy().astype(np.float64)


def read_id_table(source: str | Path | Mapping[int, int | str], protocol: str = "synthseg_head") -> dict[int, int]:
    """The FreeSurfer id of each id of a label map.

    Args:
        source: tab-separated table with the columns ``id`` and ``freesurfer_id`` or ``name``; or the rows as a mapping of ids to
            ids or names; case, blanks and hyphens of names do not matter.
        protocol: protocol in which names are looked up, before the shipped ones.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a column is missing, a value is no whole number or no known name, or an id stands twice.
    """
    if isinstance(source, Mapping):
        pairs, path = list(source.items()), Path("ids")
    else:
        path = Path(source)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: a table of ids is needed, found no such file")
        try:
            pairs = [(int(row["id"]), row.get("freesurfer_id") or row["name"]) for row in read_table(path)]
        except (KeyError, ValueError) as error:
            needed = f"{path}: whole numbers in the columns 'id' and 'freesurfer_id' (or 'name') are needed"
            raise ValueError(f"{needed}, found {error}") from error
    keys = [key for key, _ in pairs]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice or not pairs:
        raise ValueError(f"{path}: each id must stand once, found {f'twice: {twice}' if twice else 'no rows'}")
    id_of_name: dict[str, int] = {}
    for name in (*Protocol.names(), protocol):
        id_of_name |= {_plain(s.name): s.freesurfer_id for s in Protocol.load(name).structures if not s.mixture}
    table = {int(key): id_of_name.get(_plain(value), value) for key, value in pairs}
    unknown = [str(value) for value in table.values() if not str(value).lstrip("-").isdigit()]
    if unknown:
        raise ValueError(f"{path}: whole numbers or names of structures are needed, found {', '.join(unknown[:5])}")
    return {key: int(value) for key, value in table.items()}


def _plain(name: int | str) -> str:
    return "".join(c for c in str(name).lower() if c.isalnum())


def fold_ids(ids: np.ndarray) -> np.ndarray:
    """FreeSurfer's parcels as the structures that they are parts of, and ids of both sides as those of their side.

    Cortical parcels become cortex; parcels of white matter and the corpus callosum become white matter; hypointensities become
    those of their side. The side of a voxel is that of the plane halfway between the centroids of left and right white matter.

    Args:
        ids: map of FreeSurfer ids, shape (H, W, D), on a grid of isotropic voxels.

    Returns:
        Map of ids, same shape; the very same array where there is nothing to fold.
    """
    present = set(np.unique(ids).tolist())
    table = {i: target for first, last, target in PARCELS for i in present if first <= i <= last}
    unsided = present & set(UNSIDED)
    if not table and not unsided:
        return ids
    folded = ids.copy()
    for source, target in table.items():
        folded[ids == source] = target
    places = np.argwhere(np.isin(ids, list(unsided)))
    left, right = (np.argwhere(folded == white) for white in WHITE_MATTER)
    if len(places) and len(left) and len(right):
        middle, across = (left.mean(axis=0) + right.mean(axis=0)) / 2, right.mean(axis=0) - left.mean(axis=0)
        on_right = ((places - middle) @ across > 0).astype(int)
        where = tuple(places.T)
        folded[where] = [UNSIDED[int(i)][side] for i, side in zip(ids[where], on_right, strict=True)]
    return folded


def find_brain_centre(ids: np.ndarray, brain_ids: Iterable[int], source: str = "label map") -> np.ndarray:
    """Centre of the bounding box of the brain in voxels, shape (3,), a multiple of one half.

    Args:
        ids: map of ids, shape (H, W, D).
        brain_ids: the ids that make the box; without those that reach down the neck.
        source: name for messages.

    Raises:
        ValueError: if none of the ids is there.
    """
    brain = np.isin(ids, list(brain_ids))
    if not brain.any():
        raise ValueError(f"{source}: cerebrum or cerebellum labels are needed to place the box, found none")
    start, end = generate_spatial_bounding_box(brain[None])
    return (np.array(start) + np.array(end) - 1) / 2


def cut_to_brain(
    ids: np.ndarray, affine: np.ndarray, spatial_size: Sequence[int], source: str
) -> tuple[np.ndarray, np.ndarray]:
    """The box around cerebrum and cerebellum of a map of FreeSurfer ids, and its affine; see :func:`crop_to_box`."""
    return crop_to_box(ids, affine, find_brain_centre(ids, BOX_IDS, source), spatial_size)


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
    end = start + np.asarray(spatial_size)
    inside = tuple(slice(max(a, 0), max(b, 0)) for a, b in zip(start, end, strict=True))
    before, after = np.clip(-start, 0, spatial_size), np.clip(end - volume.shape, 0, spatial_size)
    box = np.pad(volume[inside], list(zip(before, after, strict=True)))
    moved = affine.copy()
    moved[:3, 3] = apply_affine(affine, start)
    return box, moved
