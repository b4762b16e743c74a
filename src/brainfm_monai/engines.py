"""What MONAI's engines need from us: a batch of subjects becomes images and targets on the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.engines import PrepareBatch
from monai.transforms import Randomizable
from monai.utils import convert_to_tensor
from torch import Tensor

from brainfm_monai.anatomy import Protocol
from brainfm_monai.synthesis import SynthesisRanges, render, sample
from brainfm_monai.tasks import TaskLayout

__all__ = ["SynthesisPrepareBatch"]

SUBJECT_KEYS = ("generation_labels", "segmentation", "distance", "mni")
LARGEST_SEED = 2**31 - 1


class SynthesisPrepareBatch(PrepareBatch, Randomizable):
    """Turns a batch of cached subjects into generated scans and their targets, on the engine's device.

    Args:
        ranges: laws of the generator.
        layout: tasks whose targets are wanted.
        spatial_size: (H, W, D) of the generated scans.
        stride: voxel of the generated scans in voxels of the subjects.
        source_mm: voxel of the subjects.
        generation_protocol: protocol of the subjects' generation labels.
        seed: of the draws; each rank and each sample gets its own stream from it.
        fixed: draw the same samples again at every pass, for validation: seeds then follow from the subject's place in the data.
    """

    def __init__(
        self,
        ranges: SynthesisRanges,
        layout: TaskLayout,
        spatial_size: Sequence[int],
        stride: int = 1,
        source_mm: float = 1.0,
        generation_protocol: str = "synthseg_generation",
        seed: int = 0,
        fixed: bool = False,
    ) -> None:
        self.ranges, self.layout, self.stride, self.source_mm = ranges, layout, stride, source_mm
        self.spatial_size = tuple(spatial_size)
        self.protocol = Protocol.load(generation_protocol)
        self.seed, self.fixed = seed, fixed
        self.set_random_state(seed)

    def draw_seeds(self, batch: Mapping[str, Any]) -> list[int]:
        """One seed for each sample of a batch."""
        count = len(batch["generation_labels"])
        if self.fixed:
            # MONAI's datalist reader makes a path of a subject's name where such a folder exists: its last part is the name.
            return [self.seed + sum(Path(str(name)).name.encode()) for name in batch.get("subject", range(count))]
        return [int(s) for s in self.R.randint(0, LARGEST_SEED, size=count)]

    def __call__(
        self, batchdata: dict[str, Any], device: str | torch.device | None = None, non_blocking: bool = False, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the images, (B, 1, H, W, D) in [0, 1], and the dictionary of targets for the loss."""
        present = [key for key in SUBJECT_KEYS if key in batchdata]
        subject = {key: convert_to_tensor(batchdata[key], device=device) for key in present}
        labels = subject["generation_labels"]
        generators = [torch.Generator(labels.device).manual_seed(seed) for seed in self.draw_seeds(batchdata)]
        with torch.no_grad():
            params = sample(
                self.ranges,
                generators,
                source_size=labels.shape[2:],
                spatial_size=self.spatial_size,
                protocol=self.protocol,
                stride=self.stride,
                source_mm=self.source_mm,
            )
            targets = render(subject, params, self.layout)
        return targets.pop("image"), targets
