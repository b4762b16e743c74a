"""The one reader of volumes: NIfTI, Analyze, MGH, NRRD and DICOM, with every refusal in one line."""

import gzip
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from brainfm_monai.io import headers
from brainfm_monai.io.dicom import convert_series, is_dicom, place_by_headers
from brainfm_monai.io.files import ScanError, first_line, refuse_if
from brainfm_monai.io.headers import Stored

NIFTI_SUFFIXES, MGH_SUFFIXES, NRRD_SUFFIXES = (".nii.gz", ".nii", ".hdr"), (".mgz", ".mgh"), (".nrrd",)
SCAN_SUFFIXES = NIFTI_SUFFIXES + MGH_SUFFIXES + NRRD_SUFFIXES
# a slab of three slices of 4 mm; head and shoulders. Beyond it the voxel size is wrong.
EXTENT_RANGE_MM = (10.0, 600.0)
WHOLE_TOLERANCE = 1e-3
FRAME_ADVICE = "pass --frame N (from 0) or --frame mean"
GZIP_MARK = b"\x1f\x8b"
LARGEST_VOXELS = 2**29  # of one volume: 2 GiB in float32, a head at 0.2 mm
PIECE_BYTES = 2**24  # that are read at once: a header that lies allocates nothing
TAIL_PIECES, TAIL_BYTES = 16, 2**20  # behind the voxels that are read on for the check sum


@dataclass(frozen=True)
class Volume:
    """One volume of a file, in the order in which the file stores it."""

    values: np.ndarray  # shape (H, W, D)
    affine: np.ndarray  # voxel indices to RAS mm, shape (4, 4), float64, as the file states it
    warnings: tuple[str, ...] = ()  # what a user should look at, one sentence each
    modality: str = ""  # "ct" or "mr" where the file says so (DICOM does), else empty

    @property
    def is_oriented(self) -> bool:
        """Whether the file states which side is left."""
        return headers.NOT_STATED not in self.warnings


def scan_stem(path: str | Path) -> str:
    """Name of a scan's file without the suffix: ``T1w`` for ``sub-01/T1w.nii.gz``."""
    name = Path(path).name
    for suffix in SCAN_SUFFIXES:
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name if Path(path).is_dir() else Path(path).stem


def read_volume(path: str | Path, frame: int | str | None = None, series: str | None = None) -> Volume:
    """Read one volume of real numbers, as it is stored; integers stay integers where the header does not scale them.

    A file that is missing, damaged, or holds no such volume is a ScanError of one line.

    Args:
        path: NIfTI, Analyze (``.hdr``), MGH or NRRD file, or the folder of a DICOM series.
        frame: which volume of a 4-D file: its number, from 0; ``"mean"``; or ``"all"``, see :func:`read_maps`; None
            refuses such a file.
        series: name of the series in a DICOM folder, see :func:`~brainfm_monai.io.list_series`; None: the only one.
    """
    path, frame = Path(path), int(frame) if isinstance(frame, str) and frame.isdecimal() else frame
    found = "a folder" if path.is_dir() else "no such file" if not path.exists() else "no regular file"
    with _named(path):
        is_series, rule = is_dicom(path), "a NIfTI, MGH or NRRD file or the folder of a DICOM series is needed"
        refuse_if(not is_series and not path.is_file(), rule, found)
        if not is_series:
            return _read_file(path, frame)
        with convert_series(path, series) as (file, chosen):
            volume = _read_file(file, frame)
        affine = place_by_headers(volume.affine, volume.values.shape[2], chosen)
        return Volume(volume.values, affine, chosen.warnings, modality=chosen.modality)


@contextmanager
def _named(path: str | Path) -> Iterator[None]:
    """Any error in the block becomes a ScanError of one line with the name of the file."""
    try:
        yield
    except ScanError:
        raise
    except Exception as error:  # damaged files show as a dozen kinds of errors of the libraries
        known = isinstance(error, ValueError) and str(error)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        raise ScanError(f"{path}: {reason if known else f'the voxels cannot be read, found {reason}'}") from error


