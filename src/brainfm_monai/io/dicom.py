"""DICOM: the series of a folder, each checked by its headers to be one evenly spaced stack, and their volumes."""

import re
import subprocess
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np

from brainfm_monai.io.files import first_line, refuse_if

MARK, MARK_PLACE = b"DICM", 128
EXTRA = "reading DICOM needs pydicom and dcm2niix, found neither or one of them: pip install 'brainfm-monai[dicom]'"
KEPT_BYTES = 2**12  # of an element of a header in memory: vendors keep 100 kB in each slice
INDEX = "DICOMDIR"  # name of the index of a medium, whose images lie in folders below
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"  # class of screenshots and scanned pages, and beginning of its kinds
NO_SCANS = ("SEG", "SR", "PR", "KO", "OT", "DOC", "REG", "RTSTRUCT", "RTDOSE", "RTPLAN", "RTRECORD", "RTIMAGE")
# what the header calls an image that is no magnitude image, or that projects many slices onto one
PHASES = {"P", "PHASE", "PHASE MAP", "R", "REAL", "I", "IMAGINARY"}
PROJECTIONS = {"PROJECTION IMAGE", "MIP", "MINIP", "MNIP"}
AXES_TOLERANCE = 0.01  # between components of the directions of slices of one stack, which headers round
SPACING_TOLERANCE, PLACE_TOLERANCE_MM = 0.05, 0.05  # of the distance between slices; rounding of places in headers
TILT_TOLERANCE_DEG = 0.1
CONVERSION_SECONDS = 1800
LPS_TO_RAS = np.diag([-1.0, -1, 1, 1])


@dataclass(frozen=True)
class Series:
    """One volume, or one series of volumes, of a DICOM folder."""

    name: str  # by number, description and what tells it from other volumes of its series; unique in a folder
    files: tuple[Path, ...]
    modality: str = ""  # "ct", "mr" or empty
    affine: np.ndarray | None = None  # columns, rows upwards, slices along the normal, as dcm2niix has them, to RAS mm
    problem: str = ""  # why it is not one evenly spaced stack of slices; empty: it is one
    is_overview: bool = False  # a localizer, a single slice, a phase image, a report: nobody means it as a scan
    warnings: tuple[str, ...] = ()
    uid: str = ""  # of the series
    instances: frozenset[str] = frozenset()  # unique ids of its files


class _Slice(NamedTuple):
    file: Path
    header: Any
    place: tuple[float, ...] | None  # of the first pixel, LPS mm
    axes: tuple[float, ...] | None  # along rows, along columns
    spacing: tuple[float, ...] | None


def is_dicom(path: str | Path) -> bool:
    """Whether a file, or one in a folder, has the mark of DICOM, whatever its name; the index of a medium is none."""
    path = Path(path)
    if path.is_dir():
        return any(is_dicom(file) for file in sorted(path.glob("[!.]*")) if file.is_file())
    with suppress(OSError):
        if path.is_file() and path.name.upper() != INDEX:
            with path.open("rb") as opened:
                return opened.read(MARK_PLACE + 4)[MARK_PLACE:] == MARK
    return False


