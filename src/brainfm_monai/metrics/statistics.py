"""Means with confidence intervals, and the comparison of two results on the same scans."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Interval", "SignedRank", "adjust_holm", "bootstrap_interval", "compare", "compute_signed_rank", "summarise"]

KEYS = ["condition", "task", "structure", "side", "metric", "unit"]  # a statistic is taken within them, over the scans
FAMILY = [
    "condition",
    "task",
    "metric",
    "unit",
]  # the tests of all structures and sides within it are corrected together
RESAMPLES = 2000  # DiCiccio and Efron, Bootstrap confidence intervals, Statistical Science 11, 1996
SMALLEST_BCA = 10  # scans; below, the acceleration rests on too few values, and the plain percentiles are taken


class Interval(NamedTuple):
    """Ends of a confidence interval, NaN where it is undefined."""

    low: float
    high: float


class SignedRank(NamedTuple):
    """P value of a signed-rank test, and the matched-pairs rank-biserial correlation in [-1, 1]."""

    p: float
    effect_size: float


def bootstrap_interval(values: ArrayLike, seed: int = 0, resamples: int = RESAMPLES, level: float = 0.95) -> Interval:
    """Confidence interval of the mean by resampling the scans.

    From 10 values on it is bias-corrected and accelerated (BCa), below that the percentiles of the resampled means.

    Args:
        values: one for each scan; NaN are left out.
        seed: of the resampling: the same values and seed give the same interval.
        resamples: how often the scans are drawn again.
        level: share of intervals that should contain the true mean, in (0, 1).

    Returns:
        The interval; NaN for fewer than two values or an infinite one, and a point where all values are equal.

    Reference:
        Efron, Better bootstrap confidence intervals, Journal of the American Statistical Association 82, 1987.
    """
    sample = np.asarray(values, dtype=np.float64).ravel()
    sample = sample[~np.isnan(sample)]
    if len(sample) < 2 or np.isinf(sample).any():
        return Interval(np.nan, np.nan)
    if np.ptp(sample) == 0:
        return Interval(float(sample[0]), float(sample[0]))
    from scipy.stats import bootstrap  # an optional dependency

    method = "BCa" if len(sample) >= SMALLEST_BCA else "percentile"
    options = {"n_resamples": resamples, "batch": RESAMPLES, "confidence_level": level, "random_state": seed}
    interval = bootstrap((sample,), np.mean, method=method, **options).confidence_interval
    return Interval(float(interval.low), float(interval.high))


def summarise(table: pd.DataFrame, seed: int = 0, resamples: int = RESAMPLES, level: float = 0.95) -> pd.DataFrame:
    """Statistics over the scans, for each condition, task, structure, side and metric.

    Args:
        table: see :func:`~brainfm_monai.metrics.make_table`.
        seed: see :func:`bootstrap_interval`.
        resamples: see :func:`bootstrap_interval`.
        level: of the confidence intervals of the mean.

    Returns:
        One row for each group, in the order in which they appear: the keys, ``n`` (scans with a value), ``mean``, ``sd`` (n - 1),
        ``median``, ``low`` and ``high``. What is undefined is left out of n and of every statistic.
    """
    groups = table.groupby(KEYS, sort=False, dropna=False)["value"]
    with np.errstate(invalid="ignore"):  # the deviation of infinite values is undefined
        summary = groups.agg(n="count", mean="mean", sd="std", median="median").reset_index()
    intervals = [bootstrap_interval(values, seed, resamples, level) for _, values in groups]
    return summary.assign(low=[i.low for i in intervals], high=[i.high for i in intervals])


def compare(
    first: pd.DataFrame, second: pd.DataFrame, seed: int = 0, resamples: int = RESAMPLES, level: float = 0.95
) -> pd.DataFrame:
    """Compare two results of the same scans, pair by pair.

    Args:
        first: see :func:`~brainfm_monai.metrics.make_table`.
        second: same scans, conditions, tasks, structures and metrics.
        seed: see :func:`bootstrap_interval`.
        resamples: see :func:`bootstrap_interval`.
        level: of the confidence intervals of the mean difference.

    Returns:
        One row for each condition, task, structure, side and metric: the keys, ``n`` (scans that have a value in both),
        ``mean_first``, ``mean_second``, ``difference`` (mean of second - first), ``low`` and ``high`` of it, ``p`` of the
        Wilcoxon signed-rank test, ``p_holm``, corrected over the structures and sides of a metric, and ``effect_size``, the
        rank-biserial correlation, positive where the second is larger.

    Raises:
        ValueError: if the tables do not have the same rows, or one has a row twice.
    """
    import pandas as pd

    rows = []
    for key, group in _pair(first, second).groupby(KEYS, sort=False, dropna=False):
        pairs = group.dropna(subset=["value_first", "value_second"])
        left, right = (pairs[f"value_{name}"].to_numpy(dtype=np.float64) for name in ("first", "second"))
        # two infinite values are equal, and not inf - inf
        difference = np.subtract(right, left, out=np.zeros_like(left), where=left != right)
        interval = bootstrap_interval(difference, seed, resamples, level)
        means = [float(one.mean()) if len(one) else np.nan for one in (left, right, difference)]
        rows.append((*key, len(pairs), *means, *interval, *compute_signed_rank(difference)))
    columns = [*KEYS, "n", "mean_first", "mean_second", "difference", "low", "high", "p", "effect_size"]
    result = pd.DataFrame(rows, columns=columns)
    corrected = result.groupby(FAMILY, sort=False)["p"].transform(lambda p: adjust_holm(p.to_numpy()))
    result.insert(columns.index("p") + 1, "p_holm", corrected)
    return result


def compute_signed_rank(differences: ArrayLike) -> SignedRank:
    """Two-sided Wilcoxon signed-rank test of paired differences; zeros are left out.

    Args:
        differences: one for each pair, without NaN.

    Returns:
        The P value, 1 where no difference is other than zero, NaN where there is no pair; and the matched-pairs rank-biserial
        correlation, the rank sum of positive differences minus that of negative ones over the sum of both.

    Reference:
        Wilcoxon, Individual comparisons by ranking methods, Biometrics Bulletin 1, 1945; Kerby, The simple difference formula,
        Comprehensive Psychology 3, 2014.
    """
    from scipy.stats import wilcoxon

    values = np.asarray(differences, dtype=np.float64).ravel()
    if not len(values):
        return SignedRank(np.nan, np.nan)
    values = values[values != 0]
    if not len(values):
        return SignedRank(1.0, 0.0)
    positive = wilcoxon(values, alternative="greater").statistic  # sum of the ranks of positive differences
    return SignedRank(float(wilcoxon(values).pvalue), float(4 * positive / (len(values) * (len(values) + 1)) - 1))


def adjust_holm(p: ArrayLike) -> np.ndarray:
    """P values corrected for their number by Holm's step-down rule; NaN stay and do not count.

    Reference:
        Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6, 1979.
    """
    values = np.asarray(p, dtype=np.float64)
    adjusted = np.full(values.shape, np.nan)
    order = np.argsort(values, kind="stable")[: np.count_nonzero(~np.isnan(values))]  # NaN are last
    steps = values[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted


def _pair(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
    """Rows of both tables side by side."""
    keys = ["scan", *KEYS]
    for name, table in (("first", first), ("second", second)):
        repeated = table[table.duplicated(keys)]
        if len(repeated):
            raise ValueError(f"compare: a row may be once in a table, found twice in '{name}': {_name(repeated, keys)}")
    scans = set(first["scan"]) ^ set(second["scan"])
    if scans:
        raise ValueError(f"compare: both tables must have the same scans, found in one alone: {sorted(scans)}")
    pairs = first.merge(second, on=keys, how="outer", sort=False, suffixes=("_first", "_second"), indicator=True)
    alone = pairs[pairs["_merge"] != "both"]
    if len(alone):
        raise ValueError(f"compare: both tables must have the same rows, found in one alone: {_name(alone, keys)}")
    return pairs


def _name(rows: pd.DataFrame, keys: Sequence[str]) -> str:
    return f"{' '.join(str(rows.iloc[0][key]) for key in keys)} ({len(rows)} in all)"
