"""Scans to work on: a file, a DICOM series, folder, pattern, BIDS dataset or table; nothing is left out silently."""

import errno
import json
import os
import re
import stat
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from glob import has_magic
from os.path import commonpath
from pathlib import Path
from typing import Any

from brainfm_monai.io.dicom import Series, is_dicom, list_series
from brainfm_monai.io.files import ABSENT, read_table, refuse_if
from brainfm_monai.io.scans import Scan, make_scans, printable, unique_names
from brainfm_monai.io.volumes import SCAN_SUFFIXES, scan_stem

BIDS_SUFFIXES = ("T1w", "T2w", "FLAIR", "PDw", "PDT2", "T2starw", "inplaneT1", "inplaneT2", "UNIT1", "ct")
BIDS_FOLDERS = ("anat", "ct")
TABLE_COLUMNS = ("image", "name", "frame")
COMPANION = re.compile(r"(.+)\.(json|bval|bvec|img)", re.IGNORECASE | re.DOTALL)  # of the scan of this stem
MARKERS = ("_finished.json", "_unfinished.json")  # beside the results of a scan, see outputs.writer
KINDS = ", ".join(SCAN_SUFFIXES)
Found = tuple[Path, str, str]  # a path, its problem and why it is skipped: attributes of a Scan


def find_scans(
    source: str | Path,
    output_dir: str | Path | None = None,
    participant_label: str | int | Sequence[str | int] | None = None,
) -> list[Scan]:
    """List the scans that a user means, in the order of their paths, and what is found among them.

    Links are followed, each folder once. Files that are named like scans and cannot be read have a ``problem``; other
    files, hidden scans and results of earlier runs are ``skipped``, with the reason. Of BIDS images the suffix becomes
    the entity ``space``, and ``folder`` is that of the image. FileNotFoundError if there is no such file or folder, or
    no scan in it; ValueError if it is another kind of file, or the results would land among the scans.

    Args:
        source: a NIfTI, MGH or NRRD file; the folder of a DICOM series; a folder, which is searched with the folders in
            it; a pattern such as ``"data/*/T1*.nii.gz"``; a BIDS dataset (a folder with dataset_description.json or
            sub-* folders), of which the anatomical images are taken; or a TSV with the column ``image`` and perhaps
            ``name`` and ``frame``, its paths relative to it. An empty string lists nothing.
        output_dir: where results are written; it may lie inside ``source`` but not be the same.
        participant_label: of a BIDS dataset, the subjects to take, with or without ``sub-``; None: all.
    """
    if not str(source):
        return []
    path, output = Path(source), os.path.realpath(output_dir) if output_dir else None
    if has_magic(str(source)) and not os.path.lexists(path):
        return _name(_match(path, output), f"{source}: a pattern of scans")
    rule = f"{path}: a scan or a folder of scans is needed"
    refuse_if(not os.path.lexists(path), rule, "no such file or folder", FileNotFoundError)
    if not path.is_dir():
        if path.name.lower().endswith(".tsv"):
            return _from_table(path)
        is_scan = path.name.lower().endswith(SCAN_SUFFIXES) or is_dicom(path)
        refuse_if(not is_scan, f"{path}: a scan is a file of the kind {KINDS}", "another suffix")
        return [Scan(unique_names([Path(path.name)])[0], str(path), problem=_find_problem(path))]
    rule = f"{source}: results need a folder of their own"
    refuse_if(output == os.path.realpath(path), rule, "output_dir to be the folder of the scans")
    folders = [folder / name for p in ("sub-*", "sub-*/ses-*") for folder in path.glob(p) for name in BIDS_FOLDERS]
    if (path / "dataset_description.json").is_file() or any(folder.is_dir() for folder in folders):
        return _from_bids(path, output, participant_label)
    rule = f"{source}: 'participant_label' needs a BIDS dataset"
    refuse_if(participant_label is not None, rule, "a folder without sub-* folders")
    return _name(_walk(path, output, {}), f"{source}: a folder of scans", path)


def _name(found: Iterator[Found], rule: str, root: Path | None = None) -> list[Scan]:
    """Scans with names; a list without scans is refused with the rule."""
    listed = list(found)
    scans = [entry for entry in listed if not entry[2]]
    refuse_if(not scans, f"{rule} ({KINDS}) is needed", "none in it" if root else "none", FileNotFoundError)
    common = Path(root or commonpath([path.absolute().parent for path, *_ in scans]))
    names = unique_names(Path(os.path.relpath(p, common)) if p != root else Path(p.resolve().name) for p, *_ in scans)
    named = [Scan(name, str(path), problem=problem) for name, (path, problem, _) in zip(names, scans, strict=True)]
    return [*_split_series(named), *(_skip(path, reason) for path, _, reason in listed if reason)]


