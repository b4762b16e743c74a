"""Headers of NIfTI, Analyze, MGH and NRRD files, and the one rule by which the geometry of NIfTI is read."""

import math
import warnings
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from brainfm_monai.io.files import refuse_if

NIFTI1_BYTES, NIFTI2_BYTES, MGH_BYTES = 348, 540, 284  # sizes of the headers; in NIfTI also the first number in them
SINGLE_FILE, PAIR = (b"n+1", b"n+2"), (b"ni1", b"ni2")  # magic words of header and voxels in one file, and in two
SINGLE_OFFSET = {NIFTI1_BYTES: 352, NIFTI2_BYTES: 544}  # of the first voxel: four bytes say whether extensions follow
DIRECTION_TOLERANCE = 0.02  # between unit vectors of two axes, about 1 degree: more than rounding
SIZE_TOLERANCE = 0.01  # relative difference of two voxel sizes: more than rounding
SMALLEST_DETERMINANT = 1e-9  # of an affine in mm
LARGEST_RATIO = 1032  # of gzip: no byte of a packed file can give more
NOT_STATED = "the header states no orientation; left and right are taken from the order of the voxels"
LPS, LAS, RAS = (-1, -1, 1), (-1, 1, 1), (1, 1, 1)  # sign of each axis in RAS
SPACES = {"right-anterior-superior": RAS, "left-anterior-superior": LAS, "left-posterior-superior": LPS}  # of NRRD
SPACES |= {"ras": RAS, "las": LAS, "lps": LPS}
COLOURS = ("rgb-color", "rgba-color", "hsv-color", "xyz-color", "3-color", "4-color")


@dataclass(frozen=True)
class Stored:
    """How the voxels of a file are stored, by its header."""

    shape: tuple[int, ...]  # (H, W, D), and more axes for several volumes
    dtype: np.dtype[Any]  # of the numbers in the file, with its byte order
    affine: np.ndarray  # voxel indices to RAS mm, shape (4, 4), float64
    path: Path  # file of the voxels
    offset: int = 0  # bytes before the first voxel, in the unpacked file
    slope: float = 1.0  # factor of the stored numbers
    intercept: float = 0.0  # added to the product
    warnings: tuple[str, ...] = ()  # what is doubtful in the header, one sentence each
    array: np.ndarray | None = None  # the voxels themselves, where a library has read and scaled the whole file


def read_nifti_header(path: Path, block: bytes) -> Stored:
    """Read the header of a NIfTI-1, NIfTI-2 or Analyze 7.5 file.

    The affine is the sform if its code is above 0 and its axes are independent; else the qform likewise; else the voxel
    sizes alone, with x from right to left as Analyze, FSL, SPM and nibabel take them. ``block`` are the first 540 bytes
    of the file; the voxels of an ``.hdr`` lie in the ``.img`` beside it. ValueError if the block is no such header.
    """
    orders = {int.from_bytes(block[:4], "little"): "<", int.from_bytes(block[:4], "big"): ">"}
    number = next((n for n in (NIFTI1_BYTES, NIFTI2_BYTES) if n in orders and len(block) >= n), 0)
    magic = block[4:7] if number == NIFTI2_BYTES else block[344:347]
    is_pair = path.name.lower().endswith(".hdr")
    found = f"{block[:4]!r} and the magic word {magic!r}"
    refuse_if(not number or is_pair == (magic in SINGLE_FILE), "a NIfTI header is needed", found)
    kind = nib.Nifti2Header if number == NIFTI2_BYTES else nib.Nifti1Header if magic in PAIR + SINGLE_FILE else None
    header: Any = (kind or nib.AnalyzeHeader)(block[:number], orders[number], check=False)
    count = int(header["dim"][0])
    shape = tuple(int(n) for n in header["dim"][1 : 1 + count])
    is_wrong = not 1 <= count <= 7 or min(shape) < 1
    refuse_if(is_wrong, "1 to 7 dimensions of at least 1 voxel are needed", header["dim"].tolist())
    dtype, file = header.get_data_dtype(), pair_of(path) if is_pair else path
    refuse_if(not file.is_file(), f"the voxels are needed in {file.name} beside the header", "no such file")
    bits, stated = 8 * dtype.itemsize, int(header["bitpix"])
    rule = f"numbers of {bits} bits are needed for the type {int(header['datatype'])}"
    refuse_if(bits and stated not in (0, bits), rule, f"{stated} bits")
    if kind is None:
        return Stored(shape, dtype, _from_sizes(header), file, warnings=(NOT_STATED,))
    offset, first = float(header["vox_offset"]), 0 if is_pair else SINGLE_OFFSET[number]
    is_whole = offset >= first and offset.is_integer()
    refuse_if(not is_whole, f"voxels that begin at byte {first} or later are needed", f"the byte {offset:g}")
    affine, noticed = _choose_affine(header)
    slope, intercept = header.get_slope_inter()
    scale = (1.0 if slope is None else float(slope), float(intercept or 0.0))
    return Stored(shape, dtype, affine, file, int(offset), *scale, tuple(noticed))


