"""Measures of dense maps: on fields whose errors are known, and against the package's other definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from brainfm_monai.metrics.fields import (
    compute_bias_error,
    compute_distance_mae,
    compute_mni_error,
)

SIZE = (12, 10, 8)
LAS = torch.diag(torch.tensor([-2.0, 1.0, 3.0, 1.0], dtype=torch.float64))


def draw(seed: int, channels: int = 1, batch: int = 2) -> Tensor:
    return torch.randn(batch, channels, *SIZE, generator=torch.Generator().manual_seed(seed))


def make_mask(batch: int = 2) -> Tensor:
    mask = torch.zeros(batch, 1, *SIZE, dtype=torch.bool)
    mask[..., 2:-2, 2:-2, 2:-2] = True
    return mask


def make_coordinates(affine: Tensor, size: tuple[int, ...] = SIZE) -> Tensor:
    """RAS mm of each voxel, shape (1, 3, H, W, D), float32."""
    index = torch.stack(torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in size), indexing="ij"))
    mm = torch.einsum("ij,jhwd->ihwd", affine[:3, :3], index) + affine[:3, 3].reshape(3, 1, 1, 1)
    return mm[None].float()


def test_the_gain_of_a_bias_field_is_no_error() -> None:
    truth, mask = (0.3 * draw(1)).exp(), make_mask()
    assert compute_bias_error(7 * truth, truth, mask).max() < 1e-6


def test_the_error_of_a_bias_field_is_its_formula() -> None:
    pred, truth = (0.3 * draw(3)).exp(), (0.3 * draw(4)).exp()
    mask = make_mask()
    errors = compute_bias_error(pred, truth, mask)
    for b in range(2):
        o, t = (one[b][mask[b]].double().numpy() for one in (pred, truth))
        gain = (o @ t) / (o @ o)
        expected = np.linalg.norm(gain * o - t) / np.linalg.norm(t)
        assert errors[b].item() == pytest.approx(expected, rel=1e-5)
    # what lies outside the mask does not count, and an empty mask has no error
    assert compute_bias_error(torch.where(mask, pred, 5), truth, mask)[0] == errors[0]
    assert compute_bias_error(pred, truth, mask & False).isnan().all()


def test_distances_count_near_the_surface() -> None:
    mask = make_mask(1)
    target = torch.linspace(-4, 4, SIZE[0]).clamp(-3, 3).reshape(1, 1, -1, 1, 1).expand(1, 4, *SIZE).clone()
    target[:, 3] = 3  # a hemisphere that is not there
    shift = torch.tensor([0.5, -0.25, 0.0, 1.0]).reshape(1, 4, 1, 1, 1)
    pred = torch.where(target.abs() < 3, target + shift, -target)
    error = compute_distance_mae(pred, target, mask)
    assert error.shape == (1, 4)
    near = target[0, 0, 2:-2, 0, 0]
    near = near[near.abs() < 3]
    expected = [((near + s).clamp(-3, 3) - near).abs().mean().item() for s in (0.5, -0.25, 0.0)]
    assert error[0].tolist() == pytest.approx([*expected, math.nan], abs=1e-6, nan_ok=True)


def test_a_shift_of_the_coordinates_is_their_error() -> None:
    truth = make_coordinates(LAS)
    error = compute_mni_error(truth + torch.tensor([3.0, 0, -4]).reshape(1, 3, 1, 1, 1), truth, make_mask(1))
    assert error["error_mean"].item() == pytest.approx(5, abs=1e-5)
    assert error["error_p95"].item() == pytest.approx(5, abs=1e-5)
    pred = truth + draw(7, 3, 1)
    distance = (pred - truth)[:, :, 2:-2, 2:-2, 2:-2].norm(dim=1).numpy()
    error = compute_mni_error(pred, truth, make_mask(1))
    assert error["error_mean"].item() == pytest.approx(distance.mean(), rel=1e-5)
    assert error["error_p95"].item() == pytest.approx(np.quantile(distance, 0.95, method="nearest"), rel=1e-5)
    assert compute_mni_error(pred, truth, make_mask(1) & False)["error_p95"].isnan().all()
