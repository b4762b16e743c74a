"""From any scan to what the network sees: reading it, window and padding, voxel size, percentiles."""

from collections.abc import Hashable, Mapping
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.data.utils import affine_to_spacing
from monai.transforms import LoadImaged, MapTransform, Spacingd
from monai.utils import convert_to_tensor

from brainfm_monai import io
from brainfm_monai.functional.intensity import antialias, normalise_percentiles
from brainfm_monai.tasks import BRAIN_WINDOW_HU
from brainfm_monai.transforms.values import decide_modality, find_doubts, mend_hounsfield, remove_padding

MODALITIES = ("auto", "mr", "ct")


def parse_window(window: Any) -> tuple[float, float] | str | None:
    """A window of intensities: ``[low, high]``, ``"auto"`` or None; anything else is a ValueError."""
    if window is None or window == "auto":
        return window
    with suppress(TypeError, ValueError):
        low, high = (float(value) for value in window)
        if low < high:
            return low, high
    raise ValueError(f"window: 'auto' or two rising numbers [low, high] are needed, found {window!r}")


class LoadScand(LoadImaged):
    """Read a scan, channel first, with :func:`brainfm_monai.io.read_scan`; every refusal is one line.

    A CT is clipped to the brain's window, so that bone and air do not take the whole range of grey values; the padding
    of an MR scan is set to 0. The entry ``original`` is the scan as it was read: what follows the network corrects and
    draws it, and opens no file again. The metadata of the image get ``scan_name``, the entry ``name`` or the file's
    stem, under which results are written; ``warnings``, what was noticed, one sentence a line; ``modality``, ``ct`` or
    ``mr`` with the reason; ``window`` where something was clipped; and ``frame``.

    Args:
        keys: key of the path.
        frame: which volume of a 4-D file: its number, from 0, or ``"mean"``; None refuses such a file. An entry
            ``frame`` of the data comes first, and an entry ``series`` names the series of a DICOM folder.
        window: intensities are clipped to ``[low, high]``; ``"auto"``: a CT to 0 to 80 HU; None: not at all.
        modality: ``"mr"``, ``"ct"`` or ``"auto"``, see :func:`decide_modality`.

    ValueError if ``window`` or ``modality`` is none of these; ScanError on a file that is not one scalar volume, or has
    no contrast.
    """

    def __init__(
        self, keys: KeysCollection, frame: int | str | None = None, window: Any = None, modality: str = "auto"
    ) -> None:
        MapTransform.__init__(self, keys)
        self._loader: Any = SimpleNamespace(image_only=True)  # MONAI Label sets it in every LoadImaged of a bundle
        if modality not in MODALITIES:
            raise ValueError(f"modality: one of {', '.join(MODALITIES)} is needed, found {modality!r}")
        self.frame, self.window, self.modality = frame, parse_window(window), modality

    def __call__(self, data: Mapping[Hashable, Any], reader: Any = None) -> dict[Hashable, Any]:
        """Replace the path by a float32 MetaTensor of shape (1, H, W, D), and add ``original``, of the same shape."""
        loaded, frame = dict(data), data.get("frame", self.frame)
        for key in self.key_iterator(dict(data)):
            path = str(data[key])
            volume = mend_hounsfield(io.read_scan(path, frame, data.get("series")), self.modality)
            modality, reason = decide_modality(volume, self.modality)
            limits = BRAIN_WINDOW_HU if self.window == "auto" and modality == "ct" else self.window
            values, floor, padding = volume.values, -np.inf, ""
            if modality == "mr":
                values, floor, padding = remove_padding(values)
            low, high = (floor, np.inf) if limits is None or isinstance(limits, str) else limits
            noticed = [*volume.warnings, padding, *find_doubts(np.maximum(values, floor), modality)]
            meta = {
                "filename_or_obj": path,
                "scan_name": str(data.get("name") or io.scan_stem(path)),
                "warnings": "\n".join(filter(None, noticed)),
                "modality": f"{modality}: {reason}",
            }
            meta |= {"window": f"{low:g} to {high:g}"} if np.isfinite(high) else {}
            meta |= {} if frame is None else {"frame": str(frame)}  # MONAI's collation of metadata takes no None
            original, affine = torch.from_numpy(values)[None], torch.from_numpy(volume.affine)
            shown = original if low == -np.inf else original.clamp(low, high)
            loaded["original"] = MetaTensor(original, affine=affine)
            loaded[key] = MetaTensor(shown, affine=affine, meta=meta)
        return loaded


class ScanSpacingd(Spacingd):
    """:class:`monai.transforms.Spacingd` that smooths what becomes coarser, and leaves entries ``<key>_...`` alone.

    Without smoothing, detail that the new voxels cannot show comes back as noise, see
    :func:`~brainfm_monai.functional.intensity.antialias`. Spacingd (MONAI 1.6.0 and 1.6.1) calls ``update`` on entries
    whose name begins with the key, which fails on the ``image_path`` of MONAI Label.
    """

    def __call__(self, data: Mapping[Hashable, Any], lazy: bool | None = None) -> dict[Hashable, Any]:
        """See :class:`monai.transforms.Spacingd`."""
        begin = tuple(f"{key}_" for key in self.keys)
        held = {k: v for k, v in data.items() if str(k).startswith(begin) and not isinstance(v, dict)}
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
            image = convert_to_tensor(d[key], track_meta=True)
            normalised = normalise_percentiles(image.as_tensor()[None], self.lower, self.upper)[0]
            d[key] = MetaTensor(normalised).copy_meta_from(image)
        return d
