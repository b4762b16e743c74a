"""The pages of evaluations: figures, tables, curves and the worst scans of one, and the comparison of two."""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import brainfm_monai
from brainfm_monai.evaluation.conditions import SETTINGS, Condition
from brainfm_monai.evaluation.figures import draw_curves, draw_rows
from brainfm_monai.evaluation.tables import ALL, METRICS_FILE, SUMMARY_FILE, drop_merged_sides, make_headlines
from brainfm_monai.io import ABSENT, write_text
from brainfm_monai.metrics import HEADLINES, Headline, compare, define, read_metrics, summarise, write_frame
from brainfm_monai.outputs import RunSettings
from brainfm_monai.report.html import data_address, render

COMPARISON_TABLE, COMPARISON_PAGE = "comparison.tsv", "comparison.html"
WORST = 8  # scans that are shown
FEW = 10  # scans, below which intervals by resampling are too narrow
LIBRARIES = ("monai", "torch")
BESIDE = 4  # headlines in one figure
STRUCTURE_METRICS = {"dice": "Dice", "hd95": "HD95, mm", "volume_error": "volume error, share"}
LEVEL = 0.05  # of P values
MOST_NAMED = 5  # scans that a message names
MEASURE = ["task", "structure", "side", "metric", "unit"]


def compose_page(
    output_dir: Path,
    table: pd.DataFrame,
    summary: pd.DataFrame,
    conditions: Sequence[Condition],
    cases: Mapping[tuple[str, str], str],
    failures: Mapping[str, str],
    used: RunSettings,
    definition: Mapping[str, Any],
) -> str:
    """The page of an evaluation as HTML, with its pictures in it.

    Args:
        output_dir: folder of the results.
        table: measures of all cases, see :func:`~brainfm_monai.metrics.make_table`.
        summary: their statistics, see :func:`~brainfm_monai.metrics.summarise`.
        conditions: of the cases.
        cases: name of every measured case, by scan and condition.
        failures: why the others were not measured, by name.
        used: weights, versions and mode.
        definition: what else the measures depend on.
    """
    first = next((c for c in conditions if not c.settings), conditions[0])  # its numbers are on top
    native = "" if first.settings else first.name
    headlines = make_headlines(table)
    statistics = {(row.condition, row.structure): row for row in summarise(headlines).itertuples(index=False)}
    shown = [headline for headline in HEADLINES if headline.title in set(headlines["structure"])]
    parts = [shown[start : start + BESIDE] for start in range(0, len(shown), BESIDE)]
    sweeps = {c.sweep: [one for one in conditions if one.sweep == c.sweep] for c in conditions if c.sweep}
    alone = headlines[headlines["condition"].isin([c.name for c in conditions if not c.sweep])]
    versions = {"brainfm-monai": brainfm_monai.__version__, **{name: metadata.version(name) for name in LIBRARIES}}
    listed = summary[(summary["condition"] == first.name) & (summary["n"] > 0)]
    counts = Counter(condition for _, condition in cases)
    details = {"conditions": {c.name: dict(c.settings) for c in conditions}, **definition, "settings": asdict(used)}
    return render(
        "evaluation.html",
        title="Evaluation",
        theme="light",
        scans=len({scan for scan, _ in cases}),
        conditions=len(conditions),
        cases=len(cases),
        few=FEW,
        used=used,
        versions={**versions, "Python": platform.python_version()},
        failures=failures,
        condition=first.name,
        condition_settings=", ".join(f"{key.replace('_', ' ')} {json.dumps(x)}" for key, x in first.settings.items()),
        native=native,
        shown=shown,
        statistics=statistics,
        format_interval=_format_interval,
        structures=_draw_structures(table[table["condition"] == first.name]),
        curves=[draw_curves(statistics, part, sweeps, native) for part in parts if sweeps],
        condition_figures=[_draw_conditions(alone, part) for part in parts if sum(not c.sweep for c in conditions) > 1],
        condition_rows=[[c.name, counts[c.name], *(_describe(h, statistics, c) for h in shown)] for c in conditions],
        worst=_find_worst(output_dir, cases, headlines, shown[0]) if shown else [],
        metrics_file=METRICS_FILE,
        summary_file=SUMMARY_FILE,
        measures=dict(iter(listed.groupby("task", sort=False))),
        all=ALL,
        settings={key: SETTINGS[key] for condition in conditions for key in condition.settings},
        definitions=_define_all(table["metric"]),
        details=json.dumps(details, indent=1, default=str),
    )


def _define_all(metrics: Iterable[str]) -> dict[str, str]:
    return {metric: define(metric) for metric in dict.fromkeys(metrics)}


def _format_interval(row: Any, digits: int, sign: str = "") -> str:
    """Low and high end of a row, empty where there is no interval."""
    return f"[{row.low:{sign}.{digits}f}, {row.high:{sign}.{digits}f}]" if np.isfinite(row.low) else ""


def _describe(headline: Headline, statistics: Mapping[tuple[str, str], Any], condition: Condition) -> str:
    row = statistics.get((condition.name, headline.title))
    return f"{headline.format(row.mean)} {_format_interval(row, headline.digits)}" if row else ABSENT