def _choose_affine(header: Any) -> tuple[np.ndarray, list[str]]:
    """Affine of a NIfTI header, and warnings."""
    has_sform, has_qform = header["sform_code"] > 0, header["qform_code"] > 0
    sform, qform = _read_form(header, "sform"), _read_form(header, "qform")
    affine = qform if sform is None else sform
    rows = [np.round(header[row].astype(float), 4).tolist() for row in ("srow_x", "srow_y", "srow_z")]
    is_wrong, found = affine is None and (has_sform or has_qform), f"the sform {rows} and no valid qform"
    refuse_if(is_wrong, "an affine of three independent axes is needed", found)
    if affine is None:
        return _from_sizes(header), [NOT_STATED]
    noticed = []
    if sform is not None and qform is not None:
        (one, one_mm), (two, two_mm) = ((form[:3, :3], np.linalg.norm(form[:3, :3], axis=0)) for form in (sform, qform))
        is_turned = np.abs(one / one_mm - two / two_mm).max() > DIRECTION_TOLERANCE
        if is_turned or (np.abs(one_mm / two_mm - 1) > SIZE_TOLERANCE).any():
            sides = " on left and right" if np.linalg.det(sform[:3, :3]) * np.linalg.det(qform[:3, :3]) < 0 else ""
            forms = f"sform ({_describe(sform)}) and qform ({_describe(qform)})"
            noticed.append(f"the header's {forms} disagree{sides}; the sform is taken")
    elif has_sform and has_qform:
        wrong, right = ("sform", "qform") if sform is None else ("qform", "sform")
        noticed.append(f"the header's {wrong} is not valid; the {right} is taken")
    stated, sizes = header["pixdim"][1:4].astype(float), np.linalg.norm(affine[:3, :3], axis=0)
    if qform is None and (~np.isfinite(stated) | (np.abs(np.abs(stated) - sizes) > SIZE_TOLERANCE * sizes)).any():
        found = f"voxel sizes {_sizes(stated)} mm and sform ({_describe(affine)})"
        noticed.append(f"the header's {found} disagree; the sform is taken")
    return affine, noticed


def _read_form(header: Any, name: str) -> np.ndarray | None:
    """The sform or the qform, by the magnitude of the voxel sizes; None if its code is 0 or it is not valid."""
    plain = header.copy()
    plain["pixdim"][1:4] = np.abs(plain["pixdim"][1:4])
    plain["pixdim"][0] = -1 if plain["pixdim"][0] < 0 else 1  # the standard: what is not -1 is 1
    with suppress(ValueError, nib.spatialimages.HeaderDataError, np.linalg.LinAlgError):
        form, code = getattr(plain, f"get_{name}")(coded=True)
        return np.asarray(form, np.float64) if code > 0 and is_valid(form) else None
    return None


