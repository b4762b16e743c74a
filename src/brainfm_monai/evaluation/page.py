"""The page of an evaluation: what was measured and how, figures, tables, curves, and the worst scans to look at."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from brainfm_monai.evaluation.conditions import SETTINGS, Condition
from brainfm_monai.evaluation.definitions import HEADLINES, Headline, define
from brainfm_monai.evaluation.figures import draw_curves, draw_rows, encode_plot
from brainfm_monai.evaluation.tables import ALL, METRICS_FILE, SUMMARY_FILE, drop_merged_sides, make_headlines
from brainfm_monai.metrics import bootstrap_interval
from brainfm_monai.outputs import RunSettings
from brainfm_monai.report.html import data_address, render

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Evaluation", "compose_page", "define_metrics", "tabulate"]

WORST = 8  # scans that are shown
FEW = 10  # scans, below which resampling them tells too little
LIBRARIES = ("brainfm-monai", "monai", "torch")
BESIDE = 4  # headlines in one figure
STRUCTURE_METRICS = {"dice": "Dice", "hd95": "HD95, mm", "volume_error": "volume error, share"}


@dataclass(frozen=True)
class Evaluation:
    """Everything that the page shows.

    Attributes:
        output_dir: folder of the results.
        table: measures of all cases, see :func:`~brainfm_monai.metrics.make_table`.
        summary: their statistics, see :func:`~brainfm_monai.metrics.summarise`.
        conditions: of the cases.
        cases: scan and condition of every measured case, by name.
        failures: why the others were not measured, by name.
        settings: weights, versions and mode.
        definition: what else the measures depend on.
    """

    output_dir: Path
    table: pd.DataFrame
    summary: pd.DataFrame
    conditions: Sequence[Condition]
    cases: Mapping[str, tuple[str, str]]
    failures: Mapping[str, str]
    settings: RunSettings
    definition: Mapping[str, Any]

    @cached_property
    def headlines(self) -> pd.DataFrame:
        """One value of every case for each headline."""
        return make_headlines(self.table)

    @cached_property
    def shown(self) -> list[Headline]:
        """Headlines that some case has."""
        titles = set(self.headlines["title"])
        return [headline for headline in HEADLINES if headline.title in titles]

    @cached_property
    def native(self) -> str:
        """The condition of scans as they are; empty where there is none."""
        return next((c.name for c in self.conditions if not c.settings), "")

    @cached_property
    def first(self) -> Condition:
        """The condition whose numbers are on top: that of scans as they are, or else the first."""
        return next((c for c in self.conditions if not c.settings), self.conditions[0])

    def values(self, headline: Headline, condition: str) -> pd.Series:
        """The values of a headline under a condition, one for each scan."""
        rows = self.headlines[self.headlines["title"] == headline.title]
        return rows[rows["condition"] == condition]["value"]


def tabulate(records: Iterable[Mapping[str, object]]) -> list[list[object]]:
    """A table for a template: the headings, and the cells of every row; empty without rows."""
    rows = list(records)
    return [list(rows[0]), *(list(row.values()) for row in rows)] if rows else []


def define_metrics(metrics: Iterable[str]) -> list[list[object]]:
    """A table of definitions."""
    return tabulate({"measure": metric, "definition": define(metric)} for metric in dict.fromkeys(metrics))


def compose_page(evaluation: Evaluation) -> str:
    """The page as HTML, with its pictures in it."""
    used, settings = evaluation.settings, evaluation.first.settings
    versions = [f"{name} {metadata.version(name)}" for name in LIBRARIES] + [f"Python {platform.python_version()}"]
    details = {c.name: dict(c.settings) for c in evaluation.conditions}
    details = {"conditions": details, **evaluation.definition, "settings": asdict(used)}
    chosen = sorted({key for c in evaluation.conditions for key in c.settings})
    return render(
        "evaluation.html",
        title="Evaluation",
        theme="light",
        scans=len({scan for scan, _ in evaluation.cases.values()}),
        conditions=len(evaluation.conditions),
        cases=len(evaluation.cases),
        few=FEW,
        weights=f"{used.weights} (SHA-256 {used.weights_sha256[:12]})" if used.weights else "not stated",
        used=used,
        versions=", ".join(versions),
        failures=evaluation.failures,
        condition=evaluation.first.name,
        condition_settings=", ".join(f"{key.replace('_', ' ')} {json.dumps(value)}" for key, value in settings.items()),
        native=evaluation.native,
        cards=_cards(evaluation),
        structures=_structures(evaluation),
        curves=_curves(evaluation),
        condition_figures=_condition_figures(evaluation),
        condition_table=_condition_table(evaluation),
        worst_by=evaluation.shown[0].title if evaluation.shown else "",
        worst=_worst(evaluation),
        metrics_file=METRICS_FILE,
        summary_file=SUMMARY_FILE,
        measures=_measures(evaluation),
        settings_table=tabulate({"setting": key, "meaning": SETTINGS[key]} for key in chosen),
        definitions=define_metrics(evaluation.table["metric"]),
        details=json.dumps(details, indent=1, default=str),
    )


def _interval(headline: Headline, values: pd.Series) -> str:
    low, high = bootstrap_interval(values)
    return f"[{headline.format(low)}, {headline.format(high)}]" if np.isfinite(low) else ""


def _cards(evaluation: Evaluation) -> list[dict[str, Any]]:
    values = {headline: evaluation.values(headline, evaluation.first.name) for headline in evaluation.shown}
    return [
        {
            "title": headline.title,
            "value": f"{headline.format(of_scans.mean())} {headline.unit}",
            "interval": _interval(headline, of_scans),
            "scans": len(of_scans),
        }
        for headline, of_scans in values.items()
        if len(of_scans)
    ]


def _structures(evaluation: Evaluation) -> str:
    table = evaluation.table
    rows = table[(table["task"] == "segmentation") & (table["condition"] == evaluation.first.name)]
    rows = drop_merged_sides(rows[rows["metric"].isin(STRUCTURE_METRICS) & (rows["structure"] != ALL)])
    if not len(rows):
        return ""
    panels = rows["metric"].map(STRUCTURE_METRICS)
    return encode_plot(draw_rows(rows.assign(panel=panels, row=rows["structure"]).sort_values("panel", kind="stable")))


def _curves(evaluation: Evaluation) -> list[str]:
    sweeps: dict[str, list[Condition]] = {}
    for condition in evaluation.conditions:
        if condition.sweep:
            sweeps.setdefault(condition.sweep, []).append(condition)
    shown = evaluation.shown if sweeps else []
    parts = [shown[first : first + BESIDE] for first in range(0, len(shown), BESIDE)]
    return [encode_plot(draw_curves(evaluation.headlines, part, sweeps, evaluation.native)) for part in parts]


def _condition_figures(evaluation: Evaluation) -> list[str]:
    names = [c.name for c in evaluation.conditions if not c.sweep]
    figures = []
    for first in range(0, len(evaluation.shown) if len(names) > 1 else 0, BESIDE):
        part = {headline.title: headline.label for headline in evaluation.shown[first : first + BESIDE]}
        rows = evaluation.headlines[evaluation.headlines["title"].isin(part)]
        rows = rows[rows["condition"].isin(names)]
        figures.append(
            encode_plot(draw_rows(rows.assign(panel=rows["title"].map(part), row=rows["condition"], side="both")))
        )
    return figures


def _condition_table(evaluation: Evaluation) -> list[list[object]]:
    if len(evaluation.conditions) < 2:
        return []
    rows = []
    for condition in evaluation.conditions:
        values = {headline: evaluation.values(headline, condition.name) for headline in evaluation.shown}
        cells = {
            headline.label: f"{headline.format(own.mean())} {_interval(headline, own)}" if len(own) else "n/a"
            for headline, own in values.items()
        }
        scans = sum(name == condition.name for _, name in evaluation.cases.values())
        rows.append({"condition": condition.name, "scans": scans, **cells})
    return tabulate(rows)


def _worst(evaluation: Evaluation) -> list[dict[str, str]]:
    if not evaluation.shown:
        return []
    leading = evaluation.shown[0]
    names = {case: name for name, case in evaluation.cases.items()}
    rows = evaluation.headlines[evaluation.headlines["title"] == leading.title]
    ordered = rows.sort_values("value", ascending=leading.higher_is_better, kind="stable").head(WORST)
    worst = []
    for row in ordered.itertuples(index=False):
        name = names[row.scan, row.condition]
        picture = evaluation.output_dir / "cases" / f"{name}.webp"
        report = f"{name}/{name}_report.html"
        worst.append(
            {
                "scan": str(row.scan),
                "condition": str(row.condition),
                "value": leading.format(row.value),
                "report": report if (evaluation.output_dir / report).is_file() else "",
                "picture": data_address(picture.read_bytes()) if picture.is_file() else "",
            }
        )
    return worst


def _measures(evaluation: Evaluation) -> dict[str, list[list[object]]]:
    """A table of statistics for each task, under the first condition."""
    summary = evaluation.summary[
        (evaluation.summary["condition"] == evaluation.first.name) & (evaluation.summary["n"] > 0)
    ]
    tables: dict[str, list[dict[str, object]]] = {}
    for row in summary.itertuples(index=False):
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
