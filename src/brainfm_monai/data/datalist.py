"""The MONAI datalist of prepared subjects, and of folders in the reference's layout."""

from __future__ import annotations

import json
import logging
import os
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from brainfm_monai.data.reference_layout import find_reference_subjects
from brainfm_monai.data.subjects import SIDECAR, STORAGE, read_record, subject_file

__all__ = ["SECTIONS", "count_subjects", "find_subjects", "read_datalist", "split_names", "write_datalist"]

logger = logging.getLogger(__name__)

SECTIONS = ("training", "validation", "test")
FACTS = ("dataset", "person", "generation_protocol", "protocol", "labels_from")


def write_datalist(
    root: str | Path | Sequence[str | Path],
    path: str | Path = "datalist.json",
    *,
    validation: Sequence[str] | str = (),
    validation_fraction: float = 0.0,
    test: Sequence[str] | str = (),
    test_fraction: float = 0.0,
    seed: int = 0,
) -> Path:
    """List subjects for ``monai.data.load_decathlon_datalist``.

    Paths in the list are relative to its folder. A target that a subject does not have is left out of its entry. All visits of
    one person are in one section. Subjects of different sets that share a name get that of their set before it.

    Args:
        root: folder with one folder per prepared subject, or in the layout of the reference; or several of these.
        path: the list to write; a relative path is taken from the (first) ``root``.
        validation: subjects kept for validation, by name; they may be separated by commas.
        validation_fraction: share of the other persons that is drawn for validation, at random.
        test: subjects kept for testing, by name.
        test_fraction: share of the other persons that is drawn for testing, at random.
        seed: seed of the draws.

    Returns:
        Path of the list, with the sections ``training``, ``validation`` and ``test``.

    Raises:
        FileNotFoundError: if a ``root`` is no folder.
        ValueError: if there is no subject, two of one set share a name, a name is not one of them or stands in two
            sections, or none is left for training.
    """
    roots = [Path(root)] if isinstance(root, (str, Path)) else [Path(r) for r in root]
    entries = _by_name([entry for r in roots for entry in find_subjects(r)])
    asked = {"validation": split_names(validation), "test": split_names(test)}
    fractions = {"validation": validation_fraction, "test": test_fraction}
    where = ", ".join(map(str, roots))
    section_of = _draw({name: _person(entry) for name, entry in entries.items()}, asked, fractions, seed, where)
    target = roots[0] / path
    sections: dict[str, list[dict[str, Any]]] = {section: [] for section in SECTIONS}
    for name in sorted(entries):
        sections[section_of.get(name, "training")].append(_relative(entries[name], target.parent))
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.part")
    beside.write_text(json.dumps(sections, indent=2) + "\n", encoding="utf-8")
    beside.replace(target)
    logger.info("%s", format_counts(count_subjects(entries.values())))
    return target


