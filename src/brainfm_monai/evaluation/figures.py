"""The plots of an evaluation: structures, images, and curves of what was made worse, with confidence bands."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import ArrayLike

from brainfm_monai.evaluation.conditions import Condition
from brainfm_monai.evaluation.definitions import Headline
from brainfm_monai.metrics import bootstrap_interval
from brainfm_monai.report.html import data_address

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["draw_curves", "draw_differences", "draw_rows", "encode_plot"]

SIDES = {"left": ("#2468b0", -0.22), "right": ("#d0681c", 0.22), "both": ("#555555", 0.0)}  # colour, place in the row
ROW_INCHES, PANEL_INCHES = 0.34, 3.4
CURVE_COLOUR, REFERENCE_COLOUR = "#2468b0", "#888888"
LEVEL = 0.05  # of P values


def encode_plot(figure: Figure) -> str:
    """The figure as a ``data:`` address of an SVG; the same figure gives the same text."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "evaluation"}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    return data_address(buffer.getvalue(), "image/svg+xml")


def draw_rows(table: pd.DataFrame) -> Figure:
    """Panels with a row for each name: a dot for each scan, a mark for the mean and a bar for its 95 % interval.

    Args:
        table: columns ``panel``, ``row``, ``side`` (left, right or both) and ``value``.
    """
    panels, rows = (list(dict.fromkeys(table[column])) for column in ("panel", "row"))
    size = (2 + PANEL_INCHES * len(panels), 0.9 + ROW_INCHES * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True):
        _tidy(axes, title=panel)
        axes.set_yticks(range(len(rows)), [row.replace("_", " ") for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        for (row, side), group in table[table["panel"] == panel].groupby(["row", "side"]):
            values = group["value"].dropna().to_numpy(dtype=np.float64)
            values = values[np.isfinite(values)]
            if len(values):
                colour, shift = SIDES[side]
                height = rows.index(row) + shift
                mean, low, high = _mean_interval(values)
                axes.plot(values, np.full(len(values), height), "o", color=colour, ms=3, alpha=0.45, mew=0)
                axes.plot([mean], [height], "|", color=colour, ms=9, mew=2)
                axes.plot([low, high], [height, height], color=colour, lw=1.6)
    if set(table["side"]) != {"both"}:
        names = {side: "no sides" if side == "both" else side for side in SIDES}
        handles = [Line2D([], [], marker="o", ls="", color=SIDES[side][0], label=name) for side, name in names.items()]
        figure.legend(handles=handles, loc="outside upper right", ncols=3, frameon=False, fontsize=8)
    return figure


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
    for line, (sweep, conditions) in zip(grid, sweeps.items(), strict=True):
        numeric = all(isinstance(c.value, int | float) for c in conditions)
        positions = [c.value if numeric else number for number, c in enumerate(conditions)]
        for axes, headline in zip(line, wanted, strict=True):
            _tidy(axes, conditions[0].axis_label if numeric else "", headline.label)
            own = headlines[headlines["title"] == headline.title].set_index("condition")["value"]
            points = np.array([_mean_interval(own.get([c.name], [])) for c in conditions])
            means, below, above = points[:, 0], points[:, 0] - points[:, 1], points[:, 2] - points[:, 0]
            if np.isnan(means).all():
                axes.set_axis_off()
                axes.text(0.5, 0.5, "no reference", ha="center", color=REFERENCE_COLOUR, fontsize=8)
                continue
            style = "-o" if numeric else "o"
            axes.errorbar(positions, means, [below, above], fmt=style, color=CURVE_COLOUR, ms=4, capsize=3, lw=1.2)
            if not numeric:
                axes.set_xticks(positions, [str(c.value) for c in conditions])
                axes.set_xlim(-0.5, len(conditions) - 0.5)
            if native in own.index:
                axes.axhline(own[[native]].mean(), color=REFERENCE_COLOUR, lw=0.9, ls="--")
        line[0].set_ylabel(sweep.replace("_", " "), fontsize=9, fontweight="bold")
    return figure


def draw_differences(table: pd.DataFrame, title: str) -> Figure:
    """Mean differences of a comparison with their intervals, a row for each; full dots where Holm's P is below 0.05.

    Args:
        table: columns ``label``, ``difference``, ``low``, ``high`` and ``p_holm``.
        title: of the axis.
    """
    figure = Figure(figsize=(6.4, 0.8 + 0.26 * len(table)), layout="constrained")
    axes = figure.subplots()
    _tidy(axes, title)
    for height, row in enumerate(table.itertuples(index=False)):
        axes.plot([row.low, row.high], [height, height], color=CURVE_COLOUR, lw=1.6)
        face = CURVE_COLOUR if row.p_holm < LEVEL else "white"
        axes.plot([row.difference], [height], "o", color=CURVE_COLOUR, mfc=face, ms=5)
    axes.axvline(0, color=REFERENCE_COLOUR, lw=0.9)
    axes.set_yticks(range(len(table)), list(table["label"]))
    axes.set_ylim(len(table) - 0.5, -0.5)
    return figure


def _mean_interval(values: ArrayLike) -> tuple[float, float, float]:
    """Mean and interval of the finite values; the interval of fewer than two is the mean, of none NaN."""
    finite = np.asarray(values, dtype=np.float64)
    finite = finite[np.isfinite(finite)]
    if not len(finite):
        return np.nan, np.nan, np.nan
    mean = float(finite.mean())
    low, high = bootstrap_interval(finite)
    return (mean, low, high) if np.isfinite(low) else (mean, mean, mean)


def _tidy(axes: Axes, label: str = "", title: str = "") -> None:
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, length=0)
    axes.set_xlabel(label, fontsize=8.5)
    axes.set_title(title, fontsize=9)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
