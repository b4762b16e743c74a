"""A scan of a list as a value: its name, which is safe to write under, its file, and why it is left out."""

import hashlib
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from os.path import commonpath
from pathlib import Path
from typing import Any

from brainfm_monai.io.files import ScanError, hash_file
from brainfm_monai.io.headers import pair_of
from brainfm_monai.io.volumes import scan_stem

LONGEST_NAME = 150  # bytes: the names of files, of which it is the beginning, may have 255
NAME_RULE = f"one visible file name of 1 to {LONGEST_NAME} bytes without separators and control characters"
# characters that no name has: controls, halves of pairs, line ends, and marks that show nothing or turn the text
# around; the two joiners of letters (zero width) stay, which some scripts and emoji need
HIDDEN_KINDS, JOINERS = ("Cc", "Cs", "Cf", "Zl", "Zp"), "\u200c\u200d"
RESERVED = ("summary.tsv", "dataset_description.json")  # files in the folder of the results


@dataclass(frozen=True)
class Scan:
    """One entry of a list; a name or folder that no file can have, or that leads out of the results, is a ScanError."""

    name: str  # folder and beginning of the files of its results: one visible part of a path, of at most 150 bytes
    path: str = ""  # its file, or the folder of its DICOM series; empty for a scan that is generated
    folder: str = ""  # where its results belong, below the folder of all results; empty: the name
    frame: int | str | None = None  # volume of a 4-D file: its number, from 0, or "mean"; None: as the config says
    series: str = ""  # name of the series in a DICOM folder of several; empty: the only one
    problem: str = ""  # why the scan cannot be read; it is reported as failed. Empty: none is known
    skipped: str = ""  # why the entry is not a scan of the list; it is listed and not read. Empty: it is one

    def __post_init__(self) -> None:
        if problem := _check_names(self.name, self.folder):
            raise ScanError(f"{printable(self.path)}: {problem}")

    @classmethod
    def of(cls, item: Mapping[Any, Any]) -> "Scan":
        """The scan of an item of a datalist, whose ``image`` is the path and whose ``name`` is the name."""
        attributes = {f.name: item[f.name] for f in fields(cls) if item.get(f.name) is not None}
        return cls(**{**attributes, "name": str(item["name"]), "path": str(item.get("image") or "")})

    @property
    def item(self) -> dict[str, Any]:
        """The entry for MONAI's transforms: ``image``, ``name`` and what else is known."""
        values = {("image" if key == "path" else key): value for key, value in vars(self).items()}
        return {key: value for key, value in values.items() if value not in ("", None)}

    @property
    def results(self) -> str:
        """Folder of the results, below the folder of all results."""
        return self.folder or self.name

    def identify(self) -> dict[str, Any]:
        """What tells, at a glance, this scan's files from those of another one, or of the same one after a change."""
        path = os.path.realpath(self.path) if self.path else ""
        return {"path": path, "changed_ns": _changed_ns(self.path), "part": [self.frame, self.series]}

    def hash_content(self) -> str:
        """SHA-256 of the bytes of the scan: of all files that it is made of; empty without a file."""
        hashes = [bytes.fromhex(hash_file(file)) for file in _files_of(Path(self.path))] if self.path else []
        return hashlib.sha256(b"".join(hashes)).hexdigest() if self.path else ""


def printable(text: str | os.PathLike[str]) -> str:
    """A path as UTF-8 text of one line: bytes and control characters that no text can hold become ``?``."""
    shown = os.fsencode(text).decode("utf-8", "replace")
    return "".join("?" if _is_hidden(character) else character for character in shown)


def _is_hidden(character: str) -> bool:
    return character not in JOINERS and unicodedata.category(character) in HIDDEN_KINDS


