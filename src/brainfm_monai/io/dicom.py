"""DICOM: the series of a folder, each checked to be one evenly spaced stack, and its volume as dcm2niix makes it."""

import re
import subprocess
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from brainfm_monai.io.files import first_line

MARK, MARK_PLACE = b"DICM", 128
EXTRA = "reading DICOM needs pydicom and dcm2niix, found neither or one of them: pip install 'brainfm-monai[dicom]'"
TAGS = (
    "SOPInstanceUID", "SeriesInstanceUID", "SeriesNumber", "SeriesDescription", "ImageType", "Modality", "EchoTime",
    "EchoNumbers", "AcquisitionNumber", "TemporalPositionIdentifier", "InstanceNumber", "ImagePositionPatient",
    "ImageOrientationPatient", "PixelSpacing", "Rows", "Columns", "NumberOfFrames", "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
)  # fmt: skip
SPACING_TOLERANCE, PLACE_TOLERANCE_MM = 0.05, 0.05  # of the distance between slices; rounding of places in headers
TILT_TOLERANCE_DEG = 0.1
CONVERSION_SECONDS = 1800
LPS_TO_RAS = np.diag([-1.0, -1, 1, 1])


@dataclass(frozen=True)
class Series:
    """One volume, or one series of volumes, of a DICOM folder.

    The affine maps voxel indices to RAS mm, shape (4, 4), as the places of the slices say, in the order of dcm2niix:
    columns, rows upwards, slices along the normal. In a mosaic Siemens lays the slices side by side in one picture;
    they have no places.
    """

    name: str  # by number, description and what tells it from other volumes of its series; unique in a folder
    files: tuple[Path, ...]
    modality: str = ""  # "ct", "mr" or empty
    affine: np.ndarray | None = None
    problem: str = ""  # why it is not one evenly spaced stack of slices; empty: it is one
    is_overview: bool = False  # a localizer or a single slice, which nobody means as a scan
    warnings: tuple[str, ...] = ()
    mosaic: tuple[int, int] | None = None  # columns and rows of its pictures


@dataclass(frozen=True)
class _Slice:
    file: Path
    header: Any = field(repr=False)
    place: tuple[float, ...] | None  # of the first pixel, LPS mm
    axes: tuple[float, ...] | None  # along rows, along columns
    spacing: tuple[float, ...] | None


def is_dicom(path: str | Path) -> bool:
    """Whether a file has the mark of DICOM, whatever its name, or one of the files in a folder has it."""
    path = Path(path)
    if path.is_dir():
        return any(is_dicom(file) for file in sorted(path.glob("[!.]*")) if file.is_file())
    with suppress(OSError):
        if path.is_file():
            with path.open("rb") as opened:
                return opened.read(MARK_PLACE + 4)[MARK_PLACE:] == MARK
    return False


def list_series(path: str | Path) -> list[Series]:
    """List the volumes of a folder (not of the folders in it), or of one file, by their headers.

    Echoes, magnitude and phase, and repetitions under one series are volumes of their own. Copies of a file count once.

    Returns:
        In the order of their numbers; those that are not one evenly spaced stack have a ``problem``.

    Raises:
        ValueError: if pydicom is not installed, or no file holds an image.
    """
    path = Path(path)
    slices, copies = _read_slices(sorted(filter(is_dicom, path.iterdir())) if path.is_dir() else [path])
    if not slices:
        raise ValueError("a DICOM image is needed, found no file with pixels")
    groups: dict[tuple[Any, ...], list[_Slice]] = defaultdict(list)
    for one in slices:
        h, axes = one.header, tuple(np.round(one.axes or (), 3))
        echo, kind = (float(h.get("EchoTime") or 0), str(h.get("EchoNumbers", ""))), tuple(h.get("ImageType") or ())
        series = int(h.get("SeriesNumber") or 0), str(h.get("SeriesInstanceUID"))
        groups[(*series, echo, kind, axes, h.Rows, h.Columns)].append(one)
    volumes: list[Series] = []
    for key, members in sorted(groups.items(), key=itemgetter(0)):
        echoes, kinds, turns = (sorted({k[i] for k in groups if k[:2] == key[:2]}) for i in (2, 3, 4))
        name = f"{key[0]}-{members[0].header.get('SeriesDescription') or ''}".strip("-")
        for word, values, value in (("echo", echoes, key[2]), ("type", kinds, key[3])):
            name += f"_{word}-{values.index(value) + 1}" if len(values) > 1 else ""
        if len(turns) > 1 or "LOCALIZER" in key[3]:
            problem = f"a localizer, slices in {len(turns)} directions under one series"
            volumes.append(_describe(name, members, problem=problem, is_overview=True))
        else:
            volumes += _split_volumes(name, members)
    count, listed = Counter[str](), []
    noticed = (f"{copies} files are copies of others and count once",) if copies else ()
    for volume in volumes:
        count[volume.name] += 1
        ending = f"__{count[volume.name]}" if count[volume.name] > 1 else ""  # the same number and description
        listed.append(replace(volume, name=volume.name + ending, warnings=volume.warnings + noticed))
    return listed