def find_subjects(root: str | Path) -> list[dict[str, Any]]:
    """The entries of all subjects in a folder, with whole paths: prepared ones, or those of the reference's layout.

    Raises:
        FileNotFoundError: if ``root`` is no folder.
        ValueError: if there is no subject.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: a folder of prepared subjects is needed, no such folder")
    folders = sorted(f.parent for f in root.glob(f"[!.]*/{SIDECAR}"))
    entries = [_entry(folder) for folder in folders] or find_reference_subjects(root)
    if not entries:
        raise ValueError(
            f"{root}: prepared subjects (folders with {SIDECAR}) or <dataset>.<subject>.T1w.nii are needed, found none"
        )
    return entries


def read_datalist(path: str | Path) -> list[dict[str, Any]]:
    """The entries of all sections of a datalist, with whole paths and the section's name in ``section``.

    Raises:
        ValueError: if it is no datalist of subjects.
    """
    path = Path(path)
    try:
        sections = json.loads(path.read_text(encoding="utf-8"))
        entries = [{**entry, "section": section} for section in SECTIONS for entry in sections.get(section, [])]
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{path}: a JSON datalist with the sections {', '.join(SECTIONS)} is needed, found {error}"
        ) from error
    folder = path.parent
    return [{k: _absolute(v, folder) if k in STORAGE else v for k, v in entry.items()} for entry in entries]


def count_subjects(entries: Iterable[Mapping[str, Any]]) -> dict[str, Counter[str]]:
    """How many subjects of each data set have what: by data set, ``subjects`` and every key of a file."""
    counts: dict[str, Counter[str]] = {}
    for entry in entries:
        counter = counts.setdefault(str(entry.get("dataset", "")), Counter())
        counter.update(["subjects", *(key for key in STORAGE if key in entry)])
    return counts


def format_counts(counts: Mapping[str, Counter[str]]) -> str:
    """The counts as a text table, one line for each data set; columns that are 0 throughout are left out."""
    keys = [key for key in ("subjects", *STORAGE) if any(c[key] for c in counts.values())]
    rows = [["dataset", *keys], *([name, *(str(counts[name][key]) for key in keys)] for name in sorted(counts))]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def split_names(names: Sequence[str] | str) -> list[str]:
    """Names out of a list, or out of a text in which commas separate them."""
    parts = names.split(",") if isinstance(names, str) else names
    return [str(part).strip() for part in parts if str(part).strip()]


def _draw(
    person_of: Mapping[str, str],
    asked: Mapping[str, Sequence[str]],
    fractions: Mapping[str, float],
    seed: int,
    where: str,
) -> dict[str, str]:
    """The section of every subject that is not for training; a person's subjects stay together."""
    section_of_person: dict[str, str] = {}
    for section, names in asked.items():
        unknown = sorted(set(names) - set(person_of))
        if unknown:
            raise ValueError(f"{where}: '{section}' must name prepared subjects, found no {', '.join(unknown)}")
        for name in names:
            if section_of_person.setdefault(person_of[name], section) != section:
                raise ValueError(f"{where}: a person is in one section, found {name} in 'validation' and in 'test'")
    rest = sorted(set(person_of.values()) - set(section_of_person))
    generator = random.Random(seed)
    generator.shuffle(rest)
    drawn = 0
    for section, fraction in fractions.items():
        if not 0 <= fraction < 1:
            raise ValueError(f"write_datalist: '{section}_fraction' must be in [0, 1), got {fraction}")
        count = round(fraction * len(rest))
        section_of_person |= dict.fromkeys(rest[drawn : drawn + count], section)
        drawn += count
    kept = {name: section_of_person[person] for name, person in person_of.items() if person in section_of_person}
    if len(kept) == len(person_of):
        raise ValueError(
            f"{where}: a subject must be left for training, found all {len(kept)} in 'validation' or 'test'"
        )
    return kept


def _by_name(entries: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The entries by names that differ: those of different sets that share a name are preceded by the set's."""
    count = Counter(entry["subject"] for entry in entries)
    named = [
        {**e, "subject": f"{e.get('dataset', '')}_{e['subject']}"} if count[e["subject"]] > 1 else e for e in entries
    ]
    twice = sorted(name for name, times in Counter(entry["subject"] for entry in named).items() if times > 1)
    if twice:
        raise ValueError(
            f"datalist: subjects of one set need different names, found twice: {', '.join(twice)}: pass --dataset NAME"
        )
    return {entry["subject"]: entry for entry in named}


def _person(entry: Mapping[str, Any]) -> str:
    """Who a subject is: the same person of the same set."""
    return f"{entry.get('dataset', '')}/{entry.get('person', entry['subject'])}"


def _entry(folder: Path) -> dict[str, Any]:
    record = read_record(folder)
    files = {key: str(subject_file(folder, key)) for key in STORAGE if subject_file(folder, key).is_file()}
    return {"subject": folder.name, **{key: record[key] for key in FACTS if record.get(key)}, **files}


def _relative(entry: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """An entry with the paths of its files relative to a folder."""

    def shorten(value: Any) -> Any:
        return (
            [shorten(v) for v in value] if isinstance(value, list) else Path(os.path.relpath(value, folder)).as_posix()
        )

    return {key: shorten(value) if key in STORAGE else value for key, value in entry.items()}


def _absolute(value: Any, folder: Path) -> Any:
    return [_absolute(v, folder) for v in value] if isinstance(value, list) else str(folder / value)
