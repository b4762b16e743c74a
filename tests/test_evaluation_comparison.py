"""Two evaluations of the same scans: paired statistics, and what is told where the scans differ."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pandas as pd
import pytest

from brainfm_monai.evaluation.tables import DEFINITIONS, HEADLINES, make_headlines, write_frame
from brainfm_monai.evaluation.writer import METRICS_FILE, compare_evaluations
from brainfm_monai.metrics.scan import MetricRow


def make_rows(shift: float, scans: int = 8, condition: str = "native") -> list[MetricRow]:
    rows: list[MetricRow] = []
    for number in range(scans):
        names = (f"scan{number}", condition, "segmentation")
        base = 0.6 + 0.02 * number
        dice = {("thalamus", "left"): base + shift, ("thalamus", "right"): base, ("thalamus", "both"): base + shift / 2}
        dice |= {("brainstem", "both"): 0.9, ("accumbens", "left"): math.nan, ("accumbens", "right"): 0.5}
        cells = [MetricRow(*names, *where, "dice", value, "1") for where, value in dice.items()]
        cells.append(MetricRow(*names, "brainstem", "both", "hd95", 2.0, "mm"))
        mean = math.fsum([base + shift, base, 0.9, 0.5]) / 4
        cells.append(MetricRow(*names, "all", "both", "mean_dice", mean, "1"))
        rows += [*cells, MetricRow(names[0], condition, "mni", "brain", "n/a", "error_mean", 3 - shift, "mm")]
    return rows


def read_table(path: Path) -> dict[tuple[str, ...], dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return {(r["metric"], r["structure"], r["side"]): r for r in csv.DictReader(file, delimiter="\t")}


def test_a_headline_counts_sides_once() -> None:
    rows = [row._replace(metric="hd95") for row in make_rows(0.1, scans=1) if row.metric == "dice"]
    value = make_headlines(pd.DataFrame(rows))["value"].item()
    assert value == pytest.approx((0.7 + 0.6 + 0.9 + 0.5) / 4)


def test_paired_statistics_of_two_evaluations(tmp_path: Path) -> None:
    for name, shift in {"a": 0.0, "b": 0.1}.items():
        (tmp_path / name).mkdir()
        write_frame(tmp_path / name / METRICS_FILE, pd.DataFrame(make_rows(shift)))
    path = compare_evaluations(tmp_path / "a", tmp_path / "b", tmp_path / "out")
    assert path == tmp_path / "out" / "comparison.tsv"
    table = read_table(path)
    left = table["dice", "thalamus", "left"]
    assert [float(left[key]) for key in ("n", "difference", "low", "high")] == pytest.approx([8, 0.1, 0.1, 0.1])
    assert float(left["p"]) == pytest.approx(2 / 2**8)  # all eight signs agree
    assert float(left["p_holm"]) > float(left["p"])  # of several structures
    assert float(table["dice", "thalamus", "right"]["p"]) == 1
    assert table["dice", "accumbens", "left"]["difference"] == "n/a"


def test_other_scans_are_told_in_one_line(tmp_path: Path) -> None:
    for name, rows in {"a": make_rows(0), "b": make_rows(0, scans=7), "c": make_rows(0, condition="noisy")}.items():
        (tmp_path / name).mkdir()
        write_frame(tmp_path / name / METRICS_FILE, pd.DataFrame(rows))
    for name, found in (("b", r"scan7 native .* \(9 in all\)"), ("c", "scan0 native ")):
        with pytest.raises(
            ValueError, match=rf"^compare: both tables must have the same rows, found in one alone: {found}"
        ):
            compare_evaluations(tmp_path / "a", tmp_path / name, tmp_path / "out")
    with pytest.raises(
        FileNotFoundError, match=r"metrics\.tsv: the folder of a finished evaluation is needed, found no such file"
    ):
        compare_evaluations(tmp_path / "a", tmp_path / "none", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_measure_is_defined() -> None:
    metrics = {row.metric for row in make_rows(0)} | {h["metric"] for h in HEADLINES} | {"ssim", "hd95", "error_p95"}
    assert all(DEFINITIONS[metric] for metric in metrics)
