"""The tables of an evaluation: every measure of every case, and their statistics over the scans."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

import pandas as pd
from numpy.typing import ArrayLike

from brainfm_monai.metrics import HEADLINES, MetricRow, summarise, write_frame
from brainfm_monai.metrics.segmentation import SIDES
from brainfm_monai.metrics.statistics import KEYS

METRICS_FILE, SUMMARY_FILE = "metrics.tsv", "summary.tsv"
ALL = "all"  # structure of a mean over structures
MEAN_DICE, MEAN_DICE_MERGED = "mean_dice", "mean_dice_merged"


def mean_dice_rows(rows: Sequence[MetricRow]) -> list[MetricRow]:
    """Rows of one case, and those of its mean Dice: left and right parts apart, and both sides merged.

    ``mean_dice`` is the mean over the left and right parts of the structures and over those that have no sides;
    ``mean_dice_merged`` that over all structures with left and right taken as one. What the reference lacks is in neither.
    """
    dice = [row for row in rows if row.metric == "dice" and not math.isnan(row.value)]
    paired = {row.structure for row in rows if row.side in ("left", "right")}
    parts = {
        MEAN_DICE: [row.value for row in dice if (row.side != "both") == (row.structure in paired)],
        MEAN_DICE_MERGED: [row.value for row in dice if row.side == "both"],
    }
    own = (rows[0].scan, rows[0].condition, "segmentation", ALL, "both")
    return [*rows, *(MetricRow(*own, name, fmean(values), "1") for name, values in parts.items() if values)]


def write_tables(output_dir: Path, table: pd.DataFrame) -> pd.DataFrame:
    """Write ``metrics.tsv``, one row for each measure of a case, and ``summary.tsv``, their statistics over the scans.

    The table is that of :func:`~brainfm_monai.metrics.make_table`, the summary that is returned that of
    :func:`~brainfm_monai.metrics.summarise`.
    """
    write_frame(output_dir / METRICS_FILE, table)
    summary = summarise(table)
    write_frame(output_dir / SUMMARY_FILE, summary)
    return summary


def write_dice_tables(output_dir: Path, dice: Mapping[str, ArrayLike], structures: Sequence[str]) -> None:
    """Write ``dice.tsv``, one row for each scan and structure, and ``dice_summary.tsv``, means over the scans.

    Args:
        output_dir: folder of both.
        dice: of each scan, shape (S, 3): left, right, both; NaN where a structure is absent or has no sides.
        structures: S names.
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

    Returns:
        A table with the columns of :func:`~brainfm_monai.metrics.make_table`, without undefined values; ``structure`` is the
        title of the headline.
    """
    titles = pd.DataFrame([(h.task, h.metric, h.title) for h in HEADLINES], columns=["task", "metric", "title"])
    rows = titles.merge(drop_merged_sides(table), on=["task", "metric"])
    rows = rows.assign(structure=rows["title"], side="both")
    return rows.groupby([*KEYS, "scan"], sort=False)["value"].mean().dropna().reset_index()
