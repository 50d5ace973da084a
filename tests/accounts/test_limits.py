"""The rate limiter against an exact model of its algorithm, in fractions."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unmask.accounts.limits import BucketTake, LocalLimiter
from unmask.errors import RateLimited


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@given(
    limits=st.tuples(st.integers(1, 1000), st.integers(1, 1000)),
    steps=st.lists(st.tuples(st.integers(0, 40_000), st.integers(0, 300), st.integers(0, 300)), max_size=40),
)
def test_it_is_the_algorithm(limits: tuple[int, int], steps: list[tuple[int, int, int]]):
    clock = Clock()
    limiter = LocalLimiter(clock)
    now, full_at = Fraction(0), [Fraction(0), Fraction(0)]
    for milliseconds, *amounts in steps:
        now += Fraction(milliseconds, 1000)
        clock.now = 1000.0 + float(now)
        full_after = [
            max(at, now) + Fraction(60 * amount, limit)
            for at, amount, limit in zip(full_at, amounts, limits, strict=True)
        ]
        draws = [BucketTake(str(n), limits[n], amounts[n]) for n in range(2)]
        if all(at - now <= 60 for at in full_after):
            levels = limiter.take_now(draws, "requests")
            full_at = full_after  # both, or neither
            for at, limit, level in zip(full_at, limits, levels, strict=True):
                assert level.remaining == pytest.approx((60 - (at - now)) * limit / 60, abs=1.001)
                assert level.reset_s == pytest.approx(float(at - now), abs=1e-6)
        else:
            with pytest.raises(RateLimited) as refused:
                limiter.take_now(draws, "requests")
            first = next(n for n in range(2) if full_after[n] - now > 60)
            if amounts[first] > limits[first]:
                assert refused.value.retry_after is None
            else:
                assert refused.value.retry_after == pytest.approx(float(full_after[first] - now - 60), abs=1e-6)


def test_a_minutes_worth_at_once_and_then_an_even_flow():
    clock = Clock()
    limiter = LocalLimiter(clock)
    draw = [BucketTake("a", 60, 1)]
    for left in range(59, -1, -1):
        assert limiter.take_now(draw, "requests")[0].remaining == left
    with pytest.raises(RateLimited) as refused:
        limiter.take_now(draw, "requests")
    assert refused.value.retry_after == pytest.approx(1)
    assert "Limit 60, Used 60, Requested 1. Please try again in 1s." in str(refused.value)
    clock.now += 1
    limiter.take_now(draw, "requests")
    clock.now += 1000
    assert limiter.take_now([BucketTake("a", 60, 0)], "requests")[0].remaining == 60


def test_a_full_bucket_is_forgotten():
    clock = Clock()
    limiter = LocalLimiter(clock)
    for n in range(100):
        limiter.take_now([BucketTake(str(n), 60, 1)], "requests")
    clock.now += 61
    limiter.take_now([BucketTake("x", 60, 1)], "requests")
    assert set(limiter._full_at) == {"x"}


def test_more_than_a_minute_holds_is_never_let_through():
    with pytest.raises(RateLimited, match="Request too large on tokens per min") as refused:
        LocalLimiter().take_now([BucketTake("a", 10, 11)], "tokens")
    assert refused.value.retry_after is None
