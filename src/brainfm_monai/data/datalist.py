"""The MONAI datalist of prepared subjects."""

import json
import logging
import os
import random
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd

from brainfm_monai.data.subjects import SIDECAR, STORAGE, read_record, split_names, subject_file
from brainfm_monai.io import SCAN_SUFFIXES, find_repeated, hash_file, refuse_if, write_text

logger = logging.getLogger(__name__)

SECTIONS = ("training", "validation", "test")
PROTOCOLS = ("generation_protocol", "protocol")
FACTS = ("dataset", "person", "generation_protocol", "protocol", "labels_from", "simulated")
LONGITUDINAL = ".long."  # FreeSurfer names a visit of its longitudinal stream VISIT.long.TEMPLATE
# what studies append to a person's name: _ses-2, _tp1, _v02, _m12, _MR_d0129, _base, _post, _week12, _20240131, _T1w
VISIT = re.compile(
    r"(?i)[._-](?:(?:ses|session|visit|tp|timepoint|time|scan|run|base|baseline|template|followup|fu|bl|mr)[._-]?\d*"
    r"|(?:day|week|month|year)[._-]?\d+|pre|post|(?:re)?test|T1w?|T2w?|FLAIR|CT"
    r"|[vtmy][._-]?\d\d?|d\d{3,}|(?:19|20)\d\d[-_]?\d\d[-_]?\d\d)$"
)
NAMES = {"subject", "name", "dataset", "person", "labels_from", "simulated"}  # never paths


def write_datalist(
    root: str | Path | Sequence[str | Path], output: str | Path = "datalist.json", *,
    validation: Sequence[str] | str = (), validation_fraction: float = 0.0, test: Sequence[str] | str = (),
    test_fraction: float = 0.0, seed: int = 0,
) -> Path:  # fmt: skip
    """Write the datalist of folders of subjects, and count what the subjects have; return its path.

    Paths in the list are relative to its folder. All visits of one person are in one section, see
    :func:`find_persons`. Subjects of different sets that share a name get the name of their set as a prefix.
    An error of one line if there is no subject, segmentations have several protocols, a name is wrong or stands twice,
    or nobody is left for training.

    Args:
        root: folder of prepared subjects; several are separated by commas.
        output: the list; a relative path is taken from the first folder.
        validation: names of subjects that are kept out of training, separated by commas.
        validation_fraction: share of the other persons that is drawn for validation.
        test: names of subjects that are kept for testing, separated by commas.
        test_fraction: share of the other persons that is drawn for testing.
        seed: seed of the draws.
    """
    roots = [Path(r) for r in split_names(str(root) if isinstance(root, Path) else root)]
    where, target = ", ".join(map(str, roots)), roots[0] / output
    entries = _by_name([entry for r in roots for entry in find_subjects(r)])
    check_protocols(entries.values(), where)
    asked = {"validation": (split_names(validation), validation_fraction), "test": (split_names(test), test_fraction)}
    section_of = _draw(find_persons(entries), asked, seed, where)
    sections: dict[str, list[dict[str, Any]]] = {section: [] for section in SECTIONS}
    first: dict[str, str] = {}  # subject by the content of its segmentation
    for name, entry in sorted(entries.items()):
        earlier = first.setdefault(hash_file(entry["segmentation"]) if "segmentation" in entry else name, name)
        if section_of[earlier] != section_of[name]:
            logger.warning("%s: %s and %s have the same labels and are in different sections", where, earlier, name)
        paths = {*STORAGE, *(key for key in PROTOCOLS if Path(str(entry.get(key, ""))).is_absolute())} & set(entry)
        relative = {key: Path(os.path.relpath(entry[key], target.parent)).as_posix() for key in paths}
        sections[section_of[name]].append({key: relative.get(key, entry[key]) for key in entry})
    write_text(target, json.dumps(sections, indent=2) + "\n")
    logger.info("%s", count_subjects(entries.values()).to_string(index=False))
    return target


