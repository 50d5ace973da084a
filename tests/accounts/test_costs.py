"""Costs of attempts: by the provider's count where it can be believed, and in the ledger exactly once."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import event

from unmask.accounts import costs, ledger, people
from unmask.accounts.costs import AttemptRecord
from unmask.accounts.ledger import Hold
from unmask.accounts.taint import tainted_answers, tainted_requests, tainted_windows
from unmask.accounts.verification import verify
from unmask.errors import LedgerRefused
from unmask.storage.database import Database
from unmask.storage.schema import charges, provider_attempts, provider_events


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


def answered(database: Database, number: int, *, provider: str = "acme", at: int = 0, account: str = "") -> str:
    """Open an account and settle a request that a provider answered. Returns the account."""
    with database.begin() as connection:
        if not account:
            account = people.open_account(connection, "somebody", 1)
            ledger.top_up(connection, account, 10**9, f"payment {number}", 1)
        hold = Hold(
            id=f"c{number}",
            account_id=account,
            key_id=None,
            request=f"r{number}",
            model="m",
            tier="default",
            tokens=1000,
            amount=8000,
            expires_at=10**15,
        )
        ledger.hold(connection, hold, 1)
        record = AttemptRecord(
            at=at,
            provider=provider,
            model="m",
            milliseconds=1,
            outcome="answered",
            reason="answer",
            tokens=1000,
            their_tokens=1002,
            price=4_000_000,
        )
        costs.settle_with_attempts(connection, hold.id, 2, provider, [record])
    return account


def test_costs_are_booked_once_however_many_book_them(database: Database) -> None:
    with database.begin() as connection:
        costs.add_attempts(connection, [attempt(tokens=number + 1) for number in range(300)])
        costs.add_attempts(connection, [attempt("unreachable")])
    start = threading.Barrier(4)

    def book(_: int) -> int:
        start.wait(30)
        with database.begin() as connection:
            return costs.book_costs(connection, 1_795_900_000_000)

    with ThreadPoolExecutor(4) as threads:
        assert sum(threads.map(book, range(4))) == 300
    with database.read() as connection:
        assert costs.payables(connection) == {"acme": 4 * 300 * 301 // 2}
        assert verify(connection).drift == ()


DAMAGES: dict[str, tuple[Any, str]] = {
    "a cost": (provider_attempts.update().values(cost=provider_attempts.c.cost - 1), "cost of an attempt"),
    "a count": (provider_attempts.update().values(their_tokens=999), "cost of an attempt"),
    "a provider": (provider_attempts.update().values(provider="other"), "entry of a provider's costs"),
    "a booking": (provider_attempts.update().values(booking="x"), "booked attempts without an entry"),
    "an attempt": (provider_attempts.delete(), "charge without the one answer of its provider"),
    "a charge": (charges.update().values(state="released"), "attempts of a charge that is not settled"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_verification_finds_damage_to(database: Database, name: str) -> None:
    answered(database, 1)
    with database.begin() as connection:
        assert costs.book_costs(connection, 3) == 1
    with database.read() as connection:
        assert verify(connection).drift == ()
    statement, rule = DAMAGES[name]
    with database.begin() as connection:
        connection.execute(statement)
    with database.read() as connection:
        assert rule in {drift.what for drift in verify(connection).drift}


def test_old_attempts_are_forgotten_unless_money_or_a_taint_report_needs_them(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1_795_900_000_000
    old, recent = now - costs.RETENTION_MS - 1, now - costs.RETENTION_MS
    account = answered(database, 1, at=old)
    with database.begin() as connection:
        for at in (old, recent):
            free = replace(attempt("unreachable"), at=at)
            canary = replace(attempt(), at=at, reason="probe", price=0)
            paid_canary = replace(attempt("failed"), at=at, reason="probe")
            costs.add_attempts(connection, [free, canary, free, paid_canary])
        verdict = {"provider": "acme", "model": "m", "verdict": "quarantined", "actor": "canaries", "finding": "drifts"}
        connection.execute(provider_events.insert(), verdict | {"at": old, "passed_at": old})
        assert costs.book_costs(connection, now) == 3

    def report() -> tuple[object, ...]:
        with database.read() as connection:
            bill = [line.cost for line in costs.bill(connection, "acme", 0, now)]
            margins = [(one.income, one.cost) for one in costs.margins(connection, 0, now)]
            (tainted,) = tainted_answers(connection, tainted_windows(connection))
            assert tainted.account == account and verify(connection).drift == ()
            return bill, margins, costs.payables(connection), costs.daily_costs(connection, 0)

    before = report()
    monkeypatch.setattr(costs, "_BATCH", 2)
    forgets = []
    for _ in range(2):
        with database.begin() as connection:
            forgets.append(costs.forget_free_attempts(connection, now))
    assert forgets == [True, False] and report() == before
    with database.read() as connection:
        rows = connection.execute(sa.select(provider_attempts.c.at, provider_attempts.c.cost)).all()
    assert sorted((row.at == old, row.cost > 0) for row in rows) == [
        (False, False),
        (False, False),
        (False, False),
        (False, True),
        (True, True),
        (True, True),
    ]


def test_old_attempts_are_found_by_their_index(sqlite: Database) -> None:
    statements: list[tuple[str, tuple[Any, ...]]] = []
    with sqlite.begin() as connection:
        event.listen(connection, "before_cursor_execute", lambda *call: statements.append(call[2:4]))
        costs.forget_free_attempts(connection, costs.RETENTION_MS)
        ((statement, parameters),) = statements
        plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters).all()
    assert "ix_provider_attempts_free" in str(plan)


def test_an_invoice_is_paid_once(sqlite: Database) -> None:
    answered(sqlite, 1)
    with sqlite.begin() as connection:
        costs.book_costs(connection, 3)
        assert costs.payables(connection) == {"acme": 4008}
        assert ledger.pay_provider(connection, "acme", 4000, "R1", 4)
        assert not ledger.pay_provider(connection, "acme", 4000, "R1", 5)
        with pytest.raises(LedgerRefused, match="was paid with"):
            ledger.pay_provider(connection, "acme", 8, "R1", 5)
        assert costs.payables(connection) == {"acme": 8}
        assert verify(connection).drift == ()


def test_a_margin_is_income_without_refunds_and_all_costs(sqlite: Database) -> None:
    account = answered(sqlite, 1)
    answered(sqlite, 2, account=account)
    with sqlite.begin() as connection:
        ledger.refund(connection, "c2", 5)
        costs.add_attempts(connection, [attempt("failed"), attempt("answered", tokens=500)])
        (line,) = costs.margins(connection, 0, 10)
    assert (line.requests, line.income, line.cost) == (2, 8000, 2 * 4008 + 4000 + 2000)
    assert line.profit == 8000 - 14016 and line.overhead == pytest.approx(6000 / 14016)


def test_the_taint_report_has_every_answer_of_the_window_and_no_other(sqlite: Database) -> None:
    """Two processes noticed the same drift, and one of them named it later: that is one window."""
    first, second = answered(sqlite, 1, at=99_999), answered(sqlite, 2, at=100_000)
    answered(sqlite, 3, at=104_000, account=first)
    answered(sqlite, 4, at=104_000, provider="other")
    answered(sqlite, 5, at=200_000, account=second)
    with sqlite.begin() as connection:
        for at, passed_at, finding in (
            (103_000, 100_000, "acme gives wrong vectors"),
            (103_500, 101_000, "acme gives wrong vectors"),
            (150_000, 100_000, "acme pools the last token"),
        ):
            values = {"provider": "acme", "model": "m", "verdict": "quarantined", "actor": "canaries"}
            row = values | {"at": at, "passed_at": passed_at, "finding": finding}
            connection.execute(provider_events.insert(), row)
    with sqlite.read() as connection:
        (window,) = tainted_windows(connection)
        assert (window.since, window.until) == (100_000, 108_500)
        tainted = tainted_answers(connection, [window])
        assert {(one.account, one.requests, one.tokens, one.first) for one in tainted} == {
            (first, 1, 1000, 104_000),
            (second, 1, 1000, 100_000),
        }
        assert [one.account for one in tainted_answers(connection, [window], account=first)] == [first]
        assert [(charge, request) for charge, _, request, _ in tainted_requests(connection, window)] == [
            ("c2", "r2"),
            ("c3", "r3"),
        ]
        assert tainted_windows(connection, since=150_001) == []
        assert connection.scalar(sa.select(sa.func.count()).select_from(provider_attempts)) == 5
