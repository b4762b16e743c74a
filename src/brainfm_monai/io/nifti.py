"""Headers of NIfTI and Analyze files, and the one rule by which their geometry is read."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from brainfm_monai.io.stored import Stored

__all__ = ["read_nifti_header"]

NIFTI1_BYTES, NIFTI2_BYTES = 348, 540  # sizes of the headers, which are also the first number in them
SINGLE_FILE, PAIR = (b"n+1", b"n+2"), (b"ni1", b"ni2")  # magic words of header and voxels in one file, and in two
DIRECTION_TOLERANCE = 0.02  # between unit vectors of two axes, about 1 degree: more than rounding
SIZE_TOLERANCE = 0.01  # relative difference of two voxel sizes: more than rounding
SMALLEST_DETERMINANT = 1e-9  # of an affine in mm
NOT_STATED = "the header states no orientation; left and right are taken from the order of the voxels"


def read_nifti_header(path: Path, block: bytes) -> Stored:
    """Read the header of a NIfTI-1, NIfTI-2 or Analyze 7.5 file.

    The affine is the sform if its code is above 0 and its axes are independent; else the qform if its code is above 0 and it
    is valid; else the voxel sizes alone, with x from right to left as Analyze, FSL, SPM and nibabel take them. A form with
    code 0 is never used.

    Args:
        path: file, for the place of the voxels; an ``.hdr`` has its voxels in the ``.img`` beside it.
        block: the first 540 bytes of the file.

    Returns:
        Where and how the voxels are stored, and the warnings about the geometry.

    Raises:
        ValueError: if the block is no such header, or states an orientation that is not valid.
    """
    size = {int.from_bytes(block[:4], "little"): "<", int.from_bytes(block[:4], "big"): ">"}
    number = next((n for n in (NIFTI1_BYTES, NIFTI2_BYTES) if n in size and len(block) >= n), 0)
    magic = block[4:7] if number == NIFTI2_BYTES else block[344:347]
    is_pair = path.name.lower().endswith(".hdr")
    if not number or not (is_pair or magic in SINGLE_FILE):
        raise ValueError(f"a NIfTI header is needed, found {block[:4]!r} and the magic word {magic!r}")
    kind = nib.Nifti2Header if number == NIFTI2_BYTES else nib.Nifti1Header if magic in PAIR + SINGLE_FILE else None
    header: Any = (kind or nib.AnalyzeHeader)(block[:number], size[number], check=False)
    count = int(header["dim"][0])
    shape = tuple(int(n) for n in header["dim"][1 : 1 + count])
    if not 1 <= count <= 7 or min(shape) < 1:
        raise ValueError(f"1 to 7 dimensions of at least 1 voxel are needed, found {header['dim'].tolist()}")
    slope, intercept = header.get_slope_inter() if kind else (None, None)
    affine, is_oriented, noticed = _choose_affine(header) if kind else (_from_sizes(header), False, [NOT_STATED])
    return Stored(
        shape=shape,
        dtype=header.get_data_dtype(),
        affine=affine,
        path=path.with_suffix(".img") if is_pair else path,
        offset=0 if kind is None else int(header["vox_offset"]),
        slope=1.0 if slope is None else float(slope),
        intercept=float(intercept or 0.0),
        warnings=tuple(noticed),
        is_oriented=is_oriented,
    )


def _choose_affine(header: Any) -> tuple[np.ndarray, bool, list[str]]:
    """Affine of a NIfTI header, whether it states an orientation, and warnings."""
    sform = _valid(header.get_sform()) if header["sform_code"] > 0 else None
    qform = _read_qform(header) if header["qform_code"] > 0 else None
    if sform is None and qform is None:
        if header["sform_code"] > 0 or header["qform_code"] > 0:
            rows = [np.round(header[row].astype(float), 4).tolist() for row in ("srow_x", "srow_y", "srow_z")]
            raise ValueError(
                f"an affine of three independent axes is needed, found the sform {rows} and no valid qform"
            )
        return _from_sizes(header), False, [NOT_STATED]
    noticed = []
    if sform is not None and qform is not None:
        if _differ(sform, qform):
            forms = f"sform ({_describe(sform)}) and qform ({_describe(qform)})"
            mirrored = np.linalg.det(sform[:3, :3]) * np.linalg.det(qform[:3, :3]) < 0
            noticed.append(
                f"the header's {forms} disagree{' on left and right' if mirrored else ''}; the sform is taken"
            )
    elif header["sform_code"] > 0 and sform is None:
        noticed.append("the header's sform is not valid; the qform is taken")
    elif header["qform_code"] > 0 and qform is None:
        noticed.append("the header's qform is not valid; the sform is taken")
    affine = sform if sform is not None else qform
    assert affine is not None
    stated, sizes = header["pixdim"][1:4].astype(float), np.linalg.norm(affine[:3, :3], axis=0)
    if qform is None and (~np.isfinite(stated) | (np.abs(np.abs(stated) - sizes) > SIZE_TOLERANCE * sizes)).any():
        noticed.append(
            f"the header's voxel sizes {_sizes(stated)} mm and sform ({_describe(affine)}) disagree; the sform is taken"
        )
    return affine, True, noticed


def _read_qform(header: Any) -> np.ndarray | None:
    """The qform with the magnitude of the voxel sizes; None if it is not valid."""
    plain = header.copy()
    plain["pixdim"][1:4] = np.abs(plain["pixdim"][1:4])
    plain["pixdim"][0] = -1 if plain["pixdim"][0] < 0 else 1  # the standard: what is not -1 is 1
    try:
        return _valid(plain.get_qform())
    except (ValueError, nib.spatialimages.HeaderDataError, np.linalg.LinAlgError):
        return None


def _valid(affine: np.ndarray) -> np.ndarray | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # overflow of absurd numbers
        usable = np.isfinite(affine).all() and abs(np.linalg.det(affine[:3, :3])) > SMALLEST_DETERMINANT
    return np.asarray(affine, dtype=np.float64) if usable else None


def _from_sizes(header: Any) -> np.ndarray:
    """Voxel sizes alone: x from right to left, the origin in the middle of the volume."""
    sizes = np.abs(header["pixdim"][1:4].astype(np.float64))
    if not (np.isfinite(sizes).all() and sizes.min() > 0):
        raise ValueError(f"voxel sizes above 0 mm are needed where no orientation is stated, found {_sizes(sizes)}")
    shape = np.ones(3)
    shape[: min(3, int(header["dim"][0]))] = header["dim"][1:4][: int(header["dim"][0])]
    affine = np.diag([-sizes[0], sizes[1], sizes[2], 1.0])
    affine[:3, 3] = -affine[:3, :3] @ ((shape - 1) / 2)
    return affine


def _differ(one: np.ndarray, two: np.ndarray) -> bool:
    sizes_one, sizes_two = (np.linalg.norm(affine[:3, :3], axis=0) for affine in (one, two))
    directions = np.abs(one[:3, :3] / sizes_one - two[:3, :3] / sizes_two).max()
    return bool(directions > DIRECTION_TOLERANCE or (np.abs(sizes_one / sizes_two - 1) > SIZE_TOLERANCE).any())


def _describe(affine: np.ndarray) -> str:
    """Voxel sizes and axes of an affine: ``2 x 2 x 4 mm, LAS, 10 degrees oblique``."""
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    cosines = np.abs(affine[:3, :3] / sizes).max(axis=0)
    oblique_deg = float(np.degrees(np.arccos(np.clip(cosines, -1, 1))).max())
    text = f"{_sizes(sizes)} mm, {''.join(str(code) for code in nib.aff2axcodes(affine))}"
    return text + (f", {oblique_deg:.0f} degrees oblique" if oblique_deg >= 1 else "")


def _sizes(sizes: np.ndarray) -> str:
    return " x ".join(f"{size:.4g}" for size in sizes)
