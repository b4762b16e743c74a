"""Scans to work on: a file, a DICOM series, folder, pattern, BIDS dataset or table; nothing is left out silently."""

import errno
import json
import os
import re
import stat
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from glob import has_magic
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
Labels = str | int | Sequence[str | int] | None  # of participants; a word may hold several
RESULTS = "the folder of the results"
Item = dict[str, Any]  # an image (a path), and perhaps its problem or why it is skipped: see make_scans


def find_scans(
    source: str | Path, output_dir: str | Path | None = None, participant_label: Labels = None
) -> list[Scan]:
    """List the scans that a user means, in the order of their paths, then what is skipped among them, with the reason.

    Links are followed, each folder once. Files that are named like scans and cannot be read have a ``problem``; other
    files, hidden scans and results of earlier runs are skipped. Of BIDS images the suffix becomes the entity ``space``,
    and ``folder`` is that of the image. FileNotFoundError if there is no such file or folder, or no scan in it;
    ValueError if it is another kind of file, or the results would land among the scans.

    Args:
        source: a NIfTI, MGH or NRRD file; a folder, which is searched with the folders in it, of DICOM series, too; a
            pattern such as ``"data/*/T1*.nii.gz"``; a BIDS dataset, of which the anatomical images are taken; or a TSV
            with the column ``image`` and perhaps ``name`` and ``frame``. Empty: lists nothing.
        output_dir: where results are written; it may lie inside ``source`` but not be the same.
        participant_label: of a BIDS dataset, the subjects to take, with or without ``sub-``; None: all.
    """
    if not str(source):
        return []
    path, output = Path(source), os.path.realpath(output_dir) if output_dir else ""
    if has_magic(str(source)) and not os.path.lexists(path):
        return _name(_match(path, output), f"{source}: a pattern of scans")
    rule = f"{path}: a scan or a folder of scans is needed"
    refuse_if(not os.path.lexists(path), rule, "no such file or folder", FileNotFoundError)
    if not path.is_dir():
        if path.name.lower().endswith(".tsv"):
            return _from_table(path)
        is_scan = path.name.lower().endswith(SCAN_SUFFIXES) or is_dicom(path)
        refuse_if(not is_scan, f"{path}: a scan is a file of the kind {KINDS}", "another suffix")
        return make_scans([{"image": path, "problem": _find_problem(path)}])
    rule = f"{source}: results need a folder of their own"
    refuse_if(output == os.path.realpath(path), rule, "output_dir to be the folder of the scans")
    folders = [folder / name for p in ("sub-*", "sub-*/ses-*") for folder in path.glob(p) for name in BIDS_FOLDERS]
    if (path / "dataset_description.json").is_file() or any(folder.is_dir() for folder in folders):
        return _from_bids(path, output, participant_label)
    rule = f"{source}: 'participant_label' needs a BIDS dataset"
    refuse_if(participant_label is not None, rule, "a folder without sub-* folders")
    return _name(_walk(path, {output: RESULTS}), f"{source}: a folder of scans", path)


def _name(found: Iterator[Item], rule: str, root: Path | None = None) -> list[Scan]:
    items = list(found)
    is_empty = all(item.get("skipped") for item in items)
    refuse_if(is_empty, f"{rule} ({KINDS}) is needed", "none in it" if root else "none", FileNotFoundError)
    return _split_series(make_scans(items, root))


def _split_series(scans: list[Scan]) -> list[Scan]:
    """One scan per series of a DICOM folder; that of one series has the name of the folder. Others stay as they are."""
    split: list[tuple[Scan, str]] = []  # and the id of the series
    held = defaultdict[str, dict[str, frozenset[str]]](dict)  # ids of the slices by series and folder
    for scan in scans:
        series: list[Series] = []
        if not (scan.problem or scan.skipped) and Path(scan.path).is_dir():
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
    for number, (scan, uid) in enumerate(split):
        elsewhere = [folder for folder, slices in held[uid].items() if slices != held[uid][scan.path]]  # a copy is none
        rule = "the slices of one DICOM series must lie in one folder"
        found = f"{rule}, found others of it in {printable(elsewhere[0])}" if elsewhere else ""
        split[number] = replace(scan, problem=scan.problem or found), uid
    return [scan for scan, _ in split]


