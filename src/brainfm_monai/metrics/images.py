"""Agreement of a predicted and a true image inside a mask: mean absolute error, PSNR, SSIM and MS-SSIM."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as nnf
from monai.metrics import MAEMetric, PSNRMetric
from torch import Tensor

from brainfm_monai.functional.separable import apply_separable
from brainfm_monai.metrics.segmentation import box_around

LOWER, UPPER = 0.001, 0.999  # quantiles of the target in the mask that become 0 and 1
RADIUS, SIGMA = 5, 1.5  # window of 11 voxels, Wang et al. 2004
K1, K2 = 0.01, 0.03  # Wang et al. 2004
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of the five scales, Wang et al. 2003
SLAB = 32  # planes that are filtered at once, so that memory does not grow with the image
SMALLEST_SHARE = 0.5  # of a voxel of a coarser scale that has to lie in the mask


def normalise_to_target(pred: Tensor, target: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Both images in units in which 0.1 and 99.9 % of the target inside the mask are 0 and 1; nothing is clipped.

    The prediction gets the target's gain and offset, and none of its own: an error of its scale stays an error. Both
    images and the mask (bool) have one shape and the images one unit. The results are NaN where the mask is empty or
    the target constant.
    """
    pred, inside = pred.float(), target.float()[mask.bool()]
    low = high = inside.new_tensor(torch.nan)
    if len(inside):
        low, high = (inside.kthvalue(1 + round(level * (len(inside) - 1))).values for level in (LOWER, UPPER))
    width = torch.where(high > low, high - low, torch.nan)
    return (pred - low) / width, (target.float() - low) / width


