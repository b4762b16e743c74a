"""DICOM: the series of a folder, each checked by its headers to be one evenly spaced stack, and their volumes."""

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

from brainfm_monai.io.files import first_line, refuse_if

MARK, MARK_PLACE = b"DICM", 128
EXTRA = "reading DICOM needs pydicom and dcm2niix, found neither or one of them: pip install 'brainfm-monai[dicom]'"
TAGS = (
    "SOPInstanceUID", "SeriesInstanceUID", "SeriesNumber", "SeriesDescription", "ImageType", "Modality", "EchoTime",
    "EchoNumbers", "AcquisitionNumber", "TemporalPositionIdentifier", "InstanceNumber", "ImagePositionPatient",
    "ImageOrientationPatient", "PixelSpacing", "Rows", "Columns", "NumberOfFrames", "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence", "PatientID", "SOPClassUID", "PhotometricInterpretation",
)  # fmt: skip
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
    """One volume, or one series of volumes, of a DICOM folder.

    The affine maps voxel indices to RAS mm, shape (4, 4), as the places of the slices say, in the order of dcm2niix:
    columns, rows upwards, slices along the normal.
    """

    name: str  # by number, description and what tells it from other volumes of its series; unique in a folder
    files: tuple[Path, ...]
    modality: str = ""  # "ct", "mr" or empty
    affine: np.ndarray | None = None
    problem: str = ""  # why it is not one evenly spaced stack of slices; empty: it is one
    is_overview: bool = False  # a localizer, a single slice, a phase image, a report: nobody means it as a scan
    warnings: tuple[str, ...] = ()
    uid: str = ""  # of the series
    instances: frozenset[str] = frozenset()  # unique ids of its files


@dataclass(frozen=True)
class _Slice:
    file: Path
    header: Any = field(repr=False)
    place: tuple[float, ...] | None  # of the first pixel, LPS mm
    axes: tuple[float, ...] | None  # along rows, along columns
    spacing: tuple[float, ...] | None


def is_dicom(path: str | Path) -> bool:
    """Whether a file, or one in a folder, has the mark of DICOM, whatever its name; the index of a medium is none."""
    path = Path(path)
    if path.name.upper() == INDEX and not path.is_dir():
        return False
    if path.is_dir():
        return any(is_dicom(file) for file in sorted(path.glob("[!.]*")) if file.is_file())
    with suppress(OSError):
        if path.is_file():
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
    slices, copies, volumes = _read_slices(files)
    refuse_if(not slices and not volumes, "a DICOM image is needed", "no file with pixels")
    groups: dict[tuple[Any, ...], list[_Slice]] = defaultdict(list)
    turns: dict[tuple[int, str], list[tuple[float, ...]]] = defaultdict(list)
    patients = sorted({str(one.header.get("PatientID", "")) for one in slices})
    for one in slices:
        h, axes, patient = one.header, one.axes or (), str(one.header.get("PatientID", ""))
        echo, kind = (float(h.get("EchoTime") or 0), str(h.get("EchoNumbers", ""))), tuple(h.get("ImageType") or ())
        series = int(h.get("SeriesNumber") or 0), str(h.get("SeriesInstanceUID"))
        alike = [t for t in turns[series] if len(t) == len(axes) and np.allclose(t, axes, 0, AXES_TOLERANCE)]
        turns[series] += [] if alike else [axes]
        groups[(patient, *series, echo, kind, (alike or [axes])[0], h.Rows, h.Columns)].append(one)
    for key, members in sorted(groups.items(), key=itemgetter(0)):
        echoes, kinds = (sorted({k[i] for k in groups if k[:3] == key[:3]}) for i in (3, 4))
        name = f"{key[1]}-{members[0].header.get('SeriesDescription') or ''}".strip("-")
        name = f"{key[0]}_{name}" if len(patients) > 1 else name
        for word, values, value in (("echo", echoes, key[3]), ("type", kinds, key[4])):
            name += f"_{word}-{values.index(value) + 1}" if len(values) > 1 else ""
        if problem := _find_overview(members, len(turns[key[1:3]])):
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


def _find_overview(slices: Sequence[_Slice], turns: int) -> str:
    """Why nobody means slices of one series as a scan, by their header; empty: somebody may."""
    header = slices[0].header
    modality = str(header.get("Modality", ""))
    kind = {str(word).upper() for word in (header.get("ImageType") or ())[2:]}
    captured = str(header.get("SOPClassUID", "")).startswith(SECONDARY_CAPTURE)
    if turns > 1 or "LOCALIZER" in kind:
        return f"a localizer, slices in {turns} directions under one series"
    if "MOSAIC" in kind:
        return "a mosaic, Siemens' format of functional and diffusion series"
    if modality in NO_SCANS or (captured and all(one.place is None for one in slices)):
        return f"no scan: {'a secondary capture' if captured else f'the modality is {modality}'}"
    if found := sorted(kind & (PHASES | PROJECTIONS if modality == "MR" else PROJECTIONS)):
        return f"{'a projection' if kind & PROJECTIONS else 'a phase image'} by its image type: {', '.join(found)}"
    return ""


