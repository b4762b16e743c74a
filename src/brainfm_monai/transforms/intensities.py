"""Intensities and voxel size of a scan before the network: window of a CT, percentiles, spacing."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, Spacingd

from brainfm_monai.functional.intensity import normalise_percentiles

__all__ = ["NormalisePercentilesd", "ScanSpacingd", "parse_window", "window_hounsfield"]

BRAIN_WINDOW_HU = (0.0, 80.0)  # BrainFM's window for CT
AIR_HU, AIR_TOLERANCE_HU = -1000.0, 50.0
AIR_SHARE = 0.05  # of the voxels of a CT that show air at least; no MR scale has so many values there


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


def window_hounsfield(image: MetaTensor, window: tuple[float, float] | str | None) -> MetaTensor:
    """Clip a CT to the brain's window, so that bone and air do not take the whole range of grey values.

    A scan is taken for a CT in Hounsfield units if at least 5 % of its voxels lie within 50 HU of air (-1000 HU).

    Args:
        image: shape (C, H, W, D); its metadata get the entry ``window`` where something was clipped.
        window: ``[low, high]``, ``"auto"`` or None.

    Returns:
        The same image, clipped.
    """
    values = image.as_tensor()
    limits = window
    if limits == "auto":
        share_of_air = ((values - AIR_HU).abs() < AIR_TOLERANCE_HU).float().mean()
        limits = BRAIN_WINDOW_HU if float(share_of_air) >= AIR_SHARE else None
    if limits is not None:
        image.set_array(values.clamp(float(limits[0]), float(limits[1])))
        image.meta["window"] = f"{limits[0]:g} to {limits[1]:g}"
    return image


class ScanSpacingd(Spacingd):
    """:class:`monai.transforms.Spacingd` that leaves entries named ``<key>_...`` alone.

    Spacingd (MONAI 1.6.0 and 1.6.1) calls ``update`` on each of them, which fails on the ``image_path`` of MONAI Label.
    """

    def __call__(self, data: Mapping[Hashable, Any], lazy: bool | None = None) -> dict[Hashable, Any]:
        """See :class:`monai.transforms.Spacingd`."""
        prefixes = tuple(f"{key}_" for key in self.keys)
        held = {
            k: v for k, v in data.items() if isinstance(k, str) and k.startswith(prefixes) and not isinstance(v, dict)
        }
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
            normalised = MetaTensor(normalise_percentiles(values.unsqueeze(0), self.lower, self.upper).squeeze(0))
            d[key] = normalised.copy_meta_from(d[key]) if isinstance(d[key], MetaTensor) else normalised
        return d
