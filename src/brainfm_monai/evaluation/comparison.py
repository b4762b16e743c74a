"""Two evaluations of the same scans: paired statistics, a table and a page."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from brainfm_monai.evaluation.definitions import HEADLINES, define
from brainfm_monai.evaluation.figures import draw_differences, encode_plot
from brainfm_monai.evaluation.style import make_document, make_figure, make_table_html
from brainfm_monai.evaluation.tables import ALL, METRICS_FILE
from brainfm_monai.io import ABSENT
from brainfm_monai.metrics import compare, read_metrics, write_frame

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["compare_evaluations"]

TABLE, PAGE = "comparison.tsv", "comparison.html"
MOST_NAMED = 5  # scans that a message names
LEVEL = 0.05


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
    tables = [_read(folder) for folder in (first, second)]
    _check_same_cases(tables[0], tables[1], first, second)
    compared = compare(*_shared_rows(*tables))
    output = Path(output_dir)
    output.mkdir(parents=True, exist_ok=True)
    write_frame(output / TABLE, compared)
    page = output / PAGE
    beside = page.with_name(f".{PAGE}.part")
    in_order = compared.set_index("condition").loc[list(dict.fromkeys(tables[0]["condition"]))].reset_index()
    parts = _compose(in_order, str(first), str(second), tables[0]["scan"].nunique())
    beside.write_text(make_document("Comparison", parts), encoding="utf-8")
    beside.replace(page)
    return page


def _read(folder: str | Path) -> pd.DataFrame:
    path = Path(folder) / METRICS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path}: the folder of a finished evaluation is needed, found no such file")
    return read_metrics(path)


def _check_same_cases(a: pd.DataFrame, b: pd.DataFrame, first: str | Path, second: str | Path) -> None:
    cases = [set(zip(table["scan"], table["condition"], strict=True)) for table in (a, b)]
    found = []
    for folder, alone in ((first, cases[0] - cases[1]), (second, cases[1] - cases[0])):
        if alone:
            names = [f"{scan} ({condition})" for scan, condition in sorted(alone)]
            more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
            found.append(f"only in {folder}: {', '.join(names[:MOST_NAMED])}{more}")
    if found:
        raise ValueError(f"compare: the same scans and conditions are needed in both folders, found {'; '.join(found)}")


def _shared_rows(a: pd.DataFrame, b: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The measures that both have: two networks may predict different tasks."""
    keys = ["task", "structure", "side", "metric", "unit"]
    both = set(a[keys].itertuples(index=False, name=None)) & set(b[keys].itertuples(index=False, name=None))
    if not both:
        raise ValueError("compare: a measure that both evaluations have is needed, found none")
    first, second = (t[[key in both for key in t[keys].itertuples(index=False, name=None)]] for t in (a, b))
    return first, second


def _compose(compared: pd.DataFrame, first: str, second: str, scans: int) -> Iterator[str]:
    yield "<h1>Comparison</h1>"
    yield f"<p>A: {escape(first)}<br>B: {escape(second)}<br>{scans} scan{'' if scans == 1 else 's'} in both.</p>"
    yield '<p class="quiet">Differences are B - A, scan by scan: mean, 95 % confidence interval by bootstrap over the scans, and '
    yield "the P value of Wilcoxon's signed-rank test after Holm's correction over the structures and sides of a measure.</p>"
    for condition in dict.fromkeys(compared["condition"]):
        own = compared[compared["condition"] == condition]
        yield f"<h2>Condition {escape(str(condition))}</h2>"
        titles = {(h.task, h.metric): h for h in HEADLINES}
        rows: list[list[str]] = []
        of_structures: list[list[str]] = []
        for (task, metric), headline in titles.items():
            chosen = own[(own["task"] == task) & (own["metric"] == metric) & (own["n"] > 0)]
            for row in chosen.itertuples(index=False):
                parts = [row.structure, row.side] if row.structure not in (ALL, ABSENT) else []
                where = " ".join(part.replace("_", " ") for part in parts if part not in (ABSENT, "both"))
                title = f"{headline.title}{f', {where}' if where else ''}"
                cells = _row(title, row, headline.digits, headline.higher_is_better)
                (of_structures if metric == "hd95" else rows).append(cells)
        columns = ["measure", "A", "B", "B - A", "95 % interval", "P (Holm)", "scans", "better"]
        yield make_table_html(columns, rows)
        if of_structures:
            yield f"<details><summary>HD95 of every structure</summary>{make_table_html(columns, of_structures)}</details>"
        dice = own[(own["metric"] == "dice") & (own["task"] == "segmentation") & (own["n"] > 0)]
        dice = dice[(dice["side"] != "both") | ~dice["structure"].isin(dice[dice["side"] == "left"]["structure"])]
        if len(dice):
            labels = [
                f"{r.structure.replace('_', ' ')}{'' if r.side == 'both' else f' {r.side}'}" for r in dice.itertuples()
            ]
            yield make_figure(
                encode_plot(draw_differences(dice, labels, "difference of Dice, B - A")), "differences of Dice"
            )
            yield f'<p class="quiet">Full dots: P (Holm) below {LEVEL}.</p>'
    yield "<h2>What the measures are</h2>"
    metrics = dict.fromkeys(compared["metric"])
    yield make_table_html(["measure", "definition"], [[m, escape(define(m))] for m in metrics], text_columns=2)
    yield f'<p>All differences: <a href="{TABLE}">{TABLE}</a></p>'


def _row(title: str, row: object, digits: int, higher_is_better: bool) -> list[str]:
    values = {
        name: float(getattr(row, name)) for name in ("mean_first", "mean_second", "difference", "low", "high", "p_holm")
    }
    certain = values["p_holm"] < LEVEL
    better = "B" if (values["difference"] > 0) == higher_is_better else "A"
    interval = f"[{values['low']:+.{digits}f}, {values['high']:+.{digits}f}]" if np.isfinite(values["low"]) else ""
    p = "n/a" if np.isnan(values["p_holm"]) else f"{values['p_holm']:.3g}"
    return [
        escape(title),
        f"{values['mean_first']:.{digits}f}",
        f"{values['mean_second']:.{digits}f}",
        f"{values['difference']:+.{digits}f}",
        f'<span class="ci">{interval}</span>',
        p,
        str(int(row.n)),  # type: ignore[attr-defined]
        better if certain else "not certain",
    ]
