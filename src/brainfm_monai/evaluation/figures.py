"""The plots of an evaluation: structures, images, and curves of what was made worse, with confidence bands."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from brainfm_monai.evaluation.conditions import Condition
from brainfm_monai.evaluation.definitions import Headline
from brainfm_monai.evaluation.tables import ALL
from brainfm_monai.metrics import bootstrap_interval

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["draw_conditions", "draw_curves", "draw_differences", "draw_structures", "encode_plot"]

SIDES = {"left": ("#2468b0", -0.22), "right": ("#d0681c", 0.22), "both": ("#555555", 0.0)}
STRUCTURE_METRICS = {"dice": "Dice", "hd95": "HD95, mm", "volume_error": "volume error, share"}
ROW_INCHES, PANEL_INCHES = 0.34, 3.6
CURVE_COLOUR = "#2468b0"


def encode_plot(figure: Figure) -> str:
    """The figure as a ``data:`` address of an SVG; the same figure gives the same text."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "evaluation"}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def draw_structures(table: pd.DataFrame) -> Figure:
    """Dice, HD95 and volume error of every structure: a dot for each scan, a bar for the mean and its interval.

    Args:
        table: rows of the segmentation under one condition.
    """
    rows = table[table["structure"] != ALL]
    names = list(dict.fromkeys(rows["structure"]))
    paired = set(rows[rows["side"] == "left"]["structure"])
    metrics = [metric for metric in STRUCTURE_METRICS if (rows["metric"] == metric).any()]
    figure = Figure(figsize=(2 + PANEL_INCHES * len(metrics), 0.9 + ROW_INCHES * len(names)))
    panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for axes, metric in zip(panels, metrics, strict=True):
        for place, name in enumerate(names):
            for side in ("left", "right") if name in paired else ("both",):
                chosen = rows[(rows["metric"] == metric) & (rows["structure"] == name) & (rows["side"] == side)]
                _draw_dots(axes, chosen["value"].to_numpy(dtype=np.float64), place + SIDES[side][1], SIDES[side][0])
        _tidy(axes, STRUCTURE_METRICS[metric])
        axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    panels[0].invert_yaxis()
    if metrics and metrics[0] == "dice":
        panels[0].set_xlim(right=1.0)
    handles = [
        matplotlib.lines.Line2D([], [], marker="o", ls="", color=c, label=side) for side, (c, _) in SIDES.items()
    ]
    handles[-1].set_label("no sides")
    figure.legend(handles=handles, loc="upper right", ncols=3, frameon=False, fontsize=8, bbox_to_anchor=(0.98, 1.0))
    return figure


def _draw_dots(axes: Axes, values: np.ndarray, place: float, colour: str) -> None:
    known = values[np.isfinite(values)]
    if not len(known):
        return
    axes.plot(known, np.full(len(known), place), "o", color=colour, ms=3, alpha=0.45, mew=0)
    low, high = bootstrap_interval(known)
    axes.plot([known.mean()], [place], "|", color=colour, ms=9, mew=2)
    if np.isfinite(low):
        axes.plot([low, high], [place, place], color=colour, lw=1.6)


