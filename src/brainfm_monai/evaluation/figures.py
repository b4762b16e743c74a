"""The plots of an evaluation: structures as rows of dots, and curves of what was made worse."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from brainfm_monai.evaluation.conditions import Condition
from brainfm_monai.metrics.scan import ALL
from brainfm_monai.metrics.tables import Headline, bootstrap_interval, drop_merged_sides
from brainfm_monai.report import data_address

SIDES = {"left": ("#2468b0", -0.22), "right": ("#d0681c", 0.22), "both": ("#555555", 0.0)}  # colour, place in the row
ROW_INCHES, PANEL_INCHES = 0.34, 3.4
STRUCTURE_METRICS = {"dice": "Dice", "hd95": "HD95, mm", "volume_error": "volume error, share"}
Statistics = Mapping[tuple[str, str], Any]
CURVE_COLOUR, REFERENCE_COLOUR = "#2468b0", "#888888"


def draw_structures(table: pd.DataFrame) -> str:
    """Dice, HD95 and volume error of every structure in a table of one condition; empty without structures.

    A row has a dot for each scan, a mark for the mean and a bar for its 95 % interval. Returns the address of the
    picture, as all functions here.
    """
    table = drop_merged_sides(table[(table["task"] == "segmentation") & (table["structure"] != ALL)])
    table = table[table["metric"].isin(STRUCTURE_METRICS)]
    if table.empty:
        return ""
    rows = list(dict.fromkeys(table["structure"]))
    size = (2 + PANEL_INCHES * len(STRUCTURE_METRICS), 0.9 + ROW_INCHES * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(STRUCTURE_METRICS), sharey=True)
    for axes, (metric, title) in zip(panels, STRUCTURE_METRICS.items(), strict=True):
        _tidy(axes, title=title)
        axes.set_yticks(range(len(rows)), [row.replace("_", " ") for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        for (row, side), group in table[table["metric"] == metric].groupby(["structure", "side"]):
            values = group["value"][np.isfinite(group["value"])]
            colour, shift = SIDES[side]
            height = rows.index(row) + shift
            axes.plot(values, np.full(len(values), height), "o", color=colour, ms=3, alpha=0.45, mew=0)
            axes.plot(bootstrap_interval(values), [height, height], color=colour, lw=1.6)
            axes.plot([values.mean()], [height], "|", color=colour, ms=9, mew=2)
    names = {side: "no sides" if side == "both" else side for side in SIDES}
    handles = [Line2D([], [], marker="o", ls="", color=SIDES[side][0], label=name) for side, name in names.items()]
    figure.legend(handles=handles, loc="outside upper right", ncols=3, frameon=False, fontsize=8)
    return _encode(figure)


def draw_curves(statistics: Statistics, headlines: Sequence[Headline], conditions: Sequence[Condition]) -> str:
    """A row for each sweep of the conditions, a panel for each headline: means over the scans with intervals.

    The statistics are ``mean``, ``low`` and ``high`` by condition and title of the headline. A dashed line is the mean
    of the scans as they are. Empty without a sweep.
    """
    sweeps = {c.sweep: [one for one in conditions if one.sweep == c.sweep] for c in conditions if c.sweep}
    native = next((c.name for c in conditions if not c.settings), "")
    if not sweeps:
        return ""
    figure = Figure(figsize=(2.9 * len(headlines), 2.4 * len(sweeps)), layout="constrained")
    grid = figure.subplots(len(sweeps), len(headlines), squeeze=False)
    for line, (sweep, points_of) in zip(grid, sweeps.items(), strict=True):
        numeric = all(isinstance(c.value, int | float) for c in points_of)
        for axes, headline in zip(line, headlines, strict=True):
            _tidy(axes, points_of[0].axis_label if numeric else "", headline.label)
            rows = {c.value: statistics.get((c.name, headline.title)) for c in points_of}
            points = {value if numeric else str(value): row for value, row in rows.items() if row}
            if not points:
                axes.set_axis_off()
                axes.text(0.5, 0.5, "no reference", ha="center", color=REFERENCE_COLOUR, fontsize=8)
                continue
            means, low, high = np.array([(row.mean, row.low, row.high) for row in points.values()]).T
            bars = np.nan_to_num([means - low, high - means]).clip(min=0)  # of one scan there is none
            style = "-o" if numeric else "o"
            axes.errorbar(list(points), means, bars, fmt=style, color=CURVE_COLOUR, ms=4, capsize=3, lw=1.2)
            if (native, headline.title) in statistics:
                axes.axhline(statistics[native, headline.title].mean, color=REFERENCE_COLOUR, lw=0.9, ls="--")
        line[0].set_ylabel(sweep.replace("_", " "), fontsize=9, fontweight="bold")
    return _encode(figure)


def _tidy(axes: Axes, label: str = "", title: str = "") -> None:
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, length=0)
    axes.set_xlabel(label, fontsize=8.5)
    axes.set_title(title, fontsize=9)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _encode(figure: Figure) -> str:
    """The figure as the address of an SVG; the same figure gives the same text."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "evaluation"}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    return data_address(buffer.getvalue(), "image/svg+xml")
