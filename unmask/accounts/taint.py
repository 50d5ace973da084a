"""Answers that may be wrong: those that a provider gave between its last right canary and its quarantine."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import sqlalchemy as sa
from sqlalchemy import Connection

from unmask.storage.schema import charges, provider_attempts, provider_events

# Another process may have answered through the provider until it read of the quarantine.
_FOLLOWING_MS = 5_000


@dataclass(frozen=True)
class TaintedWindow:
    """A time in which a provider's vectors of a model may have been wrong, in Unix milliseconds, both ends included."""

    provider: str
    model: str
    since: int
    until: int
    finding: str


class TaintedAnswers(NamedTuple):
    """The charged requests of one key in one window.

    Attributes:
        window: the time, and the fault.
        account, key: ids; no key for a request without one.
        requests, tokens: that were charged.
        first, last: Unix milliseconds of the first and of the last answer.
    """

    window: TaintedWindow
    account: str
    key: str | None
    requests: int
    tokens: int
    first: int
    last: int


def tainted_windows(connection: Connection, since: int = 0) -> list[TaintedWindow]:
    """List the windows of all quarantines that canaries ordered, oldest first. Windows that overlap are one.

    Args:
        connection: of a transaction that reads.
        since: Unix milliseconds; only quarantines after it.
    """
    event = provider_events.c
    rows = connection.execute(
        sa.select(provider_events)
        .where(event.verdict == "quarantined", event.passed_at.is_not(None), event.at >= since)
        .order_by(event.passed_at, event.id)
    )
    windows: list[TaintedWindow] = []
    for row in rows:
        until = row.at + _FOLLOWING_MS
        last = next((one for one in reversed(windows) if (one.provider, one.model) == (row.provider, row.model)), None)
        if last is None or row.passed_at > last.until:
            windows.append(TaintedWindow(row.provider, row.model, row.passed_at, until, row.finding))
        elif row.passed_at == last.since:  # the finding of the same quarantine, which came after it
            windows[windows.index(last)] = replace(last, finding=row.finding)
        else:
            windows[windows.index(last)] = replace(last, until=max(last.until, until), finding=row.finding)
    return windows


def tainted_answers(
    connection: Connection, windows: Iterable[TaintedWindow], account: str | None = None
) -> list[TaintedAnswers]:
    """Count the charged requests of the windows by account and key.

    Args:
        connection: of a transaction that reads.
        windows: the times.
        account: only of this account; None for all.
    """
    tainted = []
    for window in windows:
        table = provider_attempts.c
        statement = (
            sa.select(
                charges.c.account_id,
                charges.c.key_id,
                sa.func.count(),
                sa.func.sum(charges.c.tokens),
                sa.func.min(table.at),
                sa.func.max(table.at),
            )
            .join(charges, charges.c.id == table.charge)
            .where(*_in_window(window))
            .group_by(charges.c.account_id, charges.c.key_id)
            .order_by(charges.c.account_id, charges.c.key_id)
        )
        if account is not None:
            statement = statement.where(charges.c.account_id == account)
        for owner, key, *figures in connection.execute(statement):
            tainted.append(TaintedAnswers(window, owner, key, *map(int, figures)))
    return tainted


def tainted_requests(connection: Connection, window: TaintedWindow) -> list[tuple[str, str, str, int]]:
    """List charge, account, request id and time of the answers of a window, in order of time."""
    table = provider_attempts.c
    rows = connection.execute(
        sa.select(charges.c.id, charges.c.account_id, charges.c.request, table.at)
        .select_from(provider_attempts)
        .join(charges, charges.c.id == table.charge)
        .where(*_in_window(window))
        .order_by(table.at)
    )
    return [(charge, account, request, int(at)) for charge, account, request, at in rows]


def _in_window(window: TaintedWindow) -> tuple[sa.ColumnElement[bool], ...]:
    table = provider_attempts.c
    return (
        table.provider == window.provider,
        table.model == window.model,
        table.outcome == "answered",
        table.at >= window.since,
        table.at <= window.until,
    )