def _read_slices(files: Sequence[Path]) -> tuple[list[_Slice], int]:
    """Slices of files, those of frames included, and how many files were copies of others."""
    try:
        from pydicom import dcmread
    except ImportError as error:
        raise ValueError(EXTRA) from error
    slices, uids, copies = [], set(), 0
    for file in files:
        try:
            header = dcmread(file, stop_before_pixels=True, specific_tags=list(TAGS))
        except Exception as error:  # pydicom raises a dozen kinds for a damaged file
            raise ValueError(f"{file.name} is no readable DICOM file: {first_line(error)}") from error
        uid = str(header.get("SOPInstanceUID", file))
        if "Rows" not in header:
            continue  # an index of a medium, a report, a presentation state
        if uid in uids:
            copies += 1
            continue
        uids.add(uid)
        shared = (header.get("SharedFunctionalGroupsSequence") or [None])[0]
        for frame in header.get("PerFrameFunctionalGroupsSequence") or [None]:
            slices.append(_read_slice(file, header, (frame, shared)))
    return slices, copies


def _read_slice(file: Path, header: Any, groups: Sequence[Any]) -> _Slice:
    """Place, axes and spacing of a slice; of a frame from its own group, else from the group that all frames share."""

    def read(sequence: str, tag: str) -> Any:
        values = [g[sequence].value[0].get(tag) for g in groups if g is not None and sequence in g]
        value = next((v for v in values if v is not None), header.get(tag))
        return None if value is None else tuple(float(v) for v in value)

    place = None if _is_mosaic(header) else read("PlanePositionSequence", "ImagePositionPatient")
    axes = read("PlaneOrientationSequence", "ImageOrientationPatient")
    return _Slice(file, header, place, axes, read("PixelMeasuresSequence", "PixelSpacing"))


def _is_mosaic(header: Any) -> bool:
    return "MOSAIC" in (header.get("ImageType") or ())


def _split_volumes(name: str, slices: list[_Slice]) -> list[Series]:
    """Volumes of slices of one direction: as many as there are slices at each place."""
    header = slices[0].header
    if _is_mosaic(header):
        return [_describe(name, slices, mosaic=(int(header.Columns), int(header.Rows)))]
    if any(s.place is None or s.axes is None or s.spacing is None for s in slices):
        return [_describe(name, slices, problem="slices without a place, direction or pixel spacing in their headers")]
    order = ("AcquisitionNumber", "TemporalPositionIdentifier", "InstanceNumber")
    slices = sorted(slices, key=lambda s: [float(s.header.get(tag) or 0) for tag in order])
    heights = np.array([s.place for s in slices]) @ np.cross(*np.reshape(slices[0].axes or (), (2, 3)))
    upwards = np.argsort(heights, kind="stable")
    starts = np.flatnonzero(np.diff(heights[upwards]) > PLACE_TOLERANCE_MM) + 1
    levels = [[slices[i] for i in sorted(level)] for level in np.split(upwards, starts)]
    counts = sorted({len(level) for level in levels})
    if len(counts) > 1:
        found = f"{counts[0]} to {counts[-1]} slices at one place"
        return [_describe(name, slices, problem=f"slices are missing: {found}")]
    if len({s.file for s in slices}) < len(slices):  # dcm2niix makes 4-D data of the frames of one file
        return [_check_stack(name, slices, [level[0] for level in levels])]
    volumes = list(zip(*levels, strict=True))
    ends = [f"_volume-{i + 1}" if len(volumes) > 1 else "" for i in range(len(volumes))]
    return [_check_stack(name + end, volume, volume) for volume, end in zip(volumes, ends, strict=True)]


