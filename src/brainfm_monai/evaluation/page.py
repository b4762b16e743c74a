"""The page of an evaluation: what was measured and how, figures, tables, curves, and the worst scans to look at."""

from __future__ import annotations

import base64
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from html import escape
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from brainfm_monai.evaluation.conditions import SETTINGS, Condition
from brainfm_monai.evaluation.definitions import HEADLINES, Headline, define
from brainfm_monai.evaluation.figures import draw_conditions, draw_curves, draw_structures, encode_plot
from brainfm_monai.evaluation.style import make_document, make_figure, make_table_html
from brainfm_monai.evaluation.tables import ALL, METRICS_FILE, SUMMARY_FILE, make_headlines
from brainfm_monai.metrics import MetricRow, bootstrap_interval, make_table
from brainfm_monai.outputs import RunSettings

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Evaluation", "write_page"]

WORST = 8  # scans that are shown
FEW = 10  # scans, below which resampling them tells too little
LIBRARIES = ("brainfm-monai", "monai", "torch")
CURVES = 4  # headlines beside each other


@dataclass(frozen=True)
class Evaluation:
    """Everything that the page tells.

    Attributes:
        output_dir: folder of the results.
        rows: measures of all cases.
        summary: their statistics, see :func:`~brainfm_monai.metrics.summarise`.
        conditions: of the cases.
        cases: scan and condition of every measured case, by name.
        failures: why the others were not measured, by name.
        settings: weights, versions and mode.
        definition: what else the measures depend on.
    """

    output_dir: Path
    rows: Sequence[MetricRow]
    summary: pd.DataFrame
    conditions: Sequence[Condition]
    cases: Mapping[str, Mapping[str, str]]
    failures: Mapping[str, str]
    settings: RunSettings
    definition: Mapping[str, Any]

    @cached_property
    def table(self) -> pd.DataFrame:
        """The rows as a table."""
        return make_table(self.rows)

    @cached_property
    def headlines(self) -> pd.DataFrame:
        """One value of every case for each headline."""
        return make_headlines(self.table, HEADLINES)

    @cached_property
    def shown(self) -> list[Headline]:
        """Headlines that some case has."""
        there = set(self.headlines["title"])
        return [headline for headline in HEADLINES if headline.title in there]

    @cached_property
    def first(self) -> str:
        """The condition whose numbers stand on top: that of scans as they are, or else the first."""
        plain = [c.name for c in self.conditions if not c.settings]
        return plain[0] if plain else self.conditions[0].name


def write_page(evaluation: Evaluation, path: Path) -> None:
    """Write the page, whole or not at all."""
    parts = [*_heading(evaluation), *_failures(evaluation)]
    if evaluation.cases:
        parts += [*_cards(evaluation), *_structures(evaluation), *_curves(evaluation), *_conditions(evaluation)]
        parts += [*_worst(evaluation), *_all_measures(evaluation)]
    parts += _method(evaluation)
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(make_document("Evaluation", parts), encoding="utf-8")
    beside.replace(path)


def _heading(evaluation: Evaluation) -> Iterator[str]:
    scans = len({case["scan"] for case in evaluation.cases.values()})
    used = evaluation.settings
    weights = f"{escape(used.weights)} (SHA-256 {used.weights_sha256[:12]})" if used.weights else "not stated"
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in LIBRARIES)
    yield "<h1>Evaluation</h1>"
    conditions = len(evaluation.conditions)
    yield f"<p>{_count(scans, 'scan')}, {_count(conditions, 'condition')}, {_count(len(evaluation.cases), 'case')} measured.</p>"
    protocol = f"{escape(used.model)}, protocol {escape(used.protocol)}, mode {escape(used.mode)}"
    yield f'<p class="quiet">Weights {weights}; {protocol}; {versions}, Python {platform.python_version()}</p>'


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


def _failures(evaluation: Evaluation) -> Iterator[str]:
    if not evaluation.failures:
        return
    lines = "".join(f"<p>{escape(name)}: {escape(reason)}</p>" for name, reason in evaluation.failures.items())
    yield f'<div class="failed"><b>{_count(len(evaluation.failures), "case")} not measured</b>{lines}</div>'