def find_subjects(root: Path) -> list[dict[str, Any]]:
    """The items of all prepared subjects in a folder, with whole paths; an error if there is none."""
    refuse_if(not root.is_dir(), f"{root}: a folder of prepared subjects is needed", "no folder", FileNotFoundError)
    folders = sorted(f.parent for f in root.glob(f"[!.]*/{SIDECAR}"))
    refuse_if(not folders, f"{root}: prepared subjects (folders with {SIDECAR}) are needed", "none")
    return [make_entry(folder) for folder in folders]


def make_entry(folder: Path) -> dict[str, Any]:
    """The item of a prepared subject, with whole paths."""
    record = read_record(folder)
    files = {key: str(path) for key in STORAGE if (path := subject_file(folder, key)).is_file()}
    tables = {key: folder.parent / str(record.get(key, "")) for key in PROTOCOLS}  # of the user's, see make_subjects
    files |= {key: str(table) for key, table in tables.items() if table.is_file()}
    return {"subject": folder.name, **{key: record[key] for key in FACTS if record.get(key)}, **files}


def read_datalist(path: str | Path, section: str | None = None, protocol: str | None = None) -> list[dict[str, Any]]:
    """Read the items of a datalist (JSON), in which paths are relative to its folder, with whole paths.

    A value is a path if its key is that of a volume or if it ends like an image file. Without a ``section``, all are
    read, and each item names its own. ValueError if it is no such list, or an item has another ``protocol``.
    """
    path = Path(path)
    sections_needed = f"{path}: a JSON datalist with the sections {section or ', '.join(SECTIONS)} is needed"
    try:
        sections = json.loads(path.read_text(encoding="utf-8"))
        all_items = [{**item, "section": name} for name in SECTIONS for item in sections.get(name, [])]
        items = all_items if section is None else [dict(item) for item in sections[section]]
    except KeyError:
        raise ValueError(f"{sections_needed}, found the sections {', '.join(sections) or 'none'}") from None
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{sections_needed}, found {error}") from error
    if protocol is not None:
        check_protocols(items, str(path), protocol)
    subjects = {str(number): item for number, item in enumerate(all_items) if "subject" in item}
    first: dict[str, Mapping[str, Any]] = {}  # subject of every person
    for number, person in find_persons(subjects).items():
        pair = first.setdefault(person, subjects[number]), subjects[number]
        if pair[0]["section"] != pair[1]["section"]:
            found = " and ".join(f"{item['subject']} in '{item['section']}'" for item in pair)
            logger.warning("%s: a person must be in one section, found %s", path, found)
    return [{key: _absolute(key, value, path.parent) for key, value in item.items()} for item in items]


def check_protocols(entries: Collection[Mapping[str, Any]], where: str, protocol: str | None = None) -> None:
    """ValueError if segmentations that name their protocol have several, or another one than ``protocol``."""
    subjects_of: dict[str, list[str]] = {}
    for entry in entries:
        name = Path(str(entry.get("protocol", ""))).name
        subjects_of.setdefault(name, []).append(str(entry.get("subject", "")))
    unnamed = subjects_of.pop("", [])
    if protocol and unnamed:
        logger.warning("%s: %d subjects name no protocol; '%s' is taken for theirs", where, len(unnamed), protocol)
    wrong = set(subjects_of) - {Path(protocol or "").name}
    found = "; ".join(f"{name}: {', '.join(subjects_of[name][:5])}" for name in sorted(wrong))
    needed = f"protocol '{protocol}'" if protocol else "one protocol"
    refuse_if(len(wrong) > (not protocol), f"{where}: segmentations of {needed} are needed", found)


