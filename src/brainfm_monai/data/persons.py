"""Which subjects are one person: visits and templates stay together when subjects are split."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

__all__ = ["LONGITUDINAL", "find_persons"]

VISIT = re.compile(  # what studies append to the name of a person: _ses-2, _tp1, _v02, _m12, _MR_d0129, _base, _20240131
    r"(?i)[._-](?:(?:ses|session|visit|tp|timepoint|time|scan|run|base|baseline|template|followup|fu|bl|mr)[._-]?\d*"
    r"|[vtmy][._-]?\d\d?|d\d{3,}|(?:19|20)\d\d[-_]?\d\d[-_]?\d\d)$"
)
LONGITUDINAL = ".long."  # FreeSurfer names a visit of its longitudinal stream VISIT.long.TEMPLATE


def find_persons(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Which subjects are one person.

    Subjects of one set are one person if their records name one ``person``, or, without such a record, if their names differ
    in the visit alone (``sub-01_ses-1`` and ``sub-01_ses-2``, ``ann_tp1`` and ``ann_base``), or if FreeSurfer's longitudinal
    stream ties them (``ann1.long.ann_base`` ties ``ann1`` and ``ann_base``).

    Args:
        entries: items of a datalist by name.

    Returns:
        A key of the person by name.
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
    """Name of a person out of the name of a visit."""
    bids = re.search(r"sub-[A-Za-z0-9]+", name)
    if bids:
        return bids[0]
    while (shorter := VISIT.sub("", name)) not in ("", name):
        name = shorter
    return name
