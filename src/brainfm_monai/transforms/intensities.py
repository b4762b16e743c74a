"""Intensities and voxel size of a scan before the network: window of a CT, percentiles, spacing."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.data.utils import affine_to_spacing
from monai.transforms import MapTransform, Spacingd

from brainfm_monai.functional.intensity import antialias, normalise_percentiles

__all__ = ["BRAIN_WINDOW_HU", "NormalisePercentilesd", "ScanSpacingd", "parse_window"]

BRAIN_WINDOW_HU = (0.0, 80.0)  # BrainFM's window for CT


def parse_window(window: Any) -> tuple[float, float] | str | None:
    """Check a window of intensities: ``[low, high]``, ``"auto"`` or None.

    Raises:
        ValueError: if it is none of these.
    """
    if window is None or window == "auto":
        return window
    try:
        low, high = (float(value) for value in window)
    except (TypeError, ValueError):
        low, high = 0.0, 0.0
    if low >= high:
        raise ValueError(f"window: 'auto' or two rising numbers [low, high] are needed, found {window!r}")
    return (low, high)


class ScanSpacingd(Spacingd):
    """:class:`monai.transforms.Spacingd` that smooths what becomes coarser, and leaves entries named ``<key>_...`` alone.

    Without smoothing, detail that the new voxels cannot show comes back as noise, see
    :func:`~brainfm_monai.functional.intensity.antialias`. Spacingd (MONAI 1.6.0 and 1.6.1) calls ``update`` on entries whose
    name begins with the key, which fails on the ``image_path`` of MONAI Label.
    """

    def __call__(self, data: Mapping[Hashable, Any], lazy: bool | None = None) -> dict[Hashable, Any]:
        """See :class:`monai.transforms.Spacingd`."""
        prefixes = tuple(f"{key}_" for key in self.keys)
        held = {
            k: v for k, v in data.items() if isinstance(k, str) and k.startswith(prefixes) and not isinstance(v, dict)
        }
        d = {k: v for k, v in data.items() if k not in held}
        target_mm = [float(size) for size in self.spacing_transform.pixdim]
        for key in self.key_iterator(d):
            smooth = antialias(d[key].as_tensor(), affine_to_spacing(d[key].affine).tolist(), target_mm)
            d[key] = MetaTensor(smooth).copy_meta_from(d[key])
        resampled: dict[Hashable, Any] = super().__call__(d, lazy)
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
            normalised = MetaTensor(normalise_percentiles(values.unsqueeze(0), self.lower, self.upper).squeeze(0))
            d[key] = normalised.copy_meta_from(d[key]) if isinstance(d[key], MetaTensor) else normalised
        return d
