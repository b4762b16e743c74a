"""MONAI dictionary transforms of the inference path: reading any scan, and naming the maps of the one output tensor."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import LoadImaged, MapTransform, Spacingd
from torch import Tensor

from brainfm_monai.functional.intensity import normalise_percentiles
from brainfm_monai.tasks import MAX_DISTANCE_MM, Task, TaskLayout

__all__ = ["LoadScand", "NormalisePercentilesd", "ScanError", "ScanSpacingd", "SplitTasksd", "check_header", "scan_stem"]

logger = logging.getLogger(__name__)

EXTENT_RANGE_MM = (10.0, 600.0)  # a slab of three slices of 4 mm; head and shoulders. Beyond it the voxel size is wrong.
SCAN_SUFFIXES = (".nii.gz", ".nii", ".mgz", ".mgh")


class ScanError(ValueError):
    """A scan that cannot be used; the message is one line that names the file, the rule and what was found."""


def scan_stem(path: str | Path) -> str:
    """Name of a scan's file without the suffix: ``T1w`` for ``sub-01/T1w.nii.gz``."""
    name = Path(path).name
    for suffix in SCAN_SUFFIXES:
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return Path(path).stem


def check_header(path: str | Path) -> None:
    """Check from its header alone that a file holds one scalar 3-D volume with a usable geometry.

    Args:
        path: NIfTI or MGH file.

    Raises:
        ScanError: if it does not; one line.
    """
    if not Path(path).is_file():
        raise ScanError(f"{path}: a NIfTI or MGH file is needed, found {'a folder' if Path(path).is_dir() else 'no such file'}")
    try:
        image: Any = nib.load(path)
    except Exception as error:  # nibabel raises a dozen kinds for a damaged header
        raise ScanError(f"{path}: a NIfTI or MGH file is needed, and it cannot be read as one: {_first_line(error)}") from error
    if not isinstance(image, nib.nifti1.Nifti1Pair | nib.freesurfer.MGHImage):
        raise ScanError(f"{path}: a NIfTI or MGH file is needed, found {type(image).__name__}")
    shape, dtype = tuple(int(n) for n in image.shape), image.get_data_dtype()
    if len(shape) > 3 and any(n != 1 for n in shape[3:]):
        raise ScanError(
            f"{path}: {len(shape)}-D image of shape {shape}; one 3-D volume is needed: choose one or average them first"
        )
    if len(shape) < 3 or min(shape[:3]) < 2:
        raise ScanError(f"{path}: a 3-D volume of at least 2 voxels along each axis is needed, found shape {shape}")
    if dtype.fields or dtype.kind == "c":
        raise ScanError(
            f"{path}: one real number per voxel is needed, found {'complex numbers' if dtype.kind == 'c' else 'colours'}"
        )
    _check_geometry(path, shape, np.asarray(image.affine, dtype=np.float64))
    if isinstance(image, nib.nifti1.Nifti1Pair) and not image.header["sform_code"] and not image.header["qform_code"]:
        logger.warning("%s: the header states no orientation; left and right are taken from the order of the voxels", path)


def _check_geometry(path: str | Path, shape: tuple[int, ...], affine: np.ndarray) -> None:
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise ScanError(f"{path}: an affine of three independent axes is needed, found {np.round(affine[:3], 4).tolist()}")
    extent_mm = np.linalg.norm(affine[:3, :3], axis=0) * np.array(shape[:3])
    low, high = EXTENT_RANGE_MM
    if extent_mm.min() < low or extent_mm.max() > high:
        found = " x ".join(f"{e:.4g}" for e in extent_mm)
        raise ScanError(
            f"{path}: a head scan extends over {low:.0f} to {high:.0f} mm along each axis, found {found} mm: check the voxel size"
        )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class LoadScand(LoadImaged):
    """Read a scan, channel first, with every way in which it may be unusable told in one line.

    NaN and infinite voxels become 0. The name under which results are written goes into the metadata as ``scan_name``.

    Args:
        keys: keys of the paths.
        name_key: entry that holds the scan's name; where it is absent, the file's stem is the name.

    Raises:
        ScanError: on reading a file that is not one scalar volume, or has no contrast.
    """

    def __init__(self, keys: KeysCollection, name_key: str = "name") -> None:
        super().__init__(keys, reader="NibabelReader", ensure_channel_first=True, image_only=True)
        self.name_key = name_key

    def __call__(self, data: Mapping[Hashable, Any], reader: Any = None) -> dict[Hashable, Any]:
        """Replace each path by a float32 MetaTensor of shape (1, H, W, D)."""
        paths = {key: data[key] for key in self.key_iterator(dict(data))}
        for path in paths.values():
            check_header(path)
        try:
            loaded: dict[Hashable, Any] = super().__call__(data, reader)
        except Exception as error:  # a damaged file shows as EOFError, BadGzipFile, zlib.error, OSError, ... of the reader
            found = _first_line(error.__cause__ or error)
            raise ScanError(f"{', '.join(map(str, paths.values()))}: the voxels cannot be read, found {found}") from error
        for key, path in paths.items():
            loaded[key] = _clean(loaded[key], str(path))
            loaded[key].meta["scan_name"] = str(data.get(self.name_key) or scan_stem(path))
        return loaded


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


