"""Two evaluations of the same scans: paired statistics, a table and a page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from brainfm_monai.evaluation.figures import draw_rows
from brainfm_monai.evaluation.writer import METRICS_FILE
from brainfm_monai.io import ABSENT, write_text
from brainfm_monai.metrics import HEADLINES, compare, define, read_metrics, write_frame
from brainfm_monai.metrics.scan import ALL
from brainfm_monai.metrics.tables import drop_merged_sides
from brainfm_monai.report.html import render

TABLE, PAGE = "comparison.tsv", "comparison.html"
LEVEL = 0.05  # of P values
MOST_NAMED = 5  # scans that a message names
MEASURE = ["task", "structure", "side", "metric", "unit"]


def compare_evaluations(first: str | Path, second: str | Path, output_dir: str | Path) -> Path:
    """Compare two evaluations of the same scans under the same conditions, scan by scan.

    For every condition, task, structure, side and metric: the mean difference, its bootstrap confidence interval, and the
    Wilcoxon signed-rank test, corrected by Holm over the structures and sides of a metric.

    Args:
        first: folder of an evaluation.
        second: folder of another one, such as that of other weights.
        output_dir: folder for ``comparison.tsv`` and ``comparison.html``.

    Returns:
        Path of the page.

    Raises:
        FileNotFoundError: if a folder holds no evaluation.
        ValueError: if they are not of the same scans and conditions.
    """
    left, right = (_read(Path(folder)) for folder in (first, second))
    _check_same_cases({first: left, second: right})
    # two networks may predict different tasks: the measures that both have are compared
    measures = left[MEASURE].drop_duplicates().merge(right[MEASURE].drop_duplicates())
    if measures.empty:
        raise ValueError("compare: a measure that both evaluations have is needed, found none")
    left, right = left.merge(measures), right.merge(measures)
    compared = compare(left, right)
    write_frame(Path(output_dir) / TABLE, compared)
    pairs = left.merge(right, on=["scan", "condition", *MEASURE])
    content = {"first": first, "second": second, "scans": left["scan"].nunique(), "file": TABLE}
    content["conditions"] = [_describe(name, compared, pairs) for name in left["condition"].unique()]
    content["definitions"] = {metric: define(metric) for metric in compared["metric"].unique()}
    page = Path(output_dir) / PAGE
    write_text(page, render("comparison.html", title="Comparison", theme="light", **content))
    return page


def _read(folder: Path) -> pd.DataFrame:
    if not (folder / METRICS_FILE).is_file():
        rule = "the folder of a finished evaluation is needed, found no such file"
        raise FileNotFoundError(f"{folder / METRICS_FILE}: {rule}")
    return read_metrics(folder / METRICS_FILE)


def _check_same_cases(tables: Mapping[str | Path, pd.DataFrame]) -> None:
    cases = {folder: set(zip(table["scan"], table["condition"], strict=True)) for folder, table in tables.items()}
    shared, differences = set.intersection(*list(cases.values())), []
    for folder, own in cases.items():
        if names := [f"{scan} ({condition})" for scan, condition in sorted(own - shared)]:
            more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
            differences.append(f"only in {folder}: {', '.join(names[:MOST_NAMED])}{more}")
    if differences:
        rule = "the same scans and conditions are needed in both folders"
        raise ValueError(f"compare: {rule}, found {'; '.join(differences)}")


def _describe(condition: str, compared: pd.DataFrame, pairs: pd.DataFrame) -> dict[str, Any]:
    """Rows of the headlines, those of HD95 apart, with the names of their parts, and the figure of Dice by structure."""
    own = compared[(compared["condition"] == condition) & (compared["n"] > 0)]
    own = own.assign(part=[_name_part(row) for row in own.itertuples()], certain=own["p_holm"] < LEVEL)
    rows = [
        (headline, row) for headline in HEADLINES for row in own.itertuples() if headline[1:3] == (row.task, row.metric)
    ]
    dice = drop_merged_sides(own[(own["metric"] == "dice") & (own["task"] == "segmentation")])
    dots = dice.merge(pairs, on=["condition", *MEASURE]).assign(panel="difference of Dice, B - A")
    dots = dots.assign(
        value=dots["value_y"] - dots["value_x"], side="both", row=dots["part"] + np.where(dots["certain"], " *", "")
    )
    figure = draw_rows(dots, zero=True) if len(dots) else ""
    return {"name": condition, "rows": rows, "figure": figure}


def _name_part(row: Any) -> str:
    """Structure and side of a row, where it has them."""
    parts = [row.structure, row.side] if row.structure not in (ALL, ABSENT) else []
    return " ".join(part.replace("_", " ") for part in parts if part not in (ABSENT, "both"))