def _match(pattern: Path, output: str) -> Iterator[Item]:
    """What a pattern fits; folders at its beginning that exist are no pattern, whatever characters they have."""
    base = next(folder for folder in pattern.parents if folder.is_dir())
    for path in sorted(base.glob(str(pattern.relative_to(base)))):
        if output and Path(output) in (real := Path(os.path.realpath(path)), *real.parents):
            yield {"image": path, "skipped": "lies in the folder of the results"}
        elif path.is_dir():
            yield {"image": path, "skipped": "" if is_dicom(path) else "a folder without a DICOM series"}
        elif not path.name.startswith("."):
            yield _judge(path)


def _walk(folder: Path, searched: dict[str, str]) -> Iterator[Item]:
    """Everything in a folder and the folders in it, but the ``searched``: by the real path, the reason."""
    real = os.path.realpath(folder)
    if real in searched:
        yield {"image": folder, "skipped": searched[real]}
        return
    searched[real] = f"the same folder as {printable(folder)}, which is searched already"
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        yield {"image": folder, "problem": f"a folder that cannot be read: {error.strerror}"}
        return
    yield from _sort_entries(folder, entries, searched)


def _sort_entries(folder: Path, entries: list[Path], searched: dict[str, str]) -> Iterator[Item]:
    named = {entry for entry in entries if entry.name.lower().endswith(SCAN_SUFFIXES)}
    stems = {scan_stem(entry) for entry in named}
    silent = {entry.name for entry in entries if (match := COMPANION.fullmatch(entry.name)) and match[1] in stems}
    silent |= {name for entry in entries if entry.name.endswith(MARKERS) for name in _read_results(entry)}
    hidden = {entry for entry in entries if entry.name.startswith(".")}
    slices = {entry for entry in {*entries} - named - hidden if entry.is_file() and is_dicom(entry)}
    if slices:
        yield {"image": folder}
    for entry in entries:
        if entry in hidden & named:
            yield {"image": entry, "skipped": "a hidden file"}
        elif entry in hidden | slices:
            continue
        elif entry.name.endswith(MARKERS):
            yield {"image": entry, "skipped": "results of an earlier run"}
        elif entry.is_dir():
            yield from _walk(entry, searched)
        elif entry.name not in silent:
            yield _judge(entry)


def _judge(path: Path) -> Item:
    if not path.name.lower().endswith(SCAN_SUFFIXES):
        return {"image": path, "skipped": f"not a scan: a file of the kind {KINDS} or a DICOM series is one"}
    return {"image": path, "problem": _find_problem(path)}


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
    with suppress(OSError, ValueError, KeyError, TypeError):
        return [str(name) for name in json.loads(marker.read_text(encoding="utf-8"))["files"]]
    return []


def _from_table(path: Path) -> list[Scan]:
    rows = read_table(path)
    columns = rows[0] if rows else ["no rows"]
    refuse_if("image" not in columns, f"{path}: a table of scans needs the column 'image'", " ".join(columns))
    empty = any(row["image"] in ("", ABSENT) for row in rows)
    refuse_if(empty, f"{path}: every row needs an 'image'", "an empty one")
    items = []
    for row in rows:
        item: Item = {key: row[key] for key in TABLE_COLUMNS if row.get(key, "") not in ("", ABSENT)}
        if re.fullmatch(r"[0-9]+", item.get("frame", "")):
            item["frame"] = int(item["frame"])
        image = path.parent / item["image"]
        items.append({**item, "image": image, "problem": _find_problem(image)})
    return make_scans(items)