def _draw_structures(table: pd.DataFrame) -> str:
    rows = table[(table["task"] == "segmentation") & (table["structure"] != ALL)]
    panels = drop_merged_sides(rows).assign(row=rows["structure"], panel=rows["metric"].map(STRUCTURE_METRICS))
    order = [panels[panels["panel"] == title] for title in STRUCTURE_METRICS.values()]
    return draw_rows(pd.concat(order)) if len(rows) else ""


def _draw_conditions(headlines: pd.DataFrame, part: Sequence[Headline]) -> str:
    rows = headlines.assign(row=headlines["condition"])
    return draw_rows(pd.concat([rows[rows["structure"] == h.title].assign(panel=h.label) for h in part]))


def _find_worst(
    output_dir: Path, cases: Mapping[tuple[str, str], str], headlines: pd.DataFrame, leading: Headline
) -> list[dict[str, str]]:
    rows = headlines[headlines["structure"] == leading.title]
    worst = []
    for row in rows.sort_values("value", ascending=leading.higher_is_better, kind="stable").head(WORST).itertuples():
        name = cases[row.scan, row.condition]
        picture, report = output_dir / "cases" / f"{name}.webp", f"{name}/{name}_report.html"
        case = {"scan": row.scan, "condition": row.condition, "value": leading.format(row.value)}
        case["report"] = report if (output_dir / report).is_file() else ""
        worst.append(case | {"picture": data_address(picture.read_bytes()) if picture.is_file() else ""})
    return worst


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
    tables = {str(folder): _read(Path(folder)) for folder in (first, second)}
    _check_same_cases(tables)
    # two networks may predict different tasks: the measures that both have are compared
    left, right = (tables[str(folder)] for folder in (first, second))
    measures = left[MEASURE].drop_duplicates().merge(right[MEASURE].drop_duplicates())
    if measures.empty:
        raise ValueError("compare: a measure that both evaluations have is needed, found none")
    left, right = left.merge(measures), right.merge(measures)
    compared = compare(left, right)
    write_frame(Path(output_dir) / COMPARISON_TABLE, compared)
    page = Path(output_dir) / COMPARISON_PAGE
    pairs = left.merge(right, on=["scan", "condition", *MEASURE])
    text = render(
        "comparison.html",
        title="Comparison",
        theme="light",
        first=first,
        second=second,
        scans=left["scan"].nunique(),
        conditions=[_describe_condition(name, compared, pairs) for name in left["condition"].unique()],
        definitions=_define_all(compared["metric"]),
        file=COMPARISON_TABLE,
    )
    write_text(page, text)
    return page


def _read(folder: Path) -> pd.DataFrame:
    if not (folder / METRICS_FILE).is_file():
        rule = "the folder of a finished evaluation is needed, found no such file"
        raise FileNotFoundError(f"{folder / METRICS_FILE}: {rule}")
    return read_metrics(folder / METRICS_FILE)


def _check_same_cases(tables: Mapping[str, pd.DataFrame]) -> None:
    cases = {folder: set(zip(table["scan"], table["condition"], strict=True)) for folder, table in tables.items()}
    shared = set.intersection(*list(cases.values()))
    differences = []
    for folder, own in cases.items():
        names = [f"{scan} ({condition})" for scan, condition in sorted(own - shared)]
        if names:
            more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
            differences.append(f"only in {folder}: {', '.join(names[:MOST_NAMED])}{more}")
    if differences:
        rule = "the same scans and conditions are needed in both folders"
        raise ValueError(f"compare: {rule}, found {'; '.join(differences)}")


def _describe_condition(name: str, compared: pd.DataFrame, pairs: pd.DataFrame) -> dict[str, Any]:
    """Tables of the headlines and of HD95 by structure, and the figure of Dice by structure."""
    own = compared[(compared["condition"] == name) & (compared["n"] > 0)]
    tables: dict[str, list[list[object]]] = {"headlines": [], "hd95": []}
    for headline in HEADLINES:
        chosen = own[(own["task"] == headline.task) & (own["metric"] == headline.metric)]
        rows = [_describe_row(headline, row) for row in chosen.itertuples(index=False)]
        tables["hd95" if headline.metric == "hd95" else "headlines"] += rows
    dice = drop_merged_sides(own[(own["metric"] == "dice") & (own["task"] == "segmentation")])
    rows = dice.merge(pairs, on=["condition", *MEASURE])
    labels = [_name_part(row) + (" *" if row.p_holm < LEVEL else "") for row in rows.itertuples(index=False)]
    rows = rows.assign(
        value=rows["value_y"] - rows["value_x"], row=labels, panel="difference of Dice, B - A", side="both"
    )
    return {"name": name, **tables, "figure": draw_rows(rows, zero=True) if labels else ""}


def _name_part(row: Any) -> str:
    """Structure and side of a row, where it has them."""
    parts = [row.structure, row.side] if row.structure not in (ALL, ABSENT) else []
    return " ".join(part.replace("_", " ") for part in parts if part not in (ABSENT, "both"))


def _describe_row(headline: Headline, row: Any) -> list[object]:
    better = "B" if (row.difference > 0) == headline.higher_is_better else "A"
    return [
        ", ".join(filter(None, [headline.title, _name_part(row)])),
        headline.format(row.mean_first),
        headline.format(row.mean_second),
        headline.format(row.difference, "+"),
        _format_interval(row, headline.digits, "+"),
        ABSENT if np.isnan(row.p_holm) else f"{row.p_holm:.3g}",
        row.n,
        better if row.p_holm < LEVEL else "not certain",
    ]
