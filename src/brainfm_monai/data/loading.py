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

from brainfm_monai.anatomy import Protocol
from brainfm_monai.data.reference_layout import LAYOUT, decode_reference
from brainfm_monai.data.simulated import simulate_contrasts

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
    parts = [read_volume(path) for path in paths]
    values = parts[0][0] if len(parts) == 1 else torch.cat([values for values, _ in parts])
    values = decode_reference(key, values) if foreign else values
    return MetaTensor(values, affine=parts[0][1], meta={"filename_or_obj": str(paths[0])})