def _read_slices(files: Sequence[Path]) -> tuple[list[_Slice], int, list[Series]]:
    """Slices of files, those of frames included, how many files were copies of others, and what has no pixels."""
    try:
        from pydicom import dcmread
    except ImportError as error:
        raise ValueError(EXTRA) from error
    slices, seen, copies, others = [], set(), 0, []
    for file in files:
        try:
            header = dcmread(file, stop_before_pixels=True, specific_tags=list(TAGS))
        except Exception as error:  # pydicom raises a dozen kinds for a damaged file
            raise ValueError(f"{file.name} is no readable DICOM file: {first_line(error)}") from error
        if "Rows" not in header:  # a report, a presentation state
            if "SOPClassUID" not in header:
                raise ValueError(f"{file.name} is no readable DICOM file: it does not state its class")
            problem = f"no image: the modality is {header.get('Modality', 'not stated')}"
            others.append(Series(file.name, (file,), problem=problem, is_overview=True))
            continue
        identity = str(header.get("SOPInstanceUID", file)), str(header.get("ImagePositionPatient"))  # ids may be wrong
        if identity in seen:
            copies += 1
            continue
        seen.add(identity)
        shared = (header.get("SharedFunctionalGroupsSequence") or [None])[0]
        for frame in header.get("PerFrameFunctionalGroupsSequence") or [None]:
            slices.append(_read_slice(file, header, (frame, shared)))
    return slices, copies, others


def _read_slice(file: Path, header: Any, groups: Sequence[Any]) -> _Slice:
    """Place, axes and spacing of a slice; of a frame from its own group, else from the group that all frames share."""

    def read(sequence: str, tag: str) -> Any:
        values = [g[sequence].value[0].get(tag) for g in groups if g is not None and sequence in g]
        value = next((v for v in values if v is not None), header.get(tag))
        return None if value is None else tuple(float(v) for v in value)

    place = read("PlanePositionSequence", "ImagePositionPatient")
    axes = read("PlaneOrientationSequence", "ImageOrientationPatient")
    return _Slice(file, header, place, axes, read("PixelMeasuresSequence", "PixelSpacing"))


def _split_volumes(name: str, slices: list[_Slice]) -> list[Series]:
    """Volumes of slices of one direction: as many as there are slices at each place."""
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
    """Whether slices, one at each height, have pixels of one size and are evenly spaced on one line; their affine."""
    places = np.array([s.place for s in stack])
    if len(places) < 2:
        return _describe(name, slices, problem="one slice alone", is_overview=True)
    sizes = np.array([s.spacing for s in slices])
    if (np.ptp(sizes, axis=0) > SPACING_TOLERANCE * sizes.min()).any():
        found = f"{sizes.min():.4g} to {sizes.max():.4g} mm"
        return _describe(name, slices, problem=f"pixels differ in size from slice to slice: {found}")
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


def _describe(name: str, slices: Sequence[_Slice], warnings: Sequence[str] = (), **attributes: Any) -> Series:
    header, noticed = slices[0].header, list(warnings)
    modality, name = str(header.get("Modality", "")), re.sub(r"[^\w.+-]+", "_", name).strip("-_") or "series"
    if modality not in ("CT", "MR"):
        noticed.append(f"the modality is {modality or 'not stated'}, where MR and CT are known")
    elif modality == "MR" and header.get("PhotometricInterpretation") == "MONOCHROME1":
        noticed.append("small numbers are bright by the header (MONOCHROME1); the numbers are taken as they are")
    files = tuple(dict.fromkeys(s.file for s in slices))
    instances = frozenset(str(s.header.get("SOPInstanceUID", s.file)) for s in slices)
    attributes |= {"uid": str(header.get("SeriesInstanceUID", "")), "instances": instances}
    modality = modality.lower() if modality in ("CT", "MR") else ""
    return Series(name, files, modality, warnings=tuple(noticed), **attributes)


@contextmanager
def convert_series(path: str | Path, name: str | None = None) -> Iterator[tuple[Path, Series]]:
    """Convert one series of a folder, or of one file, to NIfTI by dcm2niix; the file lives as long as the block.

    The ``name`` is that of the series; None: the only one. ValueError if the series is not one stack of slices, an
    extra is missing, or the conversion fails.
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
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith(("Error", "Warning"))]
        said = [re.sub(r"\S+/(\d{6})\.dcm", lambda match: chosen.files[int(match[1])].name, line) for line in said]
        found = f"{len(made)}: {'; '.join(said[-2:])}"
        refuse_if(len(made) != 1, "dcm2niix must make one volume of the series", found)
        yield made[0], chosen


def place_by_headers(affine: np.ndarray, depth: int, series: Series) -> np.ndarray:
    """The affine of a converted series by the places of its slices, which keep a tilt, in the order of dcm2niix.

    ``affine``, (4, 4), is dcm2niix's, ``depth`` the number of slices. ValueError if both disagree on more than a tilt.
    """
    placed = np.array(series.affine)
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
