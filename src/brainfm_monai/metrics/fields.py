"""Errors of dense maps: bias field, distances to the surfaces of the cortex and its thickness, template coordinates."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from monai.metrics import compute_dice
from torch import Tensor

from brainfm_monai.functional.spatial import jacobian_determinant, warp
from brainfm_monai.metrics.segmentation import box_around
from brainfm_monai.tasks import MAX_DISTANCE_MM

MINIMUM_SHARE = 0.5  # probability of a tissue above which a voxel counts as it
RESOLUTION_MM = 2  # as the coordinates of prepared subjects are registered
# of cerebrum and cerebellum; hippocampus and amygdala are grey in the template, deep nuclei are neither
TISSUE_IDS = {
    "white_matter": frozenset({2, 41, 7, 46, 77, 78, 79}),
    "grey_matter": frozenset({3, 42, 8, 47, 17, 18, 53, 54}),
}


def compute_mean_inside(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of each sample and channel of values, (B, C, H, W, D), over a mask, (B, C or 1, H, W, D): shape (B, C).

    It is NaN where the mask is empty.
    """
    mask = mask.expand_as(values)
    total = torch.where(mask, values, 0.0).sum((2, 3, 4), dtype=torch.float64)
    return (total / mask.sum((2, 3, 4))).float()


def compute_bias_error(pred: Tensor, true: Tensor, mask: Tensor, image: Tensor | None = None) -> dict[str, Tensor]:
    """Error of a bias field up to its gain, which no scan determines, in a mask of the head.

    With o and t the predicted and the true factor, ``normalised_l2`` is ||w o - t|| / ||t||, w = <o, t> / <o, o> (Chua
    et al., Evaluation of performance metrics for bias field correction in MR brain images, Journal of Magnetic
    Resonance Imaging 29, 2009; w: BrainFM, arXiv 2509.00549). With an image that has the bias, ``corrected_l1`` is the
    mean absolute difference of the image divided by either field, each divided by its mean. All have the shape (B, 1,
    H, W, D), the results (B,), NaN for an empty mask.
    """

    def mean(values: Tensor) -> Tensor:
        return compute_mean_inside(values, mask.bool())[..., None, None, None]

    pred, true = (field.float() / mean(field.float()) for field in (pred, true))
    gain = mean(pred * true) / mean(pred * pred)
    errors = {"normalised_l2": (mean((gain * pred - true).square()) / mean(true.square())).sqrt().flatten()}
    if image is not None:
        by_pred, by_true = (image.float() / field for field in (pred, true))
        errors["corrected_l1"] = mean((by_pred / mean(by_pred) - by_true / mean(by_true)).abs()).flatten()
    return errors


