"""Synthetic contrasts get the detail of the scan where both show the same edges."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from monai.data import MetaTensor

from brainfm_monai.transforms import RestoreDetaild

SHAPE = (31, 40, 26)  # odd: the network's voxels reach beyond the last one


def make_scan(seed: int = 0) -> torch.Tensor:
    """A smooth field with a thin bright sheet that is oblique to every axis: another one for each seed."""
    index = torch.from_numpy(np.stack(np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij"))).float()
    direction = nnf.normalize(torch.randn(3, generator=torch.Generator().manual_seed(seed)), dim=0)
    along = torch.einsum("i,ihwd->hwd", direction, index)
    return (0.4 + 0.1 * torch.sin(along / 9) + 0.3 * torch.exp(-(((along % 9) - 4) ** 2)))[None]


def blur(image: torch.Tensor) -> torch.Tensor:
    """What a network of 2 mm draws of it."""
    coarse = nnf.avg_pool3d(image[None], 2, ceil_mode=True, count_include_pad=False)
    fine = nnf.interpolate(coarse, scale_factor=2, mode="trilinear")[0]
    return fine[:, : SHAPE[0], : SHAPE[1], : SHAPE[2]]


def restore(drawn: torch.Tensor, scan: torch.Tensor, **options: Any) -> torch.Tensor:
    labels = torch.ones(1, *SHAPE, dtype=torch.uint8)
    item: dict[Any, Any] = {
        name: MetaTensor(v.clone()) for name, v in (("T1w", drawn), ("image", scan), ("segmentation", labels))
    }
    found = RestoreDetaild(["T1w", "FLAIR"], **options)(item)
    assert torch.equal(found["image"], scan)
    assert "FLAIR" not in found
    restored: torch.Tensor = found["T1w"].as_tensor()
    return restored


def error(image: torch.Tensor, truth: torch.Tensor) -> float:
    return float((image - truth).square().mean().sqrt())


@pytest.mark.parametrize(("gain", "offset"), [(1.0, 0.0), (-0.8, 0.9)])
def test_a_contrast_with_the_edges_of_the_scan_becomes_sharp(gain: float, offset: float) -> None:
    scan = make_scan()
    truth = gain * scan + offset
    drawn = blur(truth)
    assert error(restore(drawn, scan), truth) < 0.5 * error(drawn, truth)


def test_a_contrast_of_other_edges_and_a_noisy_scan_change_little() -> None:
    truth, noise = blur(make_scan(3)), 0.02 * torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(1))
    blurred = error(blur(truth), truth)
    assert error(restore(truth, make_scan(0)), truth) < 0.5 * blurred
    flat = torch.full_like(noise, 0.4)
    assert error(restore(flat, flat + noise), flat) < 0.05 * float(noise.std())


def test_a_network_of_the_scans_own_voxels_is_left_alone() -> None:
    scan = make_scan()
    assert torch.equal(restore(blur(scan), scan, stride=1), blur(scan))
    assert not torch.equal(restore(blur(scan), scan, stride=2), blur(scan))


def test_detail_counts_as_much_as_the_scan_explains() -> None:
    """A ramp under noise: the line has a slope, and explains a part of the variance alone."""
    ramp = torch.linspace(0, 1, SHAPE[1])[None, None, :, None].expand(1, *SHAPE).contiguous()
    noise = 0.1 * torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(2))
    copied = error(restore(ramp, ramp + noise), ramp) / float(noise.std())
    assert 0.05 < copied < 0.65  # 0.57; 0.74 without the weight
