"""Which scans to work on: a file, a DICOM series, a folder, a pattern, a BIDS dataset or a table; each with a name of its own."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Sequence
from glob import has_magic
from os.path import commonpath
from pathlib import Path
from typing import Any

from brainfm_monai.io import SCAN_SUFFIXES, is_dicom, list_series, scan_stem

__all__ = ["find_scans"]

Scan = dict[str, Any]

BIDS_SUFFIXES = ("T1w", "T2w", "FLAIR", "PDw", "PDT2", "T2starw", "inplaneT1", "inplaneT2", "UNIT1", "ct")
BIDS_FOLDERS = ("anat", "ct")
TABLE_SUFFIXES = (".tsv",)
TABLE_COLUMNS = {"image", "name", "frame", "lesions"}


def find_scans(
    source: str | Path,
    output_dir: str | Path | None = None,
    participant_label: str | int | Sequence[str | int] | None = None,
) -> list[Scan]:
    """List the scans that a user means, in the order of their paths.

    Hidden files and folders are passed over, and so are the results of earlier runs in ``output_dir``.

    Args:
        source: a NIfTI, MGH or NRRD file; the folder of a DICOM series; a folder, which is searched with the folders in it; a
            pattern such as ``"data/*/T1*.nii.gz"``; a BIDS dataset (a folder with dataset_description.json or sub-* folders), of
            which the anatomical images are taken; or a TSV with the column ``image`` and perhaps ``name``, ``frame`` and
            ``lesions`` (a mask), its paths relative to it. An empty string, which is a configuration's default, lists nothing.
        output_dir: where results are written; it may lie inside ``source`` but not be the same.
        participant_label: of a BIDS dataset, the subjects to take, with or without ``sub-``; None: all.

    Returns:
        One dictionary with ``image`` (path), ``name`` and perhaps ``folder`` (where in the output the files belong), ``frame``
        and ``lesions`` per scan. The name is the file's stem; stems that occur twice are preceded by the folders they lie in
        (``sub-01_T1w``), and numbered where that is not enough. Of BIDS images the suffix becomes the entity ``space``.

    Raises:
        FileNotFoundError: if there is no such file or folder, or no scan in it.
        ValueError: if the file has another suffix, or the results would land among the scans.
    """
    if not str(source):
        return []
    if has_magic(str(source)) and not Path(source).exists():
        return _from_pattern(str(source), output_dir)
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{source}: a scan or a folder of scans is needed, found no such file or folder")
    if path.is_file():
        return _from_table(path) if path.name.lower().endswith(TABLE_SUFFIXES) else [_from_file(path)]
    output = Path(output_dir).resolve() if output_dir else None
    if output == path.resolve():
        raise ValueError(
            f"{source}: results need a folder of their own, found output_dir to be the folder of the scans"
        )
    if _is_bids(path):
        return _from_bids(path, participant_label)
    if participant_label is not None:
        raise ValueError(f"{source}: 'participant_label' needs a BIDS dataset, found a folder without sub-* folders")
    return _from_folder(path, output)


def _from_file(path: Path) -> Scan:
    if not path.name.lower().endswith(SCAN_SUFFIXES):
        kinds = ", ".join(SCAN_SUFFIXES)
        raise ValueError(f"{path}: a scan is a file of the kind {kinds}, found another suffix")
    return {"image": str(path), "name": scan_stem(path)}


def _from_folder(path: Path, output: Path | None) -> list[Scan]:
    if is_dicom(path):
        return _from_dicom(path, path.resolve().name)
    visible = [
        f for f in sorted(path.rglob("*")) if not any(part.startswith(".") for part in f.relative_to(path).parts)
    ]
    visible = [f for f in visible if output is None or (f.resolve() != output and output not in f.resolve().parents)]
    found = [f for f in visible if _is_scan(f) or (f.is_dir() and is_dicom(f))]
    if not found:
        raise FileNotFoundError(f"{path}: a folder of scans ({', '.join(SCAN_SUFFIXES)}) is needed, found none in it")
    names = _names([f.relative_to(path) for f in found])
    return [
        scan
        for f, name in zip(found, names, strict=True)
        for scan in (_from_dicom(f, name) if f.is_dir() else [{"image": str(f), "name": name}])
    ]


def _from_dicom(path: Path, name: str) -> list[Scan]:
    """One scan per series of a folder; a folder of one series has the name of the folder."""
    try:
        series = [one for one in list_series(path) if not one.is_overview]
    except ValueError:  # reading reports it
        series = []
    if not series:
        return [{"image": str(path), "name": name}]
    if len(series) == 1:
        return [{"image": str(path), "name": name, "series": series[0].name}]
    return [{"image": str(path), "name": f"{name}_{one.name}", "series": one.name} for one in series]


def _from_pattern(pattern: str, output_dir: str | Path | None) -> list[Scan]:
    output = Path(output_dir).resolve() if output_dir else None
    anchor = Path(pattern).anchor
    matched = sorted(Path(anchor or ".").glob(str(Path(pattern).relative_to(anchor)) if anchor else pattern))
    found = [f for f in matched if _is_scan(f) or (f.is_dir() and is_dicom(f))]
    found = [f for f in found if output is None or output not in f.resolve().parents]
    if not found:
        raise FileNotFoundError(
            f"{pattern}: a pattern of scans ({', '.join(SCAN_SUFFIXES)}) is needed, found none that it fits"
        )
    return [{"image": str(f), "name": name} for f, name in zip(found, _names(_below_common(found)), strict=True)]


def _below_common(paths: list[Path]) -> list[Path]:
    """Paths relative to the folder that holds all of them."""
    common = commonpath([path.absolute().parent for path in paths])
    return [path.absolute().relative_to(common) for path in paths]


def _from_table(path: Path) -> list[Scan]:
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t")
        columns = list(reader.fieldnames or ())
        rows = list(reader)
    if "image" not in columns:
        raise ValueError(
            f"{path}: a table of scans needs the column 'image', found {' '.join(columns) or 'no columns'}"
        )
    if not rows:
        raise FileNotFoundError(f"{path}: a table of scans is needed, found no rows in it")
    scans: list[Scan] = []
    for row in rows:
        scan: Scan = {key: value for key, value in row.items() if key in TABLE_COLUMNS and value}
        scan |= {key: str(path.parent / scan[key]) for key in ("image", "lesions") if key in scan}
        if "frame" in scan:
            scan["frame"] = int(scan["frame"]) if scan["frame"].isdigit() else scan["frame"]
        scans.append(scan)
    if any("image" not in scan for scan in scans):
        raise ValueError(f"{path}: every row needs an 'image', found an empty one")
    places = _below_common([Path(scan["image"]) for scan in scans])
    places = [
        Path(scan["name"] + ".nii") if "name" in scan else place for scan, place in zip(scans, places, strict=True)
    ]
    return [scan | {"name": name} for scan, name in zip(scans, _names(places), strict=True)]


def _is_bids(path: Path) -> bool:
    return (path / "dataset_description.json").is_file() or any(
        (subject / folder).is_dir() or any(subject.glob(f"ses-*/{folder}"))
        for subject in path.glob("sub-*")
        for folder in BIDS_FOLDERS
    )


def _from_bids(path: Path, participant_label: str | int | Sequence[str | int] | None) -> list[Scan]:
    subjects = {folder.name.removeprefix("sub-"): folder for folder in sorted(path.glob("sub-*")) if folder.is_dir()}
    wanted = list(subjects) if participant_label is None else _labels(participant_label)
    absent = [label for label in wanted if label not in subjects]
    if absent:
        raise FileNotFoundError(f"{path}: the participants {', '.join(absent)} are wanted, found no such folders sub-*")
    scans = []
    for label in sorted(wanted):
        for file in sorted(subjects[label].rglob("*")):
            if file.parent.name in BIDS_FOLDERS and file.name.lower().endswith((".nii", ".nii.gz")):
                stem, _, suffix = scan_stem(file).rpartition("_")
                if suffix in BIDS_SUFFIXES:
                    name = f"{stem}_space-{suffix}"
                    scans.append({"image": str(file), "name": name, "folder": str(file.parent.relative_to(path))})
    if not scans:
        raise FileNotFoundError(
            f"{path}: a BIDS dataset with anatomical images ({', '.join(BIDS_SUFFIXES)}) is needed, found none"
        )
    return scans


def _labels(participant_label: str | int | Sequence[str | int]) -> list[str]:
    """Labels of subjects without ``sub-``; a string may hold several, separated by blanks or commas."""
    given = [participant_label] if isinstance(participant_label, str | int) else list(participant_label)
    return [part.removeprefix("sub-") for entry in given for part in re.split(r"[\s,]+", str(entry)) if part]


def _is_scan(path: Path) -> bool:
    return path.is_file() and path.name.lower().endswith(SCAN_SUFFIXES) and not path.name.startswith(".")


def _names(relative: list[Path]) -> list[str]:
    """Different names for scans at these paths, also where file names ignore case."""
    names = [scan_stem(path) for path in relative]
    count = Counter(name.lower() for name in names)
    names = [
        "_".join([*p.parent.parts, n]) if count[n.lower()] > 1 else n for p, n in zip(relative, names, strict=True)
    ]
    taken: set[str] = set()
    for i, name in enumerate(names):
        number = 1
        while names[i].lower() in taken:
            number += 1
            names[i] = f"{name}-{number}"
        taken.add(names[i].lower())
    return names
