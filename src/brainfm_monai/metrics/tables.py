"""One tidy table for every measure, what measures mean (``measures.tsv``), statistics, and two tables compared."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from brainfm_monai.io import ABSENT, read_table, refuse_if, write_table

if TYPE_CHECKING:
    import pandas as pd  # it and scipy are slow to import

KEYS = ["condition", "task", "structure", "side", "metric", "unit"]  # a statistic is taken within them, over the scans
FAMILY = ["condition", "task", "metric", "unit"]  # the tests of its structures and sides are corrected together
RESAMPLES = 2000  # DiCiccio and Efron, Bootstrap confidence intervals, Statistical Science 11, 1996
SMALLEST_BCA = 10  # scans; below, the acceleration rests on too few values, and the plain percentiles are taken


class MetricRow(NamedTuple):
    """One value of one scan."""

    scan: str
    condition: str  # how the scan was changed before it was predicted, ``native`` if it was not
    task: str
    structure: str  # structure, tissue or surface that was measured, ``n/a`` where there is none
    side: str  # ``left``, ``right`` or ``both``, ``n/a`` where the task has no sides
    metric: str
    value: float  # NaN where it is undefined
    unit: str  # ``1`` for a pure number


class Headline(NamedTuple):
    """A number at the top of the page: the mean of a metric over its structures and sides."""

    title: str
    task: str
    metric: str
    unit: str  # shown behind values; empty for pure numbers
    digits: int  # after the point
    higher_is_better: bool

    def format(self, value: float) -> str:
        """A value with the headline's digits."""
        return f"{value:.{self.digits}f}"


_MEASURES = read_table(Path(__file__).with_name("measures.tsv"))
_BY_METRIC = {row["metric"]: row for row in reversed(_MEASURES)}  # the first of a name counts
HEADLINES = tuple(
    Headline(title.format(task=task), task, row["metric"], row["unit"], int(row["digits"]), row["better"] == "higher")
    for tasks in dict.fromkeys(row["tasks"] for row in _MEASURES)
    for task in tasks.split()
    for row in _MEASURES
    if row["tasks"] == tasks and (title := row["headline"])
)


def define(metric: str) -> str:
    """Definition of a metric by its name; empty for an unknown one."""
    return _BY_METRIC[metric]["definition"] if metric in _BY_METRIC else ""


def unit_of(metric: str) -> str:
    """Unit of a metric of ``measures.tsv``, ``1`` for a pure number."""
    return _BY_METRIC[metric]["unit"] or "1"


def write_frame(path: str | Path, table: pd.DataFrame, digits: str = ".6g") -> None:
    """Write a pandas table as a TSV file; an undefined number is ``n/a``, the other ones have these digits."""
    rows = [
        [(ABSENT if math.isnan(cell) else format(cell, digits)) if isinstance(cell, float) else cell for cell in row]
        for row in table.itertuples(index=False)
    ]
    write_table(path, list(table.columns), rows)


def read_metrics(path: str | Path) -> pd.DataFrame:
    """Read a table of :class:`MetricRow` from a TSV file; another table is a ValueError."""
    import pandas as pd

    table = pd.DataFrame(read_table(path))
    columns = list(table.columns)
    refuse_if(columns != list(MetricRow._fields), f"{path}: the columns must be {list(MetricRow._fields)}", columns)
    value = pd.to_numeric(table["value"], errors="coerce")
    wrong = table["value"][value.isna() & (table["value"] != ABSENT)]
    if len(wrong):
        raise ValueError(f"{path}: 'value' must be a number or {ABSENT}, found {wrong.iloc[0]!r}")
    return table.assign(value=value.astype(float))


