"""Intervals, summaries and paired comparison: against scipy, by hand, and how often an interval holds the truth."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy.stats import bootstrap, wilcoxon

from brainfm_monai.evaluation.tables import adjust_holm, bootstrap_interval, compare, summarise
from brainfm_monai.metrics.scan import MetricRow


def make_results(values: dict[str, list[float]], metric: str = "dice") -> pd.DataFrame:
    """One row for each scan and structure."""
    return pd.DataFrame(
        MetricRow(f"sub-{i:02d}", "native", "segmentation", structure, "both", metric, value, "1")
        for structure, of_scans in values.items()
        for i, value in enumerate(of_scans)
    )


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    samples = np.random.default_rng(1).normal(3.0, 2.0, size=(300, 20))
    held = 0
    for values in samples:
        low, high = bootstrap_interval(values, seed=2, resamples=500)
        held += low <= 3.0 <= high
    # 0.95 is what an exact interval gives, with a standard error of 0.013; with 20 scans the bootstrap's are a little too narrow
    assert 0.89 < held / 300 < 0.98


@pytest.mark.parametrize(("count", "method"), [(12, "BCa"), (5, "percentile")])
def test_the_interval_is_scipys(count: int, method: str) -> None:
    values = np.random.default_rng(3).gamma(1.0, size=count)
    expected = bootstrap((values,), np.mean, n_resamples=800, method=method, random_state=7).confidence_interval
    assert bootstrap_interval([*values, math.nan], seed=7, resamples=800) == pytest.approx(tuple(expected))
    assert bootstrap_interval(values, seed=7, resamples=800) == bootstrap_interval(values, seed=7, resamples=800)
    assert bootstrap_interval(values, seed=8, resamples=800) != bootstrap_interval(values, seed=7, resamples=800)


def test_the_interval_leaves_numpys_generator_alone() -> None:
    before = np.random.get_state()[1].copy()  # type: ignore[index] # noqa: NPY002
    bootstrap_interval([1.0, 2.0, 4.0], seed=0)
    assert (np.random.get_state()[1] == before).all()  # type: ignore[index] # noqa: NPY002


@pytest.mark.parametrize("values", [[], [0.5], [math.nan, 0.5], [1.0, math.inf, 2.0]])
def test_there_is_no_interval_of_too_little(values: list[float]) -> None:
    assert all(math.isnan(end) for end in bootstrap_interval(values))


def test_equal_values_have_an_interval_without_width() -> None:
    assert bootstrap_interval([0.5] * 12) == (0.5, 0.5)


def test_the_summary_leaves_out_what_is_undefined() -> None:
    table = make_results({"thalamus": [0.8, 0.9, math.nan, 0.7], "amygdala": [math.nan] * 4, "caudate": [0.5] * 4})
    summary = summarise(table, resamples=200)
    assert summary["structure"].tolist() == ["thalamus", "amygdala", "caudate"]
    assert summary["n"].tolist() == [3, 0, 4]
    first, second, third = (row for _, row in summary.iterrows())
    assert first[["mean", "sd", "median"]].tolist() == pytest.approx([0.8, 0.1, 0.8])
    assert 0.69 < first["low"] < 0.8 < first["high"] < 0.91
    assert second[["mean", "sd", "median", "low", "high"]].isna().all()
    assert third[["sd", "low", "high"]].tolist() == [0, 0.5, 0.5]


def test_conditions_and_metrics_are_summarised_apart() -> None:
    first, second = make_results({"thalamus": [0.8, 0.9]}), make_results({"thalamus": [2.0, 4.0]}, "hd95")
    table = pd.concat([first, second, first.assign(condition="5 mm", value=0.1)])
    summary = summarise(table, resamples=200).set_index(["condition", "metric"])["mean"]
    assert summary.to_dict() == pytest.approx(
        {("native", "dice"): 0.85, ("native", "hd95"): 3.0, ("5 mm", "dice"): 0.1}
    )


def test_pairs_are_compared_as_scipy_does() -> None:
    generator = np.random.default_rng(4)
    old = {"thalamus": list(generator.uniform(0.6, 0.8, 15)), "caudate": list(generator.uniform(0.6, 0.8, 15))}
    new = {
        "thalamus": [v + 0.05 for v in old["thalamus"]],
        "caudate": list(np.array(old["caudate"]) + generator.normal(0, 0.1, 15)),
    }
    old["thalamus"][3] = math.nan
    shuffled = make_results(new).sample(frac=1, random_state=1)
    result = compare(make_results(old), shuffled, seed=5, resamples=300).set_index("structure")
    assert result["n"].to_dict() == {"thalamus": 14, "caudate": 15}

    row = result.loc["thalamus"]
    assert row["difference"] == pytest.approx(0.05)
    assert row["mean_second"] - row["mean_first"] == pytest.approx(0.05)
    difference = np.array(new["caudate"]) - np.array(old["caudate"])
    row = result.loc["caudate"]
    assert row["p"] == pytest.approx(wilcoxon(new["caudate"], old["caudate"]).pvalue)
    assert (row["low"], row["high"]) == pytest.approx(bootstrap_interval(difference, seed=5, resamples=300))
    smaller, larger = sorted(result["p"])
    assert sorted(result["p_holm"]) == pytest.approx([2 * smaller, max(2 * smaller, larger)])


def test_the_correction_is_within_a_metric() -> None:
    generator = np.random.default_rng(6)
    first, second = (
        pd.concat(
            [make_results({n: list(generator.normal(size=8)) for n in "abc"}, metric) for metric in ("dice", "hd95")]
        )
        for _ in range(2)
    )
    result = compare(first, second, resamples=100)
    for _, group in result.groupby("metric"):
        assert group["p_holm"].tolist() == pytest.approx(adjust_holm(group["p"]).tolist())
    assert result["p_holm"].tolist() != pytest.approx(adjust_holm(result["p"]).tolist())


def test_the_correction_is_holms() -> None:
    assert adjust_holm(pd.Series([0.01, 0.04, math.nan, 0.03, 0.005])).tolist() == pytest.approx(
        [0.03, 0.06, math.nan, 0.06, 0.02], nan_ok=True
    )
    assert adjust_holm(pd.Series([0.6, 0.7])).tolist() == [1, 1]


def test_a_result_compared_with_itself_does_not_differ() -> None:
    table = make_results({"thalamus": [0.8, 0.9, 0.7], "caudate": [math.nan] * 3, "image": [30.0, math.inf, 20.0]})
    result = compare(table, table, resamples=100).set_index("structure")
    assert result.loc["thalamus", ["difference", "low", "high", "p", "p_holm"]].tolist() == [0, 0, 0, 1, 1]
    assert result.loc["caudate", ["difference", "low", "p", "p_holm"]].isna().all()
    assert result.loc["image", "difference"] == 0


def test_results_of_other_scans_cannot_be_compared() -> None:
    table = make_results({"thalamus": [0.8, 0.9, 0.7], "caudate": [0.8, 0.9, 0.7]})
    with pytest.raises(
        ValueError, match=r"^compare: .* must have the same rows, found in one alone: sub-02 native .* \(2 in all\)$"
    ):
        compare(table, table[table["scan"] != "sub-02"])
    with pytest.raises(
        ValueError,
        match=r"^compare: .* same rows, found in one alone: sub-01 native segmentation caudate .* \(1 in all\)$",
    ):
        compare(table, table.drop(index=4))
    with pytest.raises(
        ValueError, match=r"^compare: a row may be once in a table, found twice in 'second': sub-00 native"
    ):
        compare(table, pd.concat([table, table.iloc[:1]]))
