"""Hausdorff distance, volumes and lesions: against MONAI, ITK and brute force, and on phantoms whose values are known."""

from __future__ import annotations

import math
from typing import Any

import itk
import numpy as np
import pytest
import torch
from monai.metrics import compute_hausdorff_distance
from torch import Tensor

from brainfm_monai.metrics.scan import Scene, measure_entropy
from brainfm_monai.metrics.segmentation import (
    compute_lesion_metrics,
    compute_structure_measures,
    parse_structures,
)

STRUCTURES = parse_structures({"hippocampus": {"left": [17], "right": [53]}, "brainstem": {"middle": [16]}})
LEFT, RIGHT, BOTH = range(3)
SPACING = (1.0, 1.5, 3.0)


def make_affine(spacing: tuple[float, ...] = SPACING) -> Tensor:
    """An oblique grid: voxels of the given size, turned about two axes."""
    a, b = math.radians(20), math.radians(-35)
    turn = torch.tensor([[math.cos(a), -math.sin(a), 0], [math.sin(a), math.cos(a), 0], [0, 0, 1]], dtype=torch.float64)
    turn = turn @ torch.tensor(
        [[1, 0, 0], [0, math.cos(b), -math.sin(b)], [0, math.sin(b), math.cos(b)]], dtype=torch.float64
    )
    affine = torch.eye(4, dtype=torch.float64)
    affine[:3, :3] = turn @ torch.diag(torch.tensor(spacing, dtype=torch.float64))
    affine[:3, 3] = torch.tensor([-20.0, 5.0, 3.0])
    return affine


def make_ball(centre: tuple[float, ...], radius_mm: float, size: tuple[int, ...] = (32, 24, 16)) -> Tensor:
    """Voxels of SPACING within a ball about a voxel."""
    grid = torch.stack(torch.meshgrid(*(torch.arange(n) for n in size), indexing="ij"), -1).double()
    offset_mm = (grid - torch.tensor(centre)) * torch.tensor(SPACING)
    return offset_mm.norm(dim=-1) <= radius_mm


