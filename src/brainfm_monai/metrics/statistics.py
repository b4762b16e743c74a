"""Means with confidence intervals, and the comparison of two results on the same scans."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

if TYPE_CHECKING:
    import pandas as pd

KEYS = ["condition", "task", "structure", "side", "metric", "unit"]  # a statistic is taken within them, over the scans
FAMILY = ["condition", "task", "metric", "unit"]  # the tests of its structures and sides are corrected together
RESAMPLES = 2000  # DiCiccio and Efron, Bootstrap confidence intervals, Statistical Science 11, 1996
SMALLEST_BCA = 10  # scans; below, the acceleration rests on too few values, and the plain percentiles are taken

Interval = tuple[float, float]


def bootstrap_interval(values: ArrayLike, seed: int = 0, resamples: int = RESAMPLES, level: float = 0.95) -> Interval:
    """Confidence interval of the mean by resampling the scans.

    From 10 values on it is bias-corrected and accelerated (BCa), below that the percentiles of the resampled means.

    Args:
        values: one for each scan; NaN are left out.
        seed: of the resampling: the same values and seed give the same interval.
        resamples: how often the scans are drawn again.
        level: share of intervals that should contain the true mean, in (0, 1).

    Returns:
        Its ends; NaN for fewer than two values or an infinite one, and a point where all values are equal.

    Reference:
        Efron, Better bootstrap confidence intervals, Journal of the American Statistical Association 82, 1987.
    """
    sample = np.asarray(values, dtype=np.float64).ravel()
    sample = sample[~np.isnan(sample)]
    if len(sample) < 2 or np.isinf(sample).any():
        return np.nan, np.nan
    if np.ptp(sample) == 0:
        return float(sample[0]), float(sample[0])
    from scipy.stats import bootstrap  # slow to import

    method = "BCa" if len(sample) >= SMALLEST_BCA else "percentile"
    options = {"n_resamples": resamples, "batch": RESAMPLES, "confidence_level": level, "random_state": seed}
    interval = bootstrap((sample,), np.mean, method=method, **options).confidence_interval
    return float(interval.low), float(interval.high)


def summarise(table: pd.DataFrame, resamples: int = RESAMPLES) -> pd.DataFrame:
    """Statistics over the scans, for each condition, task, structure, side and metric.

    Args:
        table: see :func:`~brainfm_monai.metrics.make_table`.
        resamples: see :func:`bootstrap_interval`.

    Returns:
        One row for each group, in the order in which they appear: the keys, ``n`` (scans with a value), ``mean``, ``sd`` (n - 1),
        ``median``, ``low`` and ``high``. What is undefined is left out of n and of every statistic.
    """
    groups = table.groupby(KEYS, sort=False, dropna=False)["value"]
    with np.errstate(invalid="ignore"):  # the deviation of infinite values is undefined
        summary = groups.agg(n="count", mean="mean", sd="std", median="median").reset_index()
    intervals = [bootstrap_interval(values, resamples=resamples) for _, values in groups]
    return summary.assign(low=[low for low, _ in intervals], high=[high for _, high in intervals])


def compare(first: pd.DataFrame, second: pd.DataFrame, seed: int = 0, resamples: int = RESAMPLES) -> pd.DataFrame:
    """Compare two results of the same scans, pair by pair.

    Args:
        first: see :func:`~brainfm_monai.metrics.make_table`.
        second: same scans, conditions, tasks, structures and metrics.
        seed: see :func:`bootstrap_interval`.
        resamples: see :func:`bootstrap_interval`.

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
        interval = bootstrap_interval(difference, seed, resamples)
        means = [float(one.mean()) if len(one) else np.nan for one in (left, right, difference)]
        rows.append((*key, len(pairs), *means, *interval, *compute_signed_rank(difference)))
    columns = [*KEYS, "n", "mean_first", "mean_second", "difference", "low", "high", "p", "effect_size"]
    result = pd.DataFrame(rows, columns=columns)
    corrected = result.groupby(FAMILY, sort=False)["p"].transform(lambda p: adjust_holm(p.to_numpy()))
    result.insert(columns.index("p") + 1, "p_holm", corrected)
    return result


def _pair(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
    """Rows of both tables side by side."""
    keys = ["scan", *KEYS]
    pairs = first.merge(second, on=keys, how="outer", sort=False, suffixes=("_first", "_second"), indicator=True)
    for rows, rule in (
        (first[first.duplicated(keys)], "a row may be once in a table, found twice in 'first'"),
        (second[second.duplicated(keys)], "a row may be once in a table, found twice in 'second'"),
        (pairs[pairs["_merge"] != "both"], "both tables must have the same rows, found in one alone"),
    ):
        if len(rows):
            raise ValueError(f"compare: {rule}: {' '.join(map(str, rows[keys].iloc[0]))} ({len(rows)} in all)")
    return pairs


def compute_signed_rank(differences: ArrayLike) -> tuple[float, float]:
    """Two-sided Wilcoxon signed-rank test of paired differences; zeros are left out.

    Args:
        differences: one for each pair, without NaN.

    Returns:
        The P value, 1 where no difference is other than zero, NaN where there is no pair; and the matched-pairs rank-biserial
        correlation in [-1, 1], the rank sum of positive differences minus that of negative ones over the sum of both.

    Reference:
        Wilcoxon, Individual comparisons by ranking methods, Biometrics Bulletin 1, 1945; Kerby, The simple difference formula,
        Comprehensive Psychology 3, 2014.
    """
    from scipy.stats import wilcoxon

    values = np.asarray(differences, dtype=np.float64).ravel()
    if not values.any():
        return (1.0, 0.0) if len(values) else (np.nan, np.nan)
    values = values[values != 0]
    positive = wilcoxon(values, alternative="greater").statistic  # sum of the ranks of positive differences
    return float(wilcoxon(values).pvalue), float(4 * positive / (len(values) * (len(values) + 1)) - 1)


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
