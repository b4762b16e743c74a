"""Errors of dense maps: images, bias field, distances to the surfaces of the cortex, template coordinates."""

import numpy as np
import torch
from torch import Tensor

from brainfm_monai.metrics.segmentation import box_around
from brainfm_monai.tasks import MAX_DISTANCE_MM

LOWER, UPPER = 0.001, 0.999  # quantiles of the target in the mask that become 0 and 1
RADIUS, SIGMA = 5, 1.5  # window of 11 voxels, Wang et al. 2004


def compute_mean_inside(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over a mask, (B, C or 1, H, W, D), of values, (B, C, H, W, D): shape (B, C), NaN where the mask is empty."""
    mask = mask.expand_as(values)
    total = torch.where(mask, values, 0.0).sum((2, 3, 4), dtype=torch.float64)
    return (total / mask.sum((2, 3, 4))).float()


def compute_bias_error(pred: Tensor, true: Tensor, mask: Tensor) -> Tensor:
    """Normalised L2 error of a bias field up to its gain, which no scan determines, in a mask of the head.

    Of the predicted and the true factor o and t, (B, 1, H, W, D), it is ||w o - t|| / ||t||, w = <o, t> / <o, o> (Chua
    et al., Journal of Magnetic Resonance Imaging 29, 2009; w: BrainFM, arXiv 2509.00549), (B,), NaN for an empty mask.
    """
    o, t = (torch.where(mask.bool(), field.double(), 0.0).flatten(1) for field in (pred, true))
    gain = (o * t).sum(1, keepdim=True) / o.square().sum(1, keepdim=True)
    return ((gain * o - t).norm(dim=1) / t.norm(dim=1)).float()


def compute_distance_mae(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean absolute error of signed distances (B, C, H, W, D), in mm, where the true one is within +-3 mm: (B, C).

    Targets and files are clipped at 3 mm: what lies there is not known and left out, and the prediction is clipped. The
    mask is (B, 1, H, W, D); NaN where no voxel is left.
    """
    near = (target.abs() < MAX_DISTANCE_MM) & mask.bool()
    return compute_mean_inside((pred.float().clamp(-MAX_DISTANCE_MM, MAX_DISTANCE_MM) - target).abs(), near)


def compute_mni_error(pred_mm: Tensor, target_mm: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """``error_mean`` and ``error_p95``, (B,), mm, of coordinates, (B, 3, H, W, D), in a mask; NaN where it is empty."""
    distance = (pred_mm.float() - target_mm).norm(dim=1, keepdim=True)
    p95 = [_find_quantile(one[inside], 0.95) for one, inside in zip(distance, mask.bool(), strict=True)]
    return {"error_mean": compute_mean_inside(distance, mask.bool())[:, 0], "error_p95": torch.stack(p95)}


def _find_quantile(values: Tensor, level: float) -> Tensor:
    """The nearest rank of values (N,), NaN without any: torch.quantile takes 16 million values at most."""
    return values.kthvalue(1 + round(level * (len(values) - 1))).values if len(values) else values.new_tensor(torch.nan)


def normalise_to_target(pred: Tensor, target: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Both images in units in which 0.1 and 99.9 % of the target inside the mask are 0 and 1; nothing is clipped.

    The prediction gets the target's gain and offset: an error of its scale stays an error. Images and mask have one
    shape and the images one unit. The results are NaN for an empty mask or a constant target.
    """
    low, high = (_find_quantile(target.float()[mask.bool()], level) for level in (LOWER, UPPER))
    width = torch.where(high > low, high - low, torch.nan)
    return (pred.float() - low) / width, (target.float() - low) / width


def compute_image_metrics(pred: Tensor, target: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """``l1``, ``psnr`` (dB) and ``ssim`` of two images in a range of 1 inside a mask, all of shape (1, 1, H, W, D).

    Each has one element, NaN where the mask is empty; the PSNR of equal images is infinite.
    """
    error = (pred.float() - target.float())[mask.bool()]
    psnr = -10 * error.square().mean().log10()
    return {"l1": error.abs().mean(), "psnr": psnr, "ssim": compute_ssim(pred, target, mask)}


def compute_ssim(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Structural similarity of images in a range of 1, averaged over a mask's voxels whose window lies in the image.

    All have the shape (B, 1, H, W, D), the result (B,), NaN where there is no such voxel. The formula is equation 13 of
    Wang et al., Image quality assessment: from error visibility to structural similarity, IEEE Transactions on Image
    Processing 13, 2004. MONAI's ``SSIMMetric`` has no mask, and takes 1,331 products for each voxel.
    """
    from skimage.metrics import structural_similarity  # slow to import

    box = box_around(mask.flatten(0, 1).any(0), margin=RADIUS)
    parts = [one[(..., *box)][:, 0].cpu().numpy() for one in (pred.float(), target.float(), mask.bool())]
    means = torch.full((len(pred),), torch.nan)
    inner = (slice(RADIUS, -RADIUS),) * 3
    for sample, (x, y, inside) in enumerate(zip(*parts, strict=True)):
        if inside[inner].any():
            options = {"gaussian_weights": True, "sigma": SIGMA, "use_sample_covariance": False}
            similarity = structural_similarity(x, y, data_range=1.0, full=True, **options)[1]
            means[sample] = float(similarity[inner][inside[inner]].mean(dtype=np.float64))
    return means