class ScanSpacingd(Spacingd):
    """:class:`monai.transforms.Spacingd` that leaves entries named ``<key>_...`` alone.

    Spacingd (MONAI 1.6.0 and 1.6.1) calls ``update`` on each of them, which fails on the ``image_path`` of MONAI Label.
    """

    def __call__(self, data: Mapping[Hashable, Any], lazy: bool | None = None) -> dict[Hashable, Any]:
        """See :class:`monai.transforms.Spacingd`."""
        prefixes = tuple(f"{key}_" for key in self.keys)
        held = {k: v for k, v in data.items() if isinstance(k, str) and k.startswith(prefixes) and not isinstance(v, dict)}
        resampled: dict[Hashable, Any] = super().__call__({k: v for k, v in data.items() if k not in held}, lazy)
        return resampled | held


class NormalisePercentilesd(MapTransform):
    """See :func:`brainfm_monai.functional.intensity.normalise_percentiles`; the same function as in training."""

    def __init__(self, keys: KeysCollection, lower: float = 0.0, upper: float = 0.999) -> None:
        super().__init__(keys)
        self.lower, self.upper = lower, upper

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Map images of shape (C, H, W, D) to [0, 1]."""
        d = dict(data)
        for key in self.key_iterator(d):
            values = torch.as_tensor(d[key].as_tensor() if isinstance(d[key], MetaTensor) else d[key])
            normalised = normalise_percentiles(values.unsqueeze(0), self.lower, self.upper).squeeze(0)
            d[key] = _like(normalised, d[key])
        return d


class SplitTasksd(MapTransform):
    """Turn the network's one output tensor into one entry per task.

    The entry itself becomes the label map of the segmentation, uint8, shape (1, H, W, D), so that the volume of logits
    is let go before anything is resampled. The other tasks become entries of their own name, float32, in the unit
    of their files: ``distance`` in mm, clipped; ``mni`` in mm; ``bias_field`` in place of ``log_bias_field``.

    Args:
        keys: key of the output tensor, shape (C, H, W, D) with C the layout's channels.
        layout: names of the channels.
        distance_limit_mm: distances are clipped to this magnitude: beyond it they carry no information.
    """

    def __init__(self, keys: KeysCollection, layout: TaskLayout, distance_limit_mm: float = MAX_DISTANCE_MM) -> None:
        super().__init__(keys)
        self.layout = layout
        self.distance_limit_mm = distance_limit_mm

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Split the entries; their metadata go to each part."""
        d = dict(data)
        for key in self.key_iterator(d):
            output = d.pop(key)
            values = output.as_tensor() if isinstance(output, MetaTensor) else torch.as_tensor(output)
            for name, part in self.layout.split(values.unsqueeze(0)).items():
                task = self.layout.tasks[name]
                entry = {"labels": key, "log_field": name.removeprefix("log_")}.get(task.kind, name)
                d[entry] = _like(self._convert(part.squeeze(0), task), output)
        return d

    def _convert(self, part: Tensor, task: Task) -> Tensor:
        if task.kind == "labels" and len(part) == 1:  # decided already, by an inferer in little memory
            return part.to(torch.uint8)
        if task.kind == "labels":
            return part.argmax(dim=0, keepdim=True).to(torch.uint8)
        scaled = part.float() * task.scale
        if task.kind == "log_field":
            return scaled.exp()
        return scaled.clamp(-self.distance_limit_mm, self.distance_limit_mm) if task.kind == "distance" else scaled


def _like(values: Tensor, source: Any) -> MetaTensor:
    tensor = MetaTensor(values)
    return tensor.copy_meta_from(source) if isinstance(source, MetaTensor) else tensor