def fit_intensities(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """The prediction with the gain and the offset that fit it best to the target, by least squares inside the mask.

    The contrast of a synthetic image is arbitrary in scale; what is left after the fit is error of structure. All have
    one shape. The result is the target's mean where the prediction is constant in the mask, NaN where the mask is
    empty.
    """
    pred = pred.float()
    x, y = (one.float()[mask.bool()].double() for one in (pred, target))
    from_mean = x - x.mean()
    gain = (from_mean * (y - y.mean())).sum() / from_mean.square().sum().clamp_min(torch.finfo(torch.float64).tiny)
    return pred * gain.float() + (y.mean() - gain * x.mean()).float()


def compute_image_metrics(pred: Tensor, target: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """``l1``, ``psnr`` (dB), ``ssim`` and ``ms_ssim`` of two images inside a mask, all of shape (1, 1, H, W, D).

    The range of intensities is taken as 1: :func:`normalise_to_target` brings images to it. Each is of one element, NaN
    where the mask is empty; the PSNR of equal images is infinite.
    """
    over_mask = {"l1": MAEMetric(reduction="none"), "psnr": PSNRMetric(1.0, reduction="none")}
    inside = [one.float()[mask.bool()][None] for one in (pred, target)]
    return {
        **{name: torch.as_tensor(metric(*inside)).flatten() for name, metric in over_mask.items()},
        "ssim": compute_ssim(pred, target, mask),
        "ms_ssim": compute_ms_ssim(pred, target, mask),
    }


def compute_ssim(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Structural similarity, averaged over the voxels of a mask whose window lies in the image.

    Images, in a range of 1, and mask have the shape (B, 1, H, W, D), the result (B,), NaN where there is no such voxel.
    The formula is equation 13 of Wang et al., Image quality assessment: from error visibility to structural similarity,
    IEEE Transactions on Image Processing 13, 2004, as in MONAI's ``SSIMMetric`` over a whole image, and in
    scikit-image's ``structural_similarity`` with ``gaussian_weights=True, use_sample_covariance=False``. The Gaussian
    is applied axis by axis and slab by slab: MONAI takes 1,331 products for each voxel, and all voxels at once.
    """
    return _average_similarity(pred.float(), target.float(), mask.bool())[0]


def compute_ms_ssim(pred: Tensor, target: Tensor, mask: Tensor, weights: Sequence[float] = SCALE_WEIGHTS) -> Tensor:
    """Multi-scale structural similarity inside a mask; shapes and range as in :func:`compute_ssim`.

    The weights are the exponents of the scales, finest first (Wang et al., Multiscale structural similarity for image
    quality assessment, Asilomar 2003, equation 7). From each scale to the next, 2 x 2 x 2 voxels are averaged; a
    coarser voxel is in the mask if half of it is. Axes that are too short for the window of the coarsest scale, 176
    voxels for five, are continued by their last voxels, which are not in the mask. Else it is MONAI's
    ``MultiScaleSSIMMetric`` over a whole image.
    """
    smallest = (2 * RADIUS + 1) * 2 ** (len(weights) - 1)
    missing = [max(smallest - n, 0) for n in pred.shape[2:]]
    pads = [side for n in reversed(missing) for side in (n // 2, n - n // 2)]
    x, y = (nnf.pad(one.float(), pads, mode="replicate") for one in (pred, target))
    inside = nnf.pad(mask.float(), pads)
    product = torch.ones(len(pred), device=pred.device)
    for scale, weight in enumerate(weights):
        if scale:
            x, y, inside = (nnf.avg_pool3d(one, 2) for one in (x, y, inside))
            inside = (inside >= SMALLEST_SHARE).float()
        similarity, contrast = _average_similarity(x, y, inside.bool())
        product = product * (similarity if scale == len(weights) - 1 else contrast).relu() ** weight
    return product


def _average_similarity(x: Tensor, y: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Means over a mask of SSIM and of its contrast-structure term, each of shape (B,)."""
    c1, c2 = K1**2, K2**2
    box = box_around(mask.flatten(0, 1).any(0), margin=RADIUS)
    x, y, mask = (one[..., *box] for one in (x, y, mask))
    size = x.shape[2:]
    if min(size) <= 2 * RADIUS:
        return x.new_full((len(x),), torch.nan), x.new_full((len(x),), torch.nan)
    inside = mask[..., RADIUS:-RADIUS, RADIUS:-RADIUS, RADIUS:-RADIUS]
    sums = torch.zeros(2, len(x), dtype=torch.float64, device=x.device)
    across = [_window_operator(n, x) for n in size[1:]]
    for first in range(0, inside.shape[2], SLAB):
        part = inside[:, :, first : first + SLAB]
        planes = slice(first, first + part.shape[2] + 2 * RADIUS)
        a, b = x[:, :, planes], y[:, :, planes]
        moments = torch.cat([a, b, a * a, b * b, a * b], dim=1)
        filtered = apply_separable(moments, [_window_operator(a.shape[2], x), *across]).split(1, dim=1)
        mean_a, mean_b, square_a, square_b, product = filtered
        covariance = product - mean_a * mean_b
        variances = square_a - mean_a**2 + square_b - mean_b**2
        contrast = (2 * covariance + c2) / (variances + c2)
        similarity = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1) * contrast
        values = torch.stack([similarity, contrast]).where(part, 0.0)
        sums += values.sum((2, 3, 4, 5), dtype=torch.float64)
    means = (sums / inside.sum((1, 2, 3, 4))).float()  # 0 / 0 is the NaN of an empty mask
    return means[0], means[1]


def _window_operator(size: int, like: Tensor) -> Tensor:
    """Gaussian average of the 11 voxels around each voxel that has them, shape (1, size - 10, size)."""
    offset = torch.arange(-RADIUS, RADIUS + 1, device=like.device, dtype=like.dtype)
    window = torch.exp(-0.5 * (offset / SIGMA) ** 2)
    rows = torch.zeros(size - 2 * RADIUS, size, device=like.device, dtype=like.dtype)
    for i, weight in enumerate(window / window.sum()):
        rows.diagonal(i).fill_(weight)
    return rows[None]
