"""One draw and its rendering behind one call; and a draw in words."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from brainfm_monai.anatomy import Protocol
from brainfm_monai.io import refuse_if
from brainfm_monai.synthesis.acquisition import IMAGES
from brainfm_monai.synthesis.ranges import SynthesisParams, SynthesisRanges, make_mild
from brainfm_monai.synthesis.rendering import render
from brainfm_monai.synthesis.sampling import Draws, sample_appearance, sample_geometry
from brainfm_monai.tasks import TaskLayout

LARGEST_SEED = 2**31 - 1
VOXEL_TOLERANCE_MM = 1e-4
MAPS = ("distance", "mni", "lesion", "lesion_shape", "age")
SUBJECT_KEYS = ("generation_labels", "segmentation", *IMAGES, *(f"{name}_defacing_mask" for name in IMAGES), *MAPS)
# Before a key of a subject: 1 if the subject has it; for an image, 1 if a scanner made it, so that it may be an input.
FLAGS = ("available_", "real_")

_load_protocol = cache(Protocol.load)


@dataclass(eq=False)
class Synthesizer:
    """Generates scans and targets from a batch of subjects: the same for the same seeds, whatever the batch."""

    ranges: SynthesisRanges  # laws of the (severe) samples
    layout: TaskLayout  # tasks whose targets are made
    spatial_size: Sequence[int]  # (H, W, D) of the generated scans
    scan_mm: float = 1.0  # voxel of the generated scans
    label_mm: float | None = None  # voxel of the subjects' labels, a whole fraction of scan_mm; None: the same
    generation_protocol: str = "synthseg_generation"  # of the generation labels of subjects that name none
    samples: int = 1  # scans of each subject; they share its deformation and targets, and differ in everything else
    mild_samples: int = 0  # how many of them, the first ones, are mild

    def __post_init__(self) -> None:
        severe, mild = self.samples - self.mild_samples, self.mild_samples
        rule = f"Synthesizer: 'mild_samples' must be in [0, {self.samples}] of at least one sample"
        refuse_if(not 0 <= mild <= self.samples or self.samples < 1, rule, mild)
        self.source_mm = self.scan_mm if self.label_mm is None else self.label_mm
        self.stride = round(self.scan_mm / self.source_mm)
        off_mm = abs(self.stride * self.source_mm - self.scan_mm)
        rule = f"Synthesizer: 'label_mm' must divide 'scan_mm' {self.scan_mm}"
        refuse_if(off_mm > VOXEL_TOLERANCE_MM, rule, self.source_mm)
        self.laws = [make_mild(self.ranges)] * mild + [self.ranges] * severe

    def draw(
        self, subject: Mapping[str, Tensor], seeds: Sequence[int], generation_protocol: str | None = None,
        device: str | torch.device | None = None,
    ) -> SynthesisParams:  # fmt: skip
        """Everything random of the subjects' samples, on a device, for which their flags suffice, or where they are."""
        draws = Draws(seeds, torch.device(device or subject["generation_labels"].device))
        every = torch.ones(draws.batch, dtype=torch.bool)
        present = [every]
        for name in IMAGES:
            flags = [subject[f"{flag}{name}"].bool() for flag in FLAGS if f"{flag}{name}" in subject]
            present.append(torch.stack([every, *flags]).all(0) if flags or name in subject else ~every)
        protocol, painted = self.layout.protocol, _load_protocol(generation_protocol or self.generation_protocol)
        # What the samples share is drawn by the severe law: a mild law differs in the appearance alone.
        geometry = sample_geometry(self.ranges, draws, self.spatial_size, protocol, self.stride, self.source_mm)
        looks = [sample_appearance(law, draws, geometry, painted, torch.stack(present, 1)) for law in self.laws]
        return SynthesisParams(geometry, tuple(looks)).to(draws.device)

    @torch.no_grad()
    def __call__(
        self, subject: Mapping[str, Tensor], seeds: Sequence[int], generation_protocol: str | None = None
    ) -> dict[str, Tensor]:
        """Scans and targets of a batch of subjects, each with a seed; see :func:`render` for both.

        Flags of the subjects are on the host, (B,): ``available_<key>``, 0 for subjects without the key, and
        ``real_<image>``, 0 for images that are targets but no inputs. The generation protocol may be the subjects' own.
        """
        parts = [(subject, seeds)]
        if subject["generation_labels"].device.type == "cpu":
            # One after the other: the same numbers, and a subject's volumes stay in the processor's cache.
            parts = [({k: v[i : i + 1] for k, v in subject.items()}, seeds[i : i + 1]) for i in range(len(seeds))]
        made = [render(some, self.draw(some, own, generation_protocol), self.layout) for some, own in parts]
        return {name: torch.cat([part[name] for part in made]) for name in made[0]} if len(made) > 1 else made[0]


def describe(params: SynthesisParams, number: int) -> str:
    """What was drawn for a sample of the first subject, in a few lines."""
    geometry, look = params.geometry, params.appearances[number]
    shares = zip(("synthetic", *IMAGES), look.blend[0], strict=True)
    left, _, right = torch.linalg.svd(geometry.matrix[0])  # the nearest rotation, by the polar decomposition
    turn = math.degrees(math.acos(max(-1.0, min(1.0, float(((left @ right).trace() - 1) / 2)))))
    events = {"mirrored": geometry.mirror[0], "stripped": geometry.stripped[0], "defaced": geometry.face[0].any()}
    events |= {"ghosts": look.ghost_strength[0].any(), "lesions": geometry.lesion_coverage[0] > 0}
    facts = [
        " + ".join(f"{float(share):.2f} {name}" if share < 1 else name for name, share in shares if share > 0),
        " x ".join(f"{float(v) * geometry.voxel_mm:.1f}" for v in look.spacing[0]) + " mm",
        f"turned {turn:.0f} deg, scaled {float(torch.linalg.det(geometry.matrix[0])) ** (1 / 3):.2f}",
        f"velocity {float(geometry.velocity[0].std()) * geometry.voxel_mm:.1f} mm",
        f"bias {float(look.bias[0].std()):.2f}, gamma {float(look.gamma[0]):.2f}",
        f"noise {float(look.noise_std[0]):.1f}{' Rician' if look.rician[0] else ''}",
        ", ".join(name for name, happened in events.items() if happened),
    ]
    return "\n".join(facts)