def _read_file(path: Path, frame: int | str | None) -> Volume:
    name, rule = path.name.lower(), f"a file of the kind {', '.join(SCAN_SUFFIXES)} is needed"
    refuse_if(not name.endswith(SCAN_SUFFIXES), rule, "another suffix")
    if name.endswith(NRRD_SUFFIXES):
        stored = headers.read_nrrd(path)
    else:
        with _open_packed(path) as stream:
            block = stream.read(headers.NIFTI2_BYTES)  # the longest header
        stored = (headers.read_mgh_header if name.endswith(MGH_SUFFIXES) else headers.read_nifti_header)(path, block)
    _check_header(stored, frame)
    values, surplus = _read_frame(stored, frame)
    text = f"the file holds {surplus} bytes more than its header promises: are its dimensions and number type right?"
    has_surplus = surplus > 0 and name.endswith(NIFTI_SUFFIXES)  # an MGH file may have a footer
    return Volume(values, stored.affine, (*stored.warnings, *([text] if has_surplus else ())))


def _check_header(stored: Stored, frame: int | str | None) -> None:
    shape, count = stored.shape, math.prod(stored.shape[3:])
    kind = "colours" if stored.dtype.fields else "complex numbers" if stored.dtype.kind == "c" else stored.dtype
    found, axes = f"shape {shape}", np.round(stored.affine[:3], 4).tolist()
    refuse_if(stored.dtype.fields or stored.dtype.kind not in "iuf", "one real number per voxel is needed", kind)
    is_flat = len(shape) < 3 or min(shape[:3]) < 2
    refuse_if(is_flat, "a 3-D volume of at least 2 voxels along each axis is needed", found)
    refuse_if(math.prod(shape[:3]) > LARGEST_VOXELS, f"a volume of at most {LARGEST_VOXELS} voxels is needed", found)
    several = f"{len(shape)}-D data of {found}: {FRAME_ADVICE}"
    refuse_if(count > 1 and frame is None, "one 3-D volume is needed", several)
    is_frame = frame in (None, "mean", "all") or (isinstance(frame, int) and 0 <= frame < count)
    refuse_if(not is_frame, f"'frame' must be 'mean' or a number from 0 to {count - 1}", repr(frame))
    refuse_if(not headers.is_valid(stored.affine), "an affine of three independent axes is needed", axes)