def _cards(evaluation: Evaluation) -> Iterator[str]:
    rows = evaluation.headlines[evaluation.headlines["condition"] == evaluation.first]
    yield f'<p class="quiet">Condition: {escape(_describe(evaluation.first, evaluation.conditions))}. Mean over the scans; '
    yield f"in brackets its 95 % confidence interval, by bootstrap over the scans{_few(evaluation)}.</p>"
    yield '<div class="cards">'
    for headline in evaluation.shown:
        values = rows[rows["title"] == headline.title]["value"]
        if values.notna().any():
            unit = f" {headline.unit}" if headline.unit else ""
            below = _interval(values, headline.digits) or _count(int(values.notna().sum()), "scan")
            text = f"{escape(headline.title)}<br>{below}"
            yield f'<div class="card"><b>{values.mean():.{headline.digits}f}{unit}</b><span>{text}</span></div>'
    yield "</div>"


def _few(evaluation: Evaluation) -> str:
    scans = evaluation.table["scan"].nunique()
    return f"; of {_count(scans, 'scan')} it is too narrow to trust" if scans < FEW else ""


def _interval(values: pd.Series, digits: int) -> str:
    low, high = bootstrap_interval(values)
    return f"[{low:.{digits}f}, {high:.{digits}f}]" if np.isfinite(low) else ""


def _describe(name: str, conditions: Sequence[Condition]) -> str:
    settings = next(c.settings for c in conditions if c.name == name)
    told = ", ".join(f"{key.replace('_', ' ')} {json.dumps(value)}" for key, value in settings.items())
    return f"{name} ({told or 'scans as they are'})"


def _structures(evaluation: Evaluation) -> Iterator[str]:
    table = evaluation.table
    rows = table[(table["task"] == "segmentation") & (table["condition"] == evaluation.first)]
    if not len(rows):
        return
    yield f"<h2>Structures, condition {escape(evaluation.first)}</h2>"
    yield '<p class="quiet">A dot is a scan, the upright mark the mean, the bar its 95 % confidence interval.</p>'
    yield make_figure(
        encode_plot(draw_structures(rows)), "Dice, Hausdorff distance and volume error of every structure"
    )


def _curves(evaluation: Evaluation) -> Iterator[str]:
    sweeps: dict[str, list[Condition]] = {}
    for condition in evaluation.conditions:
        if condition.sweep:
            sweeps.setdefault(condition.sweep, []).append(condition)
    if not sweeps:
        return
    native = evaluation.first if any(not c.settings for c in evaluation.conditions) else ""
    yield "<h2>What makes it worse</h2>"
    dashed = " Dashed: scans as they are." if native else ""
    yield f'<p class="quiet">Mean over the scans with its 95 % confidence interval.{dashed}</p>'
    for first in range(0, len(evaluation.shown), CURVES):
        wanted = evaluation.shown[first : first + CURVES]
        figure = draw_curves(evaluation.headlines, wanted, sweeps, native)
        yield make_figure(encode_plot(figure), f"Curves of {', '.join(headline.title for headline in wanted)}")


def _conditions(evaluation: Evaluation) -> Iterator[str]:
    names = [c.name for c in evaluation.conditions]
    if len(names) < 2:
        return
    yield "<h2>Conditions</h2>"
    alone = [c.name for c in evaluation.conditions if not c.sweep]
    if len(alone) > 1:
        for first in range(0, len(evaluation.shown), CURVES):
            figure = draw_conditions(evaluation.headlines, evaluation.shown[first : first + CURVES], alone)
            yield make_figure(encode_plot(figure), "Conditions that are no curves")
    rows = []
    for name in names:
        own = evaluation.headlines[evaluation.headlines["condition"] == name]
        cells = [escape(name), str(own["scan"].nunique())]
        for headline in evaluation.shown:
            values = own[own["title"] == headline.title]["value"]
            interval = f' <span class="ci">{_interval(values, headline.digits)}</span>'
            cells.append(f"{values.mean():.{headline.digits}f}{interval}" if values.notna().any() else "n/a")
        rows.append(cells)
    columns = [f"{h.title}{f', {h.unit}' if h.unit else ''}" for h in evaluation.shown]
    yield make_table_html(["condition", "scans", *columns], rows)


