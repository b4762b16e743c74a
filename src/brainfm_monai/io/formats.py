"""Headers of FreeSurfer's MGH and of NRRD files."""

from __future__ import annotations

import math
from io import BytesIO
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from brainfm_monai.io.stored import LARGEST_RATIO, Stored

__all__ = ["read_mgh_header", "read_nrrd"]

MGH_BYTES = 284
NOT_STATED = "the header states no orientation; left and right are taken from the order of the voxels"
# NRRD's names of spaces: sign of each axis in RAS
SPACES = {
    "right-anterior-superior": (1, 1, 1), "left-anterior-superior": (-1, 1, 1), "left-posterior-superior": (-1, -1, 1),
    "ras": (1, 1, 1), "las": (-1, 1, 1), "lps": (-1, -1, 1),
}  # fmt: skip
COLOURS = ("rgb-color", "rgba-color", "hsv-color", "xyz-color", "3-color", "4-color")


def read_mgh_header(path: Path, block: bytes) -> Stored:
    """Read the header of an MGH or MGZ file; without ``goodRASFlag`` its geometry is FreeSurfer's default, coronal slices.

    Args:
        path: file.
        block: its first bytes, unpacked.

    Raises:
        ValueError: if the block is no such header.
    """
    if len(block) < MGH_BYTES:
        raise ValueError(f"an MGH header of {MGH_BYTES} bytes is needed, found {len(block)}")
    is_oriented = int.from_bytes(block[28:30], "big") > 0  # goodRASFlag, which nibabel sets where it is absent
    header: Any = nib.freesurfer.mghformat.MGHHeader.from_fileobj(BytesIO(block[:MGH_BYTES]))
    shape = tuple(int(n) for n in header["dims"])
    return Stored(
        shape=shape if shape[3] > 1 else shape[:3],
        dtype=header.get_data_dtype().newbyteorder(">"),
        affine=np.asarray(header.get_affine(), dtype=np.float64),
        path=path,
        offset=MGH_BYTES,
        warnings=() if is_oriented else (NOT_STATED,),
        is_oriented=is_oriented,
    )


def read_nrrd(path: Path) -> Stored:
    """Read a NRRD file, whose voxels may be packed within it or lie in files of their own.

    A header that names no space, or none of :data:`SPACES`, states no orientation: its axes are taken as left, posterior,
    superior, as ITK does.

    Raises:
        ValueError: if the file is none, or the header promises more voxels than the file can hold.
    """
    import nrrd  # slow to import

    header: Any = nrrd.read_header(str(path))
    sizes = [int(n) for n in header["sizes"]]
    vectors = np.atleast_2d(np.asarray(header.get("space directions", np.empty((0, 0))), dtype=np.float64))
    kinds = [str(kind).lower() for kind in header.get("kinds", ["domain"] * len(sizes))]
    if any(kind in COLOURS for kind in kinds):
        raise ValueError("one real number per voxel is needed, found colours")
    if "complex" in kinds:
        raise ValueError("one real number per voxel is needed, found complex numbers")
    spatial = [i for i in range(len(sizes)) if len(vectors) != len(sizes) or np.isfinite(vectors[i]).all()][-3:]
    if not len(vectors):
        spatial = [i for i in range(len(sizes)) if kinds[i] in ("domain", "space", "???", "none")][:3]
    rest = [i for i in range(len(sizes)) if i not in spatial]
    data_files = header.get("data file", header.get("datafile"))
    files = [path] if not isinstance(data_files, str) else [path.parent / data_files]
    needed = math.prod(sizes)
    if header["encoding"] in ("raw", "gzip", "gz") and not isinstance(data_files, list):
        held = files[0].stat().st_size * (1 if header["encoding"] == "raw" else LARGEST_RATIO)
        if needed > held:
            raise ValueError(
                f"the voxels cannot be read: {needed} are promised by the header, found {held} bytes at most"
            )
    affine, is_oriented = np.eye(4), False
    signs = SPACES.get(str(header.get("space", "")).lower())
    if len(vectors) and len(spatial) == 3 and vectors.shape[1] == 3:
        affine[:3, :3] = vectors[spatial].T
        affine[:3, 3] = np.asarray(header.get("space origin", np.zeros(3)), dtype=np.float64)
        is_oriented = signs is not None
    else:
        spacings = np.asarray(header.get("spacings", np.ones(len(sizes))), dtype=np.float64)[spatial]
        affine[range(len(spatial)), range(len(spatial))] = spacings
    affine = np.diag([*(signs or SPACES["lps"]), 1.0]) @ affine
    values, _ = nrrd.read(str(path))
    return Stored(
        shape=tuple(sizes[i] for i in spatial + rest),
        dtype=values.dtype,
        affine=affine,
        path=path,
        array=values.transpose(spatial + rest),
        warnings=() if is_oriented else (NOT_STATED,),
        is_oriented=is_oriented,
    )