def _split_series(scans: list[Scan]) -> list[Scan]:
    """One scan per series of a DICOM folder; that of one series has the name of the folder. Others stay as they are."""
    split: list[tuple[Scan, str]] = []  # and the id of the series
    held = defaultdict[str, dict[str, frozenset[str]]](dict)  # ids of the slices by series and folder
    for scan in scans:
        series: list[Series] = []
        if not scan.problem and Path(scan.path).is_dir():
            with suppress(ValueError, OSError):  # reading reports it
                series = list_series(scan.path)
        wanted = [one for one in series if not one.is_overview]
        names = unique_names(Path(f"{scan.name}_{one.name}.nii".replace("/", "_")) for one in wanted)
        for name, one in zip(names if len(wanted) > 1 else [scan.name] * len(wanted), wanted, strict=True):
            split.append((replace(scan, name=name, series=one.name), one.uid))
            held[one.uid][scan.path] = held[one.uid].get(scan.path, frozenset()) | one.instances
        overviews = [one for one in series if one.is_overview]
        split += [(replace(scan, series=one.name, skipped=f"{one.name}: {one.problem}"), "") for one in overviews]
        split += [] if series else [(scan, "")]
    return [replace(scan, problem=scan.problem or _find_spread(scan.path, held[uid])) for scan, uid in split]


def _find_spread(path: str, held: Mapping[str, frozenset[str]]) -> str:
    """Why the slices of a series in one folder are not all; empty: other folders hold none of it, or a copy."""
    others = [folder for folder, slices in held.items() if slices != held[path]]
    rule = "the slices of one DICOM series must lie in one folder"
    return f"{rule}, found others of it in {printable(others[0])}" if others else ""


def _skip(path: Path, reason: str) -> Scan:
    return Scan(unique_names([Path(path.name)])[0], str(path), skipped=reason)


def _match(pattern: Path, output: str | None) -> Iterator[Found]:
    """What a pattern fits; folders at its beginning that exist are no pattern, whatever characters they have."""
    base = next(folder for folder in pattern.parents if folder.is_dir())
    for path in sorted(base.glob(str(pattern.relative_to(base)))):
        if output is not None and Path(output) in (real := Path(os.path.realpath(path)), *real.parents):
            yield path, "", "lies in the folder of the results"
        elif path.is_dir():
            yield path, "", "" if is_dicom(path) else "a folder without a DICOM series"
        elif not path.name.startswith("."):
            yield path, *_judge(path)


def _walk(folder: Path, output: str | None, searched: dict[str, Path]) -> Iterator[Found]:
    """Everything in a folder and the folders in it, in the order of paths; a DICOM series is its folder."""
    real = os.path.realpath(folder)
    if real == output:
        yield folder, "", "the folder of the results"
    elif real in searched:
        yield folder, "", f"the same folder as {printable(searched[real])}, which is searched already"
    else:
        searched[real] = folder
        try:
            entries = sorted(folder.iterdir())
        except OSError as error:
            yield folder, f"a folder that cannot be read: {error.strerror}", ""
            return
        yield from _sort_entries(folder, entries, output, searched)


def _sort_entries(folder: Path, entries: list[Path], output: str | None, searched: dict[str, Path]) -> Iterator[Found]:
    named = {entry for entry in entries if entry.name.lower().endswith(SCAN_SUFFIXES)}
    stems = {scan_stem(entry) for entry in named}
    silent = {entry.name for entry in entries if (match := COMPANION.fullmatch(entry.name)) and match[1] in stems}
    silent |= {name for entry in entries if entry.name.endswith(MARKERS) for name in _read_results(entry)}
    slices = {entry for entry in entries if entry not in named and not entry.name.startswith(".") and entry.is_file()}
    if slices := {entry for entry in slices if is_dicom(entry)}:
        yield folder, "", ""
    for entry in entries:
        if entry.name.startswith("."):
            if entry in named:
                yield entry, "", "a hidden file"
        elif entry.name.endswith(MARKERS):
            yield entry, "", "results of an earlier run"
        elif entry.is_dir():
            yield from _walk(entry, output, searched)
        elif entry.name not in silent and entry not in slices:
            yield entry, *_judge(entry)


def _judge(path: Path) -> tuple[str, str]:
    """Problem of a file, and why it is skipped."""
    if not path.name.lower().endswith(SCAN_SUFFIXES):
        return "", f"not a scan: a file of the kind {KINDS} or a DICOM series is one"
    return _find_problem(path), ""