def _choose_participants(root: Path, participant_label: Labels) -> dict[Path, str]:
    """Folders of the participants, and why there are none: dead links, or no such folder."""
    given = [participant_label] if isinstance(participant_label, str | int) else participant_label
    words = [word for label in given or () for word in re.split(r"[\s,]+", str(label)) if word]  # one may hold several
    folders = [root / f"sub-{word.removeprefix('sub-')}" for word in words] if given is not None else root.glob("sub-*")
    wanted = [folder for folder in sorted({*folders}) if given is not None or not folder.is_file()]
    reasons = {folder: _find_problem(folder) if folder.is_symlink() else "no such folder" for folder in wanted}
    problems = {folder: "" if folder.is_dir() else reason for folder, reason in reasons.items()}
    rule = f"{root}: the participants {', '.join(folder.name.removeprefix('sub-') for folder in wanted)} are wanted"
    refuse_if(wanted and all(problems.values()), rule, "no such folders sub-*", FileNotFoundError)
    return problems


def _from_bids(path: Path, output: str, participant_label: Labels) -> list[Scan]:
    items: list[Item] = []
    others = Counter[str]()
    for subject, problem in _choose_participants(path, participant_label).items():
        found = [] if problem else [_judge_image(item, path) for item in _walk(subject, {output: RESULTS})]
        others.update(item["image"].parent.name for item in found if item.get("other"))
        items += [item for item in found if not item.get("other")]
        if problem:
            items.append({"image": subject, "name": subject.name, "problem": problem})
        elif not any("stem" in item for item in found):
            items.append({"image": subject, "skipped": "a participant without an anatomical image"})
    rule = f"{path}: a BIDS dataset with anatomical images ({', '.join(BIDS_SUFFIXES)}) is needed"
    refuse_if(not any("stem" in item for item in items), rule, "none", FileNotFoundError)
    counts = {path / "sub-*" / name: f"{n} files that are not anatomical images" for name, n in others.items()}
    items += [{"image": file, "skipped": reason} for file, reason in counts.items()]
    beside = [file for file in sorted(path.iterdir()) if os.path.realpath(file) != output]
    folders = {file for file in beside if file.is_dir() and not file.name.startswith((".", "sub-"))}
    outside = [file for file in beside if file in folders or file.name.lower().endswith(SCAN_SUFFIXES)]
    items += [{"image": file, "skipped": "lies outside the folders sub-*"} for file in outside]
    return make_scans(items)


def _judge_image(item: Item, root: Path) -> Item:
    """What was found below a subject, as an image with its ``stem``, as skipped, or as ``other`` than anatomical."""
    file: Path = item["image"]
    stem, _, suffix = scan_stem(file).rpartition("_")
    entities = dict(part.partition("-")[::2] for part in stem.split("_"))
    problem, reason, is_anatomical = item.get("problem"), item.get("skipped"), file.parent.name in BIDS_FOLDERS
    if not is_anatomical and not problem:
        return {**item, "other": True}
    if entities.get("part", "mag") != "mag":
        reason = reason or f"its entity part-{entities['part']} says that it is no magnitude image"
    elif suffix not in BIDS_SUFFIXES:
        reason = reason or f"the BIDS suffix '{suffix}' is none of {', '.join(BIDS_SUFFIXES)}"
    if reason:
        return {"image": file, "skipped": reason}
    problem = problem or find_contradiction(file, root)
    folder, name = file.parent.relative_to(root).as_posix(), f"{stem}_space-{suffix}" if stem else suffix
    return {"image": file, "stem": name, "folder": folder, "problem": problem}


def find_contradiction(file: Path, root: Path) -> str:
    """Why a file below ``root``, a BIDS dataset, is not of the person or visit of its folders; empty: it is."""
    named = dict(part.partition("-")[::2] for part in file.name.split("_"))
    for folder in file.relative_to(root).parts[:-1]:
        key, _, value = folder.partition("-")
        if key in ("sub", "ses") and named.get(key, value) != value:
            return f"its name and its folder must be of one {key}-*, found {key}-{named[key]} in {folder}"
    return ""
