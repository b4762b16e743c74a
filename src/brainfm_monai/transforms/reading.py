"""Reading any scan: NIfTI, MGH, NRRD or a DICOM series, channel first, with every refusal in one line."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import ITKReader, MetaTensor
from monai.transforms import LoadImaged

from brainfm_monai.io import ScanError, first_line
from brainfm_monai.transforms.headers import (
    ITK_SUFFIXES,
    NIBABEL_SUFFIXES,
    check_header,
    is_dicom_series,
)
from brainfm_monai.transforms.intensities import parse_window, window_hounsfield

__all__ = ["SCAN_SUFFIXES", "LoadScand", "check_header", "is_dicom_series", "read_scan", "scan_stem"]

SCAN_SUFFIXES = NIBABEL_SUFFIXES + ITK_SUFFIXES


def scan_stem(path: str | Path) -> str:
    """Name of a scan's file without the suffix: ``T1w`` for ``sub-01/T1w.nii.gz``."""
    name = Path(path).name
    for suffix in SCAN_SUFFIXES:
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name if Path(path).is_dir() else Path(path).stem


def read_scan(path: str | Path, frame: int | str | None = None) -> MetaTensor:
    """Read one scan as it is stored, apart from what is not finite, which becomes 0.

    Args:
        path: NIfTI, MGH or NRRD file, or the folder of one DICOM series.
        frame: which volume of a 4-D file: its number, from 0, or ``"mean"``.

    Returns:
        float32, shape (1, H, W, D), with the affine in RAS mm.

    Raises:
        ScanError: if it is not one scalar volume of a head, or has no contrast.
    """
    loaded: MetaTensor = LoadScand("image", frame=frame, window=None)({"image": str(path)})["image"]
    return loaded


class LoadScand(LoadImaged):
    """Read a scan, channel first, with every way in which it may be unusable told in one line.

    NaN and infinite voxels become 0. The name under which results are written goes into the metadata as ``scan_name``.

    Args:
        keys: keys of the paths.
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
        super().__init__(keys, reader="NibabelReader", ensure_channel_first=True, image_only=True)
        self.name_key = name_key
        self.frame, self.window = frame, parse_window(window)

    def __call__(self, data: Mapping[Hashable, Any], reader: Any = None) -> dict[Hashable, Any]:
        """Replace each path by a float32 MetaTensor of shape (1, H, W, D)."""
        loaded = dict(data)
        frame = data.get("frame", self.frame)
        for key in self.key_iterator(dict(data)):
            path = str(data[key])
            check_header(path, frame)
            image = _choose_frame(self._read(path, reader), frame)
            loaded[key] = window_hounsfield(_clean(image, path), self.window)
            loaded[key].meta["scan_name"] = str(data.get(self.name_key) or scan_stem(path))
            if frame is not None:
                loaded[key].meta["frame"] = str(frame)  # MONAI's collation of metadata takes no None
        return loaded

    def _read(self, path: str, reader: Any) -> MetaTensor:
        with_nibabel = Path(path).is_file() and path.lower().endswith(NIBABEL_SUFFIXES)
        try:
            loaded = self._loader(path, reader if reader or with_nibabel else ITKReader())
        except (
            Exception
        ) as error:  # a damaged file shows as EOFError, BadGzipFile, zlib.error, OSError, ... of the reader
            raise ScanError(
                f"{path}: the voxels cannot be read, found {first_line(error.__cause__ or error)}"
            ) from error
        image: MetaTensor = (
            loaded[0] if isinstance(loaded, tuple) else loaded
        )  # MONAI Label asks loaders for metadata beside it
        return image


def _choose_frame(image: MetaTensor, frame: int | str | None) -> MetaTensor:
    """One volume of shape (1, H, W, D) out of frames along the first axis."""
    if image.shape[0] == 1:
        return image
    values = image.as_tensor()
    chosen = values.mean(dim=0, keepdim=True) if frame == "mean" else values[int(frame or 0)][None].clone()
    image.set_array(chosen)
    return image


def _clean(image: MetaTensor, path: str) -> MetaTensor:
    values = image.as_tensor()
    finite = torch.isfinite(values)
    if not finite.any():
        raise ScanError(f"{path}: finite voxels are needed, found none (NaN or infinite everywhere)")
    values = torch.where(finite, values, 0.0)
    low, high = values.aminmax()
    if low == high:
        raise ScanError(f"{path}: an image with contrast is needed, found the value {float(low):g} in every voxel")
    image.set_array(values)
    return image
