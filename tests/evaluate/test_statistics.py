"""Coverage of the intervals, power and false positives of the paired tests, agreement with scipy."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy.stats import bootstrap, permutation_test, spearmanr

from unmask.evaluate.statistics import (
    _BLOCK,
    PairedDifference,
    _blocks,
    bootstrap_interval,
    holm,
    paired,
    paired_mean,
    score_of,
)

VALUES = arrays.arrays(np.float64, st.integers(2, 60), elements=st.floats(0, 1) | st.sampled_from([0.0, 0.5, 1.0]))
PAIRS = arrays.arrays(
    np.float64,
    st.tuples(st.integers(5, 60), st.just(2)),
    elements=st.floats(-1, 1).map(lambda value: round(value, 2)),
)
quick = settings(max_examples=25)


def scipy_rho(values: np.ndarray) -> float:
    rho: Any = spearmanr(values)[0]
    return float(rho)


def ranked(count: int, noise: float, seed: int) -> np.ndarray:
    """[count, 2]: predictions of gold scores with many ties, as in STS."""
    generator = np.random.default_rng(seed)
    gold = np.round(np.random.default_rng(count).uniform(0, 5, count) * 2) / 2
    return np.stack((gold + noise * generator.normal(size=count), gold), axis=1)


@quick
@given(VALUES, st.integers(0, 99))
def test_an_interval_of_a_mean_contains_it(values: np.ndarray, seed: int) -> None:
    bounds = bootstrap_interval(values, "mean", seed, resamples=200)
    assert bounds is not None
    assert 0 - 1e-9 <= bounds[0] <= score_of(values, "mean") <= bounds[1] <= 100 + 1e-9


@quick
@given(PAIRS, st.integers(0, 99))
def test_an_interval_of_a_rank_correlation_contains_it(values: np.ndarray, seed: int) -> None:
    bounds = bootstrap_interval(values, "spearman", seed, resamples=200)
    if min(len(set(column)) for column in values.T.tolist()) == 1:
        assert bounds is None
        return
    point = score_of(values, "spearman")
    assert point == pytest.approx(100 * scipy_rho(values))
    assert bounds is not None and -100.001 <= bounds[0] <= point <= bounds[1] <= 100.001


@quick
@given(VALUES, PAIRS)
def test_a_model_does_not_differ_from_itself(values: np.ndarray, pairs: np.ndarray) -> None:
    assert paired(values, values, "mean") == PairedDifference(0.0, (0.0, 0.0), 1.0, "noise")
    if min(len(set(column)) for column in pairs.T.tolist()) > 1:
        same = paired(pairs, pairs, "spearman")
        assert (same.delta, same.p_value, same.verdict) == (0.0, 1.0, "noise")


@quick
@given(VALUES, st.integers(0, 99))
def test_the_order_of_examples_is_nothing(values: np.ndarray, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(len(values))
    other = np.sqrt(values)
    assert bootstrap_interval(values, "mean", 3) == pytest.approx(bootstrap_interval(values[order], "mean", 3))
    one, two = paired(values, other, "mean"), paired(values[order], other[order], "mean")
    assert (*one.interval, one.p_value) == pytest.approx((*two.interval, two.p_value))


def test_the_order_of_pairs_is_nothing() -> None:
    a, b = ranked(300, 1.0, 1), ranked(300, 1.1, 2)
    order = np.random.default_rng(0).permutation(300)
    assert bootstrap_interval(a, "spearman") == bootstrap_interval(a[order], "spearman")
    assert paired(a, b, "spearman") == paired(a[order], b[order], "spearman")


def test_swapping_the_models_swaps_the_sign() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.random(200), generator.random(200) + 0.05
    one, two = paired(a, b, "mean"), paired(b, a, "mean")
    assert one.delta == pytest.approx(-two.delta) and one.p_value == pytest.approx(two.p_value, abs=0.02)
    assert one.interval == pytest.approx((-two.interval[1], -two.interval[0]), abs=0.5)


@pytest.mark.parametrize("examples", [10, 40])
def test_intervals_of_means_cover(examples: int) -> None:
    """95 % of intervals contain the true mean, even with the ten values of a clustering task."""
    generator = np.random.default_rng(5)
    covered = 0
    for trial in range(600):
        bounds = bootstrap_interval(generator.normal(0.5, 0.1, examples), "mean", trial, resamples=500)
        covered += bounds is not None and bounds[0] <= 50 <= bounds[1]
    assert 0.925 <= covered / 600 <= 0.975


def test_intervals_of_rank_correlations_cover() -> None:
    generator = np.random.default_rng(6)
    truth, covered = 0.7, 0
    expected = 100 * 6 / np.pi * np.arcsin(truth / 2)  # Spearman's rho of a bivariate normal
    for trial in range(400):
        sample = generator.multivariate_normal([0, 0], [[1, truth], [truth, 1]], 120)
        bounds = bootstrap_interval(sample, "spearman", trial, resamples=400)
        covered += bounds is not None and bounds[0] <= expected <= bounds[1]
    assert 0.92 <= covered / 400 <= 0.98


def test_equal_models_are_rarely_told_apart() -> None:
    generator = np.random.default_rng(7)
    false_alarms = {"mean": 0, "binary": 0, "spearman": 0}
    for trial in range(100):
        common = generator.random(80)
        a, b = (common + generator.normal(0, 0.2, 80) for _ in range(2))
        false_alarms["mean"] += paired(a, b, "mean", trial).verdict != "noise"
        false_alarms["binary"] += (
            paired((a > 0.5).astype(float), (b > 0.5).astype(float), "mean", trial).verdict != "noise"
        )
        pairs_a, pairs_b = np.stack((a, common), axis=1), np.stack((b, common), axis=1)
        false_alarms["spearman"] += paired(pairs_a, pairs_b, "spearman", trial).verdict != "noise"
    assert all(count / 100 <= 0.12 for count in false_alarms.values()), false_alarms


def test_real_differences_are_found() -> None:
    generator = np.random.default_rng(8)
    hard = generator.random(2000)
    a, b = (hard < 0.80).astype(float), (hard + generator.normal(0, 0.05, 2000) < 0.75).astype(float)
    better = paired(a, b, "mean")
    assert better.verdict == "better" and better.interval[0] > 0 and better.p_value < 0.001
    assert paired(ranked(800, 1.5, 1), ranked(800, 1.0, 2), "spearman").verdict == "worse"


def test_as_scipy_has_it() -> None:
    a, b = ranked(150, 1.0, 1), ranked(150, 2.0, 2)
    ours = bootstrap_interval(a, "spearman", resamples=4000)
    theirs = bootstrap(
        tuple(a.T), lambda x, y: spearmanr(x, y)[0], paired=True, vectorized=False, method="percentile",
        n_resamples=2000, rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    assert ours == pytest.approx((100 * theirs.low, 100 * theirs.high), abs=1.0)
    differences = a[:12, 0] - b[:12, 0]
    exact = permutation_test(
        (differences,), lambda x, axis: x.mean(axis), permutation_type="samples", vectorized=True, n_resamples=10_000
    )
    assert paired(differences, np.zeros(12), "mean").p_value == pytest.approx(exact.pvalue)
    # Beyond the exact test, flips of many distinct values and of few agree with it as far as chance allows.
    many = np.random.default_rng(1).normal(0.2, 1, 200)
    for values in (many, np.round(many)):
        sampled = permutation_test(
            (values,), lambda x, axis: x.mean(axis), permutation_type="samples", vectorized=True, n_resamples=9999,
            rng=np.random.default_rng(2),
        )  # fmt: skip
        assert paired(values, np.zeros(200), "mean").p_value == pytest.approx(sampled.pvalue, abs=0.015)


def test_holm() -> None:
    def test(p_value: float, delta: float = 1.0) -> PairedDifference:
        return PairedDifference(delta, (0.5, 1.5), p_value, "better")

    adjusted = holm([test(0.03), test(0.01, -1.0), test(0.04), test(0.9)])
    assert [round(one.p_value, 9) for one in adjusted] == [0.09, 0.04, 0.09, 0.9]
    assert [one.verdict for one in adjusted] == ["noise", "worse", "noise", "noise"]
    assert holm([]) == []


@quick
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_never_makes_a_p_value_smaller_or_swaps_two(p_values: list[float]) -> None:
    adjusted = [one.p_value for one in holm([PairedDifference(1.0, (0.0, 2.0), p, "noise") for p in p_values])]
    assert all(p <= after <= 1 for p, after in zip(p_values, adjusted, strict=True))
    assert [adjusted[i] for i in np.argsort(p_values)] == sorted(adjusted)


def test_the_mean_over_tasks() -> None:
    tasks = [(ranked(300, 1.0, s), ranked(300, 1.4, s + 9), "spearman") for s in range(3)]
    overall = paired_mean(tasks)  # pyright: ignore[reportArgumentType]
    each = [paired(a, b, "spearman") for a, b, _ in tasks]
    assert overall.delta == pytest.approx(np.mean([one.delta for one in each]))
    width = overall.interval[1] - overall.interval[0]
    assert overall.verdict == "better" and width < min(one.interval[1] - one.interval[0] for one in each)
    with pytest.raises(ValueError, match="no task"):
        paired_mean([])


def test_cases_without_an_interval_or_a_test() -> None:
    assert bootstrap_interval(np.array([0.5]), "mean") is None
    assert bootstrap_interval(np.ones((20, 2)), "spearman") is None
    with pytest.raises(ValueError, match="not finite"):
        bootstrap_interval(np.array([0.5, np.nan]), "mean")
    with pytest.raises(ValueError, match=r"shape \(n, 2\)"):
        bootstrap_interval(np.ones(5), "spearman")
    with pytest.raises(ValueError, match="cannot be paired"):
        paired(np.ones(5), np.ones(6), "mean")
    with pytest.raises(ValueError, match="gold scores differ"):
        paired(ranked(20, 1, 0), ranked(20, 1, 0)[::-1], "spearman")
    with pytest.raises(ValueError, match="constant"):
        paired(np.stack((np.ones(9), np.arange(9)), 1), np.stack((np.arange(9), np.arange(9)), 1), "spearman")


def test_rank_correlations_sort_the_sample_once_and_no_resample(monkeypatch: pytest.MonkeyPatch) -> None:
    sorted_lengths: list[int] = []
    argsort = np.argsort

    def counted(values: np.ndarray, **options: Any) -> np.ndarray:
        sorted_lengths.append(len(values))
        return argsort(values, **options)

    monkeypatch.setattr(np, "argsort", counted)
    bootstrap_interval(ranked(3000, 1.0, 0), "spearman", resamples=400)
    assert sorted_lengths == [3000, 3000]  # once per column, for all resamples


def test_working_arrays_stay_small() -> None:
    steps = _blocks(2_000, 3_000)
    assert sum(steps) == 2_000
    assert max(steps) * 3_000 <= _BLOCK