def bootstrap_interval(values: ArrayLike, seed: int = 0, resamples: int = RESAMPLES) -> tuple[float, float]:
    """95 % confidence interval of the mean by resampling the scans; the same values and seed give the same interval.

    From 10 values on it is bias-corrected and accelerated (BCa; Efron, Better bootstrap confidence intervals, Journal
    of the American Statistical Association 82, 1987), below that the percentiles of the resampled means. NaN are left
    out. Both ends are NaN for fewer than two values or an infinite one, and the value itself where all are equal.
    """
    sample = np.asarray(values, dtype=np.float64).ravel()
    sample = sample[~np.isnan(sample)]
    if len(sample) < 2 or np.isinf(sample).any():
        return np.nan, np.nan
    if np.ptp(sample) == 0:
        return float(sample[0]), float(sample[0])
    from scipy.stats import bootstrap

    method = "BCa" if len(sample) >= SMALLEST_BCA else "percentile"
    options = {"n_resamples": resamples, "batch": RESAMPLES, "random_state": seed}
    interval = bootstrap((sample,), np.mean, method=method, **options).confidence_interval
    return float(interval.low), float(interval.high)


def summarise(table: pd.DataFrame, resamples: int = RESAMPLES) -> pd.DataFrame:
    """Statistics over the scans, for each condition, task, structure, side and metric of a table of :class:`MetricRow`.

    Returns one row for each group, in the order in which they appear: the keys, ``n`` (scans with a value), ``mean``,
    ``sd`` (n - 1), ``median``, ``low`` and ``high``. What is undefined is left out of n and of every statistic.
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
    import pandas as pd

    titles = pd.DataFrame([(h.task, h.metric, h.title) for h in HEADLINES], columns=["task", "metric", "title"])
    part = pd.MultiIndex.from_frame(table[["task", "metric", "structure"]])
    merged = part.isin(part[table["side"] == "left"]) & (table["side"] == "both")  # a structure counts by its sides
    rows = titles.merge(table[~merged], on=["task", "metric"])
    rows = rows.assign(structure=rows["title"], side="both")
    return rows.groupby([*KEYS, "scan"], sort=False)["value"].mean().dropna().reset_index()


def compare(first: pd.DataFrame, second: pd.DataFrame, seed: int = 0, resamples: int = RESAMPLES) -> pd.DataFrame:
    """Compare two tables of :class:`MetricRow` pair by pair; they have the same rows, each once, else a ValueError.

    Returns one row for each condition, task, structure, side and metric: the keys, ``n`` (scans that have a value in
    both), ``mean_first``, ``mean_second``, ``difference`` (mean of second - first), ``low`` and ``high`` of it, ``p``
    of the two-sided Wilcoxon signed-rank test without zeros, 1 where there is nothing else, and ``p_holm``, corrected
    over the structures and sides of a metric.
    """
    import pandas as pd
    from scipy.stats import wilcoxon

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
        pairs = group.dropna(subset=["value_first", "value_second"])
        left, right = (pairs[f"value_{name}"].to_numpy(dtype=np.float64) for name in ("first", "second"))
        # two infinite values are equal, and not inf - inf
        difference = np.subtract(right, left, out=np.zeros_like(left), where=left != right)
        means = [float(one.mean()) if len(one) else np.nan for one in (left, right, difference)]
        interval = bootstrap_interval(difference, seed, resamples)
        p = float(wilcoxon(difference[difference != 0]).pvalue) if difference.any() else 1.0 if len(pairs) else np.nan
        rows.append((*key, len(pairs), *means, *interval, p))
    columns = [*KEYS, "n", "mean_first", "mean_second", "difference", "low", "high", "p"]
    result = pd.DataFrame(rows, columns=columns)
    corrected = result.groupby(FAMILY, sort=False)["p"].transform(lambda p: adjust_holm(p.to_numpy()))
    return result.assign(p_holm=corrected)


def adjust_holm(p: ArrayLike) -> np.ndarray:
    """P values corrected for their number by Holm's step-down rule; NaN stay and do not count.

    Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6, 1979.
    """
    values = np.asarray(p, dtype=np.float64)
    adjusted = np.full(values.shape, np.nan)
    order = np.argsort(values, kind="stable")[: np.count_nonzero(~np.isnan(values))]  # NaN are last
    steps = values[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted
