"""The page of an evaluation: what was measured and how, figures, tables, curves, and the worst scans to look at."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import brainfm_monai
from brainfm_monai.evaluation.conditions import SETTINGS, Condition
from brainfm_monai.evaluation.definitions import HEADLINES, Headline, define
from brainfm_monai.evaluation.figures import draw_curves, draw_rows
from brainfm_monai.evaluation.tables import ALL, METRICS_FILE, SUMMARY_FILE, drop_merged_sides, make_headlines
from brainfm_monai.metrics import summarise
from brainfm_monai.outputs import RunSettings
from brainfm_monai.report.html import data_address, render

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Evaluation", "compose_page", "define_metrics", "tabulate"]

WORST = 8  # scans that are shown
FEW = 10  # scans, below which intervals by resampling are too narrow
LIBRARIES = ("monai", "torch")
BESIDE = 4  # headlines in one figure
STRUCTURE_METRICS = {"dice": "Dice", "hd95": "HD95, mm", "volume_error": "volume error, share"}

Table = list[list[object]]


@dataclass(frozen=True)
class Evaluation:
    """Everything that the page shows.

    Attributes:
        output_dir: folder of the results.
        table: measures of all cases, see :func:`~brainfm_monai.metrics.make_table`.
        summary: their statistics, see :func:`~brainfm_monai.metrics.summarise`.
        conditions: of the cases.
        cases: name of every measured case, by scan and condition.
        failures: why the others were not measured, by name.
        settings: weights, versions and mode.
        definition: what else the measures depend on.
    """

    output_dir: Path
    table: pd.DataFrame
    summary: pd.DataFrame
    conditions: Sequence[Condition]
    cases: Mapping[tuple[str, str], str]
    failures: Mapping[str, str]
    settings: RunSettings
    definition: Mapping[str, Any]


def tabulate(records: Iterable[Mapping[str, object]]) -> Table:
    """A table for a template: the headings, and the cells of every row; empty without rows."""
    rows = list(records)
    return [list(rows[0]), *(list(row.values()) for row in rows)] if rows else []


def define_metrics(metrics: Iterable[str]) -> Table:
    """A table of definitions."""
    return tabulate({"measure": metric, "definition": define(metric)} for metric in dict.fromkeys(metrics))


def compose_page(evaluation: Evaluation) -> str:
    """The page as HTML, with its pictures in it."""
    used, conditions, table = evaluation.settings, evaluation.conditions, evaluation.table
    native = next((c.name for c in conditions if not c.settings), "")
    first = next((c for c in conditions if c.name == native), conditions[0])  # its numbers are on top
    headlines = make_headlines(table)
    statistics = {(row.condition, row.structure): row for row in summarise(headlines).itertuples(index=False)}
    shown = [headline for headline in HEADLINES if any(title == headline.title for _, title in statistics)]
    parts = [shown[start : start + BESIDE] for start in range(0, len(shown), BESIDE)]
    sweeps = {c.sweep: [one for one in conditions if one.sweep == c.sweep] for c in conditions if c.sweep}
    alone = [c.name for c in conditions if not c.sweep]
    versions = [
        f"brainfm-monai {brainfm_monai.__version__}",
        *(f"{name} {metadata.version(name)}" for name in LIBRARIES),
    ]
    versions.append(f"Python {platform.python_version()}")
    details = {"conditions": {c.name: dict(c.settings) for c in conditions}, **evaluation.definition}
    settings = dict.fromkeys(key for c in conditions for key in c.settings)
    return render(
        "evaluation.html",
        title="Evaluation",
        theme="light",
        scans=len({scan for scan, _ in evaluation.cases}),
        conditions=len(conditions),
        cases=len(evaluation.cases),
        few=FEW,
        weights=f"{used.weights} (SHA-256 {used.weights_sha256[:12]})" if used.weights else "not stated",
        used=used,
        versions=", ".join(versions),
        failures=evaluation.failures,
        condition=first.name,
        condition_settings=", ".join(f"{key.replace('_', ' ')} {json.dumps(x)}" for key, x in first.settings.items()),
        native=native,
        cards=[
            {"title": h.title, "value": f"{h.format(row.mean)} {h.unit}", "interval": _interval(h, row), "scans": row.n}
            for h in shown
            if (row := statistics.get((first.name, h.title)))
        ],
        structures=_draw_structures(table[table["condition"] == first.name]),
        curves=[draw_curves(statistics, part, sweeps, native) for part in parts if sweeps],
        condition_figures=[_draw_conditions(headlines, part, alone) for part in parts if len(alone) > 1],
        condition_table=_tabulate_conditions(evaluation, statistics, shown) if len(conditions) > 1 else [],
        worst_by=shown[0].title if shown else "",
        worst=_find_worst(evaluation, headlines, shown[0]) if shown else [],
        metrics_file=METRICS_FILE,
        summary_file=SUMMARY_FILE,
        measures=_tabulate_measures(evaluation.summary[evaluation.summary["condition"] == first.name]),
        settings_table=tabulate({"setting": key, "meaning": SETTINGS[key]} for key in settings),
        definitions=define_metrics(table["metric"]),
        details=json.dumps({**details, "settings": asdict(used)}, indent=1, default=str),
    )


def _interval(headline: Headline, row: Any) -> str:
    return f"[{headline.format(row.low)}, {headline.format(row.high)}]" if np.isfinite(row.low) else ""


def _draw_structures(table: pd.DataFrame) -> str:
    rows = table[(table["task"] == "segmentation") & (table["structure"] != ALL)].rename(columns={"structure": "row"})
    panels = [
        drop_merged_sides(rows[rows["metric"] == metric], "row").assign(panel=title)
        for metric, title in STRUCTURE_METRICS.items()
    ]
    return draw_rows(_stack(panels)) if len(rows) else ""


def _draw_conditions(headlines: pd.DataFrame, part: Sequence[Headline], conditions: Sequence[str]) -> str:
    rows = headlines[headlines["condition"].isin(conditions)].assign(row=lambda table: table["condition"])
    return draw_rows(_stack(rows[rows["structure"] == h.title].assign(panel=h.label) for h in part))


def _stack(tables: Iterable[pd.DataFrame]) -> pd.DataFrame:
    import pandas as pd

    return pd.concat(list(tables))


def _tabulate_conditions(
    evaluation: Evaluation, statistics: Mapping[tuple[str, str], Any], shown: Sequence[Headline]
) -> Table:
    rows = []
    for name in [condition.name for condition in evaluation.conditions]:
        cells: dict[str, object] = {"condition": name, "scans": sum(own == name for _, own in evaluation.cases)}
        for headline in shown:
            row = statistics.get((name, headline.title))
            cells[headline.label] = f"{headline.format(row.mean)} {_interval(headline, row)}" if row else "n/a"
        rows.append(cells)
    return tabulate(rows)


def _find_worst(evaluation: Evaluation, headlines: pd.DataFrame, leading: Headline) -> list[dict[str, str]]:
    rows = headlines[headlines["structure"] == leading.title]
    worst = []
    for row in rows.sort_values("value", ascending=leading.higher_is_better, kind="stable").head(WORST).itertuples():
        name = evaluation.cases[row.scan, row.condition]
        picture, report = evaluation.output_dir / "cases" / f"{name}.webp", f"{name}/{name}_report.html"
        case = {"scan": row.scan, "condition": row.condition, "value": leading.format(row.value)}
        case["report"] = report if (evaluation.output_dir / report).is_file() else ""
        worst.append(case | {"picture": data_address(picture.read_bytes()) if picture.is_file() else ""})
    return worst


def _tabulate_measures(summary: pd.DataFrame) -> dict[str, Table]:
    """A table of statistics for each task."""
    tables: dict[str, list[dict[str, object]]] = {}
    for row in summary[summary["n"] > 0].itertuples(index=False):
        cells = {
            "measure": row.metric.replace("_", " "),
            "where": "mean of all" if row.structure == ALL else row.structure.replace("_", " "),
            "side": row.side,
            "unit": "" if row.unit == "1" else row.unit,
            "scans": row.n,
            "mean": f"{row.mean:.3f}",
            "95 % interval": f"[{row.low:.3f}, {row.high:.3f}]" if np.isfinite(row.low) else "",
            "median": f"{row.median:.3f}",
        }
        tables.setdefault(row.task, []).append(cells)
    return {task: tabulate(rows) for task, rows in tables.items()}
