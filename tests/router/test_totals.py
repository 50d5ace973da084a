import pytest

from unmask.accounts.costs import AttemptRecord, Reason
from unmask.errors import EngineError, EngineStopped, NoConformingProvider, NoProvider, ProviderRefused
from unmask.router.totals import AttemptTotals, Durations, RefusalReason, RoutingTotals


def attempt(outcome: str, reason: Reason, their_tokens: int | None = None) -> AttemptRecord:
    return AttemptRecord(
        at=0,
        provider="a",
        model="m",
        milliseconds=5,
        outcome=outcome,
        reason=reason,
        tokens=10,
        their_tokens=their_tokens,
        price=0,
    )


def test_a_duration_is_in_all_buckets_from_its_own_on() -> None:
    durations = Durations()
    for seconds in (0.005, 0.006, 59.0, 61.0):
        durations.add(seconds)
    buckets = dict(durations.cumulative())
    assert (buckets["0.005"], buckets["0.01"], buckets["30.0"], buckets["60.0"], buckets["+Inf"]) == (1, 2, 2, 3, 4)
    assert durations.sum == 120.011


def test_canaries_are_attempts_without_a_duration() -> None:
    totals = AttemptTotals()
    totals.add(attempt("answered", "answer", 12), 0.1)
    totals.add(attempt("answered", "probe"), 0.1)
    totals.add(attempt("timeout", "retry"), 9.0)
    assert totals.attempts == {("answered", "answer"): 1, ("answered", "probe"): 1, ("timeout", "retry"): 1}
    assert {outcome: dict(one.cumulative())["+Inf"] for outcome, one in totals.seconds.items()} == {
        "answered": 1,
        "timeout": 1,
    }
    assert (totals.tokens, totals.their_tokens) == (20, 12)


def test_a_retry_is_counted_by_the_failure_before_it() -> None:
    totals = RoutingTotals()
    totals.add_attempts([attempt("unreachable", "answer"), attempt("failed", "retry"), attempt("answered", "retry")])
    totals.add_attempts([attempt("answered", "retry")])  # after this server's own engine
    totals.add_attempts([attempt("answered", "hedge"), attempt("cancelled", "answer")])
    totals.add_attempts([attempt("answered", "answer"), attempt("cancelled", "hedge")])
    assert totals.retries == {"unreachable": 1, "failed": 1, "local": 1}
    assert totals.hedges == {True: 1, False: 1}


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (NoProvider("", retry_after=1), "no_provider"),
        (NoConformingProvider("", retry_after=1), "no_conforming_provider"),
        (ProviderRefused("", retry_after=1), "retry_budget"),
        (EngineStopped(""), "other"),
    ],
)
def test_a_refusal_is_counted_by_its_reason(error: EngineError, reason: RefusalReason) -> None:
    totals = RoutingTotals()
    totals.add_refusal(error)
    assert totals.refusals == {reason: 1}