def list_series(path: str | Path) -> list[Series]:
    """List the volumes of a folder (not of the folders in it), or of one file, by their headers, ordered by number.

    Echoes, magnitude and phase, and repetitions under one series are volumes of their own. Copies of a file count once.
    A volume that is not one evenly spaced stack has a ``problem``. ValueError without pydicom, or without an image.
    """
    path = Path(path)
    files = [file for file in sorted(path.iterdir()) if file.is_file() and is_dicom(file)] if path.is_dir() else [path]
    slices = _read_slices(files)
    refuse_if(not slices, "a DICOM image is needed", "no file with pixels")
    groups: dict[tuple[Any, ...], list[_Slice]] = defaultdict(list)
    for one in slices:
        h, axes = one.header, one.axes or ()
        series = str(h.get("PatientID", "")), int(h.get("SeriesNumber") or 0), str(h.get("SeriesInstanceUID"))
        echo, kind = (float(h.get("EchoTime") or 0), str(h.get("EchoNumbers", ""))), tuple(h.get("ImageType") or ())
        turns = (key[5] for key in groups if key[:3] == series)
        alike = (turn for turn in turns if len(turn) == len(axes) and np.allclose(turn, axes, 0, AXES_TOLERANCE))
        groups[(*series, echo, kind, next(alike, axes), h.get("Rows", 0), h.get("Columns", 0))].append(one)
    count, listed = Counter[str](), []
    copies = len(files) - len({one.file for one in slices})
    for key in sorted(groups):
        members, same = groups[key], [other for other in groups if other[:3] == key[:3]]
        name = f"{key[1]}-{members[0].header.get('SeriesDescription') or ''}".strip("-")
        name = f"{key[0]}_{name}" if len({other[0] for other in groups}) > 1 else name
        for place, word in ((3, "echo"), (4, "type")):
            values = sorted({other[place] for other in same})
            name += f"_{word}-{values.index(key[place]) + 1}" if len(values) > 1 else ""
        problem = _find_overview(members, len({other[5] for other in same if other[6]}))
        is_overview = {"problem": problem, "is_overview": True}
        for title, volume, attributes in [(name, members, is_overview)] if problem else _split_volumes(name, members):
            title = re.sub(r"[^\w.+-]+", "_", title).strip("-_") or "series"
            count[title] += 1
            ending = f"__{count[title]}" if count[title] > 1 else ""  # the same number and description
            listed.append(_describe(title + ending, volume, copies, **attributes))
    return listed


def _find_overview(slices: Sequence[_Slice], turns: int) -> str:
    """Why nobody means slices of one series as a scan, by their header; empty: somebody may."""
    header = slices[0].header
    modality = str(header.get("Modality", ""))
    kind = {str(word).upper() for word in (header.get("ImageType") or ())[2:]}
    captured = str(header.get("SOPClassUID", "")).startswith(SECONDARY_CAPTURE)
    if "Rows" not in header:  # a report, a presentation state
        return f"no image: the modality is {modality or 'not stated'}"
    if turns > 1 or "LOCALIZER" in kind:
        return f"a localizer, slices in {turns} directions under one series"
    if "MOSAIC" in kind:
        return "a mosaic, Siemens' format of functional and diffusion series"
    if modality in NO_SCANS or (captured and all(one.place is None for one in slices)):
        return f"no scan: {'a secondary capture' if captured else f'the modality is {modality}'}"
    if found := sorted(kind & (PHASES | PROJECTIONS if modality == "MR" else PROJECTIONS)):
        return f"{'a projection' if kind & PROJECTIONS else 'a phase image'} by its image type: {', '.join(found)}"
    return ""


def _read_slices(files: Sequence[Path]) -> list[_Slice]:
    """Slices of files, those of frames included; copies of a file count once."""
    try:
        from pydicom import dcmread
    except ImportError as error:
        raise ValueError(EXTRA) from error
    headers: dict[tuple[str, str], tuple[Path, Any]] = {}
    for file in files:
        try:
            header = dcmread(file, stop_before_pixels=True, defer_size=KEPT_BYTES)
            refuse_if("Rows" not in header and "SOPClassUID" not in header, "its class is needed", "none")
        except Exception as error:  # pydicom raises a dozen kinds for a damaged file
            raise ValueError(f"{file.name} is no readable DICOM file: {first_line(error)}") from error
        place = str(header.get("ImagePositionPatient"))  # ids may be wrong
        headers.setdefault((str(header.get("SOPInstanceUID", file)), place), (file, header))
    frames = "PerFrameFunctionalGroupsSequence"
    return [_read_slice(*one, frame) for one in headers.values() for frame in one[1].get(frames) or [None]]


def _read_slice(file: Path, header: Any, frame: Any) -> _Slice:
    """Place, axes and spacing of a slice; of a frame from its own group, else from the group that all frames share."""
    shared = (header.get("SharedFunctionalGroupsSequence") or [None])[0]
    groups = [group for group in (frame, shared) if group is not None]

    def read(sequence: str, tag: str) -> Any:
        values = [group[sequence].value[0].get(tag) for group in groups if sequence in group]
        value = next((v for v in values if v is not None), header.get(tag))
        return None if value is None else tuple(float(v) for v in value)

    place = read("PlanePositionSequence", "ImagePositionPatient")
    axes = read("PlaneOrientationSequence", "ImageOrientationPatient")
    return _Slice(file, header, place, axes, read("PixelMeasuresSequence", "PixelSpacing"))


