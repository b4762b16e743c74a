"""All measures of one scan as rows, and the file of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from brainfm_monai.evaluation.tables import read_metrics, summarise, write_frame
from brainfm_monai.metrics.fields import compute_ssim
from brainfm_monai.metrics.scan import MetricRow, Scene, measure_scan
from brainfm_monai.metrics.segmentation import parse_structures

TASKS = ["segmentation", "T1w", "CT", "log_bias_field", "distance", "mni", "lesion", "super_resolution"]
STRUCTURES = parse_structures({"cortex": {"left": [3], "right": [42]}, "brainstem": {"middle": [16]}})
SIZE = (24, 20, 18)
AFFINE = torch.diag(torch.tensor([1.0, 1.0, 1.5, 1.0], dtype=torch.float64))


def draw(seed: int, channels: int = 1) -> Tensor:
    return torch.randn(channels, *SIZE, generator=torch.Generator().manual_seed(seed))


def make_ids() -> Tensor:
    ids = torch.zeros(1, *SIZE, dtype=torch.int64)
    ids[:, 3:12, 3:17, 3:15], ids[:, 12:21, 3:17, 3:15] = 3, 42
    ids[:, 10:14, 8:12, 6:10] = 16
    return ids


def make_target() -> dict[str, Tensor]:
    """Every task of one head, in the units of the files."""
    ids = make_ids()
    index = torch.stack(torch.meshgrid(*(torch.arange(n).float() for n in SIZE), indexing="ij"))
    depth = index[0] - 11.5
    return {
        "segmentation": ids,
        "T1w": draw(1).abs() * (ids > 0),
        "CT": 1000 * draw(2),
        "log_bias_field": (0.1 * draw(3)).exp(),
        "distance": torch.stack([depth - 2, depth, -depth - 2, -depth]).clamp(-3, 3),
        "mni": index * torch.tensor([1, 1, 1.5]).reshape(3, 1, 1, 1),
        "lesion": (draw(4) > 1).float(),
        "super_resolution": draw(5),
        "age": torch.tensor([61.5]),
    }


def to_prediction(target: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in target.items()}


def measure(
    pred: dict[str, Tensor], target: dict[str, Tensor], **options: Any
) -> dict[tuple[str, str, str, str], float]:
    """Values by task, structure, side and metric."""
    rows = measure_scan(pred, target, Scene(STRUCTURES, AFFINE, "sub-01", **options))
    assert {(row.scan, row.condition) for row in rows} == {("sub-01", options.get("condition", "native"))}
    found = {(row.task, row.structure, row.side, row.metric): row.value for row in rows}
    assert len(found) == len(rows)
    return found


def test_a_perfect_prediction_has_no_error() -> None:
    target = make_target()
    found = measure(to_prediction(target), target, image=draw(6).abs() + 1)
    assert {key[0] for key in found} == {*TASKS, "age"}
    best = {"dice": 1, "sensitivity": 1, "precision": 1, "ssim": 1, "psnr": math.inf}
    best |= {"mean_dice": 1, "mean_dice_merged": 1}
    for key, value in found.items():
        metric = key[3].removesuffix("_brain")
        if key[3] in {"volume", "reference_volume"}:
            continue
        if key[3].endswith(("_input", "_painted")):
            assert value < 60, key  # the image is not that of the target
        elif metric == "psnr" and key[3] != metric:
            assert value > 80, key  # the fit of an image to itself is exact up to rounding
        else:
            assert value == pytest.approx(best.get(metric, 0), abs=1e-5), key
    volume = 9 * 14 * 12 * 1.5 / 1000 - 2 * 4 * 4 * 1.5 / 1000
    assert found["segmentation", "cortex", "left", "volume"] == pytest.approx(volume)
    assert not [key for key in found if key[:2] == ("segmentation", "brainstem") and key[2] != "both"]


def test_mean_dice_with_sides_apart_and_merged() -> None:
    structures = parse_structures(
        {"cortex": {"left": [3], "right": [42]}, "brainstem": {"middle": [16]}, "x": {"middle": [99]}}
    )
    target, pred = make_ids(), make_ids()
    pred[:, :6] = 0
    found = {
        (row.structure, row.side, row.metric): row.value
        for row in measure_scan({"segmentation": pred}, {"segmentation": target}, Scene(structures, AFFINE, "one"))
    }
    dice = {key[:2]: value for key, value in found.items() if key[2] == "dice"}
    assert 0.5 < dice["cortex", "left"] < dice["cortex", "right"] == 1
    assert math.isnan(dice["x", "both"])  # what the reference lacks does not count
    apart = (dice["cortex", "left"] + dice["cortex", "right"] + dice["brainstem", "both"]) / 3
    assert found["all", "both", "mean_dice"] == pytest.approx(apart)
    merged = (dice["cortex", "both"] + dice["brainstem", "both"]) / 2
    assert found["all", "both", "mean_dice_merged"] == pytest.approx(merged)


def test_every_task_shows_its_error() -> None:
    target = make_target()
    pred = to_prediction(target)
    pred["segmentation"] = pred["segmentation"].flip(1)  # left is right
    pred["T1w"] = 0.5 * target["T1w"] + 0.1
    pred["CT"] = target["CT"] + 12
    pred["log_bias_field"] = target["log_bias_field"] * (0.1 * draw(7)).exp()
    pred["distance"] = target["distance"] + 0.25
    pred["mni"] = target["mni"] + torch.tensor([0.0, 3.0, 4.0]).reshape(3, 1, 1, 1)
    pred["lesion"] = torch.zeros_like(target["lesion"])
    pred["age"] = torch.tensor([58.0])
    found = measure(pred, target, image=draw(6).abs() + 1)
    assert found["segmentation", "cortex", "left", "dice"] == 0
    assert found["segmentation", "cortex", "both", "dice"] == 1
    assert found["segmentation", "cortex", "left", "hd95"] > 5
    assert found["T1w", "n/a", "n/a", "l1"] > 0.05
    assert found["CT", "n/a", "n/a", "mae"] == pytest.approx(12, rel=1e-4)
    assert found["CT", "n/a", "n/a", "l1"] < 12 / 80
    assert 0.05 < found["log_bias_field", "n/a", "n/a", "normalised_l2"] < 0.15
    for surface in ("pial", "white"):
        for side in ("left", "right"):
            assert found["distance", surface, side, "distance_error"] == pytest.approx(0.25, abs=0.02)
    assert found["mni", "brain", "n/a", "error_mean"] == pytest.approx(5, abs=1e-5)
    assert found["mni", "brain", "n/a", "error_p95"] == pytest.approx(5, abs=1e-5)
    assert found["lesion", "lesion", "n/a", "sensitivity"] == 0
    assert found["age", "n/a", "n/a", "error"] == -3.5
    assert found["age", "n/a", "n/a", "absolute_error"] == 3.5


def test_what_one_side_lacks_is_left_out() -> None:
    target = make_target()
    pred = to_prediction(target)
    del pred["T1w"], target["lesion"], target["segmentation"]
    found = measure(pred, target)
    assert {key[0] for key in found} == {"CT", "log_bias_field", "distance", "mni", "super_resolution", "age"}


def test_maps_are_compared_where_they_are_known() -> None:
    target = make_target()
    pred = {name: target[name].clone() for name in ("T1w", "CT", "mni")}
    pred["T1w"][:, :8] += 1
    pred["CT"][:, :8] += 100
    pred["mni"][:, :8] += 10
    pred["mni"][:, :, :3] += 1000  # outside the brain
    assert measure(pred, target)["T1w", "n/a", "n/a", "l1"] > 0.05
    right = torch.ones(1, *SIZE, dtype=torch.bool)
    right[:, :8] = False
    found = measure(pred, {**target, "valid_T1w": right})
    assert found["T1w", "n/a", "n/a", "l1"] == 0
    assert found["CT", "n/a", "n/a", "mae"] > 10
    del pred["T1w"]
    found = measure(pred, {**target, "visible": right})
    assert found["CT", "n/a", "n/a", "mae"] == 0
    assert found["mni", "brain", "n/a", "error_mean"] == 0
    assert measure(pred, target, mask=right & (make_ids() > 0))["CT", "n/a", "n/a", "mae"] == 0


def test_images_in_the_brain_beside_what_must_be_beaten() -> None:
    target = {"T1w": 3 * draw(1).abs() + 2, "segmentation": make_ids()}
    target["segmentation"][:, 21:] = 258  # skull: not in the brain, and painted as the rest
    pred, image = {"T1w": target["T1w"] + 0.3 * draw(2)}, draw(3)
    found = {key[3]: value for key, value in measure(pred, target, image=image).items() if "_brain" in key[3]}
    assert list(found) == [f"{m}_brain{n}" for n in ("", "_input", "_painted") for m in ("psnr", "ssim")]
    ids, true = target["segmentation"].numpy(), target["T1w"].numpy()
    brain = np.isin(ids, (3, 42, 16))
    painted = np.zeros_like(true)
    for i in (3, 42, 16, 258):
        painted[ids == i] = true[ids == i].mean()
    low, high = np.quantile(true[brain], (0.001, 0.999), method="nearest")
    for name, one in {"": pred["T1w"].numpy(), "_input": image.numpy(), "_painted": painted}.items():
        error = (((one - true)[brain] / (high - low)) ** 2).mean()
        assert found[f"psnr_brain{name}"] == pytest.approx(-10 * np.log10(error), rel=1e-4)
        scaled, reference = (torch.from_numpy((x - low) / (high - low))[None].float() for x in (one, true))
        expected = compute_ssim(scaled, reference, torch.from_numpy(brain)[None]).item()
        assert found[f"ssim_brain{name}"] == pytest.approx(expected, abs=1e-4)
    # without a segmentation of the target the predicted labels say what is brain
    del target["segmentation"]
    everywhere = torch.ones(1, *SIZE, dtype=torch.bool)
    again = measure(
        pred, target, image=image, labels=torch.from_numpy(ids), mask=everywhere & torch.from_numpy(ids > 0)
    )
    assert again["T1w", "n/a", "n/a", "psnr_brain"] == found["psnr_brain"]
    assert "psnr_brain" not in {key[3] for key in measure(pred, target, image=image)}


def test_a_task_without_a_measure_and_other_shapes_are_reported() -> None:
    target = make_target()
    pred = to_prediction(target)
    pred["CT"] = pred["CT"][:, 1:]
    message = r"^sub-01: CT must have one shape in prediction and reference, found \(1, 23, 20, 18\) and"
    with pytest.raises(ValueError, match=message):
        measure(pred, target)
    with pytest.raises(ValueError, match=r"^sub-01: there are measures for .*, found task 'embedding' of kind"):
        measure({"embedding": target["T1w"]}, {"embedding": target["T1w"]})


def test_rows_come_back_from_their_file(tmp_path: Path) -> None:
    target = make_target()
    pred = {name: value for name, value in to_prediction(target).items() if name != "T1w"}
    rows = measure_scan(pred, target, Scene(STRUCTURES, AFFINE, "01", "5 mm"))
    path = tmp_path / "out" / "metrics.tsv"
    write_frame(path, pd.DataFrame(rows))
    header = path.read_text(encoding="utf-8").splitlines()[0]
    assert header == "scan\tcondition\ttask\tstructure\tside\tmetric\tvalue\tunit"
    table = read_metrics(path)
    back = [MetricRow(*row) for row in table.itertuples(index=False)]
    assert [row[:6] + row[7:] for row in back] == [row[:6] + row[7:] for row in rows]  # 01 stays 01, and n/a a name
    assert [row.value for row in back] == pytest.approx([row.value for row in rows], rel=1e-5, abs=1e-9, nan_ok=True)
    assert len(summarise(table, resamples=10)) == len(rows)
    assert not list(path.parent.glob(".*"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("scan\tvalue\na\t1\n", r"the columns must be \['scan', .*\], found \['scan', 'value'\]"),
        (
            "\t".join(MetricRow._fields) + "\na\tb\tc\td\te\tf\thigh\t1\n",
            r"'value' must be a number or n/a, found 'high'",
        ),
        ("\t".join(MetricRow._fields) + "\na\tb\n", r"line 2 must have 8 cells, found 2"),
    ],
)
def test_another_file_is_reported_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "metrics.tsv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_metrics(path)
