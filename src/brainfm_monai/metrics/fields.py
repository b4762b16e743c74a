"""Errors of dense maps: bias field, distances to the surfaces of the cortex and its thickness, template coordinates."""

from __future__ import annotations

import torch
from torch import Tensor

from brainfm_monai.functional.spatial import jacobian_determinant
from brainfm_monai.metrics.structures import box_around
from brainfm_monai.tasks import MAX_DISTANCE_MM

__all__ = [
    "compute_bias_error",
    "compute_distance_error",
    "compute_fold_fraction",
    "compute_mni_error",
    "compute_thickness_error",
]


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over a mask, for each sample and channel: (B, C, H, W, D) and (B, C or 1, H, W, D) to (B, C); NaN if it is empty."""
    mask = mask.expand_as(values)
    total = torch.where(mask, values, 0.0).sum((2, 3, 4), dtype=torch.float64)
    return (total / mask.sum((2, 3, 4))).float()


def compute_bias_error(
    pred_log: Tensor, true_log: Tensor, mask: Tensor, image: Tensor | None = None
) -> dict[str, Tensor]:
    """Error of a bias field up to its gain, which no scan tells.

    With o and t the predicted and the true factor in the mask: ||w o - t|| / ||t||, w = <o, t> / <o, o>.

    Args:
        pred_log: logarithm of the predicted factor, shape (B, 1, H, W, D).
        true_log: logarithm of the true factor, same shape.
        mask: the head, same shape, bool.
        image: image with the bias, same shape, any unit; None where there is none.

    Returns:
        ``normalised_l2``, shape (B,), and with an image ``corrected_l1``: mean absolute difference in the mask of the image
        divided by either field, each divided by its mean in the mask. Both are pure numbers, NaN where the mask is empty.

    Reference:
        Chua et al., Evaluation of performance metrics for bias field correction in MR brain images, Journal of Magnetic Resonance
        Imaging 29, 2009 (normalised error); BrainFM (arXiv 2509.00549), evaluation, for w.
    """
    mask = mask.bool()
    logs = (pred_log.float(), true_log.float())
    # the gain is free: taking the mean of each log away first keeps the exponentials small and changes nothing
    found, truth = ((one - _masked_mean(one, mask)[..., None, None, None]).exp() for one in logs)
    gain = (_masked_mean(found * truth, mask) / _masked_mean(found * found, mask))[..., None, None, None]
    error = _masked_mean((gain * found - truth).square(), mask) / _masked_mean(truth.square(), mask)
    errors = {"normalised_l2": error.sqrt()[:, 0]}
    if image is not None:
        corrected = [image.float() / field for field in (found, truth)]
        level = [one / _masked_mean(one, mask)[..., None, None, None] for one in corrected]
        errors["corrected_l1"] = _masked_mean((level[0] - level[1]).abs(), mask)[:, 0]
    return errors


def compute_distance_error(pred: Tensor, target: Tensor, mask: Tensor, band_mm: float = MAX_DISTANCE_MM) -> Tensor:
    """Mean absolute error of signed distances near the surface, where |target| < band.

    Targets and files are clipped at the band, so what stands at it is not known and left out; the prediction is clipped, too.

    Args:
        pred: shape (B, C, H, W, D), mm; channels lp, lw, rp, rw.
        target: same shape, mm.
        mask: shape (B, 1, H, W, D), bool.
        band_mm: half the width of the band.

    Returns:
        Shape (B, C), mm; NaN where the band is empty.
    """
    near = (target.abs() < band_mm) & mask.bool()
    return _masked_mean((pred.float().clamp(-band_mm, band_mm) - target).abs(), near)


def compute_thickness_error(pred: Tensor, target: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Error of the thickness of the cortex, as the distances tell it.

    A voxel is cortex of a hemisphere where it lies inside its pial and not inside its white surface; the thickness there is the
    distance to the one plus the distance to the other, as in the thickness map of the outputs.

    Args:
        pred: distances lp, lw, rp, rw in mm, shape (B, 4, H, W, D).
        target: same shape, mm.
        mask: shape (B, 1, H, W, D), bool.

    Returns:
        For left and right, each of shape (B, 2), mm, NaN where there is no cortex: ``prediction`` and ``reference``, the mean
        thickness of either's own cortex; ``error``, their signed difference; ``absolute_error``, the mean over the voxels of the
        reference's cortex, whatever the prediction has there.
    """
    shown, wanted = pred.float(), target.float()
    thickness = [(one[:, 1::2] - one[:, 0::2]).clamp_min(0) for one in (shown, wanted)]
    cortex = [(one[:, 0::2] < 0) & (one[:, 1::2] >= 0) & mask.bool() for one in (shown, wanted)]
    found, truth = (_masked_mean(t, c) for t, c in zip(thickness, cortex, strict=True))
    absolute = _masked_mean((thickness[0] - thickness[1]).abs(), cortex[1])
    return {"prediction": found, "reference": truth, "error": found - truth, "absolute_error": absolute}


def compute_mni_error(pred_mm: Tensor, target_mm: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Euclidean distance between predicted and true template coordinates.

    Args:
        pred_mm: shape (B, 3, H, W, D), mm.
        target_mm: same shape, mm.
        mask: shape (B, 1, H, W, D), bool.

    Returns:
        ``mean`` and ``p95`` (95th percentile), each of shape (B,), mm; NaN where the mask is empty.
    """
    distance = (pred_mm.float() - target_mm).norm(dim=1, keepdim=True)
    p95 = []
    for one, m in zip(distance, mask.bool(), strict=True):
        inside = one[m]
        # the nearest rank: torch.quantile takes 16 million values at most
        p95.append(
            inside.kthvalue(1 + round(0.95 * (len(inside) - 1))).values if len(inside) else one.new_tensor(torch.nan)
        )
    return {"mean": _masked_mean(distance, mask.bool())[:, 0], "p95": torch.stack(p95)}


def compute_fold_fraction(coords_mm: Tensor, mask: Tensor, affine: Tensor) -> Tensor:
    """Share of voxels at which a coordinate map folds space: its Jacobian determinant is 0 or below.

    Args:
        coords_mm: template coordinates of each voxel, RAS mm, shape (B, 3, H, W, D).
        mask: shape (B, 1, H, W, D), bool.
        affine: voxel indices to RAS mm, shape (4, 4); its own determinant, negative where the axes mirror space, is divided out.

    Returns:
        Shape (B,), in [0, 1]; NaN where the mask is empty. Derivatives are central differences, one-sided at the image's edge.
    """
    sign = torch.linalg.det(affine[:3, :3].double()).sign().to(coords_mm)
    shares = []
    for coords, inside in zip(coords_mm.float(), mask.bool(), strict=True):
        box = box_around(inside[0], margin=1)
        folded = jacobian_determinant(coords[:, *box][None]) * sign <= 0
        shares.append(_masked_mean(folded.float(), inside[:, *box][None])[0, 0])
    return torch.stack(shares)
