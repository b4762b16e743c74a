"""Subjects into memory: prepared ones, and those of the reference's layout, in the same units."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform

from brainfm_monai.anatomy import Protocol
from brainfm_monai.data.reference_layout import LAYOUT, decode_reference
from brainfm_monai.data.simulated import simulate_contrasts
from brainfm_monai.io import read_maps

__all__ = ["LoadSubjectd"]


class LoadSubjectd(MapTransform):
    """Read the volumes of a datalist's item, channel first, in this package's units.

    It takes the place of ``LoadImaged`` and ``EnsureChannelFirstd`` for subjects: labels and masks keep their whole numbers,
    distances and coordinates become mm, scans [0, 1], CT HU. A contrast that the item names in ``simulated`` is painted on the
    generation labels, see :func:`simulate_contrasts`. An item of the reference's layout (``"layout": "brainfm"``), whose
    distances and coordinates are several files, is decoded, see :func:`decode_reference`.

    Args:
        keys: keys of the paths; a value may be a list of paths, one per channel.
        allow_missing_keys: whether subjects may lack some of them.
    """

    def __init__(self, keys: KeysCollection, allow_missing_keys: bool = True) -> None:
        super().__init__(keys, allow_missing_keys)

    def __call__(self, data: Mapping[Any, Any]) -> dict[Any, Any]:
        """Replace the paths by MetaTensors of shape (C, H, W, D)."""
        d = dict(data)
        foreign = Path(str(d.get("layout", ""))).name == LAYOUT
        painted = [str(key) for key in self.keys if key not in d and key in d.get("simulated", ())]
        for key in self.keys:
            if key in d:
                d[key] = _load(str(key), d[key], foreign)
            elif key not in painted and not self.allow_missing_keys:
                raise KeyError(f"{d.get('subject')}: the item has no '{key}'")
        if painted:
            labels = d["generation_labels"]
            if not isinstance(labels, MetaTensor):
                labels = _load("generation_labels", labels, foreign)
            protocol = Protocol.load(str(d["generation_protocol"]))
            values, affine = labels.as_tensor()[0].numpy(), labels.affine.numpy()
            for key, image in simulate_contrasts(values, affine, protocol, painted, str(d.get("subject"))).items():
                d[key] = MetaTensor(torch.from_numpy(image)[None], meta=dict(labels.meta))
        return d


def _load(key: str, value: Any, foreign: bool) -> MetaTensor:
    """One volume of an item, out of one file or of one file per channel."""
    paths = value if isinstance(value, (list, tuple)) else [value]
    parts = [read_maps(path) for path in paths]
    maps = [
        torch.from_numpy(part.values) for part in parts
    ]  # in the file's order of memory: a crop copies itself alone
    values = maps[0] if len(maps) == 1 else torch.cat(maps)
    values = decode_reference(key, values) if foreign else values
    return MetaTensor(values, affine=torch.from_numpy(parts[0].affine), meta={"filename_or_obj": str(paths[0])})
