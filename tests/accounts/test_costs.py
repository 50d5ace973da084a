"""The cost of an attempt: by the provider's count where it can be believed, and never nothing for work done."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unmask.accounts.costs import AttemptRecord


def attempt(outcome: str = "answered", tokens: int = 1000, their_tokens: int | None = None) -> AttemptRecord:
    return AttemptRecord(
        at=0,
        provider="acme",
        model="m",
        milliseconds=1,
        outcome=outcome,
        reason="answer",
        tokens=tokens,
        their_tokens=their_tokens,
        price=4_000_000,
    )


@pytest.mark.parametrize(
    ("their_tokens", "counted"), [(None, 1000), (0, 1000), (10_000, 1000), (499, 1000), (500, 500), (1002, 1002)]
)
def test_a_count_that_cannot_be_is_not_believed(their_tokens: int | None, counted: int) -> None:
    assert attempt(their_tokens=their_tokens).cost == 4 * counted


def test_only_an_attempt_that_did_no_work_costs_nothing() -> None:
    for outcome in ("unreachable", "rate_limited", "no_access", "rejected"):
        assert attempt(outcome).cost == 0
    for outcome in ("answered", "discarded", "failed", "cut_off", "timeout", "malformed", "cancelled"):
        assert attempt(outcome).cost == 4000


@given(st.integers(0, 10**9), st.integers(0, 10**10) | st.none())
def test_a_cost_is_within_a_factor_of_two_of_our_count(tokens: int, their_tokens: int | None) -> None:
    assert 2 * tokens <= attempt("answered", tokens, their_tokens).cost <= 8 * tokens