def make_heads(shift: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Left and right hippocampus as balls, and the same with the left one elsewhere, shape (1, H, W, D)."""
    heads = []
    for move in ((0, 0, 0), shift):
        ids = torch.zeros(1, 32, 24, 16, dtype=torch.int64)
        ids[0, make_ball((24, 11, 8), 6)] = 53
        ids[0, make_ball((8 + move[0], 11 + move[1], 7 + move[2]), 6)] = 17
        ids[..., 14:17, 2:5, 2:5] = 16
        heads.append(ids)
    return heads[1], heads[0]


def draw_blobs(seed: int) -> Tensor:
    """Ragged regions of the three ids, shape (1, 14, 12, 10)."""
    noise = torch.randn(4, 14, 12, 10, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.avg_pool3d(noise, 5, stride=1, padding=2)
    return torch.tensor([0, 17, 53, 16])[smooth.argmax(0, keepdim=True)]


def edge_voxels_mm(mask: np.ndarray) -> np.ndarray:
    padded = np.pad(mask, 1)
    inner = np.ones_like(mask)
    for axis in range(3):
        for step in (-1, 1):
            inner &= np.roll(padded, step, axis)[1:-1, 1:-1, 1:-1]
    return np.argwhere(mask & ~inner) * np.array(SPACING)


def hd95_by_brute_force(a: Tensor, b: Tensor) -> float:
    first, second = edge_voxels_mm(a.numpy()), edge_voxels_mm(b.numpy())
    distance = np.linalg.norm(first[:, None] - second[None], axis=-1)
    return float(max(np.percentile(distance.min(1), 95), np.percentile(distance.min(0), 95)))


@pytest.mark.parametrize(
    ("shift", "expected_mm"), [((2, 0, 0), 2.0), ((0, 3, 0), 4.5), ((0, 0, 2), 6.0), ((3, 0, 1), math.sqrt(18))]
)
def test_a_shifted_ball_is_as_far_as_it_was_shifted(shift: tuple[int, int, int], expected_mm: float) -> None:
    moved, still = make_heads(shift)
    distance = compute_structure_measures(moved, still, STRUCTURES, make_affine(), 100)["hausdorff"]
    assert distance.shape == (2, 3)
    assert distance[0, LEFT].item() <= expected_mm + 1e-5
    if sum(s > 0 for s in shift) == 1:  # along an axis the foremost voxel has no nearer neighbour
        assert distance[0, LEFT].item() == pytest.approx(expected_mm, abs=1e-5)
    assert distance[0, RIGHT] == 0
    assert distance[0, BOTH] == distance[0, LEFT]
    assert distance[1, BOTH] == 0
    assert distance[1, :2].isnan().all()


def test_hd95_is_what_brute_force_gives() -> None:
    moved, still = make_heads((3, 2, 1))
    hd95 = compute_structure_measures(moved, still, STRUCTURES, make_affine(), 95)["hausdorff"]
    assert hd95[0, LEFT].item() == pytest.approx(hd95_by_brute_force(moved[0] == 17, still[0] == 17), abs=1e-4)
    assert (
        hd95[0, LEFT] < compute_structure_measures(moved, still, STRUCTURES, make_affine(), 100)["hausdorff"][0, LEFT]
    )


@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")  # MONAI's own call
def test_hd95_is_monais_over_a_one_hot_volume() -> None:
    pred, truth = draw_blobs(1), draw_blobs(2)
    hd95 = compute_structure_measures(pred, truth, STRUCTURES, make_affine(), 95)["hausdorff"]
    channels = [[17], [53], [17, 53], [16]]
    found, wanted = (
        torch.stack([torch.isin(ids, torch.tensor(c)) for c in channels], 1).float() for ids in (pred, truth)
    )
    expected = compute_hausdorff_distance(found, wanted, include_background=True, percentile=95, spacing=list(SPACING))
    # the same function on a box instead of the image: the same numbers
    torch.testing.assert_close(torch.cat([hd95[0], hd95[1, 2:]]).float(), expected[0])


def to_itk(mask: Tensor) -> Any:
    image = itk.image_from_array(np.ascontiguousarray(mask.numpy().astype(np.int16).transpose()))
    image.SetSpacing(SPACING)
    return image


@pytest.mark.parametrize("ids", [(17,), (53,), (17, 53)])
def test_overlap_volume_and_largest_distance_are_itks(ids: tuple[int, ...]) -> None:
    side = {(17,): LEFT, (53,): RIGHT, (17, 53): BOTH}[ids]
    moved, still = make_heads((3, 2, 1))
    found, wanted = (to_itk(torch.isin(one[0], torch.tensor(ids))) for one in (moved, still))
    overlap = itk.LabelOverlapMeasuresImageFilter[type(found)].New(SourceImage=found, TargetImage=wanted)
    overlap.Update()
    overlaps = compute_structure_measures(moved, still, STRUCTURES, make_affine())
    dice = overlaps["dice"][0, side].item()
    assert dice == pytest.approx(overlap.GetDiceCoefficient(1), abs=1e-6)

    error = overlaps["volume_error"][0, side].item()
    # ITK's similarity is 2 (s - t) / (s + t); ours is (s - t) / t
    assert error == pytest.approx(2 * overlap.GetVolumeSimilarity(1) / (2 - overlap.GetVolumeSimilarity(1)), abs=1e-6)

    farthest = itk.HausdorffDistanceImageFilter[type(found), type(found)].New(
        Input1=found, Input2=wanted, UseImageSpacing=True
    )
    farthest.Update()
    distance = compute_structure_measures(moved, still, STRUCTURES, make_affine(), 100)["hausdorff"][0, side].item()
    # ITK measures between the masks, not their edges: for balls of one size that is the same; its distance map is float32
    assert distance == pytest.approx(farthest.GetHausdorffDistance(), abs=1e-4)


def test_swapped_sides_are_wrong_alone_and_right_together() -> None:
    _, truth = make_heads((0, 0, 0))
    swapped = truth.clone()
    swapped[truth == 17], swapped[truth == 53] = 53, 17
    measures = compute_structure_measures(swapped, truth, STRUCTURES, make_affine())
    assert measures["dice"][0].tolist() == [0, 0, 1]
    assert measures["volume_error"][0, BOTH] == 0
    distance = compute_structure_measures(swapped, truth, STRUCTURES, make_affine(), 100)["hausdorff"][0]
    assert distance[BOTH] == 0
    assert distance[LEFT].item() == distance[RIGHT].item() == pytest.approx(math.hypot(16, 3), rel=0.2)


def test_an_absent_part_has_no_distance_and_a_volume() -> None:
    pred, truth = make_heads((1, 0, 0))
    pred[pred == 17] = 0
    truth[truth == 53] = 0
    hd95 = compute_structure_measures(pred, truth, STRUCTURES, make_affine(), 95)["hausdorff"][0]
    assert hd95[:2].isnan().all()
    assert not hd95[BOTH].isnan()
    measures = compute_structure_measures(pred, truth, STRUCTURES, make_affine())
    error, found, wanted = (measures[name][0] for name in ("volume_error", "volume", "reference_volume"))
    assert error[LEFT] == -1
    assert error[RIGHT].isnan()
    assert found[LEFT] == 0
    assert wanted[RIGHT] == 0


def test_volumes_are_those_of_the_voxels() -> None:
    pred, truth = make_heads((0, 0, 0))
    pred[..., 14:17, 2:5, 2] = 0
    volumes = compute_structure_measures(pred, truth, STRUCTURES, make_affine())
    voxel_ml = 1.0 * 1.5 * 3.0 / 1000
    assert volumes["reference_volume"][1, BOTH].item() == pytest.approx(27 * voxel_ml)
    assert volumes["volume"][1, BOTH].item() == pytest.approx(18 * voxel_ml)
    assert volumes["volume_error"][1, BOTH].item() == pytest.approx(-1 / 3)
    assert volumes["volume_error"][1, :2].isnan().all()
    sides = volumes["reference_volume"][0]
    assert sides[LEFT].item() == pytest.approx((truth == 17).sum().item() * voxel_ml)
    assert sides[BOTH].item() == pytest.approx((sides[LEFT] + sides[RIGHT]).item())


def test_entropy_is_that_of_each_predicted_side() -> None:
    labels, _ = make_heads((0, 0, 0))
    entropy = torch.where(labels == 17, 0.2, torch.where(labels == 53, 0.5, 0.8))
    left, right = (int((labels == i).sum()) for i in (17, 53))
    scene = Scene(STRUCTURES, make_affine(), "one")
    both = (0.2 * left + 0.5 * right) / (left + right)
    rows = measure_entropy(labels, entropy, scene)
    assert [(row.structure, row.side, row.metric) for row in rows][-2:] == [
        ("hippocampus", "both", "entropy"), ("brainstem", "both", "entropy"),
    ]  # fmt: skip
    np.testing.assert_allclose([row.value for row in rows], [0.2, 0.5, both, 0.8], rtol=1e-6)
    labels[labels == 53] = 0
    found = [row.value for row in measure_entropy(labels, entropy, scene)]
    np.testing.assert_allclose(found, [0.2, np.nan, 0.2, 0.8], rtol=1e-6)


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"^structures: .* one shape \(1, H, W, D\), found \(1, 2, 2, 2\) and"):
        compute_structure_measures(torch.zeros(1, 2, 2, 2), torch.zeros(1, 3, 2, 2), STRUCTURES, make_affine())


def test_lesions_overlap_by_voxels() -> None:
    truth, found = torch.zeros(3, 4, 4, 4), torch.zeros(3, 4, 4, 4)
    truth[0, :2], found[0, 1:] = 1, 0.9  # 32 voxels, 48 voxels, 16 in common
    found[1, 0] = 0.51  # found where there is none
    truth[2, 0] = 1  # there is one and it is not found
    found[2] = 0.5
    everywhere = torch.ones(4, 4, 4, dtype=torch.bool)
    expected = [(2 * 16 / 80, 0.5, 1 / 3), (math.nan, math.nan, 0), (0, 0, math.nan)]
    for one, reference, values in zip(found, truth, expected, strict=True):
        overlap = compute_lesion_metrics(one, reference, everywhere)
        assert list(overlap) == ["dice", "sensitivity", "precision"]
        assert [float(value) for value in overlap.values()] == pytest.approx(values, nan_ok=True)
    mask = everywhere.clone()
    mask[2:] = False
    assert compute_lesion_metrics(found[0], truth[0], mask)["precision"] == 1
