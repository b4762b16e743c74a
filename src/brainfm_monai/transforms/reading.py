"""Reading any scan into a MetaTensor, channel first, with every refusal in one line."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import LoadImaged, MapTransform

from brainfm_monai import io
from brainfm_monai.transforms.intensities import parse_window, window_hounsfield

__all__ = ["LoadScand", "read_scan"]


def read_scan(path: str | Path, frame: int | str | None = None) -> MetaTensor:
    """Read one scan as an image: float32, shape (1, H, W, D); see :func:`brainfm_monai.io.read_scan`."""
    image: MetaTensor = LoadScand("image", frame=frame)({"image": str(path)})["image"]
    return image


class LoadScand(LoadImaged):
    """Read a scan, channel first, with :func:`brainfm_monai.io.read_scan`; every refusal is one line.

    The metadata of the image get ``scan_name``, the name under which results are written, and ``warnings``, what the reader
    noticed, one sentence a line. The entry ``original`` is the scan as it was read, float32, shape (1, H, W, D): what follows
    the network corrects and draws it, and opens no file again.

    Args:
        keys: key of the path.
        name_key: entry that holds the scan's name; where it is absent, the file's stem is the name.
        frame: which volume of a 4-D file: its number, from 0, or ``"mean"``; None refuses such a file. An entry ``frame`` of the
            data comes first.
        window: intensities are clipped to ``[low, high]``; ``"auto"``: to the brain's window where they are Hounsfield
            units, see :func:`~brainfm_monai.transforms.window_hounsfield`; None: not at all.

    Raises:
        ValueError: if ``window`` is none of these.
        ScanError: on reading a file that is not one scalar volume, or has no contrast.
    """

    def __init__(
        self, keys: KeysCollection, name_key: str = "name", frame: int | str | None = None, window: Any = None
    ) -> None:
        MapTransform.__init__(self, keys)
        self._loader = SimpleNamespace(image_only=True)  # type: ignore[assignment]  # which MONAI Label sets in every LoadImaged of a bundle
        self.name_key = name_key
        self.frame, self.window = frame, parse_window(window)

    def __call__(self, data: Mapping[Hashable, Any], reader: Any = None) -> dict[Hashable, Any]:
        """Replace the path by a float32 MetaTensor of shape (1, H, W, D)."""
        loaded = dict(data)
        frame = data.get("frame", self.frame)
        for key in self.key_iterator(dict(data)):
            path = str(data[key])
            volume = io.read_scan(path, frame, data.get("series"))
            meta = {
                "filename_or_obj": path,
                "scan_name": str(data.get(self.name_key) or io.scan_stem(path)),
                "warnings": "\n".join(volume.warnings),
            }
            if frame is not None:
                meta["frame"] = str(frame)  # MONAI's collation of metadata takes no None
            original = MetaTensor(
                torch.from_numpy(volume.values)[None], affine=torch.from_numpy(volume.affine), meta=meta
            )
            loaded["original"] = original
            loaded[key] = window_hounsfield(original, self.window)
        return loaded
