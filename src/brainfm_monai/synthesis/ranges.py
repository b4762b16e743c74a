"""The laws of the generator's random quantities, and the tables of contrasts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from brainfm_monai.anatomy import Protocol
from brainfm_monai.io import read_table, refuse_if
from brainfm_monai.tasks import TASKS

Range = tuple[float, float]
CONTRASTS = ("T1w", "T2w", "FLAIR", "CT")  # that have a table of the mean intensity of every tissue
# Real contrasts, in the order of the blend after the synthetic image, with the value of air in the unit of the files.
IMAGES = {name: TASKS[name].outside * TASKS[name].scale for name in CONTRASTS}
INTENSITY_TOP = 255.0  # painted intensities lie in [0, 255]; real images are brought to the same scale
LESION_NOISE_MM = (64.0, 32.0, 16.0, 8.0)  # control points of the noise, by octaves, each with half the amplitude
LESION_FLOW_MM = 24.0  # control points of the flow's potential
QUARTILES = (-0.674, 0.0, 0.674)  # of the standard normal law


@dataclass(frozen=True)
class SynthesisRanges:
    """Laws of the random quantities; pairs are (low, high) of a uniform law unless said otherwise.

    The numbers are those of the published BrainFM configuration, except where ``docs/sampling.md``, which has a row for
    every field, says why not. Values that do not fit are a ValueError.
    """

    rotation_deg: Range = (-15.0, 15.0)
    shear: Range = (-0.2, 0.2)
    scaling: Range = (0.8, 1.2)
    translation_mm: Range = (-20.0, 20.0)
    velocity_spacing_mm: Range = (18.0, 40.0)
    velocity_std_mm: Range = (0.0, 4.0)
    mirror_prob: float = 0.5
    mean: Range = (25.0, 225.0)
    std: Range = (5.0, 25.0)
    dark_background_prob: float = 0.5
    contrast_prior_prob: float = 0.0
    contrast_priors: tuple[str, ...] = CONTRASTS
    contrast_prior_spread: float = 2.0
    contrast_inversion_prob: float = 0.3
    head_cluster_prob: float = 0.3
    head_cluster_spacing_mm: Range = (20.0, 60.0)
    head_cluster_std: Range = (5.0, 40.0)
    input_weights: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0, 1.0)
    mixup_prob: float = 0.2
    ct_low_hu: Range = (0.0, 0.0)
    ct_high_hu: Range = (80.0, 80.0)
    gamma_log_std: float = 0.1
    bias_spacing_mm: Range = (32.0, 80.0)
    bias_log_std: Range = (0.1, 0.6)
    resolution_weights: tuple[float, ...] = (0.25, 0.25, 0.25, 0.25)
    clinical_spacing_mm: Range = (2.5, 8.5)
    clinical_thickness_mm: Range = (4.0, 6.0)
    low_field_spacing_mm: tuple[float, float, float] = (1.3, 1.3, 4.8)
    low_field_extra_mm: Range = (0.0, 0.4)
    coarse_spacing_mm: Range = (2.0, 5.0)
    dissection_photo_prob: float = 0.0
    dissection_photo_spacing_mm: Range = (2.5, 12.5)
    profile_factor: Range = (0.85, 1.15)
    ghost_prob: float = 0.0
    ghost_count: Range = (2.0, 5.0)
    ghost_strength: Range = (0.1, 0.5)
    noise_std: Range = (5.0, 15.0)
    real_noise_std: Range = (0.0, 5.0)
    rician_prob: float = 0.5
    skull_strip_prob: float = 0.3
    strip_threshold: Range = (0.3, 0.7)
    head_removal_prob: float = 0.05
    hemisphere_prob: float = 0.0
    left_hemisphere: bool = False
    deface_prob: float = 0.1
    deface_angle_deg: Range = (35.0, 55.0)
    deface_offset_mm: Range = (55.0, 75.0)
    field_of_view_prob: float = 0.2
    field_of_view_loss: Range = (0.0, 0.2)
    lesion_prob: float = 0.0
    lesion_coverage: Range = (0.001, 0.15)
    lesion_flow_mm: Range = (0.0, 10.0)
    lesion_change: Range = (0.3, 0.9)

    def __post_init__(self) -> None:
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            if isinstance(value, list):  # of a config or a command line
                object.__setattr__(self, name, value := tuple(value))
            numbers = value if isinstance(value, tuple) else (value,)
            numbers = numbers if all(isinstance(n, int | float) for n in numbers) else ()
            if name.endswith("_prob"):
                rule, valid = "in [0, 1]", len(numbers) == 1 and 0 <= numbers[0] <= 1
            elif field.type == Range:
                rule, valid = "two ascending numbers", len(numbers) == 2 and numbers[0] <= numbers[1]
            elif name.endswith("_weights"):
                count = len(getattr(SynthesisRanges, name))
                rule = f"{count} numbers of at least 0, not all 0"
                valid = len(numbers) == count and min(numbers) >= 0 and sum(numbers) > 0
            elif field.type is float:
                rule, valid = "a number", len(numbers) == 1
            else:
                continue
            refuse_if(not valid, f"SynthesisRanges: '{name}' must be {rule}", value)

    def make_mild(self) -> "SynthesisRanges":
        """Laws of the mild samples of a subject, out of these of the severe ones: hardly any bias, gamma and noise.

        The numbers are those of the mild samples of BrainFM (arXiv 2509.00549) and Brain-ID (ECCV 2024).
        """
        still: dict[str, Any] = {"gamma_log_std": 0.01, "ghost_prob": 0.0, "mixup_prob": 0.0}
        still |= {"noise_std": (0.0, 5.0), "real_noise_std": (0.0, 5.0), "resolution_weights": (1.0, 0.0, 0.0, 0.0)}
        return replace(self, bias_log_std=(0.0, 0.02), **still)


def parse_ranges(values: Mapping[str, Any]) -> SynthesisRanges:
    """Laws out of names and values, as a command line gives them; ValueError if a name or a value does not fit."""
    unknown = sorted(set(values) - {field.name for field in fields(SynthesisRanges)})
    refuse_if(unknown, "SynthesisRanges: docs/sampling.md lists the fields", f"no {', '.join(unknown)}")
    return SynthesisRanges(**values)


def read_contrasts(names: Sequence[str], protocol: Protocol) -> tuple[Tensor, Tensor]:
    """Means and the stds of these means, both (N, L), out of N tables, else a ValueError, for L generation labels.

    ``CT`` is in HU, the others are in [0, 255]; NaN for labels that a table does not know, as for partial-volume codes.
    """
    unknown = [name for name in names if name not in CONTRASTS]
    refuse_if(unknown, f"contrast_priors: names must be out of {list(CONTRASTS)}", unknown)
    rows = [[_read(name).get(int(i), (math.nan, math.nan)) for i in protocol.freesurfer_ids] for name in names]
    means, stds = torch.tensor(rows, dtype=torch.float32).reshape(len(names), len(protocol), 2).unbind(-1)
    return means, stds


@cache
def _read(name: str) -> dict[int, tuple[float, float]]:
    rows = read_table(str(resources.files("brainfm_monai") / "contrasts" / f"{name}.tsv"))
    return {int(row["freesurfer_id"]): (float(row["mean"]), float(row["mean_std"])) for row in rows}
