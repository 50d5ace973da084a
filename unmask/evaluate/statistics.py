"""Bootstrap intervals and paired tests over per-example values: is a difference more than noise?

The examples of a task are a sample; the tasks themselves are fixed. Results depend on the values and the seed alone:
examples are sorted first, so shuffling a file changes no figure.

Intervals are percentile intervals, with the percentiles moved outwards as Hesterberg (2015, arXiv 1411.5279,
section 5.2) proposes for small samples. For the thousands of examples of most tasks that changes nothing; for the ten
experiments of a clustering task it corrects the narrowness of the bootstrap. BCa was not chosen: its correction for
skew is within the resampling error for these statistics, and a percentile interval can be read off one histogram.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from unmask.evaluate.results import Statistic

Verdict = Literal["better", "worse", "noise"]

RESAMPLES = 2_000
FLIPS = 10_000
SIGNIFICANCE = 0.05

# Numbers in one working array: small enough to stay in a core's cache.
_BLOCK = 1 << 18
# Up to this many distinct values, drawing the count of each is the same as drawing examples, and far quicker.
_FEW_VALUES = 64
_EXACT_FLIPS = 13


@dataclass(frozen=True)
class PairedDifference:
    """The difference between two models on the same examples, first minus second.

    Attributes:
        delta: difference of the scores, in points (0-100 scale).
        interval: 95 % bootstrap interval of `delta`.
        p_value: two-sided probability of so large a difference between equally good models; after `holm`,
            adjusted for the number of tests.
        verdict: "better" or "worse" if `p_value` is below 0.05, else "noise".
    """

    delta: float
    interval: tuple[float, float]
    p_value: float
    verdict: Verdict


def score_of(values: np.ndarray, statistic: Statistic) -> float:
    """Compute the score (0-100) of per-example values: [n] for "mean", [n, 2] for "spearman"."""
    values = _checked(values, statistic)
    if statistic == "mean":
        return 100 * float(values.mean())
    ranks = [_centred_ranks(column) for column in values.T]
    return 100 * float(_correlation(np.ones(len(values)), *ranks))


def bootstrap_interval(
    values: np.ndarray, statistic: Statistic, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float] | None:
    """Compute the 95 % bootstrap interval of a score, 0-100 scale. It always contains the score itself.

    Args:
        values: per-example values, [n] for "mean", [n, 2] (predicted, gold) for "spearman".
        statistic: rule by which the score follows from them.
        seed: same values and seed, same interval.
        resamples: bootstrap samples.

    Returns:
        None for fewer than two examples, or if a column is constant, so that no rank correlation exists.

    Raises:
        ValueError: the shape does not fit the statistic, or a value is not finite.
    """
    values = _checked(values, statistic)
    if len(values) < 2:
        return None
    generator = np.random.default_rng(seed)
    if statistic == "mean":
        samples = _resampled_means(np.sort(values), resamples, generator)
    else:
        samples = _resampled_correlations(values[np.lexsort(values.T)], resamples, generator)[0]
    return _interval(samples, score_of(values, statistic) / 100, len(values))


def paired(values_a: np.ndarray, values_b: np.ndarray, statistic: Statistic, seed: int = 0) -> PairedDifference:
    """Test if model A is better than model B on one task.

    The interval is a paired bootstrap: both models are scored on the same resampled examples. The p-value of a mean
    comes from flipping the signs of the differences at random (exact up to 13 differences). The only assumption is that
    equally good models could swap their results on any example. Rank correlations have no difference per example,
    so theirs comes from the bootstrap distribution centred at zero.

    Args:
        values_a, values_b: per-example values in the same order, [n] or [n, 2] as for `bootstrap_interval`.
        statistic: rule by which a score follows from them.
        seed: seed of the resampling.

    Raises:
        ValueError: shapes differ or do not fit the statistic; gold scores differ; fewer than two examples; a rank
            correlation does not exist.
    """
    delta, samples, differences = _paired_samples(values_a, values_b, statistic, np.random.default_rng(seed))
    if statistic == "mean":
        p_value = _sign_flip(differences, np.random.default_rng((seed, 1)))
    else:
        p_value = _centred_p_value(samples, delta)
    return _judged(delta, samples, len(differences), p_value)


def paired_mean(
    tasks: Sequence[tuple[np.ndarray, np.ndarray, Statistic]],
    seed: int = 0,
) -> PairedDifference:
    """Test if model A is better than model B on the average of several tasks.

    Each task's examples are resampled separately. The interval is that of the average over *these* tasks and says
    nothing about tasks that were not run.

    Raises:
        ValueError: as `paired`, or there is no task.
    """
    if not tasks:
        raise ValueError("no task to average over")
    drawn = [_paired_samples(*task, np.random.default_rng((seed, index))) for index, task in enumerate(tasks)]
    delta = float(np.mean([part[0] for part in drawn]))
    samples = np.mean([part[1] for part in drawn], axis=0)
    examples = min(len(part[2]) for part in drawn)
    return _judged(delta, samples, examples, _centred_p_value(samples, delta))


def holm(tests: Sequence[PairedDifference]) -> list[PairedDifference]:
    """Return the tests with p-values adjusted for their number (Holm 1979), and verdicts to match.

    The probability of any false "better" or "worse" stays below 5 %.
    """
    adjusted = list(tests)
    highest = 0.0
    for rank, index in enumerate(sorted(range(len(tests)), key=lambda i: tests[i].p_value)):
        highest = max(highest, min(1.0, (len(tests) - rank) * tests[index].p_value))
        adjusted[index] = replace(tests[index], p_value=highest, verdict=_verdict(tests[index].delta, highest))
    return adjusted


def _checked(values: np.ndarray, statistic: Statistic) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if statistic == "mean" and values.ndim != 1:
        raise ValueError(f'statistic "mean" needs values of shape (n,), not {values.shape}')
    if statistic == "spearman" and (values.ndim != 2 or values.shape[1] != 2):
        raise ValueError(f'statistic "spearman" needs values of shape (n, 2), not {values.shape}')
    if not np.isfinite(values).all():
        raise ValueError(f"{int((~np.isfinite(values)).sum())} of {values.size} values are not finite")
    return values


def _paired_samples(
    values_a: np.ndarray, values_b: np.ndarray, statistic: Statistic, generator: np.random.Generator
) -> tuple[float, np.ndarray, np.ndarray]:
    """Return the difference in score, that in each resample [RESAMPLES], and those per example [n]."""
    values_a, values_b = _checked(values_a, statistic), _checked(values_b, statistic)
    if values_a.shape != values_b.shape:
        raise ValueError(f"{len(values_a)} examples cannot be paired with {len(values_b)}")
    if len(values_a) < 2:
        raise ValueError("a paired test needs at least two examples")
    if statistic == "mean":
        differences = np.sort(values_a - values_b)
        return float(differences.mean()), _resampled_means(differences, RESAMPLES, generator), differences
    if not np.array_equal(values_a[:, 1], values_b[:, 1]):
        raise ValueError("the gold scores differ, so these are not the same examples in the same order")
    columns = np.stack((values_a[:, 0], values_b[:, 0], values_a[:, 1]), axis=1)
    columns = columns[np.lexsort(columns.T)]
    of_a, of_b = _resampled_correlations(columns, RESAMPLES, generator)
    delta = (score_of(values_a, statistic) - score_of(values_b, statistic)) / 100
    if not np.isfinite(delta):
        raise ValueError("a column is constant, so there is no rank correlation")
    return delta, of_a - of_b, columns[:, 0] - columns[:, 1]


def _judged(delta: float, samples: np.ndarray, examples: int, p_value: float) -> PairedDifference:
    interval = _interval(samples, delta, examples)
    if interval is None:
        raise ValueError("a column is constant, so there is no rank correlation")
    return PairedDifference(100 * delta, interval, p_value, _verdict(delta, p_value))


def _verdict(delta: float, p_value: float) -> Verdict:
    if p_value >= SIGNIFICANCE or delta == 0:
        return "noise"
    return "better" if delta > 0 else "worse"


def _interval(samples: np.ndarray, point: float, examples: int) -> tuple[float, float] | None:
    from scipy.special import ndtr, stdtrit

    samples = samples[np.isfinite(samples)]
    if not len(samples) or not np.isfinite(point):
        return None
    # Hesterberg's expansion: the normal quantile that covers as a t interval with the unbiased variance would.
    reach = stdtrit(examples - 1, (1 + 0.95) / 2) * np.sqrt(examples / (examples - 1))
    tail = float(ndtr(-reach))
    low, high = np.quantile(samples, (tail, 1 - tail))
    return 100 * min(float(low), point), 100 * max(float(high), point)


def _resampled_means(values: np.ndarray, resamples: int, generator: np.random.Generator) -> np.ndarray:
    """Return the means of bootstrap samples of values [n]: [resamples]."""
    count = len(values)
    distinct, counts = np.unique(values, return_counts=True)
    if len(distinct) <= _FEW_VALUES:
        return generator.multinomial(count, counts / count, size=resamples) @ distinct / count
    drawn = (generator.integers(0, count, (size, count)) for size in _blocks(resamples, count))
    return np.concatenate([values[rows].mean(axis=1) for rows in drawn])


def _resampled_correlations(columns: np.ndarray, resamples: int, generator: np.random.Generator) -> np.ndarray:
    """Return rank correlations of the last column with each other one in bootstrap samples of rows [n, c].

    The result is [c - 1, resamples]. No resample is sorted: an example drawn k times is k tied examples, so its rank
    follows from the draws of the examples below it, a running sum over the order of the full sample.
    """
    count = len(columns)
    orders = [(np.argsort(column, kind="stable"), *_tied_groups(column)) for column in columns.T]
    parts = []
    for size in _blocks(resamples, count):
        drawn = generator.integers(0, count, (count, size)) + count * np.arange(size)
        times = np.bincount(drawn.ravel(), minlength=count * size).reshape(size, count).astype(np.int32)  # [B, n]
        ranks = [_resampled_ranks(times, *order) for order in orders]
        weights = times.astype(np.float64)
        parts.append([_correlation(weights, rank, ranks[-1]) for rank in ranks[:-1]])
    return np.concatenate(parts, axis=1)


def _resampled_ranks(times: np.ndarray, order: np.ndarray, group_of: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Return twice the centred ranks [B, n] of a column's examples where example i is drawn times[:, i].

    The mean rank of tied examples lies halfway between the numbers of examples up to them and below them. Twice that is
    an integer, and a correlation is the same.

    Args:
        times: [B, n], integers.
        order: [n], positions of the examples in ascending order.
        group_of, last: groups of equal examples, see `_tied_groups`.
    """
    up_to = np.cumsum(times.take(order, axis=1), axis=1, dtype=times.dtype)
    if len(last) < len(order):
        up_to = up_to.take(last, axis=1)  # [B, groups]
    twice = up_to - len(order)
    twice[:, 1:] += up_to[:, :-1]
    return twice.take(group_of, axis=1).astype(np.float64)


