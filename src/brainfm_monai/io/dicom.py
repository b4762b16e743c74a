"""DICOM: the series of a folder, each checked to be one evenly spaced stack, and its volume as dcm2niix makes it."""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from brainfm_monai.io.errors import first_line

__all__ = ["Series", "convert_series", "is_dicom", "list_series", "place_by_headers"]

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

    Attributes:
        name: by number, description and what tells it from other volumes of its series; no two in a folder are the same.
        files: its files.
        modality: ``"ct"``, ``"mr"`` or empty.
        affine: voxel indices to RAS mm as the places of the slices say, in the order of dcm2niix (columns to rows upwards,
            slices along the normal), shape (4, 4); None for a mosaic, whose slices have no places of their own.
        problem: why it is not one evenly spaced stack of slices; empty: it is one.
        is_overview: a localizer or a single slice, which nobody means as a scan.
        warnings: what a user should look at.
    """

    name: str
    files: tuple[Path, ...]
    modality: str = ""
    affine: np.ndarray | None = None
    problem: str = ""
    is_overview: bool = False
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Slice:
    file: Path
    header: Any = field(repr=False)
    place: np.ndarray | None  # of the first pixel, LPS mm
    axes: tuple[float, ...] | None  # along rows, along columns
    spacing: tuple[float, ...] | None


def is_dicom(path: str | Path) -> bool:
    """Whether a file has the mark of DICOM, whatever its name, or one of the files in a folder has it."""
    path = Path(path)
    if path.is_dir():
        return any(
            is_dicom(file) for file in sorted(path.iterdir()) if file.is_file() and not file.name.startswith(".")
        )
    if not path.is_file():
        return False
    try:
        with path.open("rb") as opened:
            return opened.read(MARK_PLACE + 4)[MARK_PLACE:] == MARK
    except OSError:
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
        groups[*series, echo, kind, axes, h.Rows, h.Columns].append(one)
    listed: dict[str, Series] = {}
    for key, members in sorted(groups.items(), key=lambda item: item[0]):
        echoes, kinds, turns = (sorted({k[i] for k in groups if k[:2] == key[:2]}) for i in (2, 3, 4))
        name = f"{key[0]}-{members[0].header.get('SeriesDescription') or ''}".strip("-")
        for word, values, value in (("echo", echoes, key[2]), ("type", kinds, key[3])):
            name += f"_{word}-{values.index(value) + 1}" if len(values) > 1 else ""
        if len(turns) > 1 or "LOCALIZER" in key[3]:
            problem = f"a localizer, slices in {len(turns)} directions under one series"
            volumes = [_describe(name, members, problem, is_overview=True)]
        else:
            volumes = _split_volumes(name, members)
        for volume in volumes:
            number = 1 + sum(
                known.partition("__")[0] == volume.name for known in listed
            )  # the same number and description
            unique = volume.name if number == 1 else f"{volume.name}__{number}"
            noticed = (f"{copies} files are copies of others and count once",) if copies else ()
            listed[unique] = replace(volume, name=unique, warnings=volume.warnings + noticed)
    return list(listed.values())


def _read_slices(files: Sequence[Path]) -> tuple[list[_Slice], int]:
    """Slices of files, those of frames included, and how many files were copies of others."""
    try:
        from pydicom import dcmread
    except ImportError as error:
        raise ValueError(EXTRA) from error
    slices, known, copies = [], set(), 0
    for file in files:
        try:
            header = dcmread(file, stop_before_pixels=True, specific_tags=list(TAGS))
        except Exception as error:  # pydicom raises a dozen kinds for a damaged file
            raise ValueError(f"{file.name} is no readable DICOM file: {first_line(error)}") from error
        if "Rows" not in header:
            continue  # an index of a medium, a report, a presentation state
        uid = str(header.get("SOPInstanceUID", file))
        copies += uid in known
        if uid in known:
            continue
        known.add(uid)
        frames = header.get("PerFrameFunctionalGroupsSequence") or [None]
        shared = (header.get("SharedFunctionalGroupsSequence") or [None])[0]
        slices += [_read_slice(file, header, (frame, shared)) for frame in frames]
    return slices, copies


def _read_slice(file: Path, header: Any, groups: Sequence[Any]) -> _Slice:
    """Place, axes and spacing of one slice; of a frame from its own group, else from the group that all frames share."""

    def find(sequence: str, tag: str) -> Any:
        found = [g[sequence].value[0].get(tag) for g in groups if g is not None and sequence in g]
        value = next((v for v in found if v is not None), header.get(tag))
        return None if value is None else tuple(float(v) for v in value)

    is_mosaic = "MOSAIC" in (header.get("ImageType") or ())
    place = None if is_mosaic else find("PlanePositionSequence", "ImagePositionPatient")
    axes = find("PlaneOrientationSequence", "ImageOrientationPatient")
    spacing = find("PixelMeasuresSequence", "PixelSpacing")
    return _Slice(file, header, None if place is None else np.array(place), axes, spacing)


def _split_volumes(name: str, slices: list[_Slice]) -> list[Series]:
    """Volumes of slices of one direction: as many as there are slices at each place."""
    if "MOSAIC" in (slices[0].header.get("ImageType") or ()):
        return [_describe(name, slices)]
    if any(s.place is None or s.axes is None or s.spacing is None for s in slices):
        return [_describe(name, slices, "slices without a place, direction or pixel spacing in their headers")]
    normal = np.cross(*np.reshape(slices[0].axes or (), (2, 3)))
    levels: list[tuple[float, list[_Slice]]] = []
    for height, one in sorted(((float(s.place @ normal), s) for s in slices), key=itemgetter(0)):
        if not levels or height - levels[-1][0] > PLACE_TOLERANCE_MM:
            levels.append((height, []))
        levels[-1][1].append(one)
    counts = sorted({len(members) for _, members in levels})
    if len(counts) > 1:
        return [_describe(name, slices, f"slices are missing: {counts[0]} to {counts[-1]} slices at one place")]
    if len({s.file for s in slices}) < len(slices):  # dcm2niix makes 4-D data of the frames of one file
        return [_check_stack(name, slices, [members[0] for _, members in levels])]
    order = ("AcquisitionNumber", "TemporalPositionIdentifier", "InstanceNumber")
    for _, members in levels:
        members.sort(key=lambda s: [float(s.header.get(tag) or 0) for tag in order])
    volumes = [[members[i] for _, members in levels] for i in range(counts[0])]
    ends = [f"_volume-{i + 1}" if len(volumes) > 1 else "" for i in range(len(volumes))]
    return [_check_stack(name + end, volume, volume) for volume, end in zip(volumes, ends, strict=True)]


def _check_stack(name: str, slices: Sequence[_Slice], stack: Sequence[_Slice]) -> Series:
    """Whether slices, one at each height, are evenly spaced on one line; their affine."""
    places = np.array([s.place for s in stack])
    if len(places) < 2:
        return _describe(name, slices, "one slice alone", is_overview=True)
    row, column = np.array(stack[0].axes).reshape(2, 3)
    normal = np.cross(row, column)
    gaps = np.diff(places @ normal)
    step = (places[-1] - places[0]) / (len(places) - 1)
    if np.ptp(gaps) > max(SPACING_TOLERANCE * np.median(gaps), 2 * PLACE_TOLERANCE_MM):
        found = f"distances from {gaps.min():.4g} to {gaps.max():.4g} mm"
        return _describe(name, slices, f"slices are missing or unevenly spaced: {found}")
    off = np.abs(places - places[0] - np.arange(len(places))[:, None] * step).max()
    if off > max(SPACING_TOLERANCE * np.median(gaps), 2 * PLACE_TOLERANCE_MM):
        return _describe(name, slices, f"slices do not lie on one line: up to {off:.4g} mm beside it")
    down, across = stack[0].spacing or (1.0, 1.0)
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 2] = row * across, -column * down, step
    affine[:3, 3] = places[0] + column * down * (stack[0].header.Rows - 1)  # dcm2niix turns the rows around
    tilt_deg = float(np.degrees(np.arccos(np.clip(step @ normal / np.linalg.norm(step), -1, 1))))
    warning = f"the gantry was tilted by {tilt_deg:.1f} degrees; the affine of the scan is sheared"
    described = _describe(name, slices)
    return replace(described, affine=LPS_TO_RAS @ affine, warnings=(warning,) if tilt_deg > TILT_TOLERANCE_DEG else ())


def _describe(name: str, slices: Sequence[_Slice], problem: str = "", is_overview: bool = False) -> Series:
    files = tuple(dict.fromkeys(s.file for s in slices))
    modality = str(slices[0].header.get("Modality", "")).lower()
    name = re.sub(r"[^\w.+-]+", "_", name).strip("-_") or "series"
    return Series(name, files, modality if modality in ("ct", "mr") else "", problem=problem, is_overview=is_overview)


@contextmanager
def convert_series(path: str | Path, name: str | None = None) -> Iterator[tuple[Path, Series]]:
    """Convert one series of a folder to NIfTI by dcm2niix.

    Args:
        path: folder, or one file.
        name: name of the series; None: the only one.

    Yields:
        The NIfTI file, which lives as long as the block, and the series.

    Raises:
        ValueError: if the series is not one stack of slices, an extra is missing, or the conversion fails.
    """
    series = list_series(path)
    usable = [s for s in series if (s.name == name if name else not s.problem)]
    if len(usable) != 1:
        kinds = "; ".join(f"{s.name} ({s.problem or f'{len(s.files)} files'})" for s in series)
        raise ValueError(f"one DICOM series of evenly spaced slices is needed, found {len(usable)} in {kinds}")
    if usable[0].problem:
        raise ValueError(f"one evenly spaced stack of DICOM slices is needed, found {usable[0].problem}")
    try:
        import dcm2niix
    except ImportError as error:
        raise ValueError(EXTRA) from error
    with TemporaryDirectory() as folder:
        source, target = Path(folder, "source"), Path(folder, "target")
        source.mkdir()
        target.mkdir()
        for number, file in enumerate(usable[0].files):  # these files alone, under names that every converter takes
            (source / f"{number:06d}.dcm").symlink_to(file.resolve())
        options = "-b n -z n -m y -x i -f scan -o".split()
        command = [dcm2niix.bin, *options, str(target), str(source)]
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=CONVERSION_SECONDS, check=False
        )
        # beside a volume dcm2niix writes versions that it resampled: without tilt (_Tilt), with even distances (_Eq)
        made = [f for f in sorted(target.glob("*.nii")) if not re.search(r"_(Tilt|Eq)_?\d*\.nii$", f.name)]
        if len(made) != 1:
            said = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith(("Error", "Warning"))]
            raise ValueError(f"dcm2niix must make one volume of the series, found {len(made)}: {'; '.join(said[-2:])}")
        yield made[0], usable[0]


def place_by_headers(affine: np.ndarray, depth: int, series: Series) -> np.ndarray:
    """The affine of a converted series by the places of its slices, which keep a tilt.

    Args:
        affine: of dcm2niix, shape (4, 4).
        depth: number of slices.
        series: with the affine of its slices.

    Returns:
        The affine of the slices, in the order in which dcm2niix stores them.

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