def is_valid(affine: np.ndarray) -> bool:
    """Whether the axes of an affine, (4, 4), are finite and independent."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # overflow of absurd numbers
        return bool(np.isfinite(affine).all() and abs(np.linalg.det(affine[:3, :3])) > SMALLEST_DETERMINANT)


def _from_sizes(header: Any) -> np.ndarray:
    """Voxel sizes alone: x from right to left, the origin in the middle of the volume."""
    plain = header.copy()
    plain["pixdim"][1:4] = sizes = np.abs(header["pixdim"][1:4])
    is_valid, rule = np.isfinite(sizes).all() and sizes.min() > 0, "voxel sizes above 0 mm are needed"
    refuse_if(not is_valid, f"{rule} where no orientation is stated", _sizes(sizes))
    return np.asarray(plain.get_base_affine(), dtype=np.float64)


def _describe(affine: np.ndarray) -> str:
    """Voxel sizes and axes of an affine: ``2 x 2 x 4 mm, LAS, 10 degrees oblique``."""
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    cosines = np.abs(affine[:3, :3] / sizes).max(axis=0)
    oblique_deg = float(np.degrees(np.arccos(np.clip(cosines, -1, 1))).max())
    text = f"{_sizes(sizes)} mm, {''.join(str(code) for code in nib.aff2axcodes(affine))}"
    return text + (f", {oblique_deg:.0f} degrees oblique" if oblique_deg >= 1 else "")


def _sizes(sizes: np.ndarray) -> str:
    return " x ".join(f"{size:.4g}" for size in sizes)


def read_mgh_header(path: Path, block: bytes) -> Stored:
    """Read the header of an MGH file (its first bytes, unpacked); without ``goodRASFlag`` the slices are coronal."""
    refuse_if(len(block) < MGH_BYTES, f"an MGH header of {MGH_BYTES} bytes is needed", len(block))
    is_oriented = int.from_bytes(block[28:30], "big") > 0  # goodRASFlag, which nibabel sets where it is absent
    header: Any = nib.freesurfer.mghformat.MGHHeader.from_fileobj(BytesIO(block[:MGH_BYTES]))
    shape, noticed = tuple(int(n) for n in header["dims"]), () if is_oriented else (NOT_STATED,)
    affine, dtype = np.asarray(header.get_affine(), dtype=np.float64), header.get_data_dtype().newbyteorder(">")
    return Stored(shape if shape[3] > 1 else shape[:3], dtype, affine, path, MGH_BYTES, warnings=noticed)


def pair_of(path: Path) -> Path:
    """The file of the voxels that belong to an ``.hdr``."""
    return path.with_suffix(".IMG" if path.suffix.isupper() else ".img")


def read_nrrd(path: Path) -> Stored:
    """Read a NRRD file; ValueError if it is none, or promises more voxels than it can hold.

    Without a space out of :data:`SPACES` its axes are taken as left, posterior, superior, as ITK does.
    """
    import nrrd  # slow to import

    header: Any = nrrd.read_header(str(path))
    axes, signs = range(len(header["sizes"])), SPACES.get(str(header.get("space", "")).lower())
    kinds = [str(kind).lower() for kind in header.get("kinds", ["domain"] * len(axes))]
    for name, wrong in (("colours", COLOURS), ("complex numbers", ("complex",))):
        refuse_if(set(kinds) & set(wrong), "one real number per voxel is needed", name)
    refuse_if({"data file", "datafile"} & set(header), "voxels in the same file are needed", "a header without them")
    if header["encoding"] in ("raw", "gzip", "gz"):
        held = path.stat().st_size * (1 if header["encoding"] == "raw" else LARGEST_RATIO)
        needed = math.prod(map(int, header["sizes"]))
        rule = f"the voxels cannot be read: {needed} are promised by the header"
        refuse_if(needed > held, rule, f"{held} bytes at most")
    affine, noticed = np.eye(4), [] if signs else [NOT_STATED]
    if "space directions" in header:
        vectors = np.atleast_2d(np.asarray(header["space directions"], dtype=np.float64))
        found = f"'{header.get('space', vectors.shape[1])}'"
        refuse_if(vectors.shape[1] != 3, "a space of 3 dimensions is needed", found)
        spatial = [i for i in axes if np.isfinite(vectors[i]).all()][-3:]
        affine[:3, : len(spatial)] = vectors[spatial].T
        affine[:3, 3] = np.asarray(header.get("space origin", np.zeros(3)), dtype=np.float64)
    else:
        spatial, noticed = [i for i in axes if kinds[i] in ("domain", "space", "???", "none")][:3], [NOT_STATED]
        spacings = np.asarray(header.get("spacings", np.ones(len(axes))), dtype=np.float64)[spatial]
        affine[range(len(spatial)), range(len(spatial))] = spacings
        noticed += [] if "spacings" in header else ["the header states no voxel size; 1 mm is taken"]
    affine = np.diag([*(signs or LPS), 1.0]) @ affine
    values = nrrd.read(str(path))[0].transpose([*spatial, *(i for i in axes if i not in spatial)])
    return Stored(values.shape, values.dtype, affine, path, warnings=tuple(noticed), array=values)