def draw_curves(
    headlines: pd.DataFrame, wanted: Sequence[Headline], sweeps: Mapping[str, Sequence[Condition]], native: str
) -> Figure:
    """One row for each sweep and one panel for each headline: the mean over the scans with its 95 % interval.

    Args:
        headlines: columns scan, condition, title and value, see :func:`~brainfm_monai.evaluation.tables.make_headlines`.
        wanted: headlines that are drawn.
        sweeps: the conditions of every curve.
        native: condition of the scans as they are, whose mean is a dashed line; empty: none.
    """
    figure = Figure(figsize=(2.9 * len(wanted), 2.4 * len(sweeps)), layout="constrained")
    grid = figure.subplots(len(sweeps), len(wanted), squeeze=False)
    for line, (sweep, conditions) in enumerate(sweeps.items()):
        numbers = [c.value for c in conditions]
        numeric = all(isinstance(value, int | float) for value in numbers)
        places = np.array([float(value or 0) for value in numbers] if numeric else range(len(numbers)))
        for axes, headline in zip(grid[line], wanted, strict=True):
            rows = headlines[headlines["title"] == headline.title]
            means, lows, highs = _curve(rows, [c.name for c in conditions])
            axes.set_title(f"{headline.title}{f', {headline.unit}' if headline.unit else ''}", fontsize=9)
            if np.isnan(means).all():
                axes.set_axis_off()
                axes.text(0.5, 0.5, "no reference", ha="center", color="#888888", fontsize=8, transform=axes.transAxes)
                continue
            if numeric:
                axes.plot(places, means, "-o", color=CURVE_COLOUR, ms=4)
                axes.fill_between(places, lows, highs, color=CURVE_COLOUR, alpha=0.18, lw=0)
            else:
                axes.errorbar(
                    places, means, yerr=_bars(means, lows, highs), fmt="o", color=CURVE_COLOUR, ms=5, capsize=3
                )
                axes.set_xticks(places, [str(value) for value in numbers])
                axes.set_xlim(-0.5, len(numbers) - 0.5)
            if native:
                own = rows[rows["condition"] == native]["value"].mean()
                if np.isfinite(own):
                    axes.axhline(own, color="#888888", lw=0.9, ls="--")
            _tidy(axes, conditions[0].axis_label if numeric else "")
        grid[line][0].set_ylabel(sweep.replace("_", " "), fontsize=9, fontweight="bold")
    return figure


def _curve(rows: pd.DataFrame, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    points = []
    for name in names:
        values = rows[rows["condition"] == name]["value"].to_numpy(dtype=np.float64)
        known = values[np.isfinite(values)]
        points.append((known.mean() if len(known) else np.nan, *bootstrap_interval(known)))
    means, lows, highs = np.array(points, dtype=np.float64).T
    return means, np.where(np.isnan(lows), means, lows), np.where(np.isnan(highs), means, highs)


def _bars(means: np.ndarray, lows: np.ndarray, highs: np.ndarray) -> np.ndarray:
    return np.nan_to_num(np.stack([means - lows, highs - means])).clip(0)


def draw_conditions(headlines: pd.DataFrame, wanted: Sequence[Headline], conditions: Sequence[str]) -> Figure:
    """A panel for each headline with a row for each condition: a dot for each scan, the mean and its interval."""
    figure = Figure(figsize=(1.6 + 2.9 * len(wanted), 0.8 + ROW_INCHES * len(conditions)), layout="constrained")
    panels = figure.subplots(1, len(wanted), sharey=True, squeeze=False)[0]
    for axes, headline in zip(panels, wanted, strict=True):
        rows = headlines[headlines["title"] == headline.title]
        for place, name in enumerate(conditions):
            _draw_dots(axes, rows[rows["condition"] == name]["value"].to_numpy(dtype=np.float64), place, CURVE_COLOUR)
        _tidy(axes, "")
        axes.set_title(f"{headline.title}{f', {headline.unit}' if headline.unit else ''}", fontsize=9)
        axes.set_yticks(range(len(conditions)), conditions)
        axes.set_ylim(len(conditions) - 0.5, -0.5)
    return figure


def draw_differences(table: pd.DataFrame, labels: Sequence[str], title: str) -> Figure:
    """Mean differences of a comparison with their intervals, a row for each; full dots where Holm's P is below 0.05."""
    figure = Figure(figsize=(6.4, 0.8 + 0.26 * len(labels)), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(table.itertuples(index=False)):
        certain = row.p_holm < 0.05
        if np.isfinite(row.low):
            axes.plot([row.low, row.high], [place, place], color=CURVE_COLOUR, lw=1.6)
        axes.plot([row.difference], [place], "o", color=CURVE_COLOUR, mfc=CURVE_COLOUR if certain else "white", ms=5)
    axes.axvline(0, color="#888888", lw=0.9)
    _tidy(axes, title)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    return figure


def _tidy(axes: Axes, label: str) -> None:
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, length=0)
    axes.set_xlabel(label, fontsize=8.5)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