def _tied_groups(column: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the group of equal values of each example [n], and the last position of each group in ascending order."""
    _, group_of, tied = np.unique(column, return_inverse=True, return_counts=True)
    return group_of, np.cumsum(tied) - 1


def _centred_ranks(column: np.ndarray) -> np.ndarray:
    """Return ranks [n] minus their mean; ties share their mean rank."""
    _, group_of, tied = np.unique(column, return_inverse=True, return_counts=True)
    return (np.cumsum(tied) - (tied - 1) / 2 - (len(column) + 1) / 2)[group_of]


def _correlation(times: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Correlate centred ranks over the last axis, with example i counted times[..., i]; NaN where a side is constant.

    Ranks are multiples of one half, so the sums are exact, in whatever order they are taken, up to 100,000 examples.
    """
    weighted = times * first
    product = np.einsum("...i,...i->...", weighted, second)
    spread_of_first = np.einsum("...i,...i->...", weighted, first)
    spread_of_second = np.einsum("...i,...i,...i->...", times, second, second)
    spread = np.sqrt(spread_of_first * spread_of_second)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(spread > 0, product / spread, np.nan)


def _centred_p_value(samples: np.ndarray, delta: float) -> float:
    samples = samples[np.isfinite(samples)]
    as_large = np.abs(samples - delta) >= abs(delta) - 1e-12
    return float(1 + as_large.sum()) / (1 + len(samples))


def _sign_flip(differences: np.ndarray, generator: np.random.Generator) -> float:
    """Return the two-sided p-value of a sum of differences [n] if each sign is as likely as its opposite."""
    sizes, counts = np.unique(np.abs(differences[differences != 0]), return_counts=True)
    if not len(sizes):
        return 1.0
    least = abs(differences.sum()) - 1e-9 * np.abs(differences).sum()
    changed = int(counts.sum())
    if changed <= _EXACT_FLIPS:
        signs = 1 - 2 * ((np.arange(1 << changed)[:, None] >> np.arange(changed)) & 1)
        return float(np.mean(np.abs(signs @ np.repeat(sizes, counts)) >= least))
    if len(sizes) <= _FEW_VALUES:
        sums = (2 * generator.binomial(counts, 0.5, (FLIPS, len(sizes))) - counts) @ sizes
        as_large = int((np.abs(sums) >= least).sum())
    else:
        as_large = 0
        for size in _blocks(FLIPS, len(differences)):
            bits = np.frombuffer(generator.bytes(-(-size * len(differences) // 8)), dtype=np.uint8)
            positive = np.unpackbits(bits)[: size * len(differences)].reshape(size, -1).astype(np.float64)
            as_large += int((np.abs(2 * (positive @ differences) - differences.sum()) >= least).sum())
    return (1 + as_large) / (1 + FLIPS)


def _blocks(total: int, width: int) -> list[int]:
    """Split `total` into steps small enough for arrays [step, width] of `_BLOCK` numbers."""
    step = max(1, _BLOCK // width)
    return [min(step, total - start) for start in range(0, total, step)]
