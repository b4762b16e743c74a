"""Dice of structures: against a slow loop, and the rules for what is absent, folded or without a side."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ignite.engine import Engine
from monai.data import MetaTensor
from torch import Tensor

from brainfm_monai import Protocol, TaskLayout
from brainfm_monai.metrics import StructureDiceTable, compute_mean_dice, compute_structure_dice, parse_structures

TABLE: dict[str, Any] = {
    "cortex": {"left": [3, [1000, 1999]], "right": [42, [2000, 2999]]},
    "white_matter": {"left": [2], "right": [41], "unsided": [77, [251, 255]]},
    "amygdala": {"left": [18], "right": [54]},
    "brainstem": {"middle": [16]},
}
STRUCTURES = parse_structures(TABLE)
NAMES = [s.name for s in STRUCTURES]
IDS = torch.tensor([0, 3, 1005, 42, 2017, 2, 41, 18, 54, 16, 999, 5000])


def draw_ids(seed: int, shape: tuple[int, ...] = (2, 1, 5, 6, 7)) -> Tensor:
    return IDS[torch.randint(len(IDS), shape, generator=torch.Generator().manual_seed(seed))]


def dice_by_counting(prediction: Tensor, reference: Tensor, ids: frozenset[int]) -> float:
    overlap = predicted = truth = 0
    for p, r in zip(prediction.flatten().tolist(), reference.flatten().tolist(), strict=True):
        overlap += p in ids and r in ids
        predicted += p in ids
        truth += r in ids
    return 2 * overlap / (predicted + truth) if truth else math.nan


def make_head(*, unsided: int = 77) -> Tensor:
    """A head of 12 x 6 x 6 voxels, left white matter at low indices (RAS), with one unsided voxel near each end."""
    ids = torch.zeros(1, 1, 12, 6, 6, dtype=torch.int64)
    ids[..., 1:6, 1:5, 1:5], ids[..., 6:11, 1:5, 1:5] = 2, 41
    ids[..., 4, 2, 2] = ids[..., 7, 2, 2] = unsided
    return ids


def test_dice_is_what_counting_gives() -> None:
    prediction, reference = draw_ids(1), draw_ids(2)
    dice = compute_structure_dice(prediction, reference, STRUCTURES)
    assert dice.shape == (2, 4, 3)
    for b in range(2):
        for s, structure in enumerate(STRUCTURES):
            parts = (structure.left, structure.right, structure.left | structure.right | structure.middle)
            expected = [dice_by_counting(prediction[b], reference[b], ids) for ids in parts]
            assert dice[b, s].tolist() == pytest.approx(expected, nan_ok=True)


def test_a_perfect_prediction_has_dice_one() -> None:
    ids = draw_ids(3)
    dice = compute_structure_dice(ids, ids, STRUCTURES)
    assert torch.all(dice[~dice.isnan()] == 1)
    assert dice.isnan().sum() == 2 * 2  # the sides of the brainstem


def test_parcels_fold_into_the_structure() -> None:
    reference = torch.tensor([3, 1001, 1999, 42, 2000, 2999]).reshape(1, 1, 6, 1, 1)
    prediction = torch.tensor([3, 3, 3, 42, 42, 42]).reshape(1, 1, 6, 1, 1)
    assert compute_structure_dice(prediction, reference, STRUCTURES)[0, 0].tolist() == [1, 1, 1]


def test_sides_count_apart_and_together() -> None:
    reference = torch.tensor([18, 18, 54, 54]).reshape(1, 1, 4, 1, 1)
    swapped = torch.tensor([54, 54, 18, 18]).reshape(1, 1, 4, 1, 1)
    assert compute_structure_dice(swapped, reference, STRUCTURES)[0, 2].tolist() == [0, 0, 1]


def test_what_the_reference_lacks_is_absent_not_zero() -> None:
    prediction, reference = draw_ids(4), draw_ids(5)
    reference[reference == 18] = 0
    assert (prediction == 18).any()
    dice = compute_structure_dice(prediction, reference, STRUCTURES)
    assert dice[:, 2, 0].isnan().all()
    assert not dice[:, 2, 1:].isnan().any()


def test_what_the_prediction_lacks_is_zero() -> None:
    prediction, reference = draw_ids(4), draw_ids(5)
    prediction[prediction == 18] = 0
    assert torch.all(compute_structure_dice(prediction, reference, STRUCTURES)[:, 2, 0] == 0)


@pytest.mark.parametrize("unsided", [77, 251, 255])
def test_unsided_voxels_belong_to_the_side_they_lie_on(unsided: int) -> None:
    prediction = make_head()
    prediction[prediction == 77] = 0
    prediction[..., 4, 2, 2], prediction[..., 7, 2, 2] = 2, 41
    assert compute_structure_dice(prediction, make_head(unsided=unsided), STRUCTURES)[0, 1].tolist() == [1, 1, 1]


def test_the_midplane_follows_the_affine_of_an_oblique_scan() -> None:
    # Voxels of 1 x 2 x 1 mm; the midplane is x + y = 40 mm, oblique to the voxels. Its normal in mm is not its normal in indices.
    affine = torch.diag(torch.tensor([1.0, 2.0, 1.0, 1.0], dtype=torch.float64))
    truth = torch.zeros(1, 1, 41, 21, 1, dtype=torch.int64)
    reference = truth.clone()
    for x_mm in range(0, 40, 2):
        for y_mm in range(0, 40 - x_mm, 2):
            place, mirrored = (0, 0, x_mm, y_mm // 2, 0), (0, 0, 40 - y_mm, 20 - x_mm // 2, 0)
            truth[place], truth[mirrored] = 2, 41
            near = 40 - x_mm - y_mm < 6
            reference[place], reference[mirrored] = (77, 77) if near else (2, 41)
    assert compute_structure_dice(truth, reference, STRUCTURES, affine)[0, 1].tolist() == [1, 1, 1]
    assert compute_structure_dice(truth, reference, STRUCTURES)[0, 1, 0] < 1


def test_shapes_must_agree() -> None:
    with pytest.raises(
        ValueError,
        match=r"^compute_structure_dice: .* share one shape \(B, 1, H, W, D\), got \(1, 1, 2, 2, 2\) and \(1, 1, 3",
    ):
        compute_structure_dice(torch.zeros(1, 1, 2, 2, 2), torch.zeros(1, 1, 3, 2, 2), STRUCTURES)


def test_the_mean_is_over_sides_and_what_has_none() -> None:
    nan = math.nan
    dice = torch.tensor([[0.8, 0.6, 0.1], [nan, 0.5, 0.1], [nan, nan, nan], [nan, nan, 0.9]])
    assert compute_mean_dice(dice, STRUCTURES) == pytest.approx((0.8 + 0.6 + 0.5 + 0.9) / 4)


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


def read_table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def run_table(table: StructureDiceTable, name: str, prediction: Tensor, reference: Tensor, **entries: str) -> None:
    """One iteration of an engine with decollated tensors of shape (1, H, W, D)."""
    item = {
        "image": SimpleNamespace(meta={"scan_name": name}),
        "pred": MetaTensor(prediction),
        "label": MetaTensor(reference),
    }
    engine = Engine(lambda engine, batch: [item])
    engine.state.batch = [entries]  # type: ignore[assignment]
    table.attach(engine)
    engine.run([[entries]])


def test_the_tables_hold_dice_by_scan_and_structure(tmp_path: Path) -> None:
    layout = TaskLayout(["segmentation"], "synthseg_head")
    table = StructureDiceTable(TABLE, layout, tmp_path / "out")
    head = layout.protocol
    reference = make_head()[0]
    labels = torch.as_tensor(head.encode(make_head(unsided=2)[0].numpy()))
    run_table(table, "sub-01", labels, reference)
    table.dice["sub-02"] = table.dice["sub-01"].clone()
    table.dice["sub-02"][1] = torch.tensor([0.5, 0.5, 0.5])
    table.write()

    rows = read_table(tmp_path / "out" / "dice.tsv")
    assert [(r["scan"], r["structure"]) for r in rows] == [
        (scan, name) for scan in ("sub-01", "sub-02") for name in NAMES
    ]
    assert rows[0] == {"scan": "sub-01", "structure": "cortex", "left": "n/a", "right": "n/a", "both": "n/a"}
    # one of 80 right voxels is predicted as left white matter
    assert rows[1]["left"] == f"{2 * 80 / 161:.4f}"
    assert rows[1]["right"] == f"{2 * 79 / 159:.4f}"
    assert rows[1]["both"] == "1.0000"

    summary = {row["structure"]: row for row in read_table(tmp_path / "out" / "dice_summary.tsv")}
    assert list(summary) == [*NAMES, "mean"]
    assert summary["cortex"]["scans"] == "0"
    assert summary["white_matter"]["both"] == "0.7500"
    first = (2 * 80 / 161 + 2 * 79 / 159) / 2
    assert float(summary["mean"]["both"]) == pytest.approx((first + 0.5) / 2, abs=1e-4)
    assert not list((tmp_path / "out").glob(".*"))


def test_a_reference_in_another_protocol_is_read_by_it(tmp_path: Path) -> None:
    brainfm = Protocol.load("brainfm")
    layout = TaskLayout(["segmentation"], "synthseg_head")
    table = StructureDiceTable(TABLE, layout, tmp_path)
    ids = make_head(unsided=2)[0].numpy()
    ids[ids == 41] = 18
    prediction, reference = torch.as_tensor(layout.protocol.encode(ids)), torch.as_tensor(brainfm.encode(ids))
    run_table(table, "sub-01", prediction, reference, label_protocol="brainfm")
    assert table.dice["sub-01"][2, 0] == 1
    assert table.dice["sub-01"][1, 0] == 1
