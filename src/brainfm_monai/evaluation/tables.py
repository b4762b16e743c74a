"""The tables of an evaluation beside ``metrics.tsv`` and ``summary.tsv``: Dice of scans as they are, headlines of every case."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
from numpy.typing import ArrayLike

from brainfm_monai.metrics import HEADLINES, write_frame
from brainfm_monai.metrics.segmentation import SIDES
from brainfm_monai.metrics.tables import KEYS

METRICS_FILE, SUMMARY_FILE = "metrics.tsv", "summary.tsv"


def write_dice_tables(output_dir: Path, dice: Mapping[str, ArrayLike], structures: Sequence[str]) -> None:
    """Write ``dice.tsv``, one row for each scan and structure, and ``dice_summary.tsv``, means over the scans.

    The Dice of each scan has the shape (S, 3): S structures by left, right, both; NaN where one is absent or has no sides.
    """
    scans = {scan: pd.DataFrame(values, index=structures, columns=SIDES) for scan, values in dice.items()}
    table = pd.concat(scans, names=["scan", "structure"])
    write_frame(output_dir / "dice.tsv", table.reset_index(), ".4f")
    by_structure = table.groupby("structure", sort=False)
    summary = by_structure.mean().assign(scans=by_structure["both"].count())
    # the mean is that over left and right parts, and structures without sides; first of each scan, then over the scans
    without_sides = table[["left", "right"]].isna().all(axis=1)
    parts = table.assign(both=table["both"].where(without_sides)).stack().groupby("scan")
    summary.loc["mean"] = [math.nan, math.nan, parts.mean().mean(), len(dice)]
    write_frame(output_dir / "dice_summary.tsv", summary.astype({"scans": int}).reset_index(names="structure"), ".4f")


def drop_merged_sides(table: pd.DataFrame) -> pd.DataFrame:
    """Rows without those that merge a left and a right part of the table: a structure counts by its sides."""
    part = pd.MultiIndex.from_frame(table[["task", "metric", "structure"]])
    return table[~(part.isin(part[table["side"] == "left"]) & (table["side"] == "both"))]


def make_headlines(table: pd.DataFrame) -> pd.DataFrame:
    """One row of every case for each headline: the mean of its metric over structures and sides.

    The result has the columns of :class:`~brainfm_monai.metrics.MetricRow`, without undefined values; ``structure`` is the title
    of the headline.
    """
    titles = pd.DataFrame([(h.task, h.metric, h.title) for h in HEADLINES], columns=["task", "metric", "title"])
    rows = titles.merge(drop_merged_sides(table), on=["task", "metric"])
    rows = rows.assign(structure=rows["title"], side="both")
    return rows.groupby([*KEYS, "scan"], sort=False)["value"].mean().dropna().reset_index()