@contextmanager
def _open_packed(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for reading, unpacked where its content, not its name, is gzip."""
    with path.open("rb") as file:
        yield gzip.GzipFile(fileobj=file) if file.peek(2)[:2] == GZIP_MARK else file  # type: ignore[misc]


def _read_frame(stored: Stored, frame: int | str | None) -> tuple[np.ndarray, int]:
    """Voxels of a file, (H, W, D) or, of all volumes, (H, W, D, C), and how many bytes follow the last volume.

    They are of the stored type in the machine's byte order, or float32 where they are scaled or a mean.
    """
    shape, frames = stored.shape[:3], math.prod(stored.shape[3:])
    if stored.array is not None:
        volumes = stored.array.reshape((*shape, frames), order="F")
        if frame == "mean":
            return volumes.mean(axis=3, dtype=np.float64).astype(np.float32), 0
        return volumes if frame == "all" else volumes[..., int(frame or 0)], 0
    count = math.prod(shape) * stored.dtype.itemsize
    needed, size = stored.offset + count * frames, stored.path.stat().st_size
    rule = f"the voxels cannot be read: {needed} bytes are promised by the header"
    with _open_packed(stored.path) as stream:
        ratio = headers.LARGEST_RATIO if isinstance(stream, gzip.GzipFile) else 1
        refuse_if(needed > size * ratio, rule, f"a file of {size}")  # before memory is taken
        stream.seek(stored.offset + (count * frame if isinstance(frame, int) else 0))
        if frame == "mean":
            each = (_read_array(stream, stored.dtype, shape).astype(np.float64) for _ in range(frames))
            values: Any = sum(each) / frames
        else:
            values = _read_array(stream, stored.dtype, (*shape, frames) if frame == "all" else shape)
        surplus = stream.tell() - needed
        try:
            for _ in range(TAIL_PIECES):
                surplus += len(stream.read(TAIL_BYTES))
        except gzip.BadGzipFile as error:
            if "Not a gzipped file" not in str(error):  # what follows the packed file is ignored
                raise
    if frame == "mean" or (stored.slope, stored.intercept) != (1.0, 0.0):
        scaled = np.empty(values.shape, np.float32, order="F")
        for plane in range(values.shape[2]):  # in float64, which a whole volume has no memory for
            scaled[:, :, plane] = values[:, :, plane].astype(np.float64) * stored.slope + stored.intercept
        values = scaled
    return values, surplus


def _read_array(stream: IO[bytes], dtype: np.dtype[Any], shape: tuple[int, ...]) -> np.ndarray:
    count = math.prod(shape) * dtype.itemsize
    content = bytearray()
    while len(content) < count and (piece := stream.read(min(PIECE_BYTES, count - len(content)))):
        content += piece
    refuse_if(len(content) < count, f"the voxels cannot be read: {count} bytes are needed", len(content))
    return np.frombuffer(content, dtype).reshape(shape, order="F").astype(dtype.newbyteorder("="), copy=False)


def read_maps(path: str | Path) -> Volume:
    """Read all volumes of a file, channel first, of shape (C, H, W, D); errors are those of :func:`read_volume`."""
    volume = read_volume(path, "all")
    return replace(volume, values=np.moveaxis(volume.values, 3, 0))


def read_scan(path: str | Path, frame: int | str | None = None, series: str | None = None) -> Volume:
    """Read one scan of a head, float32, see :func:`read_volume`; other sizes, or no contrast, are a ScanError, too."""
    low, high = EXTENT_RANGE_MM
    with _named(path), np.errstate(over="ignore"):
        refuse_if(frame == "all", "one volume is needed", f"'frame' to be 'all': {FRAME_ADVICE}")
        volume = read_volume(path, frame, series)
        extent_mm = np.linalg.norm(volume.affine[:3, :3], axis=0) * np.array(volume.values.shape)
        rule = f"a head scan extends over {low:.0f} to {high:.0f} mm along each axis"
        found = f"{' x '.join(f'{e:.4g}' for e in extent_mm)} mm: check the voxel size"
        refuse_if(extent_mm.min() < low or extent_mm.max() > high, rule, found)
        values, noticed = np.ascontiguousarray(volume.values, dtype=np.float32), volume.warnings
        finite = np.isfinite(values)
        if not finite.all():
            refuse_if(not finite.any(), "finite voxels are needed", "none (NaN or infinite everywhere)")
            are_larger = np.isfinite(volume.values).sum() > finite.sum()
            refuse_if(are_larger, f"values up to {np.finfo(np.float32).max:.2g} are needed", "larger ones")
            noticed = (*noticed, f"{(~finite).sum()} voxels are NaN or infinite and become 0")
            values = np.where(finite, values, np.float32(0))
        is_flat, found = values.min() == values.max(), f"the value {values.min():g} in every voxel"
        refuse_if(is_flat, "an image with contrast is needed", found)
    return replace(volume, values=values, warnings=noticed)


def read_labels(path: str | Path) -> Volume:
    """Read one label map, int32, see :func:`read_volume`; a value that is no whole number from 0 on is a ScanError."""
    volume, largest = read_volume(path), np.iinfo(np.int32).max
    values: Any = volume.values
    rule = f"ids must be whole numbers from 0 to {largest}"
    with _named(path):
        is_wrong = not np.isfinite(values).all() or values.min() < 0 or values.max() > largest
        refuse_if(is_wrong, rule, "values that are negative, larger or not finite")
        if values.dtype.kind == "f":
            fraction = np.abs(values - np.rint(values)).max()
            refuse_if(fraction > WHOLE_TOLERANCE, rule, f"values up to {fraction:.2g} off one")
            values = np.rint(values)
    return replace(volume, values=values.astype(np.int32))
