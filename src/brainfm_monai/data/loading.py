"""Prepared subjects into memory, as files hold them and as a training needs them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as nnf
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, Transform
from torch import Tensor

from brainfm_monai.anatomy import Protocol
from brainfm_monai.data.labels import simulate_contrasts
from brainfm_monai.io import read_maps, refuse_if
from brainfm_monai.tasks import TASKS

MNI_MM = 4.0  # voxel of coordinates, as prepared subjects have it
BOX_TOLERANCE_MM = 0.01
LABELS = ("generation_labels", "segmentation")


class LoadSubjectd(MapTransform):
    """Read the volumes of a datalist's item, channel first, in this package's units.

    Labels and masks keep their whole numbers, distances and coordinates become mm, scans [0, 1], CT HU. The value of a
    key is a path. A contrast that the item names in ``simulated`` is painted, see :func:`simulate_contrasts`.
    """

    def __init__(self, keys: KeysCollection, allow_missing_keys: bool = True) -> None:
        super().__init__(keys, allow_missing_keys)

    def __call__(self, data: Mapping[Any, Any]) -> dict[Any, Any]:
        """Replace the paths by MetaTensors of shape (C, H, W, D)."""
        d = dict(data)
        painted = [str(key) for key in self.keys if key not in d and key in d.get("simulated", ())]
        absent = [key for key in self.keys if key not in d and key not in painted]
        if absent and not self.allow_missing_keys:
            raise KeyError(f"{d.get('subject')}: the item has no '{absent[0]}'")
        d |= {key: _load(d[key]) for key in self.keys if key in d}
        if painted:
            labels = d["generation_labels"]
            labels = labels if isinstance(labels, MetaTensor) else _load(labels)
            protocol = Protocol.load(str(d["generation_protocol"]))
            values, affine = labels.as_tensor()[0].numpy(), labels.affine.numpy()
            images = simulate_contrasts(values, affine, protocol, painted, str(d.get("subject")))
            d |= {key: MetaTensor(torch.from_numpy(images[key])[None], meta=dict(labels.meta)) for key in painted}
        return d


def _load(path: str | Path) -> MetaTensor:
    """One volume of an item, in the file's order of memory: a crop copies only itself."""
    maps, meta = read_maps(path), {"filename_or_obj": str(path)}
    return MetaTensor(torch.from_numpy(maps.values), affine=torch.from_numpy(maps.affine), meta=meta)


@dataclass(eq=False)
class HoldSubjectd(Transform):
    """Load a prepared subject and hold it in memory as a training needs it, in the unit of its files.

    Labels and masks are bytes, distances and images floats, and coordinates lie on a grid of 4 mm, because they change
    slowly; all grids cover the box of the subject. What a subject lacks becomes zeros, so that any subjects fit in one
    batch; ``available_<key>`` is 1 or 0, and ``real_<image>`` is 0 for an image that is painted: a target and no input.
    ValueError if a subject has no labels, its box does not divide into such voxels, or a file is not a volume.
    """

    label_mm: float | None = None  # voxel of labels and masks; None: the voxel of the files
    image_mm: float | None = None  # voxel of distances and images; None: the voxel of the files
    images: Sequence[str] = ()  # real or painted scans of subjects that have them: T1w, T2w, FLAIR, CT
    masks: Sequence[str] = ()  # masks of subjects that have them: lesion, lesion_shape, T1w_defacing_mask, ...
    scalars: Sequence[str] = ()  # numbers of subjects that have them: age
    device: str | torch.device | None = None  # where the subject is held; None: the host

    def __post_init__(self) -> None:
        self.grids: dict[str, tuple[float | None, bool]] = {}  # voxel, and whether the numbers are whole
        self.grids |= dict.fromkeys((*LABELS, *self.masks), (self.label_mm, True))
        self.grids |= dict.fromkeys(("distance", *self.images), (self.image_mm, False)) | {"mni": (MNI_MM, False)}
        self.load = LoadSubjectd(list(self.grids))

    def __call__(self, data: Mapping[Any, Any]) -> dict[str, Any]:
        """Replace the paths by tensors (C, h, w, d); other entries but the name and the protocol are left out."""
        subject = Path(str(data.get("subject", ""))).name  # load_decathlon_datalist makes a path of a name
        for key in LABELS:
            refuse_if(key not in data, f"{subject}: a subject with {key} is needed", ", ".join(map(str, data)))
        loaded = self.load(data)
        labels = loaded["generation_labels"]
        spacing_mm = labels.affine[:3, :3].norm(dim=0).tolist()
        box_mm = [n * mm for n, mm in zip(labels.shape[1:], spacing_mm, strict=True)]
        held = {"subject": subject, **{key: data[key] for key in ("generation_protocol",) if key in data}}
        for key, (voxel_mm, whole) in self.grids.items():
            volume = loaded.get(key)
            mm = voxel_mm or spacing_mm[0]
            size = [max(1, round(side / mm)) for side in box_mm]
            off_mm = max(abs(n * mm - side) for n, side in zip(size, box_mm, strict=True))
            rule = f"{subject}: a box that divides into voxels of {mm:g} mm is needed"
            refuse_if(off_mm > BOX_TOLERANCE_MM, rule, " x ".join(f"{side:g}" for side in box_mm) + " mm")
            if key not in LABELS:
                held[f"available_{key}"] = torch.tensor(float(volume is not None))
            if key in self.images:
                held[f"real_{key}"] = torch.tensor(float(volume is not None and key not in data.get("simulated", ())))
            channels = TASKS[key].channels if key in TASKS and TASKS[key].channels else 1
            empty = torch.zeros(()).expand(channels, *size)
            values = empty if volume is None else _resize(volume.as_tensor(), size, whole)
            held[key] = values.to(device=self.device, dtype=torch.uint8 if whole else torch.float32)
        for key in self.scalars:
            held[f"available_{key}"] = torch.tensor(float(key in data))
            held[key] = torch.as_tensor(data.get(key, 0.0), dtype=torch.float32)
        return held


def _resize(values: Tensor, size: Sequence[int], whole: bool) -> Tensor:
    """A volume on another grid of the same box: the nearest label, a mean in larger voxels, or linear interpolation."""
    if list(values.shape[1:]) == list(size):
        return values
    coarser = all(n <= m for n, m in zip(size, values.shape[1:], strict=True))
    mode = "nearest-exact" if whole else "area" if coarser else "trilinear"
    return nnf.interpolate(values[None] if whole else values[None].float(), size=list(size), mode=mode)[0]
