"""The one output tensor becomes named maps: labels of those that a mode allows, the other tasks in their units."""

import math
from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from monai.transforms.utils import generate_spatial_bounding_box
from monai.utils import convert_to_tensor
from torch import Tensor

from brainfm_monai.anatomy import Protocol
from brainfm_monai.tasks import TaskLayout

HINDBRAIN = (7, 8, 15, 16, 46, 47)  # FreeSurfer ids of cerebellum, fourth ventricle and brainstem
OUTER_FLUID = (24,)
SLAB = 16  # slices that are turned into probabilities at once: 44 labels of 256^2 voxels are 0.2 GB


class Mode(NamedTuple):
    """What of a head a scan shows: other labels cannot be found in it."""

    shows_head: bool = True  # whether tissues of the head outside the brain are in the scan
    excluded_ids: tuple[int, ...] = ()  # FreeSurfer ids that are not in the scan
    excluded_side: str = ""  # "left" or "right": the structures of that side are not in the scan


MODES: dict[str, Mode] = {
    "whole_head": Mode(),
    "brain": Mode(False),
    "cerebrum": Mode(False, HINDBRAIN),
    "left_hemisphere": Mode(False, HINDBRAIN, "right"),
    "right_hemisphere": Mode(False, HINDBRAIN, "left"),
    "ex_vivo": Mode(False, OUTER_FLUID),
}


def allowed_labels(protocol: Protocol, mode: str) -> list[int]:
    """Labels of a protocol that a mode allows; the background always is. Another mode is a ValueError."""
    if mode not in MODES:
        raise ValueError(f"mode: one of {', '.join(MODES)} is needed, found '{mode}'")
    rule = MODES[mode]
    excluded = np.isin(protocol.freesurfer_ids, rule.excluded_ids)
    excluded |= np.array([s.side == rule.excluded_side for s in protocol.structures])
    excluded |= protocol.is_head & (not rule.shows_head)
    excluded[0] = False
    return [int(label) for label in np.flatnonzero(~excluded)]


class SplitTasksd(MapTransform):
    """Turn the network's one output tensor, (C, H, W, D), into one entry for each task.

    The entry itself becomes the label map of the segmentation, uint8, shape (1, H, W, D), so that the volume of logits
    is freed before anything is resampled. The other tasks become entries of the name (``Task.entry``) and unit
    (``Task.output_unit``) that the table of tasks gives them, float32. A scalar stays a map, whose mean over the head
    is the number. Where labels were decided already, in little memory, the maps overwrite the output.

    Labels that the mode, a name out of :data:`MODES`, excludes get no probability; it is a ValueError if labels that
    were decided already include one. With ``probabilities`` the entries have what files report of them: ``entropy``,
    that of the labels relative to its maximum, (1, H, W, D), in [0, 1], 0 in the air around; ``soft_volumes``, the sum
    of each label's probability times the voxel's volume in mm^3, (L,); ``segmentation``, a second label map, which
    stays in this grid.
    """

    def __init__(
        self, keys: KeysCollection, layout: TaskLayout, mode: str = "whole_head", probabilities: bool = False
    ) -> None:
        super().__init__(keys)
        self.layout, self.probabilities = layout, probabilities
        self.allowed = allowed_labels(layout.protocol, mode)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Split the entries; their metadata go to each part."""
        d = dict(data)
        for key in self.key_iterator(d):
            output = d.pop(key)
            entries: dict[Hashable, Tensor] = {}
            for name, part in self.layout.split(convert_to_tensor(output, track_meta=False)[None]).items():
                task = self.layout.tasks[name]
                if task.kind == "labels":
                    entries |= self._decide(key, part[0], output)
                else:
                    maps = task.to_map(part[0])  # where labels are decided, the output's memory becomes that of maps
                    entries[task.entry] = part[0].copy_(maps) if len(output) < self.layout.channels else maps
            for entry, value in entries.items():
                d[entry] = value if entry == "soft_volumes" else MetaTensor(value)
                if isinstance(output, MetaTensor) and entry != "soft_volumes":
                    d[entry].copy_meta_from(output)
        return d

    def _decide(self, key: Hashable, logits: Tensor, output: Any) -> dict[Hashable, Tensor]:
        """Label map, entropy and soft volumes, slab by slab."""
        if len(logits) == 1:  # decided already, by an inferer in little memory
            decided = logits.to(torch.uint8)
            if excluded := sorted(set(decided.unique().tolist()) - set(self.allowed)):
                raise ValueError(f"the mode excludes the labels {excluded}: decide the labels among those of the mode")
            return {key: decided, **({"segmentation": decided.clone()} if self.probabilities else {})}
        allowed = torch.tensor(self.allowed, device=logits.device)
        possible = logits if len(allowed) == len(logits) else logits[allowed]
        slabs = [allowed[slab.argmax(dim=0, keepdim=True)].to(torch.uint8) for slab in possible.split(SLAB, dim=1)]
        labels = torch.cat(slabs, dim=1)
        if not self.probabilities:
            return {key: labels}
        entropy = torch.zeros(labels.shape, device=logits.device)
        volumes = torch.zeros(len(logits), dtype=torch.float64, device=logits.device)
        box = [slice(*ends) for ends in zip(*generate_spatial_bounding_box(labels), strict=True)]
        entropy[(slice(None), *box)], volumes[allowed] = _measure(possible[(slice(None), *box)])
        voxel_mm3 = float(torch.det(output.affine[:3, :3]).abs()) if isinstance(output, MetaTensor) else 1.0
        return {key: labels, "segmentation": labels.clone(), "entropy": entropy, "soft_volumes": volumes * voxel_mm3}


def _measure(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy of each voxel relative to its maximum, (1, H, W, D), and sum of each label's probability, (L,).

    With z the log of the sum of exp(logits), the entropy is z - sum(p logits). One buffer serves all slabs: large new
    ones cost more time than the arithmetic.
    """
    entropies, total = [], logits.new_zeros(len(logits), dtype=torch.float64)
    buffer = torch.empty(0, device=logits.device)
    for part in logits.split(SLAB, dim=1):
        slab = part.float()
        normaliser = slab.logsumexp(dim=0, keepdim=True)
        buffer = torch.sub(slab, normaliser, out=buffer.resize_(0)).exp_()
        total += buffer.sum(dim=(1, 2, 3)).double()
        entropies.append(normaliser - buffer.mul_(slab).sum(dim=0, keepdim=True))
    return torch.cat(entropies, 1).clamp_min(0) / math.log(max(len(logits), 2)), total