def _check_stack(name: str, slices: Sequence[_Slice], stack: Sequence[_Slice]) -> Series:
    """Whether slices, one at each height, are evenly spaced on one line; their affine."""
    places = np.array([s.place for s in stack])
    if len(places) < 2:
        return _describe(name, slices, problem="one slice alone", is_overview=True)
    row, column = np.array(stack[0].axes).reshape(2, 3)
    normal = np.cross(row, column)
    gaps, step = np.diff(places @ normal), (places[-1] - places[0]) / (len(places) - 1)
    tolerance_mm = max(SPACING_TOLERANCE * np.median(gaps), 2 * PLACE_TOLERANCE_MM)
    if np.ptp(gaps) > tolerance_mm:
        found = f"distances from {gaps.min():.4g} to {gaps.max():.4g} mm"
        return _describe(name, slices, problem=f"slices are missing or unevenly spaced: {found}")
    off_mm = np.abs(places - places[0] - np.arange(len(places))[:, None] * step).max()
    if off_mm > tolerance_mm:
        return _describe(name, slices, problem=f"slices do not lie on one line: up to {off_mm:.4g} mm beside it")
    down, across = stack[0].spacing or (1.0, 1.0)
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 2] = row * across, -column * down, step
    affine[:3, 3] = places[0] + column * down * (stack[0].header.Rows - 1)  # dcm2niix turns the rows around
    tilt_deg = float(np.degrees(np.arccos(np.clip(step @ normal / np.linalg.norm(step), -1, 1))))
    warning = f"the gantry was tilted by {tilt_deg:.1f} degrees; the affine of the scan is sheared"
    noticed = (warning,) if tilt_deg > TILT_TOLERANCE_DEG else ()
    return _describe(name, slices, affine=LPS_TO_RAS @ affine, warnings=noticed)


def _describe(name: str, slices: Sequence[_Slice], **attributes: Any) -> Series:
    modality = str(slices[0].header.get("Modality", "")).lower()
    name = re.sub(r"[^\w.+-]+", "_", name).strip("-_") or "series"
    files = tuple(dict.fromkeys(s.file for s in slices))
    return Series(name, files, modality if modality in ("ct", "mr") else "", **attributes)


@contextmanager
def convert_series(path: str | Path, name: str | None = None) -> Iterator[tuple[Path, Series]]:
    """Convert one series of a folder, or of one file, to NIfTI by dcm2niix; the file lives as long as the block.

    Args:
        path: folder, or one file.
        name: name of the series; None: the only one.

    Raises:
        ValueError: if the series is not one stack of slices, an extra is missing, or the conversion fails.
    """
    series = list_series(path)
    usable = [s for s in series if (s.name == name if name else not s.problem)]
    if len(usable) != 1:
        kinds = "; ".join(f"{s.name} ({s.problem or f'{len(s.files)} files'})" for s in series)
        raise ValueError(f"one DICOM series of evenly spaced slices is needed, found {len(usable)} in {kinds}")
    (chosen,) = usable
    if chosen.problem:
        raise ValueError(f"one evenly spaced stack of DICOM slices is needed, found {chosen.problem}")
    try:
        import dcm2niix
    except ImportError as error:
        raise ValueError(EXTRA) from error
    with TemporaryDirectory() as folder:
        source, target = Path(folder, "source"), Path(folder, "target")
        source.mkdir()
        target.mkdir()
        for number, file in enumerate(chosen.files):  # these files alone, under names that every converter takes
            (source / f"{number:06d}.dcm").symlink_to(file.resolve())
        command = [dcm2niix.bin, *"-b n -z n -m y -x i -f scan -o".split(), str(target), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=CONVERSION_SECONDS)
        # beside a volume dcm2niix writes versions that it resampled: without tilt (_Tilt), with even distances (_Eq)
        made = [f for f in sorted(target.glob("*.nii")) if not re.search(r"_(Tilt|Eq)_?\d*\.nii$", f.name)]
        if len(made) != 1:
            said = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith(("Error", "Warning"))]
            raise ValueError(f"dcm2niix must make one volume of the series, found {len(made)}: {'; '.join(said[-2:])}")
        yield made[0], chosen


def place_by_headers(affine: np.ndarray, depth: int, series: Series) -> np.ndarray:
    """The affine of a converted series by the places of its slices, which keep a tilt, in the order of dcm2niix.

    ``affine``, shape (4, 4), is that of dcm2niix, ``depth`` the number of slices.

    Raises:
        ValueError: if dcm2niix and the headers disagree on anything but a tilt.
    """
    if series.affine is None:
        return affine
    placed = series.affine.copy()
    if placed[:3, 2] @ affine[:3, 2] < 0:
        placed[:3, 3] += placed[:3, 2] * (depth - 1)
        placed[:3, 2] *= -1
    sizes = np.linalg.norm(placed[:3, :3], axis=0)
    off = np.abs(placed - affine)[:3] / np.append(sizes, sizes.max())
    leaning = np.abs(placed[:3, 2] @ placed[:3, :2] / sizes[:2] / sizes[2]).max()
    is_tilted = leaning > np.sin(np.radians(TILT_TOLERANCE_DEG))
    tolerance = 1.0 if is_tilted else SPACING_TOLERANCE  # dcm2niix's own affine leaves a tilt out
    if off[:, :3].max() > tolerance or off[:, 3].max() > 1:
        raise ValueError(f"dcm2niix places slices otherwise than their headers: {np.round(affine[:3], 3).tolist()}")
    return placed