def count_subjects(entries: Collection[Mapping[str, Any]]) -> pd.DataFrame:
    """How many subjects of each data set have what: columns ``dataset``, ``subjects``, and a volume that any has."""
    columns = ("subjects", *STORAGE)
    rows = [[key in ("subjects", *entry, *entry.get("simulated", ())) for key in columns] for entry in entries]
    datasets = pd.Index([str(entry.get("dataset", "")) for entry in entries], name="dataset")
    counts = pd.DataFrame(rows, index=datasets, columns=columns).groupby("dataset").sum()
    return counts.loc[:, counts.any()].reset_index()


def find_persons(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Which subjects are one person: a key of the person by name of the subject.

    Subjects of one set are one person if their records name one ``person``, or else if their names differ in the visit
    alone (``ann_tp1`` and ``ann_base``), or the longitudinal stream ties them (as ``ann1.long.ann_base`` ties two).
    """
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while parent.setdefault(key, key) != key:
            key = parent[key]
        return key

    for entry in entries.values():
        subject, parts = str(entry["subject"]), str(entry["subject"]).split(LONGITUDINAL)
        persons = [str(entry["person"])] if "person" in entry else [_strip_visit(part) for part in parts]
        keys = [f"{entry.get('dataset', '')}/{name}" for name in (subject, *parts, *persons)]
        for key in keys[1:]:
            parent[root(key)] = root(keys[0])
    return {name: root(f"{entry.get('dataset', '')}/{entry['subject']}") for name, entry in entries.items()}


def _strip_visit(name: str) -> str:
    if bids := re.search(r"sub-[A-Za-z0-9]+", name):
        return bids[0]
    while (shorter := VISIT.sub("", name)) not in ("", name):
        name = shorter
    return name


def _draw(
    person_of: Mapping[str, str], asked: Mapping[str, tuple[Sequence[str], float]], seed: int, where: str
) -> dict[str, str]:
    """The section of every subject, by the names and the share asked for each; a person's subjects stay together."""
    section_of: dict[str, str] = {}  # by person
    for section, (names, fraction) in asked.items():
        unknown = sorted(set(names) - set(person_of))
        refuse_if(unknown, f"{where}: '{section}' must name prepared subjects", f"no {', '.join(unknown)}")
        refuse_if(not 0 <= fraction < 1, f"write_datalist: '{section}_fraction' must be in [0, 1)", fraction)
        for name in names:
            other = section_of.setdefault(person_of[name], section)
            refuse_if(other != section, f"{where}: a person is in one section", f"{name} in 'validation' and in 'test'")
    rest = sorted(set(person_of.values()) - set(section_of))
    random.Random(seed).shuffle(rest)
    drawn = iter(rest)
    for section, (_, fraction) in asked.items():
        section_of |= dict.fromkeys(islice(drawn, round(fraction * len(rest))), section)
    sections = {name: section_of.get(person, "training") for name, person in person_of.items()}
    found = f"all {len(sections)} in 'validation' or 'test'"
    refuse_if("training" not in sections.values(), f"{where}: a subject must be left for training", found)
    return sections


def _by_name(entries: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The entries by names that differ: those of different sets that share a name are preceded by the set's."""
    count, named = Counter(entry["subject"] for entry in entries), []
    for entry in entries:
        name = entry["subject"]
        prefixed = {"person": entry.get("person", name), "subject": f"{entry.get('dataset', '')}_{name}"}
        named.append(entry | (prefixed if count[name] > 1 else {}))
    twice = ", ".join(find_repeated(entry["subject"] for entry in named))
    refuse_if(twice, "datalist: subjects of one set need different names", f"twice: {twice}: pass --dataset NAME")
    return {entry["subject"]: entry for entry in named}


def _absolute(key: str, value: Any, folder: Path) -> Any:
    """A value of an item, with a path made whole."""
    if not isinstance(value, str) or key in NAMES:
        return value
    is_file = key in (*STORAGE, "image", "label") or value.lower().endswith(SCAN_SUFFIXES)
    is_table = key.endswith("protocol") and (folder / value).is_file()
    return str(folder / value) if is_file or is_table else value
