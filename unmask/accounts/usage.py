"""Usage and statement of an account. Every function reads the rows of one account only."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from unmask.errors import UsageError
from unmask.storage.schema import charges, entries

DEFAULT_GROUPS = ("day", "model", "key", "tier")
GROUPS = (*DEFAULT_GROUPS, "provider")
OWN_ENGINE = "local"  # provider of requests that this server's own engine answered
_DAY_MS = 24 * 3600 * 1000
LONGEST_DAYS = 366


@dataclass(frozen=True, kw_only=True)
class UsageGroup:
    """The sums of a group of settled requests. Fields that were not grouped by are None; `cost` in nano-dollars."""

    day: date | None = None
    model: str | None = None
    key: str | None = None
    tier: str | None = None
    provider: str | None = None
    requests: int
    tokens: int
    cost: int


@dataclass(frozen=True)
class StatementLine:
    """An entry as its account sees it: `amount` is positive for credit that came, in nano-dollars."""

    number: int
    at: int
    kind: str
    amount: int
    reference: str
    note: str


@dataclass(frozen=True)
class ChargedRequest:
    """One request. `cost` in nano-dollars, times in Unix milliseconds."""

    id: str
    request: str
    key: str | None
    model: str
    tier: str
    tokens: int
    cost: int
    state: str
    at: int


def check_days(first: date, last: date) -> None:
    """Check a range of days.

    Raises:
        UsageError: the last day is before the first, or they are too many.
    """
    if not 0 <= (last - first).days < LONGEST_DAYS:
        raise UsageError(f"from {first} to {last}: choose 1 to {LONGEST_DAYS} days")


def check_groups(by: Sequence[str]) -> None:
    """Check the fields to group by.

    Raises:
        UsageError: one is not in `GROUPS`.
    """
    unknown = next((name for name in by if name not in GROUPS), None)
    if unknown is not None:
        raise UsageError(f"group_by={unknown[:80]!r}: choose out of {', '.join(GROUPS)}")


def usage_totals(
    connection: Connection, account: str, first: date, last: date, by: Sequence[str] = DEFAULT_GROUPS
) -> list[UsageGroup]:
    """Sum the settled requests of the days from `first` to `last`, both included, in UTC.

    Args:
        by: fields to group by, out of `GROUPS`.

    Raises:
        UsageError: as `check_days` and `check_groups`.
    """
    check_days(first, last)
    check_groups(by)
    columns: dict[str, sa.ColumnElement[Any]] = {
        "day": sa.cast(charges.c.ended_at, sa.BigInteger).op("/")(_DAY_MS),
        "model": charges.c.model,
        "key": charges.c.key_id,
        "tier": charges.c.tier,
        "provider": sa.func.coalesce(charges.c.provider, OWN_ENGINE),
    }
    chosen = [columns[name].label(name) for name in GROUPS if name in by]
    names = [column.name for column in chosen]
    inner = (
        sa.select(*chosen, charges.c.tokens, charges.c.amount)
        .where(
            charges.c.account_id == account,
            charges.c.state == "settled",
            charges.c.ended_at >= day_start(first),
            charges.c.ended_at < day_start(last) + _DAY_MS,  # the last day of the calendar has no next one
        )
        .subquery()
    )
    groups = [inner.c[name] for name in names]
    statement = (
        sa.select(
            *groups,
            sa.func.count().label("requests"),
            sa.func.coalesce(sa.func.sum(inner.c.tokens), 0).label("tokens"),
            sa.func.coalesce(sa.func.sum(inner.c.amount), 0).label("cost"),
        )
        .group_by(*groups)
        .order_by(*groups)
    )
    groups_used = []
    for row in connection.execute(statement).mappings():
        values: dict[str, Any] = dict(row)
        if "day" in values:
            values["day"] = datetime.fromtimestamp(values["day"] * _DAY_MS / 1000, UTC).date()
        for name in ("requests", "tokens", "cost"):
            values[name] = int(values[name])  # Postgres sums 64-bit integers as decimals
        groups_used.append(UsageGroup(**values))
    return groups_used


def statement(
    connection: Connection, account: str, *, limit: int = 100, before: int | None = None
) -> list[StatementLine]:
    """List the account's entries, newest first.

    Args:
        before: only with lower numbers, for the next page.
    """
    own = sa.or_(entries.c.debit == account, entries.c.credit == account)
    query = sa.select(entries).where(own).order_by(entries.c.id.desc()).limit(limit)
    if before is not None:
        query = query.where(entries.c.id < before)
    return [
        StatementLine(
            row.id,
            row.at,
            row.kind,
            row.amount if row.credit == account else -row.amount,
            # The reference of free credit is a digest, which only the ledger needs.
            "" if row.kind == "free_credit" else row.reference,
            row.note,
        )
        for row in connection.execute(query)
    ]


def charged_requests(
    connection: Connection, account: str, *, limit: int = 100, before: tuple[int, str] | None = None
) -> list[ChargedRequest]:
    """List the account's requests with their costs, newest first.

    Args:
        before: `at` and `id` of the last one of the page before.
    """
    query = sa.select(charges).where(charges.c.account_id == account)
    if before is not None:
        query = query.where(sa.tuple_(charges.c.held_at, charges.c.id) < sa.tuple_(*map(sa.literal, before)))
    rows = connection.execute(query.order_by(charges.c.held_at.desc(), charges.c.id.desc()).limit(limit))
    return [
        ChargedRequest(
            row.id,
            row.request,
            row.key_id,
            row.model,
            row.tier,
            row.tokens,
            row.amount if row.state == "settled" else 0,
            row.state,
            row.held_at,
        )
        for row in rows
    ]


def account_of_charge(connection: Connection, charge: str) -> str | None:
    """Return the account of a charge; None if there is no such charge."""
    return connection.scalar(sa.select(charges.c.account_id).where(charges.c.id == charge))


def day_start(day: date) -> int:
    """Return the Unix milliseconds at which a day begins in UTC."""
    return int(datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp()) * 1000