def _find_problem(path: Path) -> str:
    """Why a file that is named like a scan cannot be read; empty: as far as one sees, it can."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if path.is_symlink():
            return "a link to itself" if error.errno == errno.ELOOP else f"a dead link, to {printable(path.readlink())}"
        return "no such file" if error.errno == errno.ENOENT else str(error.strerror)
    except ValueError as error:
        return f"a path of a file is needed, found {error}"
    if stat.S_ISDIR(mode):
        return "" if is_dicom(path) else "a folder without a DICOM series"
    if not stat.S_ISREG(mode):
        return "a regular file is needed, found a named pipe, a socket or a device"
    return "" if os.access(path, os.R_OK) else "no permission to read the file"


def _read_results(marker: Path) -> list[str]:
    """Names of the files of an earlier run, which its marker lists."""
    try:
        return [str(name) for name in json.loads(marker.read_text(encoding="utf-8"))["files"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _from_table(path: Path) -> list[Scan]:
    rows = read_table(path)
    columns = rows[0] if rows else ["no rows"]
    refuse_if("image" not in columns, f"{path}: a table of scans needs the column 'image'", " ".join(columns))
    empty = any(row["image"] in ("", ABSENT) for row in rows)
    refuse_if(empty, f"{path}: every row needs an 'image'", "an empty one")
    items: list[dict[str, Any]] = []
    for row in rows:
        item: dict[str, Any] = {key: row[key] for key in TABLE_COLUMNS if row.get(key, "") not in ("", ABSENT)}
        item["image"] = str(path.parent / item["image"])
        if re.fullmatch(r"[0-9]+", item.get("frame", "")):
            item["frame"] = int(item["frame"])
        items.append({**item, "problem": _find_problem(Path(item["image"]))})
    return make_scans(items)


def _choose_participants(
    path: Path, participant_label: str | int | Sequence[str | int] | None
) -> tuple[dict[str, Path], dict[str, str]]:
    """Folders of the participants by their labels, and why others have none: dead links, or no such folder."""
    places = {file.name.removeprefix("sub-"): file for file in sorted(path.glob("sub-*")) if not file.is_file()}
    given = [participant_label] if isinstance(participant_label, str | int) else participant_label
    words = [word for label in given or () for word in re.split(r"[\s,]+", str(label)) if word]  # one may hold several
    labels = sorted(places if given is None else {word.removeprefix("sub-") for word in words})
    subjects = {label: places[label] for label in labels if label in places and places[label].is_dir()}
    absent = [label for label in labels if label not in subjects]
    rule = f"{path}: the participants {', '.join(absent)} are wanted"
    refuse_if(absent and not subjects, rule, "no such folders sub-*", FileNotFoundError)
    return subjects, {label: _find_problem(places[label]) if label in places else "no such folder" for label in absent}


def _from_bids(path: Path, output: str | None, participant_label: str | int | Sequence[str | int] | None) -> list[Scan]:
    subjects, absent = _choose_participants(path, participant_label)
    images: list[tuple[Path, str, str]] = []  # file, problem, name
    skipped, others = [], Counter[str]()
    for subject in subjects.values():
        found = len(images)
        for file, problem, reason in _walk(subject, output, {}):
            stem, _, suffix = scan_stem(file).rpartition("_")
            entities = dict(part.partition("-")[::2] for part in stem.split("_"))
            if entities.get("part", "mag") != "mag":
                reason = reason or f"its entity part-{entities['part']} says that it is no magnitude image"
            if file.parent.name in BIDS_FOLDERS:
                problem = problem or find_contradiction(file, path)
            if file.parent.name not in BIDS_FOLDERS and not problem:
                others[file.parent.name] += 1
            elif reason or suffix not in BIDS_SUFFIXES:
                skipped.append((file, reason or f"the BIDS suffix '{suffix}' is none of {', '.join(BIDS_SUFFIXES)}"))
            else:
                images.append((file, problem, f"{stem}_space-{suffix}" if stem else suffix))
        if len(images) == found:
            skipped.append((subject, "a participant without an anatomical image"))
    rule = f"{path}: a BIDS dataset with anatomical images ({', '.join(BIDS_SUFFIXES)}) is needed"
    refuse_if(not images, rule, "none", FileNotFoundError)
    names = unique_names(Path(name + ".nii") for *_, name in images)
    items: list[dict[str, Any]] = [
        {"image": file, "name": name, "folder": file.parent.relative_to(path).as_posix(), "problem": problem}
        for name, (file, problem, _) in zip(names, images, strict=True)
    ]
    items += [{"image": path / f"sub-{n}", "name": f"sub-{n}", "problem": problem} for n, problem in absent.items()]
    skipped += [(path / "sub-*" / name, f"{n} files that are not anatomical images") for name, n in others.items()]
    beside = [file for file in sorted(path.iterdir()) if not file.name.startswith((".", "sub-")) or file.is_file()]
    outside = [file for file in beside if file.is_dir() or _judge(file) == ("", "")]
    skipped += [(file, "lies outside the folders sub-*") for file in outside if os.path.realpath(file) != output]
    return [*make_scans(items), *(_skip(file, reason) for file, reason in skipped)]


def find_contradiction(file: Path, root: Path) -> str:
    """Why a file below ``root``, a BIDS dataset, is not of the person or visit of its folders; empty: it is."""
    named = dict(part.partition("-")[::2] for part in file.name.split("_"))
    for folder in file.relative_to(root).parts[:-1]:
        key, _, value = folder.partition("-")
        if key in ("sub", "ses") and named.get(key, value) != value:
            return f"its name and its folder must be of one {key}-*, found {key}-{named[key]} in {folder}"
    return ""
