"""The one output tensor becomes named maps: labels out of those that a mode allows, and the other tasks in their units."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from torch import Tensor

from brainfm_monai.anatomy import Protocol
from brainfm_monai.tasks import MAX_DISTANCE_MM, Task, TaskLayout, bound_log_scale

__all__ = ["MODES", "Mode", "SplitTasksd", "allowed_labels"]

IdRanges = tuple[tuple[int, int], ...]

HEAD: IdRanges = ((500, 599), (901, 999))  # SynthSeg's and SuperSynth's labels of what is not brain
HINDBRAIN: IdRanges = ((7, 8), (15, 16), (46, 47))  # cerebellum, fourth ventricle and brainstem
OUTER_FLUID: IdRanges = ((24, 24),)
SLAB = 16  # slices that are turned into probabilities at once: 44 labels of 256^2 voxels are 0.2 GB


@dataclass(frozen=True)
class Mode:
    """What of a head a scan shows: other labels cannot be found in it.

    Attributes:
        excluded_ids: [first, last] ranges of FreeSurfer ids that are left out.
        excluded_side: ``"left"`` or ``"right"`` leaves out the structures of that side.
    """

    excluded_ids: IdRanges = ()
    excluded_side: str = ""


MODES: dict[str, Mode] = {
    "whole_head": Mode(),
    "brain": Mode(HEAD),
    "cerebrum": Mode(HEAD + HINDBRAIN),
    "left_hemisphere": Mode(HEAD + HINDBRAIN, "right"),
    "right_hemisphere": Mode(HEAD + HINDBRAIN, "left"),
    "ex_vivo": Mode(HEAD + OUTER_FLUID),
}


def allowed_labels(protocol: Protocol, mode: str) -> list[int]:
    """Labels of a protocol that a mode leaves in; the background always is.

    Raises:
        ValueError: if there is no such mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode: one of {', '.join(MODES)} is needed, found '{mode}'")
    rule = MODES[mode]
    return [
        s.label
        for s in protocol.structures
        if s.label == 0
        or (
            not any(first <= s.freesurfer_id <= last for first, last in rule.excluded_ids)
            and s.side != rule.excluded_side
        )
    ]


