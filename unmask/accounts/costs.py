"""Attempts at providers: what each cost us, beside the one charge that its request costs the caller.

Every attempt is a row: good ones in the transaction of the settlement, all others on their own. Our count of tokens is
charged; a provider's own count decides what it will bill, unless it is absurd. The costs go into the ledger a few
seconds later: `book_costs` moves the sum of all attempts that no entry has yet from `@cost` to `@payable:PROVIDER`,
and marks each attempt with the entry that has it, in one transaction. So a crash books no cost twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any, Literal, NamedTuple

import sqlalchemy as sa
from sqlalchemy import Connection

from unmask.accounts import ledger, money
from unmask.storage.database import RawStatement
from unmask.storage.schema import charges, entries, provider_attempts

Reason = Literal["answer", "retry", "hedge", "probe"]

# Outcomes of attempts at which no work was done, so nothing is billed.
FREE_OUTCOMES = ("unreachable", "rate_limited", "no_access", "rejected")

# Attempts of one transaction of `book_costs`: the others that want to write wait a few milliseconds for it.
_BATCH = 1000

_DAY_MS = 24 * 3600 * 1000

# Attempts that cost nothing and answered no charge are kept for this long: canaries of free providers, and requests
# that were refused. All others are evidence: of a charge, of an entry of the ledger, or of what a quarantine taints.
RETENTION_MS = 90 * _DAY_MS

# A count that differs from ours by more than this factor is no count: it is missing, or of something else.
ABSURD_FACTOR = 2

_INSERT = RawStatement(
    "INSERT INTO provider_attempts (at, charge, provider, model, milliseconds, outcome, reason, tokens, their_tokens, "
    "price, cost) VALUES (:at, :charge, :provider, :model, :milliseconds, :outcome, :reason, :tokens, :their_tokens, "
    ":price, :cost)"
)


@dataclass(frozen=True, kw_only=True)
class AttemptRecord:
    """One attempt at a provider.

    Attributes:
        at: Unix milliseconds.
        provider, model: names.
        milliseconds: duration.
        outcome: "answered", or the signal of its failure.
        reason: the first attempt of a request is for the answer, the others are retries, or hedges if the attempt
            before had not ended; canaries are probes.
        tokens: by our count.
        their_tokens: by the provider's; None if it did not say.
        price: nano-dollars per million tokens there, on that day.
    """

    at: int
    provider: str
    model: str
    milliseconds: int
    outcome: str
    reason: Reason
    tokens: int
    their_tokens: int | None
    price: int

    @property
    def cost(self) -> int:
        """Nano-dollars that the provider will bill: nothing for a failure before it answered."""
        if self.outcome in FREE_OUTCOMES:
            return 0
        theirs = self.their_tokens
        if theirs is None or not self.tokens <= theirs * ABSURD_FACTOR <= self.tokens * ABSURD_FACTOR**2:
            theirs = self.tokens
        return money.cost(theirs, self.price)


class ProviderBill(NamedTuple):
    """Attempts of a month, by model and reason."""

    model: str
    reason: Reason
    attempts: int
    tokens: int
    their_tokens: int
    cost: int


def add_attempts(connection: Connection, attempts: Sequence[AttemptRecord], charge: str | None = None) -> None:
    """Append attempts.

    Args:
        connection: of the transaction that settles `charge`, where there is one.
        attempts: of one request.
        charge: its charge; None for canaries and for requests that failed.
    """
    for attempt in attempts:
        _INSERT.changed(
            connection,
            {
                "at": attempt.at,
                "charge": charge,
                "provider": attempt.provider,
                "model": attempt.model,
                "milliseconds": attempt.milliseconds,
                "outcome": attempt.outcome,
                "reason": attempt.reason,
                "tokens": attempt.tokens,
                "their_tokens": attempt.their_tokens,
                "price": attempt.price,
                "cost": attempt.cost,
            },
        )


def settle_with_attempts(
    connection: Connection, charge: str, now: int, provider: str | None, attempts: Sequence[AttemptRecord]
) -> bool:
    """Settle a charge and append the attempts of its request, in one transaction. Doing it again changes nothing.

    Args:
        connection: of a transaction that writes.
        charge: id of the charge.
        now: Unix milliseconds.
        provider: name of the provider that computed the vectors; None for this server's own engine.
        attempts: of the request.

    Returns:
        True if this call settled it, False if an earlier one did.

    Raises:
        LedgerRefused, InsufficientCredit: as `ledger.settle`.
    """
    settled = ledger.settle(connection, charge, now, provider)
    if settled:
        add_attempts(connection, attempts, charge)
    return settled


def move_answer(connection: Connection, charge: str, provider: str | None, attempts: Sequence[AttemptRecord]) -> None:
    """Let another provider have answered a settled charge: the earlier answer was thrown away, and still costs.

    Args:
        connection: of a transaction that writes.
        charge: id of the charge.
        provider: name of the provider whose vectors went out; None for this server's own engine.
        attempts: those since the charge was settled.
    """
    table = provider_attempts.c
    connection.execute(
        provider_attempts.update()
        .where(table.charge == charge, table.outcome == "answered")
        .values(outcome="discarded")
    )
    connection.execute(charges.update().where(charges.c.id == charge).values(provider=provider))
    add_attempts(connection, attempts, charge)


def book_costs(connection: Connection, now: int) -> int:
    """Book the costs of attempts that no entry has yet, oldest first: one entry per provider.

    Call it until it returns 0. Two at the same time book different attempts.

    Returns:
        The number of attempts that were booked.
    """
    table = provider_attempts.c
    rows = connection.execute(
        sa.select(table.id, table.provider, table.cost)
        .where(table.booking.is_(None), table.cost > 0)
        .order_by(table.id)
        .limit(_BATCH)
        .with_for_update(skip_locked=True)
    ).all()
    hour = datetime.fromtimestamp(now / 1000, UTC).strftime("%Y-%m-%dT%H")
    for provider in dict.fromkeys(row.provider for row in rows):
        attempts = [row for row in rows if row.provider == provider]
        # An attempt is booked once, so the number of the first one makes the reference unique.
        reference = f"{provider}/{hour}/{attempts[0].id}"
        ledger.book_cost(connection, provider, sum(row.cost for row in attempts), reference, now)
        booked = table.id.in_([row.id for row in attempts])
        connection.execute(provider_attempts.update().where(booked).values(booking=reference))
    return len(rows)


def forget_free_attempts(connection: Connection, now: int) -> bool:
    """Delete attempts older than `RETENTION_MS` that cost nothing and belong to no charge, at most a batch of them.

    Call it again while it returns True, in a transaction of its own each time, so that no other writer waits long.

    Args:
        connection: of a transaction that writes.
        now: Unix milliseconds.

    Returns:
        True if there may be more of them.
    """
    table = provider_attempts.c
    zero = sa.literal_column("0")  # as a parameter, it would not match the condition of the index
    statement = (
        sa.select(table.id)
        .where(table.charge.is_(None), table.cost == zero, table.at < now - RETENTION_MS)
        .order_by(table.at)
        .limit(_BATCH)
        .with_for_update(skip_locked=True)
    )
    ids = list(connection.scalars(statement))
    if ids:
        connection.execute(provider_attempts.delete().where(table.id.in_(ids)))
    return len(ids) == _BATCH


def costs_since(connection: Connection, start: int) -> dict[str, int]:
    """Return the nano-dollars of each provider's attempts since a time.

    Args:
        connection: of a transaction that reads.
        start: Unix milliseconds.
    """
    table = provider_attempts.c
    statement = sa.select(table.provider, sa.func.sum(table.cost)).where(table.at >= start).group_by(table.provider)
    return {provider: int(cost) for provider, cost in connection.execute(statement)}


def daily_costs(connection: Connection, start: int) -> dict[tuple[date, str], int]:
    """Return the nano-dollars of each day and provider since a time.

    Args:
        connection: of a transaction that reads.
        start: Unix milliseconds.
    """
    table = provider_attempts.c
    day = (table.at // _DAY_MS).label("day")
    statement = sa.select(day, table.provider, sa.func.sum(table.cost)).where(table.at >= start, table.cost > 0)
    rows = connection.execute(statement.group_by(day, table.provider))
    return {(date(1970, 1, 1) + timedelta(days=int(at)), provider): int(cost) for at, provider, cost in rows}


def payables(connection: Connection) -> dict[str, int]:
    """Return the nano-dollars that we owe each provider: its booked costs without what was paid."""
    owed: dict[str, int] = {}
    for book, sign in ((entries.c.credit, 1), (entries.c.debit, -1)):
        sums = sa.select(book, sa.func.sum(entries.c.amount)).where(book.startswith(ledger.PAYABLE)).group_by(book)
        for name, amount in connection.execute(sums):
            provider = name.removeprefix(ledger.PAYABLE)
            owed[provider] = owed.get(provider, 0) + sign * int(amount)
    return owed


def bill(connection: Connection, provider: str, start: int, end: int) -> list[ProviderBill]:
    """Sum the attempts at a provider in a time, to compare with its invoice.

    Args:
        connection: of a transaction that reads.
        provider: its name.
        start, end: Unix milliseconds; the end is not included.
    """
    table = provider_attempts.c
    rows = connection.execute(
        sa.select(
            table.model,
            table.reason,
            sa.func.count(),
            sa.func.sum(table.tokens),
            sa.func.sum(sa.func.coalesce(table.their_tokens, 0)),
            sa.func.sum(table.cost),
        )
        .where(table.provider == provider, table.at >= start, table.at < end)
        .group_by(table.model, table.reason)
        .order_by(table.model, table.reason)
    )
    return [ProviderBill(model, reason, *map(int, figures)) for model, reason, *figures in rows]


class Margin(NamedTuple):
    """Income and cost of a model at a provider in a time. Amounts in nano-dollars.

    Attributes:
        requests: charges that it answered.
        income: of these charges, without what was refunded.
        cost: of all attempts there, canaries included.
        overhead: share of the cost that no answer came from: failures, hedges that were overtaken, canaries.
    """

    provider: str
    model: str
    requests: int
    income: int
    cost: int
    overhead: float

    @property
    def profit(self) -> int:
        """Income without cost; negative for a loss."""
        return self.income - self.cost


def margins(connection: Connection, start: int, end: int) -> list[Margin]:
    """Compare what callers paid for a provider's answers with what the provider costs.

    Args:
        connection: of a transaction that reads.
        start, end: Unix milliseconds; the end is not included.
    """
    income = {(row.provider, row.model): row for row in connection.execute(_income(start, end))}
    table = provider_attempts.c
    useful = sa.and_(table.outcome == "answered", table.charge.is_not(None))
    spent = sa.select(
        table.provider,
        table.model,
        sa.func.sum(table.cost).label("cost"),
        sa.func.sum(sa.case((useful, table.cost), else_=0)).label("useful"),
    )
    spent = spent.where(table.at >= start, table.at < end).group_by(table.provider, table.model)
    costs = {(row.provider, row.model): row for row in connection.execute(spent)}
    return [_margin(key, income.get(key), costs.get(key)) for key in sorted({*income, *costs})]


def _income(start: int, end: int) -> sa.Select[Any, Any, int, Any]:
    refunds = sa.select(entries.c.reference).where(entries.c.kind == "refund")
    return (
        sa.select(
            charges.c.provider,
            charges.c.model,
            sa.func.count().label("requests"),
            sa.func.sum(sa.case((charges.c.id.in_(refunds), 0), else_=charges.c.amount)).label("income"),
        )
        .where(
            charges.c.state == "settled",
            charges.c.provider.is_not(None),
            charges.c.ended_at >= start,
            charges.c.ended_at < end,
        )
        .group_by(charges.c.provider, charges.c.model)
    )


def _margin(key: tuple[str, str], income: Any, spent: Any) -> Margin:
    cost, useful = (int(spent.cost), int(spent.useful)) if spent is not None else (0, 0)
    return Margin(
        provider=key[0],
        model=key[1],
        requests=int(income.requests) if income is not None else 0,
        income=int(income.income) if income is not None else 0,
        cost=cost,
        overhead=(cost - useful) / cost if cost else 0.0,
    )
