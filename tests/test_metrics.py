"""Dice of structures: against a slow loop, and the rules for what is absent, folded or without a side."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from brainfm_monai import Protocol
from brainfm_monai.metrics.segmentation import compute_structure_measures, parse_structures

TABLE: dict[str, Any] = {
    "cortex": {"left": [3, [1000, 1999]], "right": [42, [2000, 2999]]},
    "white_matter": {"left": [2], "right": [41], "unsided": [77, [251, 255]]},
    "amygdala": {"left": [18], "right": [54]},
    "brainstem": {"middle": [16]},
}
STRUCTURES = parse_structures(TABLE)
NAMES = [s.name for s in STRUCTURES]
EYE = torch.eye(4, dtype=torch.float64)
IDS = torch.tensor([0, 3, 1005, 42, 2017, 2, 41, 18, 54, 16, 999, 5000])


def draw_ids(seed: int, shape: tuple[int, ...] = (1, 5, 6, 7)) -> Tensor:
    return IDS[torch.randint(len(IDS), shape, generator=torch.Generator().manual_seed(seed))]


def dice_by_counting(prediction: Tensor, reference: Tensor, ids: frozenset[int]) -> float:
    overlap = predicted = truth = 0
    for p, r in zip(prediction.flatten().tolist(), reference.flatten().tolist(), strict=True):
        overlap += p in ids and r in ids
        predicted += p in ids
        truth += r in ids
    return 2 * overlap / (predicted + truth) if truth else math.nan


def measure_dice(prediction: Tensor, reference: Tensor, affine: Tensor = EYE) -> Tensor:
    return compute_structure_measures(prediction, reference, STRUCTURES, affine)["dice"]


def make_head(*, unsided: int = 77) -> Tensor:
    """A head of 12 x 6 x 6 voxels, left white matter at low indices (RAS), with one unsided voxel near each end."""
    ids = torch.zeros(1, 12, 6, 6, dtype=torch.int64)
    ids[..., 1:6, 1:5, 1:5], ids[..., 6:11, 1:5, 1:5] = 2, 41
    ids[..., 4, 2, 2] = ids[..., 7, 2, 2] = unsided
    return ids


def test_dice_is_what_counting_gives() -> None:
    for prediction, reference in ((draw_ids(1), draw_ids(2)), (draw_ids(2), draw_ids(1))):
        dice = measure_dice(prediction, reference)
        assert dice.shape == (4, 3)
        for s, structure in enumerate(STRUCTURES):
            parts = (structure.left, structure.right, structure.left | structure.right | structure.middle)
            expected = [dice_by_counting(prediction, reference, ids) for ids in parts]
            assert dice[s].tolist() == pytest.approx(expected, nan_ok=True)


def test_a_perfect_prediction_has_dice_one() -> None:
    ids = draw_ids(3)
    dice = measure_dice(ids, ids)
    assert torch.all(dice[~dice.isnan()] == 1)
    assert dice.isnan().sum() == 2  # the sides of the brainstem


def test_parcels_fold_into_the_structure() -> None:
    reference = torch.tensor([3, 1001, 1999, 42, 2000, 2999]).reshape(1, 6, 1, 1)
    prediction = torch.tensor([3, 3, 3, 42, 42, 42]).reshape(1, 6, 1, 1)
    assert measure_dice(prediction, reference)[0].tolist() == [1, 1, 1]


def test_sides_count_apart_and_together() -> None:
    reference = torch.tensor([18, 18, 54, 54]).reshape(1, 4, 1, 1)
    swapped = torch.tensor([54, 54, 18, 18]).reshape(1, 4, 1, 1)
    assert measure_dice(swapped, reference)[2].tolist() == [0, 0, 1]


def test_what_the_reference_lacks_is_absent_not_zero() -> None:
    prediction, reference = draw_ids(4), draw_ids(5)
    reference[reference == 18] = 0
    assert (prediction == 18).any()
    dice = measure_dice(prediction, reference)
    assert dice[2, 0].isnan()
    assert not dice[2, 1:].isnan().any()


def test_what_the_prediction_lacks_is_zero() -> None:
    prediction, reference = draw_ids(4), draw_ids(5)
    prediction[prediction == 18] = 0
    assert torch.all(measure_dice(prediction, reference)[2, 0] == 0)


@pytest.mark.parametrize("unsided", [77, 251, 255])
def test_unsided_voxels_belong_to_the_side_they_lie_on(unsided: int) -> None:
    prediction = make_head()
    prediction[prediction == 77] = 0
    prediction[..., 4, 2, 2], prediction[..., 7, 2, 2] = 2, 41
    assert measure_dice(prediction, make_head(unsided=unsided))[1].tolist() == [1, 1, 1]


def test_the_midplane_follows_the_affine_of_an_oblique_scan() -> None:
    # Voxels of 1 x 2 x 1 mm; the midplane is x + y = 40 mm, oblique to the voxels. Its normal in mm is not its normal in indices.
    affine = torch.diag(torch.tensor([1.0, 2.0, 1.0, 1.0], dtype=torch.float64))
    truth = torch.zeros(1, 41, 21, 1, dtype=torch.int64)
    reference = truth.clone()
    for x_mm in range(0, 40, 2):
        for y_mm in range(0, 40 - x_mm, 2):
            place, mirrored = (0, x_mm, y_mm // 2, 0), (0, 40 - y_mm, 20 - x_mm // 2, 0)
            truth[place], truth[mirrored] = 2, 41
            near = 40 - x_mm - y_mm < 6
            reference[place], reference[mirrored] = (77, 77) if near else (2, 41)
    assert measure_dice(truth, reference, affine)[1].tolist() == [1, 1, 1]
    assert measure_dice(truth, reference)[1, 0] < 1


def test_shapes_must_agree() -> None:
    with pytest.raises(
        ValueError,
        match=r"^structures: .* share one shape \(1, H, W, D\), found \(1, 2, 2, 2\) and \(1, 3",
    ):
        measure_dice(torch.zeros(1, 2, 2, 2), torch.zeros(1, 3, 2, 2))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"a": {"left": [1]}}, r"structure a: ids are needed either on 'left' and 'right' or in the 'middle' alone"),
        ({"a": {}}, r"structure a: ids are needed either .*"),
        ({"a": {"left": [1], "right": [2], "middle": [3]}}, r"structure a: ids are needed either .*"),
        ({"a": {"middle": [3], "unsided": [4]}}, r"structure a: ids are needed either .*"),
        ({"a": {"top": [1]}}, r"structure a: the entries are left, right, unsided and middle, found \['top'\]"),
        (
            {"a": {"middle": [5]}, "b": {"middle": [[4, 6]]}},
            r"structure b: an id may stand in one structure, found 5 in a, too",
        ),
    ],
)
def test_a_wrong_table_is_told_in_one_line(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        parse_structures(table)


def test_the_bundles_structures_know_every_brain_id_they_should(repository: Path) -> None:
    config = json.loads((repository / "bundle" / "configs" / "evaluate.json").read_text(encoding="utf-8"))
    known = {i for s in parse_structures(config["structures"]) for i in s.ids}
    assert {3, 42, 1035, 2035, 11175, 12175, 77, 78, 79, 80, 251, 255, 4, 43, 10, 49, 16, 7, 8, 46, 47} <= known
    assert not {0, 14, 15, 24, 28, 60} & known
    head = Protocol.load("synthseg_head")
    scored = {head.structures[head.label_of_id[i]].name for i in known if i in head.label_of_id}
    assert len(scored) == 23  # 11 structures, of which cerebellum has two tissues and brainstem one side
