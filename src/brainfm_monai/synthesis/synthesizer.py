"""One draw and its rendering behind one call: what MONAI's faces of the generator share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from monai.transforms import Randomizable
from monai.utils import convert_to_tensor
from torch import Tensor

from brainfm_monai.anatomy import Protocol
from brainfm_monai.functional import intensity
from brainfm_monai.synthesis.acquisition import IMAGES
from brainfm_monai.synthesis.ranges import SynthesisParams, SynthesisRanges, make_mild
from brainfm_monai.synthesis.rendering import render
from brainfm_monai.synthesis.sampling import sample
from brainfm_monai.tasks import TaskLayout

__all__ = ["LARGEST_SEED", "SUBJECT_KEYS", "Synthesizer"]

LARGEST_SEED = 2**31 - 1

DEFACING_KEYS = tuple(f"{name}_defacing_mask" for name in IMAGES)
SUBJECT_KEYS = (
    "generation_labels",
    "segmentation",
    *IMAGES,
    *DEFACING_KEYS,
    "distance",
    "mni",
    "lesion",
    "lesion_shape",
    "age",
)


@cache
def _load_protocol(name: str) -> Protocol:
    return Protocol.load(name)


class Synthesizer:
    """Generates scans and targets from a batch of subjects: the same for the same seeds, whatever the batch.

    Args:
        ranges: laws of the (severe) samples.
        layout: tasks whose targets are wanted.
        spatial_size: (H, W, D) of the generated scans.
        stride: voxel of the generated scans in voxels of the subjects.
        source_mm: voxel of the subjects.
        generation_protocol: protocol of the generation labels of subjects that name none.
        samples: scans of each subject; they share its deformation and its targets, and differ in everything else.
        mild_samples: how many of them, the first ones, are mild.
        mild_ranges: laws of the mild samples; those of :func:`make_mild` if not given.
        image_transform: MONAI transform of one image (1, H, W, D) in [0, 1], such as ``RandKSpaceSpikeNoise`` or
            ``RandGibbsNoise``; a random one is seeded with the sample. The image is normalised again after it.

    Raises:
        ValueError: if there are more mild samples than samples.
    """

    def __init__(
        self,
        ranges: SynthesisRanges,
        layout: TaskLayout,
        spatial_size: Sequence[int],
        stride: int = 1,
        source_mm: float = 1.0,
        generation_protocol: str = "synthseg_generation",
        samples: int = 1,
        mild_samples: int = 0,
        mild_ranges: SynthesisRanges | None = None,
        image_transform: Callable[[Any], Any] | None = None,
    ) -> None:
        if not 0 <= mild_samples <= samples or samples < 1:
            raise ValueError(
                f"Synthesizer: 'mild_samples' must be in [0, {samples}] of at least one sample, got {mild_samples}"
            )
        self.layout, self.spatial_size, self.stride, self.source_mm = layout, tuple(spatial_size), stride, source_mm
        self.generation_protocol = generation_protocol
        # What the samples share is drawn by the first law: a mild law differs in the appearance alone.
        mild = mild_ranges or make_mild(ranges)
        self.ranges = [mild] * mild_samples + [ranges] * (samples - mild_samples)
        self.image_transform = image_transform

    def draw(
        self, subject: Mapping[str, Tensor], seeds: Sequence[int], generation_protocol: str | None = None
    ) -> SynthesisParams:
        """Everything random of the subjects' samples, on the device of the subjects; see the call for the arguments."""
        return sample(
            self.ranges,
            [torch.Generator().manual_seed(seed) for seed in seeds],
            spatial_size=self.spatial_size,
            protocol=self.layout.protocol,
            generation_protocol=_load_protocol(generation_protocol or self.generation_protocol),
            stride=self.stride,
            source_mm=self.source_mm,
            available=self._available(subject, len(seeds)),
            device=subject["generation_labels"].device,
        )

    @torch.no_grad()
    def __call__(
        self, subject: Mapping[str, Tensor], seeds: Sequence[int], generation_protocol: str | None = None
    ) -> dict[str, Tensor]:
        """Scans and targets.

        Args:
            subject: batch of subjects, see :func:`render`; ``available_<image>`` on the host.
            seeds: one for each subject.
            generation_protocol: of these subjects, where it is not that of the synthesizer.

        Returns:
            See :func:`render`.
        """
        if subject["generation_labels"].device.type == "cpu":
            # One after the other: the same numbers, and a subject's volumes stay in the processor's cache.
            alone = [
                self._make({key: value[i : i + 1] for key, value in subject.items()}, [seed], generation_protocol)
                for i, seed in enumerate(seeds)
            ]
            out = {name: torch.cat([one[name] for one in alone]) for name in alone[0]} if len(alone) > 1 else alone[0]
        else:
            out = self._make(subject, seeds, generation_protocol)
        if self.image_transform is not None:
            images = self._transform_images(self.image_transform, out["image"], seeds)
            out["image"] = intensity.normalise_percentiles(torch.stack(images))
        return out

    def _make(
        self, subject: Mapping[str, Tensor], seeds: Sequence[int], generation_protocol: str | None
    ) -> dict[str, Tensor]:
        return render(subject, self.draw(subject, seeds, generation_protocol), self.layout)

    def _available(self, subject: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
        there = [name for name in IMAGES if name in subject]
        every = torch.ones(count, dtype=torch.bool)
        return {name: subject.get(f"available_{name}", every).bool() for name in there}

    def _transform_images(self, transform: Callable[[Any], Any], images: Tensor, seeds: Sequence[int]) -> list[Tensor]:
        transformed = []
        for place, image in enumerate(images):
            subject, number = divmod(place, len(self.ranges))
            if isinstance(transform, Randomizable):
                transform.set_random_state(seed=(seeds[subject] + number) % LARGEST_SEED)
            transformed.append(convert_to_tensor(transform(image), track_meta=False))
        return transformed
