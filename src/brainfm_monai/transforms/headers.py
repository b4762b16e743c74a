"""What a scan's header must say before its voxels are read; every refusal is one line."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from monai.data.utils import orientation_ras_lps

from brainfm_monai.io import ScanError, first_line

__all__ = ["DICOM_SUFFIXES", "ITK_SUFFIXES", "NIBABEL_SUFFIXES", "check_header", "is_dicom_series"]

logger = logging.getLogger(__name__)

NIBABEL_SUFFIXES = (".nii.gz", ".nii", ".mgz", ".mgh")
ITK_SUFFIXES = (".nrrd", ".nhdr")
DICOM_SUFFIXES = (".dcm", ".ima", "")  # many archives name slices without a suffix
DICOM_MARK = b"DICM"  # at byte 128 of a DICOM file
EXTENT_RANGE_MM = (
    10.0,
    600.0,
)  # a slab of three slices of 4 mm; head and shoulders. Beyond it the voxel size is wrong.
FORM_TOLERANCE = 0.02  # the two orientations of a NIfTI header differ by rounding, or they contradict each other
FRAME_ADVICE = "pass --frame N (from 0) or --frame mean"


@dataclass(frozen=True)
class _Header:
    shape: tuple[int, ...]
    affine: np.ndarray
    kind: str  # "real", "complex numbers" or "colours"


def is_dicom_series(path: str | Path) -> bool:
    """Whether a folder holds DICOM slices: one of its files has the mark of the format."""
    folder = Path(path)
    if not folder.is_dir():
        return False
    return any(_has_dicom_mark(file) for file in sorted(folder.iterdir()) if file.suffix.lower() in DICOM_SUFFIXES)


def _has_dicom_mark(file: Path) -> bool:
    if not file.is_file() or file.name.startswith("."):
        return False
    with file.open("rb") as opened:
        opened.seek(128)
        return opened.read(4) == DICOM_MARK


def check_header(path: str | Path, frame: int | str | None = None) -> None:
    """Check from its header alone that a scan is one scalar 3-D volume with a usable geometry.

    Args:
        path: NIfTI, MGH or NRRD file, or the folder of one DICOM series.
        frame: which volume of a 4-D file is wanted: its number, from 0, or ``"mean"``; None refuses such a file.

    Raises:
        ScanError: if it is not; one line.
    """
    if not Path(path).is_file() and not is_dicom_series(path):
        found = "a folder" if Path(path).is_dir() else "no such file"
        raise ScanError(f"{path}: a NIfTI, MGH or NRRD file or the folder of a DICOM series is needed, found {found}")
    is_nibabels = Path(path).name.lower().endswith(NIBABEL_SUFFIXES) and Path(path).is_file()
    header = _read_nibabel_header(path) if is_nibabels else _read_itk_header(path)
    shape = header.shape
    if len(shape) > 4 and any(n != 1 for n in shape[4:]):
        raise ScanError(f"{path}: {len(shape)}-D image of shape {shape}; one 3-D volume is needed")
    if len(shape) > 3 and shape[3] != 1:
        _check_frame(path, shape, frame)
    if len(shape) < 3 or min(shape[:3]) < 2:
        raise ScanError(f"{path}: a 3-D volume of at least 2 voxels along each axis is needed, found shape {shape}")
    if header.kind != "real":
        raise ScanError(f"{path}: one real number per voxel is needed, found {header.kind}")
    _check_geometry(path, shape, header.affine)


def _check_frame(path: str | Path, shape: tuple[int, ...], frame: int | str | None) -> None:
    if frame is None:
        raise ScanError(f"{path}: {len(shape)}-D image of shape {shape}; one 3-D volume is needed: {FRAME_ADVICE}")
    if frame != "mean" and not (isinstance(frame, int) and 0 <= frame < shape[3]):
        raise ScanError(f"{path}: 'frame' must be 'mean' or a number from 0 to {shape[3] - 1}, found {frame!r}")


def _check_geometry(path: str | Path, shape: tuple[int, ...], affine: np.ndarray) -> None:
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise ScanError(
            f"{path}: an affine of three independent axes is needed, found {np.round(affine[:3], 4).tolist()}"
        )
    extent_mm = np.linalg.norm(affine[:3, :3], axis=0) * np.array(shape[:3])
    low, high = EXTENT_RANGE_MM
    if extent_mm.min() < low or extent_mm.max() > high:
        found = " x ".join(f"{e:.4g}" for e in extent_mm)
        raise ScanError(
            f"{path}: a head scan extends over {low:.0f} to {high:.0f} mm along each axis, found {found} mm: check the voxel size"
        )


def _read_nibabel_header(path: str | Path) -> _Header:
    try:
        image: Any = nib.load(path)
    except Exception as error:  # nibabel raises a dozen kinds for a damaged header
        raise ScanError(
            f"{path}: a NIfTI or MGH file is needed, and it cannot be read as one: {first_line(error)}"
        ) from error
    if not isinstance(image, nib.nifti1.Nifti1Pair | nib.freesurfer.MGHImage):
        raise ScanError(f"{path}: a NIfTI or MGH file is needed, found {type(image).__name__}")
    if isinstance(image, nib.nifti1.Nifti1Pair):
        _warn_of_doubtful_orientation(path, image)
    dtype = image.get_data_dtype()
    kind = "colours" if dtype.fields else "complex numbers" if dtype.kind == "c" else "real"
    return _Header(tuple(int(n) for n in image.shape), np.asarray(image.affine, dtype=np.float64), kind)


def _warn_of_doubtful_orientation(path: str | Path, image: Any) -> None:
    """Tell where left and right rest on a guess: a header that states no orientation, or two that contradict each other."""
    if not image.header["sform_code"] and not image.header["qform_code"]:
        logger.warning(
            "%s: the header states no orientation; left and right are taken from the order of the voxels", path
        )
    elif image.header["sform_code"] and image.header["qform_code"]:
        one, other = (
            form[:3, :3] / np.linalg.norm(form[:3, :3], axis=0) for form in (image.get_sform(), image.get_qform())
        )
        if np.sign(np.linalg.det(one)) != np.sign(np.linalg.det(other)):
            logger.warning("%s: the header's sform and qform disagree on left and right; the sform is taken", path)
        elif np.abs(one - other).max() > FORM_TOLERANCE:
            logger.warning("%s: the header's sform and qform turn the scan differently; the sform is taken", path)


def _read_itk_header(path: str | Path) -> _Header:
    import itk  # slow to import

    io = _open_with_itk(path, itk)
    count = int(io.GetNumberOfDimensions())
    shape = [int(io.GetDimensions(i)) for i in range(count)]
    axes = min(count, 3)
    affine = np.eye(4)
    for i in range(axes):
        affine[:axes, i] = np.array(io.GetDirection(i))[:axes] * io.GetSpacing(i)
    affine[:axes, 3] = [io.GetOrigin(i) for i in range(axes)]
    if Path(path).is_dir():
        shape, affine = _stack_of_slices(path, itk, shape, affine)
    pixel = int(io.GetPixelType())
    colours = {int(getattr(itk.CommonEnums, f"IOPixel_{name}")) for name in ("RGB", "RGBA")}
    kind = (
        "colours"
        if pixel in colours
        else "complex numbers"
        if pixel == int(itk.CommonEnums.IOPixel_COMPLEX)
        else "real"
    )
    components = int(io.GetNumberOfComponents())
    return _Header(
        (*shape, *([components] if components > 1 and kind == "real" else [])), orientation_ras_lps(affine), kind
    )


def _open_with_itk(path: str | Path, itk: Any) -> Any:
    file = dicom_files(path)[0] if Path(path).is_dir() else str(path)
    io = itk.ImageIOFactory.CreateImageIO(file, itk.CommonEnums.IOFileMode_ReadMode)
    if io is None:
        raise ScanError(f"{path}: a NRRD file or a DICOM series is needed, and it cannot be read as one")
    try:
        io.SetFileName(file)
        io.ReadImageInformation()
    except RuntimeError as error:
        raise ScanError(
            f"{path}: a NRRD file or a DICOM series is needed, and it cannot be read: {first_line(error)}"
        ) from error
    return io


def dicom_files(folder: str | Path) -> list[str]:
    """Slices of the one DICOM series of a folder, in spatial order.

    Raises:
        ScanError: if the folder holds several series, or none.
    """
    import itk  # slow to import

    names = itk.GDCMSeriesFileNames.New()
    names.SetUseSeriesDetails(True)
    names.AddSeriesRestriction("0008|0021")  # as MONAI's reader tells series apart
    names.SetDirectory(str(folder))
    series = list(names.GetSeriesUIDs())
    if len(series) != 1:
        raise ScanError(f"{folder}: one DICOM series in a folder of its own is needed, found {len(series)}")
    return [str(name) for name in names.GetFileNames(series[0])]


def _stack_of_slices(path: str | Path, itk: Any, shape: list[int], affine: np.ndarray) -> tuple[list[int], np.ndarray]:
    """Shape and affine of a series whose first file has these; several files are slices of one stack."""
    files = dicom_files(path)
    if len(files) == 1:
        return shape, affine
    affine = affine.copy()
    places = []
    for file in (files[0], files[-1]):
        io = _open_with_itk(file, itk)
        places.append(np.array([io.GetOrigin(i) for i in range(3)]))
    affine[:3, 2] = (places[1] - places[0]) / (len(files) - 1)
    return [*shape[:2], len(files)], affine