def compute_distance_mae(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean absolute error of signed distances (B, C, H, W, D), in mm, where the true one is within +-3 mm.

    Targets and files are clipped at 3 mm: what lies there is not known and left out. The prediction is clipped, too.
    The channels are lp, lw, rp, rw, the mask has the shape (B, 1, H, W, D), the result (B, C), NaN where there is no
    such voxel.
    """
    near = (target.abs() < MAX_DISTANCE_MM) & mask.bool()
    return compute_mean_inside((pred.float().clamp(-MAX_DISTANCE_MM, MAX_DISTANCE_MM) - target).abs(), near)


def compute_thickness_error(pred: Tensor, target: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Error of the thickness of the cortex, as the distances of :func:`compute_distance_mae` give it, mm.

    A voxel is cortex of a hemisphere where it lies inside its pial and not inside its white surface; the thickness
    there is the distance to the one plus the distance to the other, as in the thickness map of the outputs. For left
    and right, (B, 2), NaN without cortex: ``thickness`` and ``reference_thickness``, the mean over either's own cortex,
    ``thickness_error``, their difference, and ``thickness_absolute_error``, the mean over the reference's cortex,
    whatever the prediction has there.
    """
    thickness = [(one[:, 1::2].float() - one[:, 0::2]).clamp_min(0) for one in (pred, target)]
    cortex = [(one[:, 0::2] < 0) & (one[:, 1::2] >= 0) & mask.bool() for one in (pred, target)]
    predicted, true = (compute_mean_inside(t, c) for t, c in zip(thickness, cortex, strict=True))
    return {
        "thickness": predicted,
        "reference_thickness": true,
        "thickness_error": predicted - true,
        "thickness_absolute_error": compute_mean_inside((thickness[0] - thickness[1]).abs(), cortex[1]),
    }


def compute_mni_error(pred_mm: Tensor, target_mm: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """``error_mean`` and ``error_p95`` (95th percentile), mm, of the distance between coordinates, (B, 3, H, W, D).

    The mask has the shape (B, 1, H, W, D), the results (B,), NaN where it is empty.
    """
    distance = (pred_mm.float() - target_mm).norm(dim=1, keepdim=True)
    inside = [one[m] for one, m in zip(distance, mask.bool(), strict=True)]
    # the nearest rank: torch.quantile takes 16 million values at most
    p95 = [x.kthvalue(1 + round(0.95 * (len(x) - 1))).values if len(x) else x.new_tensor(torch.nan) for x in inside]
    return {"error_mean": compute_mean_inside(distance, mask.bool())[:, 0], "error_p95": torch.stack(p95)}


def compute_fold_fraction(coords_mm: Tensor, mask: Tensor, affine: Tensor) -> Tensor:
    """Share of voxels in a mask, (B, 1, H, W, D), at which a coordinate map folds space, shape (B,).

    The Jacobian determinant of the map, (B, 3, H, W, D) in RAS mm, by central differences, is 0 or below there; the
    sign of that of the affine from voxel indices to RAS mm, negative where the axes mirror space, is divided out. NaN
    where the mask is empty.
    """
    sign = torch.linalg.det(affine[:3, :3].double()).sign().to(coords_mm)
    box = box_around(mask.flatten(0, 1).any(0), margin=1)
    folded = jacobian_determinant(coords_mm[..., *box].float()) * sign <= 0
    return compute_mean_inside(folded.float(), mask[..., *box].bool())[:, 0]


@dataclass(frozen=True)
class TemplateTissues:
    """K tissues of the template, to be laid over a scan by its template coordinates."""

    names: tuple[str, ...]
    probability: Tensor  # in [0, 1], shape (K, h, w, d)
    affine: Tensor  # its voxel indices to RAS mm of the template, shape (4, 4)
    ids: tuple[frozenset[int], ...]  # FreeSurfer ids that each tissue has in a label map


def load_template_tissues() -> TemplateTissues:
    """White and grey matter of MNI152, as nilearn ships them, 2 mm."""
    from nilearn import datasets  # slow to import

    loaders = (datasets.load_mni152_wm_template, datasets.load_mni152_gm_template)
    maps = [load(resolution=RESOLUTION_MM) for load in loaders]
    probability = torch.from_numpy(np.stack([one.get_fdata(dtype=np.float32) for one in maps]))
    affine = torch.as_tensor(maps[0].affine, dtype=torch.float64)
    return TemplateTissues(tuple(TISSUE_IDS), probability, affine, tuple(TISSUE_IDS.values()))


def pull_template(coords_mm: Tensor, template: TemplateTissues) -> Tensor:
    """Tissues of the template at template coordinates, (B, 3, H, W, D) in RAS mm: bool, (B, K, H, W, D).

    A tissue is where its probability, linearly interpolated, is above one half.
    """
    inverse = torch.linalg.inv(template.affine.double()).to(coords_mm.device, torch.float32)
    index = torch.einsum("ij,bjhwd->bihwd", inverse[:3, :3], coords_mm.float()) + inverse[:3, 3].reshape(1, 3, 1, 1, 1)
    source = template.probability.to(coords_mm.device, torch.float32)[None].expand(len(index), -1, -1, -1, -1)
    return warp(source, index) > MINIMUM_SHARE


def compute_warped_dice(pred_mm: Tensor, reference: Tensor, template: TemplateTissues, mask: Tensor) -> Tensor:
    """Dice of the template's tissues, pulled through predicted coordinates, and a reference, in a mask (B, 1, H, W, D).

    The reference, (B, K, H, W, D), bool, is the same tissues pulled through true coordinates, or those of a
    segmentation. The result has the shape (B, K), NaN where the reference lacks the tissue.
    """
    inside = mask.bool()
    return compute_dice(pull_template(pred_mm, template) & inside, reference & inside, include_background=True)