def _split_volumes(name: str, slices: list[_Slice]) -> list[tuple[str, Sequence[_Slice], dict[str, Any]]]:
    """Volumes of slices of one direction, as many as there are slices at each place: name, slices, what is found."""
    if any(s.place is None or s.axes is None or s.spacing is None for s in slices):
        return [(name, slices, {"problem": "slices without a place, direction or pixel spacing in their headers"})]
    order = ("AcquisitionNumber", "TemporalPositionIdentifier", "InstanceNumber")
    slices = sorted(slices, key=lambda s: [float(s.header.get(tag) or 0) for tag in order])
    heights = np.array([s.place for s in slices]) @ np.cross(*np.reshape(slices[0].axes or (), (2, 3)))
    upwards = np.argsort(heights, kind="stable")
    starts = np.flatnonzero(np.diff(heights[upwards]) > PLACE_TOLERANCE_MM) + 1
    levels = [[slices[i] for i in sorted(level)] for level in np.split(upwards, starts)]
    counts = sorted({len(level) for level in levels})
    if len(counts) > 1:
        found = f"{counts[0]} to {counts[-1]} slices at one place"
        return [(name, slices, {"problem": f"slices are missing: {found}"})]
    if len({s.file for s in slices}) < len(slices):  # dcm2niix makes 4-D data of the frames of one file
        return [(name, slices, _check_stack(slices, [level[0] for level in levels]))]
    volumes = list(zip(*levels, strict=True))
    ends = [f"_volume-{i + 1}" if len(volumes) > 1 else "" for i in range(len(volumes))]
    return [(name + end, volume, _check_stack(volume, volume)) for volume, end in zip(volumes, ends, strict=True)]


def _check_stack(slices: Sequence[_Slice], stack: Sequence[_Slice]) -> dict[str, Any]:
    """The affine of slices, one at each height, or why they are not of one size and evenly spaced on one line."""
    places = np.array([s.place for s in stack])
    if len(places) < 2:
        return {"problem": "one slice alone", "is_overview": True}
    sizes = np.array([s.spacing for s in slices])
    row, column = np.array(stack[0].axes).reshape(2, 3)
    normal = np.cross(row, column)
    gaps, step = np.diff(places @ normal), (places[-1] - places[0]) / (len(places) - 1)
    off_mm = np.abs(places - places[0] - np.arange(len(places))[:, None] * step).max()
    tolerance_mm = max(SPACING_TOLERANCE * np.median(gaps), 2 * PLACE_TOLERANCE_MM)
    size, gap = (f"{values.min():.4g} to {values.max():.4g} mm" for values in (sizes, gaps))
    if (np.ptp(sizes, axis=0) > SPACING_TOLERANCE * sizes.min()).any():
        return {"problem": f"pixels differ in size from slice to slice: {size}"}
    if np.ptp(gaps) > tolerance_mm:
        return {"problem": f"slices are missing or unevenly spaced: distances from {gap}"}
    if off_mm > tolerance_mm:
        return {"problem": f"slices do not lie on one line: up to {off_mm:.4g} mm beside it"}
    down, across = stack[0].spacing or (1.0, 1.0)
    origin = places[0] + column * down * (stack[0].header.Rows - 1)  # dcm2niix turns the rows around
    affine = np.vstack([np.stack([row * across, -column * down, step, origin], axis=1), [0, 0, 0, 1]])
    tilt_deg = float(np.degrees(np.arccos(np.clip(step @ normal / np.linalg.norm(step), -1, 1))))
    warning = f"the gantry was tilted by {tilt_deg:.1f} degrees; the affine of the scan is sheared"
    return {"affine": LPS_TO_RAS @ affine, "warnings": [warning] if tilt_deg > TILT_TOLERANCE_DEG else []}


