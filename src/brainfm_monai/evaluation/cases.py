"""The cases of an evaluation: every scan under every condition, with a name and a seed of its own."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.data import load_decathlon_datalist

from brainfm_monai.data.pairs import read_pairs
from brainfm_monai.evaluation.conditions import Condition

__all__ = ["make_generated_cases", "make_pair_cases"]

Case = dict[str, Any]


def make_pair_cases(
    datalist: str | Path, conditions: Sequence[Condition], section: str = "testing", seed: int = 0
) -> list[Case]:
    """Real scans under every condition.

    Args:
        datalist: see :func:`~brainfm_monai.data.pairs.read_pairs`.
        conditions: what is done to the scans.
        section: of the list.
        seed: of what conditions draw; a scan draws the same under each.

    Returns:
        The items of the list, each once for every condition, with ``scan``, ``condition``, ``seed`` and a ``name`` of its own.

    Raises:
        FileNotFoundError: see :func:`~brainfm_monai.data.pairs.read_pairs`.
        ValueError: see :func:`~brainfm_monai.data.pairs.read_pairs`; or if two cases share a name.
    """
    pairs = read_pairs(datalist, section)
    return _different([c for pair in pairs for c in _under_conditions(pair, pair["name"], conditions, seed)], datalist)


def make_generated_cases(
    datalist: str | Path,
    conditions: Sequence[Condition],
    section: str = "validation",
    scans_per_subject: int = 1,
    seed: int = 0,
) -> list[Case]:
    """Generated scans of prepared subjects under every condition.

    Args:
        datalist: list of prepared subjects, as ``brainfm-monai data list`` writes it.
        conditions: under which they are generated.
        section: of the list; that of training would measure what was learnt by heart.
        scans_per_subject: scans with different heads and looks of each subject.
        seed: of all scans; a scan's own follows from it, the subject's name and its number, and is the same under each condition.

    Returns:
        The subjects of the list, each once for every scan and condition, with ``scan`` (``<subject>_<number>``), ``condition``,
        ``seed`` and a ``name`` of its own.

    Raises:
        FileNotFoundError: if there is no such list.
        ValueError: if it has no such section or no subject in it, or two cases share a name.
    """
    if not Path(datalist).is_file():
        raise FileNotFoundError(f"{datalist}: a list of prepared subjects (JSON) is needed, found no such file")
    try:
        subjects = load_decathlon_datalist(str(datalist), True, section)
    except ValueError as error:
        raise ValueError(
            f"{datalist}: a JSON datalist with the section '{section}' is needed, found {error}"
        ) from error
    if not subjects or scans_per_subject < 1:
        raise ValueError(f"{datalist}: subjects in '{section}' and scans of each are needed, found none")
    cases: list[Case] = []
    for subject in subjects:
        if "generation_labels" not in subject or "segmentation" not in subject:
            raise ValueError(
                f"{datalist}: every subject needs 'generation_labels' and 'segmentation', found {sorted(subject)}"
            )
        # MONAI's reader makes a path of a subject's name where such a folder exists: its last part is the name.
        name = Path(str(subject["subject"])).name
        for number in range(1, scans_per_subject + 1):
            cases += _under_conditions({**subject, "subject": name}, f"{name}_{number:02}", conditions, seed)
    return _different(cases, datalist)


def _under_conditions(item: Mapping[str, Any], scan: str, conditions: Sequence[Condition], seed: int) -> Iterator[Case]:
    for condition in conditions:
        name = f"{scan}_{condition.name}" if condition.settings else scan
        yield {
            **item,
            "name": name,
            "scan": scan,
            "condition": condition.name,
            "seed": seed + zlib.crc32(scan.encode()),
        }


def _different(cases: list[Case], datalist: str | Path) -> list[Case]:
    names = [case["name"] for case in cases]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"{datalist}: scans and conditions whose names together differ are needed, found twice: {twice}"
        )
    return cases