class SplitTasksd(MapTransform):
    """Turn the network's one output tensor into one entry per task.

    The entry itself becomes the label map of the segmentation, uint8, shape (1, H, W, D), so that the volume of logits
    is let go before anything is resampled. The other tasks become entries of their own name, float32, in the unit
    of their files: ``distance`` in mm, clipped; ``mni`` in mm; ``bias_field`` in place of ``log_bias_field``; ``<task>_scale``,
    the scale of a task's error in the task's unit, in place of ``<task>_log_scale``. A scalar stays a map, whose mean over the
    head is the number.

    Args:
        keys: key of the output tensor, shape (C, H, W, D) with C the layout's channels.
        layout: names of the channels.
        distance_limit_mm: distances are clipped to this magnitude: beyond it they carry no information.
        mode: name out of :data:`MODES`: the labels that are left out get no probability.
        probabilities: add what the files tell of the probabilities: ``entropy``, that of the labels relative to its maximum,
            shape (1, H, W, D), in [0, 1], 0 in the air around; ``soft_volumes``, the sum of each label's probability times
            the voxel's volume in mm^3, shape (L,); and ``segmentation``, a second label map, which stays in the network's grid.

    Raises:
        ValueError: if there is no such mode, or labels that were decided already meet a mode that restricts them.
    """

    def __init__(
        self,
        keys: KeysCollection,
        layout: TaskLayout,
        distance_limit_mm: float = MAX_DISTANCE_MM,
        mode: str = "whole_head",
        probabilities: bool = False,
    ) -> None:
        super().__init__(keys)
        self.layout = layout
        self.distance_limit_mm = distance_limit_mm
        self.allowed = allowed_labels(layout.protocol, mode)
        self.probabilities = probabilities

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Split the entries; their metadata go to each part."""
        d = dict(data)
        for key in self.key_iterator(d):
            output = d.pop(key)
            values = output.as_tensor() if isinstance(output, MetaTensor) else torch.as_tensor(output)
            for name, part in self.layout.split(values.unsqueeze(0)).items():
                task = self.layout.tasks[name]
                if task.kind == "labels":
                    entries = self._decide(key, part.squeeze(0), output)
                else:
                    entry = {"log_field": name.removeprefix("log_"), "log_scale": name.replace("_log_", "_")}.get(
                        task.kind, name
                    )
                    entries = {entry: self._convert(part.squeeze(0), task)}
                d |= {
                    name: value if name == "soft_volumes" else _like(value, output) for name, value in entries.items()
                }
        return d

    def _decide(self, key: Hashable, logits: Tensor, output: Any) -> dict[Hashable, Tensor]:
        """Label map, and what is told of the probabilities, slab by slab."""
        if len(logits) == 1:  # decided already, by an inferer in little memory
            if len(self.allowed) < len(self.layout.protocol):
                raise ValueError(
                    "a mode restricts the labels before they are decided, and --memory low decides them: pass --memory slabs"
                )
            labels_alone = logits.to(torch.uint8)
            return {key: labels_alone, **({"segmentation": labels_alone.clone()} if self.probabilities else {})}
        allowed = torch.tensor(self.allowed, device=logits.device)
        known = logits if len(allowed) == len(logits) else logits[allowed]
        labels = torch.cat(
            [allowed[slab.argmax(dim=0, keepdim=True)].to(torch.uint8) for slab in known.split(SLAB, dim=1)], dim=1
        )
        if not self.probabilities:
            return {key: labels}
        entropy = torch.zeros(labels.shape, device=logits.device)
        volumes = torch.zeros(len(logits), dtype=torch.float64, device=logits.device)
        box = _box_of(labels[0] > 0)
        entropy[:, *box], volumes[allowed] = _measure(known[:, *box])
        voxel_mm3 = float(torch.det(output.affine[:3, :3]).abs()) if isinstance(output, MetaTensor) else 1.0
        return {key: labels, "segmentation": labels.clone(), "entropy": entropy, "soft_volumes": volumes * voxel_mm3}

    def _convert(self, part: Tensor, task: Task) -> Tensor:
        if task.kind == "log_scale":
            return bound_log_scale(part).exp() * task.scale
        scaled = part.float() * task.scale
        if task.kind == "log_field":
            return scaled.exp()
        return scaled.clamp(-self.distance_limit_mm, self.distance_limit_mm) if task.kind == "distance" else scaled


def _box_of(mask: Tensor) -> tuple[slice, ...]:
    """Slices of the box around what is true in a mask of shape (H, W, D); empty ones where nothing is."""
    occupied = [mask.flatten(1).any(1), mask.transpose(0, 1).flatten(1).any(1), mask.flatten(0, 1).any(0)]
    ends = [axis.nonzero().flatten() for axis in occupied]
    return tuple(slice(int(e[0]), int(e[-1]) + 1) if len(e) else slice(0, 0) for e in ends)


def _measure(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy of each voxel relative to its maximum, shape (1, H, W, D), and sum of each label's probability, shape (L,).

    With z the log of the sum of exp(logits), the entropy is z - sum(p logits). One buffer serves all slabs: large new ones
    cost more time than the arithmetic.
    """
    entropy, total = (
        torch.zeros(1, *logits.shape[1:], device=logits.device),
        logits.new_zeros(len(logits), dtype=torch.float64),
    )
    buffer = torch.empty(0, device=logits.device)
    for first in range(0, logits.shape[1], SLAB):
        slab = logits[:, first : first + SLAB].float()
        normaliser = slab.logsumexp(dim=0, keepdim=True)
        buffer = torch.sub(slab, normaliser, out=buffer.resize_(0)).exp_()
        total += buffer.sum(dim=(1, 2, 3)).double()
        entropy[:, first : first + SLAB] = normaliser - buffer.mul_(slab).sum(dim=0, keepdim=True)
    return entropy.clamp_min(0) / math.log(max(len(logits), 2)), total


def _like(values: Tensor, source: Any) -> MetaTensor:
    tensor = MetaTensor(values)
    return tensor.copy_meta_from(source) if isinstance(source, MetaTensor) else tensor
