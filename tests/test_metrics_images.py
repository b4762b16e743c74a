"""Image measures: against MONAI and scikit-image, and the rules of mask, normalisation and fit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from monai.metrics import PSNRMetric, SSIMMetric
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from brainfm_monai.metrics.fields import (
    compute_image_metrics,
    compute_ssim,
    normalise_to_target,
)

SIZE = (50, 24, 26)
NAMES = ["l1", "psnr", "ssim"]


def draw_pair(seed: int = 0, size: tuple[int, ...] = SIZE, batch: int = 2) -> tuple[Tensor, Tensor]:
    """A smooth image with noise, as prediction, and without, in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(batch, 1, 6, 6, 6, generator=generator)
    truth = torch.nn.functional.interpolate(coarse, size=size, mode="trilinear", align_corners=True)
    return truth + 0.1 * torch.randn(truth.shape, generator=generator), truth


def make_mask(truth: Tensor, margin: int) -> Tensor:
    mask = torch.zeros_like(truth, dtype=torch.bool)
    mask[..., margin:-margin, margin:-margin, margin:-margin] = True
    return mask


def test_ssim_over_the_image_is_monais() -> None:
    pred, truth = draw_pair()
    expected = SSIMMetric(spatial_dims=3, data_range=1.0, reduction="none")(pred, truth)
    found = compute_ssim(pred, truth, torch.ones_like(truth, dtype=torch.bool))
    # float32 sums in another order: axis by axis, and the mean in double
    torch.testing.assert_close(found[:, None], expected, rtol=0, atol=1e-5)
    assert 0.2 < found.min() < found.max() < 0.95


def test_ssim_in_a_mask_is_scikit_images() -> None:
    pred, truth = draw_pair(1)
    ragged = make_mask(truth, 6) & (truth > 0.45)
    found = compute_ssim(pred, truth, ragged)
    for p, t, m, value in zip(pred.numpy(), truth.numpy(), ragged.numpy(), found.tolist(), strict=True):
        _, full = structural_similarity(
            t[0].astype(np.float64), p[0], data_range=1.0, gaussian_weights=True, use_sample_covariance=False, full=True
        )
        # scikit-image computes in double; the variances of float32 differ in the sixth digit
        assert value == pytest.approx(full[m[0]].mean(), abs=1e-5)


def test_a_window_that_leaves_the_image_does_not_count() -> None:
    pred, truth = draw_pair(2)
    spoiled = pred.clone()
    mask = torch.ones_like(truth, dtype=torch.bool)
    everywhere, inner = compute_ssim(pred, truth, mask), compute_ssim(pred, truth, make_mask(truth, 5))
    torch.testing.assert_close(everywhere, inner)
    spoiled[..., 0] += 1  # five voxels from the first window's centre
    assert (compute_ssim(spoiled, truth, mask) < everywhere).all()
    torch.testing.assert_close(
        compute_ssim(spoiled, truth, make_mask(truth, 6)), compute_ssim(pred, truth, make_mask(truth, 6))
    )
    assert compute_ssim(pred[..., :10], truth[..., :10], mask[..., :10]).isnan().all()


def test_psnr_and_l1_are_those_of_the_mask() -> None:
    pred, truth = draw_pair(6, (16, 15, 14), batch=1)
    mask = truth > 0.5
    found = compute_image_metrics(torch.where(mask, pred, 99.0), truth, mask)
    assert list(found) == NAMES
    p, t = pred[mask], truth[mask]
    expected = peak_signal_noise_ratio(t.numpy(), p.numpy(), data_range=1.0)
    assert found["psnr"].item() == pytest.approx(expected, abs=1e-4)
    assert found["psnr"] == PSNRMetric(1.0, reduction="none")(p[None], t[None])
    assert found["l1"].item() == pytest.approx((p - t).abs().mean().item(), rel=1e-6)
    equal = compute_image_metrics(truth, truth, mask)
    assert equal["l1"] == 0
    assert equal["psnr"].isinf()


def test_an_empty_mask_has_no_value() -> None:
    pred, truth = draw_pair(7, (16, 15, 14), batch=1)
    mask = make_mask(truth, 2)
    found = compute_image_metrics(*normalise_to_target(pred, truth, mask), mask)
    assert not any(found[name].isnan() for name in NAMES[:3])
    found = compute_image_metrics(*normalise_to_target(pred, truth, ~truth.isfinite()), ~truth.isfinite())
    assert all(value.isnan() for value in found.values())


def test_both_images_take_the_targets_scale() -> None:
    pred, truth = draw_pair(8, (16, 15, 14), batch=1)
    mask = make_mask(truth, 3)
    scaled_pred, scaled_truth = normalise_to_target(pred, truth, mask)
    low, high = np.quantile(truth[mask].numpy(), [0.001, 0.999], method="nearest")
    assert scaled_truth[mask].min() <= 0 < 1 <= scaled_truth[mask].max()
    torch.testing.assert_close(scaled_truth, (truth - low) / (high - low), rtol=0, atol=1e-5)
    # a change of unit of both images is no error, one of the prediction is
    other_pred, other_truth = normalise_to_target(300 * pred + 7, 300 * truth + 7, mask)
    torch.testing.assert_close(other_pred, scaled_pred, rtol=0, atol=1e-4)
    torch.testing.assert_close(other_truth, scaled_truth, rtol=0, atol=1e-4)
    wrong, _ = normalise_to_target(2 * truth, truth, mask)
    assert ((wrong - scaled_truth).abs()[mask].mean()) > 0.1
    assert normalise_to_target(pred, torch.ones_like(truth), mask)[0].isnan().all()


def test_each_sample_of_a_batch_is_measured_alone() -> None:
    pred, truth = draw_pair(10, (20, 21, 22))
    mask = make_mask(truth, 3)
    mask[1, :, :8] = False
    together = compute_ssim(pred, truth, mask)
    for i in range(2):
        alone = compute_ssim(pred[i : i + 1], truth[i : i + 1], mask[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone)
    assert not math.isclose(float(together[0]), float(together[1]))
