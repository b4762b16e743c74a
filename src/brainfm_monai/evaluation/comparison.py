"""Two evaluations of the same scans: paired statistics, a table and a page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from brainfm_monai.evaluation.definitions import HEADLINES, Headline
from brainfm_monai.evaluation.figures import draw_rows
from brainfm_monai.evaluation.page import define_metrics, tabulate
from brainfm_monai.evaluation.tables import ALL, METRICS_FILE, drop_merged_sides
from brainfm_monai.io import ABSENT, write_text
from brainfm_monai.metrics import compare, read_metrics, write_frame
from brainfm_monai.report.html import render

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["compare_evaluations"]

TABLE, PAGE = "comparison.tsv", "comparison.html"
LEVEL = 0.05  # of P values
MOST_NAMED = 5  # scans that a message names
KEYS = ["task", "structure", "side", "metric", "unit"]


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
    left, right = _read(first), _read(second)
    _check_same_cases(left, right, first, second)
    # two networks may predict different tasks: the measures that both have are compared
    rows = [set(table[KEYS].itertuples(index=False, name=None)) for table in (left, right)]
    if not rows[0] & rows[1]:
        raise ValueError("compare: a measure that both evaluations have is needed, found none")
    shared = [
        t[[key in rows[0] & rows[1] for key in t[KEYS].itertuples(index=False, name=None)]] for t in (left, right)
    ]
    compared = compare(*shared)
    write_frame(Path(output_dir) / TABLE, compared)
    page = Path(output_dir) / PAGE
    conditions = [_describe_condition(name, compared, *shared) for name in dict.fromkeys(left["condition"])]
    content = {"first": first, "second": second, "scans": left["scan"].nunique(), "conditions": conditions}
    content |= {"definitions": define_metrics(compared["metric"]), "file": TABLE}
    write_text(page, render("comparison.html", title="Comparison", theme="light", **content))
    return page


def _read(folder: str | Path) -> pd.DataFrame:
    path = Path(folder) / METRICS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path}: the folder of a finished evaluation is needed, found no such file")
    return read_metrics(path)


def _check_same_cases(a: pd.DataFrame, b: pd.DataFrame, first: str | Path, second: str | Path) -> None:
    cases = [set(zip(table["scan"], table["condition"], strict=True)) for table in (a, b)]
    differences = []
    for folder, alone in ((first, cases[0] - cases[1]), (second, cases[1] - cases[0])):
        if alone:
            names = [f"{scan} ({condition})" for scan, condition in sorted(alone)]
            more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
            differences.append(f"only in {folder}: {', '.join(names[:MOST_NAMED])}{more}")
    if differences:
        found = "; ".join(differences)
        raise ValueError(f"compare: the same scans and conditions are needed in both folders, found {found}")


def _describe_condition(name: str, compared: pd.DataFrame, first: pd.DataFrame, second: pd.DataFrame) -> dict[str, Any]:
    """Tables of the headlines and of HD95 by structure, and the figure of Dice by structure."""
    own = compared[(compared["condition"] == name) & (compared["n"] > 0)]
    tables: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
    for headline in HEADLINES:
        chosen = own[(own["task"] == headline.task) & (own["metric"] == headline.metric)]
        tables[headline.metric == "hd95"] += [_describe_row(headline, row) for row in chosen.to_dict("records")]
    dice = drop_merged_sides(own[(own["metric"] == "dice") & (own["task"] == "segmentation")])
    pairs = dice.merge(first.merge(second, on=["scan", "condition", *KEYS]), on=["condition", *KEYS], sort=False)
    labels = [_place(row) + (" *" if row["p_holm"] < LEVEL else "") for row in pairs.to_dict("records")]
    rows = pairs.assign(value=pairs["value_y"] - pairs["value_x"], row=labels, panel="difference of Dice, B - A")
    figure = draw_rows(rows.assign(side="both"), zero=True) if labels else ""
    headlines, hd95 = (tabulate(rows) for rows in tables.values())
    return {"name": name, "headlines": headlines, "hd95": hd95, "figure": figure}


def _place(row: dict[str, Any]) -> str:
    """Structure and side of a row, where it has them."""
    parts = [row["structure"], row["side"]] if row["structure"] not in (ALL, ABSENT) else []
    return " ".join(part.replace("_", " ") for part in parts if part not in (ABSENT, "both"))


def _describe_row(headline: Headline, row: dict[str, Any]) -> dict[str, Any]:
    certain = row["p_holm"] < LEVEL
    better = "B" if (row["difference"] > 0) == headline.higher_is_better else "A"
    interval = f"[{headline.format(row['low'], '+')}, {headline.format(row['high'], '+')}]"
    return {
        "measure": ", ".join(filter(None, [headline.title, _place(row)])),
        "A": headline.format(row["mean_first"]),
        "B": headline.format(row["mean_second"]),
        "B - A": headline.format(row["difference"], "+"),
        "95 % interval": interval if np.isfinite(row["low"]) else "",
        "P (Holm)": "n/a" if np.isnan(row["p_holm"]) else f"{row['p_holm']:.3g}",
        "scans": row["n"],
        "better": better if certain else "not certain",
    }