def _describe(name: str, slices: Sequence[_Slice], copies: int, **attributes: Any) -> Series:
    header, noticed = slices[0].header, attributes.pop("warnings", [])
    modality = str(header.get("Modality", ""))
    if modality not in ("CT", "MR"):
        noticed.append(f"the modality is {modality or 'not stated'}, where MR and CT are known")
    elif modality == "MR" and header.get("PhotometricInterpretation") == "MONOCHROME1":
        noticed.append("small numbers are bright by the header (MONOCHROME1); the numbers are taken as they are")
    if copies:
        noticed.append(f"{copies} files are copies of others and count once")
    files = tuple(dict.fromkeys(s.file for s in slices))
    instances = frozenset(str(s.header.get("SOPInstanceUID", s.file)) for s in slices)
    attributes |= {"uid": str(header.get("SeriesInstanceUID", "")), "instances": instances}
    modality = modality.lower() if modality in ("CT", "MR") else ""
    return Series(name, files, modality, warnings=tuple(noticed), **attributes)


@contextmanager
def convert_series(path: str | Path, name: str | None = None) -> Iterator[tuple[Path, Series]]:
    """Convert the series of a name, or the only one, to NIfTI by dcm2niix; the file lives as long as the block.

    ValueError if the series is not one stack of slices, an extra is missing, or the conversion fails.
    """
    series = list_series(path)
    usable = [s for s in series if (s.name == name if name else not s.problem)]
    kinds = "; ".join(f"{s.name} ({s.problem or f'{len(s.files)} files'})" for s in series)
    refuse_if(len(usable) != 1, "one DICOM series of evenly spaced slices is needed", f"{len(usable)} in {kinds}")
    (chosen,) = usable
    refuse_if(chosen.problem, "one evenly spaced stack of DICOM slices is needed", chosen.problem)
    try:
        import dcm2niix
    except ImportError as error:
        raise ValueError(EXTRA) from error
    with TemporaryDirectory() as source, TemporaryDirectory() as target:
        for number, file in enumerate(chosen.files):  # these files alone, under names that every converter takes
            Path(source, f"{number:06d}.dcm").symlink_to(file.resolve())
        command = [dcm2niix.bin, *"-b n -z n -m y -x i -f scan -o".split(), target, source]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=CONVERSION_SECONDS)
        # beside a volume dcm2niix writes versions that it resampled: without tilt (_Tilt), with even distances (_Eq)
        made = [f for f in sorted(Path(target).glob("*.nii")) if not re.search(r"_(Tilt|Eq)_?\d*\.nii$", f.name)]
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith(("Error", "Warning"))]
        said = [re.sub(r"\S+/(\d{6})\.dcm", lambda match: chosen.files[int(match[1])].name, line) for line in said]
        found = f"{len(made)}: {'; '.join(said[-2:])}"
        refuse_if(len(made) != 1, "dcm2niix must make one volume of the series", found)
        yield made[0], chosen


def place_by_headers(affine: np.ndarray, depth: int, series: Series) -> np.ndarray:
    """The affine, (4, 4), of ``depth`` slices as their headers say; ValueError if dcm2niix's differs but by a tilt."""
    placed = np.array(series.affine)
    if placed[:3, 2] @ affine[:3, 2] < 0:
        placed[:3, 3] += placed[:3, 2] * (depth - 1)
        placed[:3, 2] *= -1
    sizes = np.linalg.norm(placed[:3, :3], axis=0)
    off = np.abs(placed - affine)[:3] / np.append(sizes, sizes.max())
    leaning = np.abs(placed[:3, 2] @ placed[:3, :2] / sizes[:2] / sizes[2]).max()
    # dcm2niix's own affine leaves a tilt out
    tolerance = 1.0 if leaning > np.sin(np.radians(TILT_TOLERANCE_DEG)) else SPACING_TOLERANCE
    if off[:, :3].max() > tolerance or off[:, 3].max() > 1:
        raise ValueError(f"dcm2niix places slices otherwise than their headers: {np.round(affine[:3], 3).tolist()}")
    return placed
