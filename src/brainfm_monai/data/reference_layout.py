"""Folders in the layout of the reference implementation, read as they are: ``<dataset>.<subject>.T1w.nii`` and its siblings."""

from __future__ import annotations

from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from brainfm_monai.anatomy import Protocol
from brainfm_monai.data.labels import read_id_table
from brainfm_monai.functional.intensity import normalise_percentiles

__all__ = ["LAYOUT", "decode_reference", "find_reference_subjects"]

LAYOUT = "brainfm"
GENERATION_PROTOCOL, PROTOCOL = "brainfm_generation", "brainfm"
SUFFIXES = (".nii", ".nii.gz")
# file names after the prefix, by key; several become the channels of one volume
FILES: dict[str, tuple[str, ...]] = {
    "T1w": ("T1w",),
    "T2w": ("T2w",),
    "FLAIR": ("FLAIR",),
    "CT": ("CT",),
    **{f"{contrast}_defacing_mask": (f"{contrast}.defacingmask",) for contrast in ("T1w", "T2w", "FLAIR", "CT")},
    "generation_labels": ("generation_labels",),
    "segmentation": ("brainseg_with_extracerebral",),
    "distance": ("lp_dist_map", "lw_dist_map", "rp_dist_map", "rw_dist_map"),
    "mni": ("mni_reg.x", "mni_reg.y", "mni_reg.z"),
}
STEPS = {"distance": (128.0, 20.0), "mni": (0.0, 100.0)}  # stored zero, and steps per mm


def find_reference_subjects(root: str | Path) -> list[dict[str, Any]]:
    """List the subjects of a folder in the reference's layout.

    Args:
        root: the folder; a subject is a T1w scan with siblings of the same prefix.

    Returns:
        By subject, in the order of their names: ``subject``, ``dataset``, ``layout``, the protocols, and the path of every file
        that is there; ``distance`` and ``mni`` are lists of paths, one per channel, and left out if one of them is missing.
    """
    root = Path(root)
    entries = []
    for scan in sorted(f for suffix in SUFFIXES for f in root.glob(f"[!.]*.*.T1w{suffix}")):
        prefix = scan.name[: scan.name.rindex(".T1w.")]
        found = {key: [_existing(root, f"{prefix}.{name}") for name in names] for key, names in FILES.items()}
        paths = {key: parts[0] if len(parts) == 1 else parts for key, parts in found.items() if all(parts)}
        facts = {"layout": LAYOUT, "generation_protocol": GENERATION_PROTOCOL, "protocol": PROTOCOL}
        entries.append({"subject": prefix, "dataset": prefix.split(".")[0], **facts, **paths})
    return entries


def decode_reference(key: str, values: Tensor) -> Tensor:
    """Values of a file of the reference in this package's units.

    Args:
        key: what the file is, a key of a datalist's entry.
        values: as they are read, shape (C, H, W, D).

    Returns:
        mm for ``distance`` and ``mni``, labels of the protocol ``brainfm`` for ``segmentation``, [0, 1] for magnetic resonance
        (quantiles 0 and 99.9 % of the volume), and everything else as it is; same shape.

    Raises:
        ValueError: if the segmentation holds an id that the reference does not know.
    """
    if key in STEPS:
        zero, steps_per_mm = STEPS[key]
        return (values.float() - zero) / steps_per_mm
    if key == "segmentation":
        table = _label_table()
        index = values.round().long()
        if int(index.max()) >= len(table) or int(table[index].min()) < 0:
            raise ValueError(f"segmentation: ids of the reference (0 to {len(table) - 1}) are needed, found others")
        return table[index].to(torch.uint8)
    return normalise_percentiles(values.float()[None])[0] if key in ("T1w", "T2w", "FLAIR") else values


def _existing(root: Path, stem: str) -> str:
    return next((str(root / f"{stem}{suffix}") for suffix in SUFFIXES if (root / f"{stem}{suffix}").is_file()), "")


@lru_cache(maxsize=1)
def _label_table() -> Tensor:
    """Label of the protocol ``brainfm`` for each of the reference's own ids, -1 where there is none."""
    with resources.as_file(resources.files("brainfm_monai") / "ids" / "brainfm_internal.tsv") as path:
        ids = read_id_table(path)
    labels = Protocol.load(PROTOCOL).label_of_id
    table = np.full(max(ids) + 1, -1, dtype=np.int16)
    for own, freesurfer in ids.items():
        table[own] = labels[freesurfer]
    return torch.from_numpy(table)