def _worst(evaluation: Evaluation) -> Iterator[str]:
    if not evaluation.shown:
        return
    leading = evaluation.shown[0]
    values = evaluation.headlines[evaluation.headlines["title"] == leading.title]
    ordered = values.dropna(subset=["value"]).sort_values("value", ascending=leading.higher_is_better, kind="stable")
    names = {(case["scan"], case["condition"]): name for name, case in evaluation.cases.items()}
    yield "<h2>Look at the worst first</h2>"
    yield f'<p class="quiet">By {escape(leading.title)}. Each picture: the scan, the prediction, the reference; two axial '
    yield "slices, a coronal and a sagittal one. Right of the patient, and in sagittal slices anterior, is on the left.</p>"
    yield '<div class="scans">'
    for row in ordered.head(WORST).itertuples(index=False):
        name = names[row.scan, row.condition]
        picture = evaluation.output_dir / "cases" / f"{name}.webp"
        report = evaluation.output_dir / name / f"{name}_report.html"
        more = f', <a href="{escape(name)}/{escape(report.name)}">its page</a>' if report.is_file() else ""
        yield f"<div><p><b>{escape(str(row.scan))}</b>, {escape(str(row.condition))}: {row.value:.{leading.digits}f}{more}</p>"
        if picture.is_file():
            address = "data:image/webp;base64," + base64.b64encode(picture.read_bytes()).decode("ascii")
            yield make_figure(address, f"{name}: scan, prediction, reference")
        yield "</div>"
    yield "</div>"


def _all_measures(evaluation: Evaluation) -> Iterator[str]:
    summary = evaluation.summary[evaluation.summary["condition"] == evaluation.first]
    yield "<h2>All measures</h2>"
    yield f'<p>Every value of every scan: <a href="{METRICS_FILE}">{METRICS_FILE}</a>; statistics of every condition: '
    yield f'<a href="{SUMMARY_FILE}">{SUMMARY_FILE}</a>. Here those of condition {escape(evaluation.first)}.</p>'
    for task in dict.fromkeys(summary["task"]):
        own = summary[(summary["task"] == task) & (summary["n"] > 0)]
        rows = []
        for row in own.itertuples(index=False):
            interval = f"[{row.low:.3f}, {row.high:.3f}]" if np.isfinite(row.low) else ""
            where = "mean of all" if row.structure == ALL else str(row.structure).replace("_", " ")
            unit = "" if row.unit == "1" else row.unit
            told = [escape(str(cell)) for cell in (row.metric.replace("_", " "), where, row.side, unit)]
            rows.append(
                [*told, f"{row.n}", f"{row.mean:.3f}", f'<span class="ci">{interval}</span>', f"{row.median:.3f}"]
            )
        columns = ["measure", "where", "side", "unit", "scans", "mean", "95 % interval", "median"]
        table = make_table_html(columns, rows, text_columns=4)
        yield f"<details><summary>{escape(str(task))}: {_count(len(rows), 'measure')}</summary>{table}</details>"


def _method(evaluation: Evaluation) -> Iterator[str]:
    yield "<h2>How it was measured</h2>"
    used = sorted({key for c in evaluation.conditions for key in c.settings})
    if used:
        yield "<p>Conditions are made with the generator's own acquisition: inversion or contrast, gamma and bias field, slices "
        yield "with a Gaussian profile, noise, and linear interpolation back to the voxels. A scan draws the same under each.</p>"
        yield make_table_html(["setting", "meaning"], [[key, escape(SETTINGS[key])] for key in used], text_columns=2)
    metrics = list(dict.fromkeys(row.metric for row in evaluation.rows))
    yield make_table_html(["measure", "definition"], [[m, escape(define(m))] for m in metrics], text_columns=2)
    details = {**{c.name: dict(c.settings) for c in evaluation.conditions}}
    told = {"conditions": details, **evaluation.definition, "settings": asdict(evaluation.settings)}
    text = json.dumps(told, indent=1, default=str)
    yield f"<details><summary>All settings</summary><pre>{escape(text)}</pre></details>"
