"""What was drawn for a sample, in words."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from brainfm_monai.synthesis.ranges import SynthesisParams

__all__ = ["describe"]


def describe(params: SynthesisParams, number: int) -> str:
    """What was drawn for a sample of the first subject, in a few lines."""
    geometry, look = params.geometry, params.appearances[number]
    names = ("synthetic", "T1w", "T2w", "FLAIR", "CT")
    blend = " + ".join(
        f"{float(w):.2f} {n}" if w < 1 else n for n, w in zip(names, look.blend[0], strict=True) if w > 0
    )
    spacing = " x ".join(f"{float(v) * geometry.voxel_mm:.1f}" for v in look.spacing[0])
    turn = math.degrees(math.acos(max(-1.0, min(1.0, float((_rotation(geometry.matrix[0]).trace() - 1) / 2)))))
    facts = [
        blend,
        f"{spacing} mm",
        f"turned {turn:.0f} deg, scaled {float(torch.linalg.det(geometry.matrix[0])) ** (1 / 3):.2f}",
        f"velocity {float(geometry.velocity[0].std()) * geometry.voxel_mm:.1f} mm",
        f"bias {float(look.bias[0].std()):.2f}, gamma {float(look.gamma[0]):.2f}",
        f"noise {float(look.noise_std[0]):.1f}{' Rician' if look.rician[0] else ''}",
    ]
    events = {"mirrored": geometry.mirror[0], "stripped": geometry.stripped[0], "defaced": geometry.face[0].any()}
    events |= {"ghosts": look.ghost_strength[0].any(), "lesions": geometry.lesion_coverage[0] > 0}
    return "\n".join([*facts, ", ".join(name for name, happened in events.items() if happened)])


def _rotation(matrix: Tensor) -> Tensor:
    """The rotation nearest to a linear map, by its polar decomposition."""
    left, _, right = torch.linalg.svd(matrix)
    return left @ right