def make_scans(items: Sequence[Mapping[Any, Any]], root: Path | None = None) -> list[Scan]:
    """Scans of a list's items; a name or folder that is not allowed, or a second name, is the ``problem`` of its scan.

    Items have an ``image`` (a path) and perhaps other attributes of a scan; those with ``skipped`` come last. Without a
    ``name`` the ``stem``, or that of the path below ``root`` or the common folder, makes it, see :func:`unique_names`.
    """
    wanted = [item for item in items if not item.get("skipped")]
    images = [Path(str(item.get("image") or "")) for item in wanted]
    common = root or commonpath([image.absolute().parent for image in images] or [Path()])
    paths = [
        Path(f"{asked}.nii" if (asked := item.get("name") or item.get("stem")) else os.path.relpath(image, common))
        for item, image in zip(wanted, images, strict=True)
    ]
    if root in images:
        paths[images.index(root)] = Path(root.resolve().name)
    scans = []
    for item, name in zip(wanted, unique_names(paths), strict=True):
        given, folder = str(item.get("name") or name), str(item.get("folder") or "")
        wrong = _check_names(given, folder)
        twice = "" if given == name else f"the names of scans must differ, found {given!r} twice"
        problem = wrong or twice or str(item.get("problem") or "")
        scans.append(Scan.of({**item, "name": name, "folder": "" if wrong else folder, "problem": problem}))
    skipped = [item for item in items if item.get("skipped")]
    return scans + [Scan.of({"name": unique_names([Path(Path(item["image"]).name)])[0], **item}) for item in skipped]


def unique_names(paths: Iterable[Path]) -> list[str]:
    """Names for scans at relative paths: the stems of the files, different also where case does not count.

    Stems that occur twice are preceded by the folders of the path, and numbered where that is not enough. Characters
    that no name may have become ``_``.
    """
    paths = list(paths)
    stems = [_clean(scan_stem(path)) for path in paths]
    count = Counter(map(_fold, stems))
    names: dict[str, str] = {}  # by what file systems may take two names by
    for path, stem in zip(paths, stems, strict=True):
        name = first = _clean("_".join([*path.parent.parts, stem])) if count[_fold(stem)] > 1 else stem
        number = 1
        while _fold(name) in names:
            number += 1
            name = f"{first}-{number}"
        names[_fold(name)] = name
    return list(names.values())


def _check_names(name: str, folder: str) -> str:
    """Why results cannot have a name or lie in a folder; empty: they can."""
    for part in (name, *(folder.split("/") if folder else ())):
        if part != _clean(part):
            return f"the name of a scan must be {NAME_RULE}, found {part!a}"
    return ""


def _clean(text: str) -> str:
    """The text itself if it can be the name of a scan, else the nearest one that can."""
    kept = "".join("_" if c in "/\\" or _is_hidden(c) else c for c in text)
    kept = (kept.lstrip(".") or "scan") + "_" * (kept in RESERVED)
    if len(kept.encode()) > LONGEST_NAME:
        ending = "-" + hashlib.sha256(kept.encode()).hexdigest()[:8]
        kept = kept.encode()[: LONGEST_NAME - len(ending)].decode(errors="ignore") + ending
    return kept


def _fold(name: str) -> str:
    """What file systems may take two names by: without case, accents composed, no dots and blanks at the end."""
    return unicodedata.normalize("NFC", name).casefold().rstrip(". ")


def _files_of(path: Path) -> list[Path]:
    """Files that a scan is made of: those of its folder, its own, or a header and the file of its voxels."""
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.is_file())
    is_pair = path.name.lower().endswith(".hdr") and pair_of(path).is_file()
    return [path, pair_of(path)] if is_pair else [path]


def _changed_ns(path: str) -> int:
    """Newest time of change of a file, or of a folder and its files, whatever time programs set; 0 if there is none."""
    with suppress(OSError):
        found = [file.stat() for file in (Path(path), *_files_of(Path(path)))]
        return max(max(state.st_mtime_ns, state.st_ctime_ns) for state in found)
    return 0
