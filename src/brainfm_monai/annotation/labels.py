"""Label maps that annotators save: which structure each value stands for."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from brainfm_monai.anatomy import Protocol
from brainfm_monai.io import ScanError

__all__ = ["match_structures", "read_label_info"]

DATASTORE = "datastore_v2.json"  # MONAI Label's record of a folder of scans, beside its folder labels/
NOT_STRUCTURES = {"background", "background-scribbles", "foreground-scribbles"}  # segments of clients
VALUE_KEYS = ("idx", "id", "value")  # how clients call the value of a segment


def read_label_info(label: str | Path) -> list[dict[str, Any]]:
    """What a client said about a label map in a folder of MONAI Label: names of the segments and their values.

    Args:
        label: ``STUDIES/labels/TAG/ID.nii.gz``; ``STUDIES/datastore_v2.json`` is read.

    Returns:
        Entries with ``name`` and ``idx``; empty if nothing is known.
    """
    path = Path(label)
    try:
        objects = json.loads((path.parents[2] / DATASTORE).read_text(encoding="utf-8"))["objects"]
        labels = [
            entry["labels"][path.parent.name] for entry in objects.values() if path.parent.name in entry["labels"]
        ]
        known = [entry["info"] for entry in labels if entry["info"].get("name") == path.name]
        return list(known[0].get("label_info") or []) if known else []
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError):
        return []  # a label map from elsewhere


def match_structures(
    values: Collection[int], label_info: Sequence[Mapping[str, Any]], protocol: Protocol, source: str
) -> dict[int, int]:
    """FreeSurfer id of every value of a label map.

    3D Slicer numbers the segments that are left, in their order: deleting one moves all that follow. The names say which
    structure a value is. Values are those of the entries (``idx``) if all values of the map are among them, else positions in the
    list: Slicer counts scribbles in ``idx`` and leaves them out of the map.

    Args:
        values: of the label map, without the background.
        label_info: entries with ``name`` and a value, as the client sent them; without any, values are labels of the protocol.
        protocol: of the segmentation.
        source: name for messages.

    Returns:
        FreeSurfer id by value, for each of ``values`` and the background.

    Raises:
        ScanError: if a value has no name, or a name that the protocol does not know.
    """
    if not label_info:
        names = {s.label: s.name for s in protocol.structures}
    else:
        known = [str(entry.get("name", "")) for entry in label_info]
        given = [next((entry[key] for key in VALUE_KEYS if key in entry), None) for entry in label_info]
        by_value = {int(value): name for value, name in zip(given, known, strict=True) if value is not None}
        names = by_value if set(values) <= set(by_value) else dict(enumerate(known, start=1))
    id_of = {_plain(s.name): s.freesurfer_id for s in protocol.structures[1:]} | dict.fromkeys(NOT_STRUCTURES, 0)
    ids = {0: 0}
    for value in sorted(set(values) - {0}):
        name = names.get(value)
        if name is None or _plain(name) not in id_of:
            found = "a value without a name" if name is None else f"'{name}'"
            raise ScanError(
                f"{source}: segments must have names of the model's structures, found {found} (value {value})"
            )
        ids[value] = id_of[_plain(name)]
    return ids


def _plain(name: str) -> str:
    """A name without differences of case and separators, which clients change."""
    return "-".join(name.lower().replace("_", " ").replace("-", " ").split())
