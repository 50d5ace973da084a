"""Verification of the books: every balance, hold, spend and cost recomputed from entries, charges and attempts."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from unmask.accounts.costs import ABSURD_FACTOR, FREE_OUTCOMES
from unmask.accounts.idempotency import is_refunded
from unmask.accounts.ledger import COST, PAYABLE
from unmask.accounts.money import format_dollars
from unmask.storage.schema import accounts, charges, entries, keys, provider_attempts


@dataclass(frozen=True)
class Discrepancy:
    """A stored amount that differs from the recomputed one.

    Attributes:
        what: the rule that is broken.
        subject: the account, key, charge, booking or attempt.
        expected, actual: nano-dollars, by the entries, charges or attempts and as stored.
    """

    what: str
    subject: str
    expected: int
    actual: int

    def __str__(self) -> str:
        expected, actual = format_dollars(self.expected), format_dollars(self.actual)
        return f"{self.subject}: {self.what}: {actual} dollars, but {expected} by the books"


@dataclass(frozen=True)
class Verification:
    """The result of `verify`; the books balance if `drift` is empty."""

    accounts: int
    entries: int
    charges: int
    attempts: int  # at providers
    settled: int  # nano-dollars
    held: int
    cost: int  # of the attempts
    drift: tuple[Discrepancy, ...]


def verify(connection: Connection) -> Verification:
    """Recompute every balance, hold, spend, settlement and cost.

    Args:
        connection: in a transaction that sees one state, as `Database.read` gives.
    """
    drift = [
        *_balances(connection),
        *_holds(connection),
        *_settlements(connection),
        *_refunds(connection),
        *_spends(connection),
        *_attempt_costs(connection),
        *_cost_bookings(connection),
        *_answers(connection),
    ]

    def number(statement: sa.Select[Any]) -> int:
        return int(connection.scalar(statement) or 0)

    def count(table: sa.Table) -> int:
        return number(sa.select(sa.func.count()).select_from(table))

    def total(state: str) -> int:
        return number(sa.select(sa.func.sum(charges.c.amount)).where(charges.c.state == state))

    return Verification(
        accounts=count(accounts),
        entries=count(entries),
        charges=count(charges),
        attempts=count(provider_attempts),
        settled=total("settled"),
        held=total("held"),
        cost=number(sa.select(sa.func.sum(provider_attempts.c.cost))),
        drift=tuple(drift),
    )


def discrepancies(connection: Connection) -> tuple[Discrepancy, ...]:
    """List what `verify` finds broken. Empty if the books balance."""
    return verify(connection).drift


def _balances(connection: Connection) -> Iterable[Discrepancy]:
    moved = sa.union_all(
        sa.select(entries.c.credit.label("book"), entries.c.amount.label("amount")),
        sa.select(entries.c.debit.label("book"), (-entries.c.amount).label("amount")),
    ).subquery()
    sums = sa.select(moved.c.book, sa.func.sum(moved.c.amount).label("amount")).group_by(moved.c.book)
    by_book = {book: int(amount) for book, amount in connection.execute(sums)}
    stored = {row.id: row for row in connection.execute(sa.select(accounts.c.id, accounts.c.balance, accounts.c.held))}
    for id, row in stored.items():
        if by_book.get(id, 0) != row.balance:
            yield Discrepancy("balance", id, by_book.get(id, 0), row.balance)
        if not 0 <= row.held <= row.balance:
            yield Discrepancy("more is held than there is", id, row.balance, row.held)
    for book, amount in by_book.items():
        if not book.startswith("@") and book not in stored:
            yield Discrepancy("entries of an account that does not exist", book, 0, amount)


def _holds(connection: Connection) -> Iterable[Discrepancy]:
    open_ones = (
        sa.select(charges.c.account_id, sa.func.sum(charges.c.amount).label("amount"))
        .where(charges.c.state == "held")
        .group_by(charges.c.account_id)
    )
    expected = {account: int(amount) for account, amount in connection.execute(open_ones)}
    for id, held in connection.execute(sa.select(accounts.c.id, accounts.c.held)):
        if expected.get(id, 0) != held:
            yield Discrepancy("held", id, expected.get(id, 0), held)


def _settlements(connection: Connection) -> Iterable[Discrepancy]:
    """Each settled charge has its one entry, to the right account, and no other charge has one."""
    booked = sa.select(entries).where(entries.c.kind == "charge").subquery()
    settled = sa.and_(charges.c.state == "settled", charges.c.amount > 0)
    joined = sa.select(
        charges.c.id, charges.c.amount, charges.c.state, booked.c.amount.label("booked"), booked.c.debit
    ).join(booked, booked.c.reference == charges.c.id, isouter=True)
    broken = sa.or_(
        sa.and_(settled, sa.or_(booked.c.id.is_(None), booked.c.amount != charges.c.amount)),
        sa.and_(booked.c.id.is_not(None), booked.c.debit != charges.c.account_id),
        sa.and_(booked.c.id.is_not(None), sa.not_(settled)),
    )
    for row in connection.execute(joined.where(broken)):
        due = row.amount if row.state == "settled" else 0
        yield Discrepancy(f"entry of a charge that is {row.state}", row.id, due, row.booked or 0)
    orphans = (
        sa.select(booked.c.reference, booked.c.amount)
        .join(charges, charges.c.id == booked.c.reference, isouter=True)
        .where(charges.c.id.is_(None))
    )
    for reference, amount in connection.execute(orphans):
        yield Discrepancy("entry of a charge that does not exist", reference, 0, amount)


def _refunds(connection: Connection) -> Iterable[Discrepancy]:
    refunds = (
        sa.select(entries.c.reference, entries.c.amount, charges.c.amount.label("charged"))
        .join(
            charges,
            sa.and_(
                charges.c.id == entries.c.reference,
                charges.c.state == "settled",
                charges.c.account_id == entries.c.credit,
            ),
            isouter=True,
        )
        .where(entries.c.kind == "refund", sa.or_(charges.c.id.is_(None), charges.c.amount != entries.c.amount))
    )
    for row in connection.execute(refunds):
        yield Discrepancy("refund", row.reference, row.charged or 0, row.amount)


def _spends(connection: Connection) -> Iterable[Discrepancy]:
    own = keys.alias("own")
    counted = (
        sa.select(keys.c.id, sa.func.sum(charges.c.amount).label("amount"))
        .join(own, sa.func.coalesce(own.c.counter_id, own.c.id) == keys.c.id)
        .join(charges, sa.and_(charges.c.key_id == own.c.id, charges.c.window_start == keys.c.window_started))
        .where(charges.c.state.in_(("held", "settled")), sa.not_(is_refunded(charges.c.id)))
        .group_by(keys.c.id)
    )
    expected = {id: int(amount) for id, amount in connection.execute(counted)}
    for row in connection.execute(sa.select(keys.c.id, keys.c.spent, keys.c.carried)):
        due = expected.get(row.id, 0) + row.carried
        if due != row.spent:
            yield Discrepancy("spent in the key's window", row.id, due, row.spent)


def _attempt_costs(connection: Connection) -> Iterable[Discrepancy]:
    """Each attempt costs its tokens at its price, by the rule of `AttemptRecord.cost`."""
    attempt = provider_attempts.c
    theirs = attempt.their_tokens * ABSURD_FACTOR
    counted = sa.case(
        (
            sa.and_(theirs >= attempt.tokens, theirs <= attempt.tokens * ABSURD_FACTOR**2),
            attempt.their_tokens,
        ),
        else_=attempt.tokens,
    )
    rounded_up = (sa.cast(counted, sa.BigInteger) * attempt.price + 999_999) // 1_000_000
    expected = sa.case((attempt.outcome.in_(FREE_OUTCOMES), 0), else_=rounded_up)
    differing = sa.select(attempt.id, attempt.provider, attempt.cost, expected.label("due")).where(
        attempt.price.is_not(None), attempt.cost != expected
    )
    for row in connection.execute(differing):
        yield Discrepancy("cost of an attempt", f"{row.provider}/{row.id}", int(row.due), row.cost)


def _cost_bookings(connection: Connection) -> Iterable[Discrepancy]:
    """Each entry of costs has its attempts, all of the one provider, and each booked attempt has its entry."""
    attempt = provider_attempts.c
    booked = (
        sa.select(attempt.booking, attempt.provider, sa.func.sum(attempt.cost).label("cost"))
        .where(attempt.booking.is_not(None))
        .group_by(attempt.booking, attempt.provider)
        .subquery()
    )
    costs = sa.select(entries).where(entries.c.kind == "provider_cost").subquery()
    differing = (
        sa.select(costs.c.reference, costs.c.amount, booked.c.cost)
        .join(booked, booked.c.booking == costs.c.reference, isouter=True)
        .where(
            sa.or_(
                booked.c.booking.is_(None),
                booked.c.cost != costs.c.amount,
                costs.c.debit != COST,
                costs.c.credit != sa.literal(PAYABLE) + booked.c.provider,
            )
        )
    )
    for reference, amount, due in connection.execute(differing):
        yield Discrepancy("entry of a provider's costs", reference, int(due or 0), amount)
    lost = (
        sa.select(booked.c.booking, booked.c.cost)
        .join(costs, costs.c.reference == booked.c.booking, isouter=True)
        .where(costs.c.id.is_(None))
    )
    for reference, due in connection.execute(lost):
        yield Discrepancy("booked attempts without an entry", reference, int(due), 0)


def _answers(connection: Connection) -> Iterable[Discrepancy]:
    """Check that attempts belong to settled charges, and that the provider named by a charge answered it once."""
    attempt = provider_attempts.c
    of_nobody = (
        sa.select(attempt.charge, sa.func.sum(attempt.cost).label("cost"))
        .join(charges, charges.c.id == attempt.charge, isouter=True)
        .where(attempt.charge.is_not(None), sa.func.coalesce(charges.c.state, "") != "settled")
        .group_by(attempt.charge)
    )
    for charge, cost in connection.execute(of_nobody):
        yield Discrepancy("attempts of a charge that is not settled", charge, 0, int(cost))
    answered = (
        sa.select(attempt.charge, attempt.provider, sa.func.count().label("number"))
        .where(attempt.charge.is_not(None), attempt.outcome == "answered")
        .group_by(attempt.charge, attempt.provider)
        .subquery()
    )
    same = sa.and_(answered.c.charge == charges.c.id, answered.c.provider == charges.c.provider)
    unanswered = (
        sa.select(charges.c.id, charges.c.amount)
        .join(answered, same, isouter=True)
        .where(charges.c.provider.is_not(None), sa.func.coalesce(answered.c.number, 0) != 1)
    )
    for charge, amount in connection.execute(unanswered):
        yield Discrepancy("charge without the one answer of its provider", charge, 0, amount)
