"""The tables of an evaluation: every value, statistics over the scans, headlines, and two evaluations compared."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.stats import bootstrap, wilcoxon

from brainfm_monai.io import ABSENT, read_table, refuse_if, write_table
from brainfm_monai.metrics.scan import MEASURES, MetricRow

MEASURE = ["task", "structure", "side", "metric", "unit"]
KEYS = ["condition", *MEASURE]  # a statistic is taken within them, over the scans
FAMILY = ["condition", "task", "metric", "unit"]  # the tests of its structures and sides are corrected together
RESAMPLES = 2000  # DiCiccio and Efron, Bootstrap confidence intervals, Statistical Science 11, 1996
SMALLEST_BCA = 10  # scans; below, the acceleration rests on too few values, and the plain percentiles are taken
DEFINITIONS = {row["metric"]: row["definition"] for row in reversed(MEASURES)}  # the first of a name counts
# numbers at the top of the page: rows of measures.tsv, each for one task
HEADLINES = [
    {**row, "task": task, "title": row["headline"].format(task=task)}
    for tasks in dict.fromkeys(row["tasks"] for row in MEASURES)
    for task in tasks.split()
    for row in MEASURES
    if row["tasks"] == tasks and row["headline"]
]


def write_frame(path: str | Path, table: pd.DataFrame, digits: str = ".6g") -> None:
    """Write a pandas table as a TSV file; an undefined number is ``n/a``, the other ones have these digits."""
    shown = table.map(lambda x: x if not isinstance(x, float) else ABSENT if math.isnan(x) else format(x, digits))
    write_table(path, list(table.columns), shown.itertuples(index=False))


def read_metrics(path: str | Path) -> pd.DataFrame:
    """Read a table of :class:`MetricRow` from a TSV file; another table is a ValueError."""
    table = pd.DataFrame(read_table(path))
    columns = list(table.columns)
    refuse_if(columns != list(MetricRow._fields), f"{path}: the columns must be {list(MetricRow._fields)}", columns)
    value = pd.to_numeric(table["value"], errors="coerce")
    wrong = [*table["value"][value.isna() & (table["value"] != ABSENT)]]
    refuse_if(wrong, f"{path}: 'value' must be a number or {ABSENT}", ", ".join(map(repr, wrong[:1])))
    return table.assign(value=value.astype(float))


def bootstrap_interval(values: ArrayLike, seed: int = 0, resamples: int = RESAMPLES) -> tuple[float, float]:
    """95 % confidence interval of the mean by resampling the scans; the same values and seed give the same interval.

    From 10 values on it is bias-corrected and accelerated (BCa; Efron, Better bootstrap confidence intervals, Journal
    of the American Statistical Association 82, 1987), below that the percentiles of the resampled means. NaN are left
    out. Both ends are NaN for fewer than two values or an infinite one, and the value itself where all are equal.
    """
    sample = np.asarray(values, dtype=np.float64)
    sample = sample[~np.isnan(sample)]
    if len(sample) < 2 or np.isinf(sample).any():
        return np.nan, np.nan
    if np.ptp(sample) == 0:
        return sample[0], sample[0]
    method = "BCa" if len(sample) >= SMALLEST_BCA else "percentile"
    options = {"n_resamples": resamples, "batch": RESAMPLES, "random_state": seed}
    return tuple(bootstrap((sample,), np.mean, method=method, **options).confidence_interval)


def summarise(table: pd.DataFrame, resamples: int = RESAMPLES) -> pd.DataFrame:
    """Statistics over the scans, for each condition, task, structure, side and metric of a table of :class:`MetricRow`.

    One row for each, in the order in which they appear, has the keys, ``n`` (scans with a value), ``mean``, ``sd``
    (n - 1), ``median``, ``low`` and ``high``. What is undefined is left out of n and of every statistic.
    """
    groups = table.groupby(KEYS, sort=False, dropna=False)["value"]
    with np.errstate(invalid="ignore"):  # the deviation of infinite values is undefined
        summary = groups.agg(n="count", mean="mean", sd="std", median="median").reset_index()
    intervals = [bootstrap_interval(values, resamples=resamples) for _, values in groups]
    return summary.assign(low=[low for low, _ in intervals], high=[high for _, high in intervals])


def make_headlines(table: pd.DataFrame) -> pd.DataFrame:
    """One row of every case for each headline: the mean of its metric over structures and sides.

    The result has the columns of :class:`MetricRow`, without undefined values; ``structure`` is the headline's title.
    """
    part = pd.MultiIndex.from_frame(table[["task", "metric", "structure"]])
    merged = part.isin(part[table["side"] == "left"]) & (table["side"] == "both")  # a structure counts by its sides
    rows = pd.DataFrame(HEADLINES)[["task", "metric", "title"]].merge(table[~merged], on=["task", "metric"])
    groups = rows.assign(structure=rows["title"], side="both").groupby([*KEYS, "scan"], sort=False)
    return groups["value"].mean().dropna().reset_index()


def compare(first: pd.DataFrame, second: pd.DataFrame, seed: int = 0, resamples: int = RESAMPLES) -> pd.DataFrame:
    """Compare two tables of :class:`MetricRow` pair by pair; they have the same rows, each once, else a ValueError.

    One row for each condition, task, structure, side and metric has ``n`` (scans with a value in both), both means,
    ``difference`` (mean of second - first), ``low`` and ``high`` of it, ``p`` of the two-sided Wilcoxon signed-rank
    test without zeros, 1 where there is nothing else, and ``p_holm``, corrected over structures and sides of a metric.
    """
    keys = ["scan", *KEYS]
    merged = first.merge(second, on=keys, how="outer", sort=False, suffixes=("_first", "_second"), indicator=True)
    for wrong, rule in (
        (first[first.duplicated(keys)], "a row may be once in a table, found twice in 'first'"),
        (second[second.duplicated(keys)], "a row may be once in a table, found twice in 'second'"),
        (merged[merged["_merge"] != "both"], "both tables must have the same rows, found in one alone"),
    ):
        if len(wrong):
            raise ValueError(f"compare: {rule}: {' '.join(map(str, wrong[keys].iloc[0]))} ({len(wrong)} in all)")
    rows = []
    for key, group in merged.groupby(KEYS, sort=False, dropna=False):
        left, right = group[["value_first", "value_second"]].dropna().to_numpy().T
        # two infinite values are equal, and not inf - inf
        difference = np.subtract(right, left, out=np.zeros_like(left), where=left != right)
        means = [one.mean() if len(one) else np.nan for one in (left, right, difference)]
        p = wilcoxon(difference[difference != 0]).pvalue if difference.any() else 1.0 if len(left) else np.nan
        rows.append((*key, len(left), *means, *bootstrap_interval(difference, seed, resamples), p))
    result = pd.DataFrame(rows, columns=[*KEYS, "n", "mean_first", "mean_second", "difference", "low", "high", "p"])
    return result.assign(p_holm=result.groupby(FAMILY, sort=False)["p"].transform(adjust_holm))


def adjust_holm(p: pd.Series) -> pd.Series:
    """P values corrected for their number by Holm's step-down rule; NaN stay and do not count.

    Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6, 1979.
    """
    ordered = p.dropna().sort_values(kind="stable")
    return (ordered * np.arange(len(ordered), 0, -1)).cummax().clip(upper=1.0).reindex(p.index)
