"""Subjects into memory: prepared ones, and those of the reference's layout, in the same units."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from nibabel.filebasedimages import ImageFileError
from nibabel.wrapstruct import WrapStructError
from torch import Tensor

from brainfm_monai.data.reference_layout import LAYOUT, decode_reference

__all__ = ["LoadSubjectd", "read_volume"]

GZIP = 31  # zlib's way to say that there is a gzip header


def read_volume(path: str | Path) -> tuple[Tensor, Tensor]:
    """Read a NIfTI volume, unpacked at once and left in the file's order of memory, which saves most of the time.

    Args:
        path: ``.nii`` or ``.nii.gz``.

    Returns:
        Values, shape (C, H, W, D), of the stored type, or float32 where the header scales them, with the strides of the file (H
        runs fastest), so that a crop copies only itself; and the affine to RAS mm, shape (4, 4), float64.

    Raises:
        ValueError: if the file is no such volume.
    """
    try:
        content = Path(path).read_bytes()
        image: Any = nib.Nifti1Image.from_bytes(
            zlib.decompress(content, GZIP) if str(path).endswith(".gz") else content
        )
        stored = torch.from_numpy(image.dataobj.get_unscaled())
    except (ImageFileError, WrapStructError, OSError, zlib.error, ValueError, TypeError) as error:
        raise ValueError(f"{path}: a NIfTI volume is needed, found {' '.join(str(error).split())}") from error
    channel_first = stored.movedim(-1, 0) if stored.ndim == 4 else stored[None]
    slope, offset = float(image.dataobj.slope), float(image.dataobj.inter)
    values = channel_first if (slope, offset) == (1.0, 0.0) else channel_first.float().mul_(slope).add_(offset)
    return values, torch.from_numpy(image.affine)


class LoadSubjectd(MapTransform):
    """Read the volumes of a datalist's item, channel first, in this package's units.

    It takes the place of ``LoadImaged`` and ``EnsureChannelFirstd`` for subjects: labels and masks keep their whole numbers,
    distances and coordinates become mm, scans [0, 1], CT HU. An item of the reference's layout (``"layout": "brainfm"``), whose
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
        foreign = (
            Path(str(d.get("layout", ""))).name == LAYOUT
        )  # MONAI makes a whole path of a value that exists as one
        for key in self.key_iterator(d):
            paths = d[key] if isinstance(d[key], (list, tuple)) else [d[key]]
            parts = [read_volume(path) for path in paths]
            values = parts[0][0] if len(parts) == 1 else torch.cat([values for values, _ in parts])
            if foreign:
                values = decode_reference(str(key), values)
            d[key] = MetaTensor(values, affine=parts[0][1], meta={"filename_or_obj": str(paths[0])})
        return d
