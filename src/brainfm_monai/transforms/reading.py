"""Reading any scan into a MetaTensor, channel first, with every refusal in one line."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import LoadImaged, MapTransform

from brainfm_monai import io
from brainfm_monai.transforms.intensities import BRAIN_WINDOW_HU, parse_window

__all__ = ["LoadScand", "read_scan"]


def read_scan(path: str | Path, frame: int | str | None = None) -> MetaTensor:
    """Read one scan as an image: float32, shape (1, H, W, D); see :func:`brainfm_monai.io.read_scan`."""
    volume = io.read_scan(path, frame)
    return MetaTensor(torch.from_numpy(volume.values)[None], affine=torch.from_numpy(volume.affine))


class LoadScand(LoadImaged):
    """Read a scan, channel first, with :func:`brainfm_monai.io.read_scan`; every refusal is one line.

    A CT is clipped to the brain's window, so that bone and air do not take the whole range of grey values; the padding of an
    MR scan is set to 0. The entry ``original`` is the scan as it was read: what follows the network corrects and draws it, and
    opens no file again. The metadata of the image get ``scan_name``, under which results are written; ``warnings``, what was
    noticed, one sentence a line; ``modality``, ``ct`` or ``mr`` with the reason; ``window`` where something was clipped; and
    ``frame``.

    Args:
        keys: key of the path.
        name_key: entry that holds the scan's name; where it is absent, the file's stem is the name.
        frame: which volume of a 4-D file: its number, from 0, or ``"mean"``; None refuses such a file. An entry ``frame`` of the
            data comes first, and an entry ``series`` names the series of a DICOM folder.
        window: intensities are clipped to ``[low, high]``; ``"auto"``: a CT to 0 to 80 HU; None: not at all.
        modality: ``"mr"``, ``"ct"`` or ``"auto"``, see :func:`brainfm_monai.io.decide_modality`.

    Raises:
        ValueError: if ``window`` or ``modality`` is none of these.
        ScanError: on reading a file that is not one scalar volume, or has no contrast.
    """

    def __init__(
        self,
        keys: KeysCollection,
        name_key: str = "name",
        frame: int | str | None = None,
        window: Any = None,
        modality: str = "auto",
    ) -> None:
        MapTransform.__init__(self, keys)
        self._loader: Any = SimpleNamespace(image_only=True)  # MONAI Label sets it in every LoadImaged of a bundle
        self.name_key, self.frame = name_key, frame
        self.window, self.modality = parse_window(window), io.parse_modality(modality)

    def __call__(self, data: Mapping[Hashable, Any], reader: Any = None) -> dict[Hashable, Any]:
        """Replace the path by a float32 MetaTensor of shape (1, H, W, D), and add ``original``, of the same shape."""
        loaded = dict(data)
        frame = data.get("frame", self.frame)
        for key in self.key_iterator(dict(data)):
            path = str(data[key])
            volume = io.read_scan(path, frame, data.get("series"))
            modality, reason = io.decide_modality(volume, self.modality)
            limits = BRAIN_WINDOW_HU if self.window == "auto" and modality == "ct" else self.window
            floor, padding = io.find_floor(volume.values) if modality == "mr" else (-np.inf, "")
            low, high = (floor, np.inf) if limits is None or isinstance(limits, str) else limits
            meta = {
                "filename_or_obj": path,
                "scan_name": str(data.get(self.name_key) or io.scan_stem(path)),
                "warnings": "\n".join([*volume.warnings, *([padding] if padding else [])]),
                "modality": f"{modality}: {reason}",
            }
            if np.isfinite(high):
                meta["window"] = f"{low:g} to {high:g}"
            if frame is not None:
                meta["frame"] = str(frame)  # MONAI's collation of metadata takes no None
            original = torch.from_numpy(volume.values)[None]
            shown = original if low == -np.inf else original.clamp(low, high)
            affine = torch.from_numpy(volume.affine)
            loaded["original"] = MetaTensor(original, affine=affine)
            loaded[key] = MetaTensor(shown, affine=affine, meta=meta)
        return loaded
