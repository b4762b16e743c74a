"""Dice of the template's tissues, laid over a scan by its template coordinates."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from monai.metrics import compute_dice
from torch import Tensor

from brainfm_monai.functional.spatial import warp

__all__ = ["TemplateTissues", "compute_warped_dice", "load_template_tissues", "pull_template"]

MINIMUM_SHARE = 0.5  # probability of a tissue above which a voxel counts as it
RESOLUTION_MM = 2  # as the coordinates of prepared subjects are registered
# white and grey matter of cerebrum and cerebellum; hippocampus and amygdala are grey in the template, deep nuclei are neither
TISSUE_IDS = {
    "white_matter": frozenset({2, 41, 7, 46, 77, 78, 79}),
    "grey_matter": frozenset({3, 42, 8, 47, 17, 18, 53, 54}),
}


@dataclass(frozen=True)
class TemplateTissues:
    """Tissues of the template, to be laid over a scan.

    Attributes:
        names: K names.
        probability: in [0, 1], shape (K, h, w, d).
        affine: its voxel indices to RAS mm of the template, shape (4, 4).
        ids: FreeSurfer ids that each tissue has in a label map.
    """

    names: tuple[str, ...]
    probability: Tensor
    affine: Tensor
    ids: tuple[frozenset[int], ...]


def load_template_tissues() -> TemplateTissues:
    """White and grey matter of MNI152, as nilearn ships them, 2 mm."""
    from nilearn.datasets import (  # an optional dependency, and slow to import
        load_mni152_gm_template,
        load_mni152_wm_template,
    )

    maps = [load(resolution=RESOLUTION_MM) for load in (load_mni152_wm_template, load_mni152_gm_template)]
    probability = torch.from_numpy(np.stack([one.get_fdata(dtype=np.float32) for one in maps]))
    return TemplateTissues(
        tuple(TISSUE_IDS), probability, torch.as_tensor(maps[0].affine, dtype=torch.float64), tuple(TISSUE_IDS.values())
    )


def pull_template(coords_mm: Tensor, template: TemplateTissues) -> Tensor:
    """Tissues of the template at the template coordinates of each voxel.

    Args:
        coords_mm: template coordinates, RAS mm, shape (B, 3, H, W, D).
        template: K tissues.

    Returns:
        Where the probability, linearly interpolated, is above one half, shape (B, K, H, W, D), bool.
    """
    inverse = torch.linalg.inv(template.affine.double()).to(coords_mm.device, torch.float32)
    index = torch.einsum("ij,bjhwd->bihwd", inverse[:3, :3], coords_mm.float()) + inverse[:3, 3].reshape(1, 3, 1, 1, 1)
    source = template.probability.to(coords_mm.device, torch.float32)[None].expand(len(index), -1, -1, -1, -1)
    return warp(source, index) > MINIMUM_SHARE


def compute_warped_dice(pred_mm: Tensor, reference: Tensor, template: TemplateTissues, mask: Tensor) -> Tensor:
    """Dice of the template's tissues, pulled through predicted coordinates, and a reference.

    Args:
        pred_mm: predicted template coordinates, RAS mm, shape (B, 3, H, W, D).
        reference: bool, shape (B, K, H, W, D): the same tissues pulled through true coordinates (:func:`pull_template`), or those
            of a segmentation.
        template: K tissues.
        mask: where it counts, shape (B, 1, H, W, D), bool.

    Returns:
        Shape (B, K); NaN where the reference lacks the tissue.
    """
    inside = mask.bool()
    return compute_dice(pull_template(pred_mm, template) & inside, reference & inside, include_background=True)
