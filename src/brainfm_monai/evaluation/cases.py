"""The cases of an evaluation: every scan under every condition, with a name and a seed of its own."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from brainfm_monai.data.datalist import read_datalist
from brainfm_monai.evaluation.conditions import Condition, check_for_real_scans, find_repeated
from brainfm_monai.io import scan_stem
from brainfm_monai.tasks import TASKS

WITHOUT_REFERENCE = ("segmentation", "super_resolution", "embedding")
# what an item may have beside its scan: entry of the list and task that it is the reference of
REFERENCES = {"label": "segmentation", **{name: name for name in TASKS if name not in WITHOUT_REFERENCE}}
SURFACES = ("left_white", "left_pial", "right_white", "right_pial")  # files of reference surfaces, for --surfaces

Case = dict[str, Any]
Conditions = Sequence[Condition]


def make_pair_cases(
    datalist: str | Path, conditions: Conditions, section: str = "testing", seed: int = 0
) -> list[Case]:
    """Real scans under every condition.

    Args:
        datalist: JSON file ``{section: [{"image": path, "label": path}, ...]}``; paths are relative to its folder. An item may
            have a ``name``, a ``label_protocol`` where its label map does not hold FreeSurfer ids, and, beside the label map
            or in its place, ``T1w``, ``T2w``, ``FLAIR``, ``CT`` (HU), ``log_bias_field`` (logarithm of the factor), ``distance``
            (mm; left pial, left white, right pial, right white), ``mni`` (mm; x, y, z) and ``lesion``, in the same space as
            the scan and in grids of their own; ``age`` (years); and surfaces, :data:`SURFACES` (GIFTI or FreeSurfer).
        conditions: what is done to the scans.
        section: of the list.
        seed: of what conditions draw; a scan draws the same under each.

    Returns:
        The items of the list, each once for every condition, with ``scan``, ``condition``, ``settings``, ``seed`` and a ``name``.

    Raises:
        FileNotFoundError: if the list or one of its files is missing.
        ValueError: if the list is not such a list, two cases have one name, or a condition is for generated scans alone.
    """
    check_for_real_scans(conditions)
    references, scans = {*REFERENCES, *SURFACES}, []
    rule = "item needs 'image' and 'label' or another reference"
    for item in _read_items(datalist, section, rule, lambda item: "image" in item and not references.isdisjoint(item)):
        item |= {key: str(Path(datalist).parent / item[key]) for key in SURFACES if key in item}
        for path in [item[key] for key in ("image", *REFERENCES, *SURFACES) if key in item and key != "age"]:
            if not Path(path).is_file():
                raise FileNotFoundError(f"{path}: named in {datalist}, found no such file")
        scans.append((str(item.get("name") or scan_stem(item["image"])), item))
    return _under_conditions(scans, conditions, seed, datalist)


def make_generated_cases(
    datalist: str | Path, conditions: Conditions, section: str = "validation", scans_per_subject: int = 1, seed: int = 0
) -> list[Case]:
    """Generated scans of prepared subjects under every condition.

    Args:
        datalist: list of prepared subjects, as ``brainfm-monai data list`` writes it.
        conditions: under which they are generated.
        section: of the list; that of training would measure what was learnt by heart.
        scans_per_subject: scans with different heads and looks of each subject.
        seed: of all scans; a scan's own follows from it, the subject's name and its number, and is the same under each condition.

    Returns:
        The subjects of the list, each once for every scan and condition, with the entries of :func:`make_pair_cases`; ``scan`` is
        ``<subject>_<number>``.

    Raises:
        FileNotFoundError: if there is no such list.
        ValueError: if it has no such section or no subject in it, or two cases have one name.
    """
    rule = "subject needs 'generation_labels' and 'segmentation'"
    subjects = _read_items(datalist, section, rule, {"generation_labels", "segmentation"}.issubset)
    numbers = range(1, scans_per_subject + 1)
    scans = [(f"{subject['subject']}_{number:02}", subject) for subject in subjects for number in numbers]
    return _under_conditions(scans, conditions, seed, datalist)


def _read_items(datalist: str | Path, section: str, rule: str, is_complete: Callable[[Case], bool]) -> list[Case]:
    if not Path(datalist).is_file():
        raise FileNotFoundError(f"{datalist}: a datalist (JSON) is needed, found no such file: pass --datalist FILE")
    items = read_datalist(datalist, section)
    for item in items:
        if not is_complete(item):
            raise ValueError(f"{datalist}: every {rule}, found {sorted(item)}")
    return items


def _under_conditions(
    scans: Iterable[tuple[str, Case]], conditions: Conditions, seed: int, datalist: str | Path
) -> list[Case]:
    cases = []
    for scan, item in scans:
        own = {"scan": scan, "seed": seed + zlib.crc32(scan.encode())}
        for condition in conditions:
            name = f"{scan}_{condition.name}" if condition.settings else scan
            cases.append(
                {**item, **own, "name": name, "condition": condition.name, "settings": dict(condition.settings)}
            )
    if (repeated := find_repeated([case["name"] for case in cases])) or not cases:
        rule = "items whose names, with those of the conditions, differ are needed"
        raise ValueError(f"{datalist}: {rule}, found {f'twice: {repeated}' if repeated else 'none'}")
    return cases
