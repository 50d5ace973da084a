"""The books: double entry, append-only, integers of nano-dollars.

A row of `entries` moves an amount from one book to another, so all books together are zero whatever happens.
An account's `balance` is what its entries sum to. Of it `held` is set aside for requests in flight, each a row of
`charges` that is `held` once and then becomes `settled`, `released` or `expired`, by one conditional statement.

Tokens are counted before the work starts, so a hold is the charge to the last nano-dollar. Nothing here reads a
balance to decide about it: one statement tests and takes. Every function is one step of the caller's transaction
and takes its locks in the order charge, account, key, so that no two of them ever wait for each other.
"""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import sqlalchemy as sa
from sqlalchemy import Connection

from unmask.accounts.idempotency import find_replay, store_replay
from unmask.accounts.money import MAX_AMOUNT, format_dollars
from unmask.errors import (
    Forbidden,
    InsufficientCredit,
    KeyRefused,
    LedgerRefused,
    SpendLimitReached,
    UsageError,
)
from unmask.storage.database import RawStatement
from unmask.storage.schema import accounts, charges, entries, keys

# Our own books. `PAYABLE` and a provider's name: what we owe it.
CASH, REVENUE, PROMOTION, FORFEITED = "@cash", "@revenue", "@promotion", "@forfeited"
COST, PAYABLE = "@cost", "@payable:"

LONGEST_REFERENCE = 200  # characters; an index row of Postgres holds 2,704 bytes


@dataclass(frozen=True, kw_only=True)
class Hold:
    """An amount to hold for a request.

    Attributes:
        id: of the charge, unique.
        request: the request's id, for people to find it by.
        tokens: number of tokens.
        amount: nano-dollars.
        expires_at: Unix milliseconds after which the sweeper gives it back.
        idempotency_key: digest of the caller's Idempotency-Key, if there is one.
        body: digest of tier and body, to tell a repetition from another request.
    """

    id: str
    account_id: str
    key_id: str | None
    request: str
    model: str
    tier: str
    tokens: int
    amount: int
    expires_at: int
    spend_window: str | None = None
    idempotency_key: str | None = None
    body: str = ""


@dataclass(frozen=True)
class HeldCredit:
    """The charge of a request.

    Attributes:
        replayed: an earlier request with the same Idempotency-Key settled it, so it costs nothing again. A charge that
            was refunded since is not replayed: the request would be worked on for nothing.
    """

    id: str
    amount: int
    replayed: bool = False


_TAKE = RawStatement(
    "UPDATE accounts SET held = held + :amount WHERE id = :account AND state = 'active' AND balance - held >= :amount"
)
_GIVE_BACK = RawStatement("UPDATE accounts SET held = held - :amount WHERE id = :account")
_PAY = RawStatement("UPDATE accounts SET balance = balance - :amount, held = held - :amount WHERE id = :account")
# A key and those that replace it count in one row, so that together they spend no more than the limit.
_SPEND = RawStatement(
    "UPDATE keys SET "
    "spent = CASE WHEN window_started < :start THEN 0 ELSE spent END + :amount, "
    "carried = CASE WHEN window_started < :start THEN 0 ELSE carried END, "
    "window_started = CASE WHEN window_started < :start THEN :start ELSE window_started END "
    "WHERE id = (SELECT COALESCE(own.counter_id, own.id) FROM keys AS own "
    "WHERE own.id = :key AND own.account_id = :account AND own.revoked_at IS NULL) AND (spend_limit IS NULL "
    "OR CASE WHEN window_started < :start THEN 0 ELSE spent END + :amount <= spend_limit) "
    "RETURNING window_started"
)
_HOLD = RawStatement(
    "INSERT INTO charges (id, account_id, key_id, request, model, tier, tokens, amount, state, window_start, "
    "held_at, expires_at) VALUES (:id, :account_id, :key_id, :request, :model, :tier, :tokens, :amount, 'held', "
    ":window_start, :held_at, :expires_at)"
)
_END = RawStatement(
    "UPDATE charges SET state = :after, ended_at = :now WHERE id = :charge AND state = :before "
    "RETURNING account_id, key_id, amount, window_start"
)
_ANSWERED_BY = RawStatement("UPDATE charges SET provider = :provider WHERE id = :charge")
_BOOK = RawStatement(
    "INSERT INTO entries (at, kind, debit, credit, amount, reference, note) "
    "VALUES (:at, :kind, :debit, :credit, :amount, :reference, :note) "
    "ON CONFLICT (kind, reference) DO NOTHING RETURNING id"
)


class _Ended(NamedTuple):
    account_id: str
    key_id: str | None
    amount: int
    window_start: int


def window_start(window: str | None, now: int) -> int:
    """Return the Unix milliseconds at which the day, the week (from Monday) or the month around `now` began, in UTC."""
    if window is None:
        return 0
    day = datetime.fromtimestamp(now / 1000, UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    if window == "week":
        day -= timedelta(days=day.weekday())
    elif window == "month":
        day = day.replace(day=1)
    return int(day.timestamp()) * 1000


def hold(connection: Connection, new_hold: Hold, now: int) -> HeldCredit:
    """Hold the cost of a request.

    Raises:
        InsufficientCredit, SpendLimitReached: the account's credit or the key's limit does not cover it.
        Forbidden: the account is frozen or closed.
        KeyRefused: the key was revoked meanwhile.
        RequestInProgress, ReplayLimitReached, KeyReused: about the Idempotency-Key.
    """
    if new_hold.idempotency_key is not None:
        own = (new_hold.account_id, new_hold.idempotency_key, new_hold.body)
        earlier = find_replay(connection, *own, now)
        if earlier is not None:
            return HeldCredit(*earlier, replayed=True)
    if _TAKE.changed(connection, {"amount": new_hold.amount, "account": new_hold.account_id}) != 1:
        raise _refusal(connection, new_hold)
    window = _spend(connection, new_hold, now) if new_hold.key_id is not None else 0
    _HOLD.changed(
        connection,
        {
            "id": new_hold.id,
            "account_id": new_hold.account_id,
            "key_id": new_hold.key_id,
            "request": new_hold.request,
            "model": new_hold.model,
            "tier": new_hold.tier,
            "tokens": new_hold.tokens,
            "amount": new_hold.amount,
            "window_start": window,
            "held_at": now,
            "expires_at": new_hold.expires_at,
        },
    )
    if new_hold.idempotency_key is not None:
        own = (new_hold.account_id, new_hold.idempotency_key, new_hold.body)
        store_replay(connection, *own, new_hold.id, now)
    return HeldCredit(new_hold.id, new_hold.amount)


def settle(connection: Connection, charge: str, now: int, provider: str | None = None) -> bool:
    """Turn a hold into money spent. Doing it again changes nothing.

    A hold that the sweeper gave back meanwhile is taken again, if the credit is still there: the work was done.

    Args:
        connection: of a transaction that writes.
        charge: id of the charge.
        now: Unix milliseconds.
        provider: name of the provider that computed the vectors; None for this server's own engine.

    Returns:
        True if this call settled it, False if an earlier one did.

    Raises:
        LedgerRefused: the charge was released, or never held.
        InsufficientCredit: it had expired, and the credit has gone elsewhere since.
    """
    row = _end(connection, charge, "held", "settled", now)
    if row is not None:
        _PAY.changed(connection, {"amount": row.amount, "account": row.account_id})
    else:
        row = _end(connection, charge, "expired", "settled", now)
        if row is None:
            state = connection.scalar(sa.select(charges.c.state).where(charges.c.id == charge))
            if state == "settled":
                return False
            raise LedgerRefused(f"charge {charge} is {state or 'not known'}, so it cannot be settled")
        taken = connection.execute(
            accounts.update()
            .where(accounts.c.id == row.account_id, accounts.c.balance - accounts.c.held >= row.amount)
            .values(balance=accounts.c.balance - row.amount)
        )
        if taken.rowcount != 1:
            raise InsufficientCredit(f"the hold of charge {charge} expired, and its credit was spent meanwhile")
        _adjust_spent(connection, row, row.amount)
    if row.amount:
        _book(connection, now, "charge", row.account_id, REVENUE, row.amount, charge)
    if provider is not None:
        _ANSWERED_BY.changed(connection, {"provider": provider, "charge": charge})
    return True


def release(connection: Connection, charge: str, now: int, *, state: str = "released") -> bool:
    """Give a hold back, because the request failed or its client left.

    Args:
        state: "released", or "expired" from the sweeper.

    Returns:
        True if there was a hold to give back. A settled charge stays settled.
    """
    row = _end(connection, charge, "held", state, now)
    if row is None:
        return False
    _GIVE_BACK.changed(connection, {"amount": row.amount, "account": row.account_id})
    _adjust_spent(connection, row, -row.amount)
    return True


def expired_holds(connection: Connection, now: int, limit: int = 1000) -> list[str]:
    """List charges whose hold has expired. Give each back in its own transaction, with `expire`."""
    return list(
        connection.scalars(
            sa.select(charges.c.id)
            .where(charges.c.state == "held", charges.c.expires_at <= now)
            .order_by(charges.c.expires_at)
            .limit(limit)
        )
    )


def expire(connection: Connection, charge: str, now: int) -> bool:
    """Give back a hold that its server did not end, because it died."""
    return release(connection, charge, now, state="expired")


def top_up(
    connection: Connection, account: str, amount: int, reference: str, now: int, *, note: str = "", source: str = CASH
) -> bool:
    """Add credit that was paid for, once per reference.

    Args:
        reference: of the payment, in words of the operator's choice.
        source: `CASH`, or `PROMOTION` for credit that was given.

    Returns:
        False if this very top-up is in the books already.

    Raises:
        LedgerRefused: the reference stands for another top-up, the amount is impossible, or there is no such account.
        UsageError: the reference is too long.
    """
    kind = "free_credit" if source == PROMOTION else "top_up"
    _check_amount(amount)
    _check_reference(reference)
    if not reference:
        raise LedgerRefused("a top-up needs a reference, so that it cannot be booked twice")
    if not _book(connection, now, kind, source, account, amount, reference, note):
        earlier = connection.execute(
            sa.select(entries.c.credit, entries.c.amount).where(
                entries.c.kind == kind, entries.c.reference == reference
            )
        ).one()
        if (earlier.credit, earlier.amount) == (account, amount):
            return False
        raise LedgerRefused(
            f"the reference {reference!r} stands for {format_dollars(earlier.amount)} dollars to {earlier.credit}: "
            "give this top-up one of its own"
        )
    done = connection.execute(
        accounts.update()
        .where(accounts.c.id == account, accounts.c.state != "closed", accounts.c.balance <= MAX_AMOUNT - amount)
        .values(balance=accounts.c.balance + amount)
    )
    if done.rowcount != 1:
        raise LedgerRefused(
            f"account {account} does not exist, is closed, or would hold more than {format_dollars(MAX_AMOUNT)} dollars"
        )
    return True


def refund(connection: Connection, charge: str, now: int, *, note: str = "") -> bool:
    """Give back what a settled charge cost, once: to the account, and to the key's spend limit in the same window.

    Returns:
        False if it was refunded already, or cost nothing.

    Raises:
        LedgerRefused: it is not settled, or its account is closed.
    """
    row = connection.execute(
        sa.select(
            charges.c.account_id, charges.c.key_id, charges.c.amount, charges.c.window_start, charges.c.state
        ).where(charges.c.id == charge)
    ).one_or_none()
    if row is None or row.state != "settled":
        raise LedgerRefused(
            f"charge {charge} is {'not known' if row is None else row.state}: only a settled charge can be refunded; "
            "check the id; a charge is settled when its request was answered"
        )
    if row.amount == 0 or not _book(connection, now, "refund", REVENUE, row.account_id, row.amount, charge, note):
        return False
    done = connection.execute(
        accounts.update()
        .where(accounts.c.id == row.account_id, accounts.c.state != "closed")
        .values(balance=accounts.c.balance + row.amount)
    )
    if done.rowcount != 1:
        raise LedgerRefused(f"account {row.account_id} is closed")
    _adjust_spent(connection, _Ended(row.account_id, row.key_id, row.amount, row.window_start), -row.amount)
    return True


def pay_out(
    connection: Connection, account: str, amount: int, reference: str, now: int, *, note: str = "", to: str = CASH
) -> None:
    """Take credit out of an account: money paid back, or given up with the account.

    Raises:
        LedgerRefused: there is not so much that is free, or the reference was used.
        UsageError: the reference is too long.
    """
    _check_amount(amount)
    _check_reference(reference)
    kind = "forfeit" if to == FORFEITED else "pay_out"
    taken = connection.execute(
        accounts.update()
        .where(accounts.c.id == account, accounts.c.balance - accounts.c.held >= amount)
        .values(balance=accounts.c.balance - amount)
    )
    if taken.rowcount != 1:
        raise LedgerRefused(f"account {account} does not have {format_dollars(amount)} dollars of free credit")
    if not reference or not _book(connection, now, kind, account, to, amount, reference, note):
        raise LedgerRefused(f"the reference {reference!r} is empty or was used already")


def book_cost(connection: Connection, provider: str, amount: int, reference: str, now: int) -> None:
    """Book what attempts at a provider cost, from `COST` to what we owe it.

    Args:
        connection: of the transaction that marks the attempts with the reference.
        provider: its name.
        amount: nano-dollars.
        reference: unique.
        now: Unix milliseconds.

    Raises:
        LedgerRefused: the amount is impossible, or the reference was used.
    """
    _check_amount(amount)
    if not _book(connection, now, "provider_cost", COST, PAYABLE + provider, amount, reference):
        raise LedgerRefused(f"the reference {reference!r} was used already")


def pay_provider(
    connection: Connection, provider: str, amount: int, reference: str, now: int, *, note: str = ""
) -> bool:
    """Book that a provider's invoice was paid, once per reference.

    Args:
        connection: of a transaction that writes.
        provider: its name.
        amount: nano-dollars.
        reference: of the invoice.
        now: Unix milliseconds.
        note: for people.

    Returns:
        False if this very payment is in the books already.

    Raises:
        LedgerRefused: the reference stands for another payment, or the amount is impossible.
        UsageError: the reference is too long.
    """
    _check_amount(amount)
    _check_reference(reference)
    if not reference:
        raise LedgerRefused("a payment needs the number of its invoice, so that it cannot be booked twice")
    if _book(connection, now, "provider_payment", PAYABLE + provider, CASH, amount, f"{provider}/{reference}", note):
        return True
    earlier = connection.scalar(
        sa.select(entries.c.amount).where(
            entries.c.kind == "provider_payment", entries.c.reference == f"{provider}/{reference}"
        )
    )
    if earlier == amount:
        return False
    raise LedgerRefused(f"{reference!r} of {provider} was paid with {format_dollars(earlier or 0)} dollars already")


def _spend(connection: Connection, new_hold: Hold, now: int) -> int:
    """Count the cost against the key's limit. Returns the window it counts in.

    A window only ever moves forward, so that a request that crossed midnight on its way does not bring
    yesterday back.
    """
    values = {
        "start": window_start(new_hold.spend_window, now),
        "amount": new_hold.amount,
        "key": new_hold.key_id,
        "account": new_hold.account_id,
    }
    for (window,) in _SPEND.rows(connection, values):
        return window
    key = connection.execute(
        sa.select(keys.c.spend_limit, keys.c.spend_window, keys.c.revoked_at).where(
            keys.c.id == new_hold.key_id, keys.c.account_id == new_hold.account_id
        )
    ).one_or_none()
    if key is None or key.revoked_at is not None:
        raise KeyRefused("it was revoked")
    again = f"It starts anew with the next {key.spend_window}." if key.spend_window else "It does not start anew."
    raise SpendLimitReached(
        f"This request costs {format_dollars(new_hold.amount)} dollars, more than what is left of the API key's "
        f"spend limit of {format_dollars(key.spend_limit)} dollars. {again}"
    )


def _adjust_spent(connection: Connection, row: _Ended, change: int) -> None:
    """Correct the key's count, where it still counts the window of the charge."""
    if row.key_id is not None and row.amount:
        own = keys.alias("own")
        counter = sa.select(sa.func.coalesce(own.c.counter_id, own.c.id)).where(own.c.id == row.key_id)
        connection.execute(
            keys.update()
            .where(keys.c.id == counter.scalar_subquery(), keys.c.window_started == row.window_start)
            .values(spent=keys.c.spent + change)
        )


def _end(connection: Connection, charge: str, before: str, after: str, now: int) -> _Ended | None:
    for row in _END.rows(connection, {"after": after, "now": now, "charge": charge, "before": before}):
        return _Ended(*row)
    return None


def _book(
    connection: Connection, now: int, kind: str, debit: str, credit: str, amount: int, reference: str, note: str = ""
) -> bool:
    """Write an entry, unless there is one of this kind and reference."""
    values = {
        "at": now,
        "kind": kind,
        "debit": debit,
        "credit": credit,
        "amount": amount,
        "reference": reference,
        "note": note,
    }
    return bool(_BOOK.rows(connection, values))


def _refusal(connection: Connection, new_hold: Hold) -> Exception:
    account = connection.execute(sa.select(accounts).where(accounts.c.id == new_hold.account_id)).one_or_none()
    if account is None or account.state != "active":
        return Forbidden(f"This account is {'closed' if account is None else account.state}.")
    free = format_dollars(account.balance - account.held)
    return InsufficientCredit(
        f"This request costs {format_dollars(new_hold.amount)} dollars and the account has {free} dollars of free "
        "credit: top it up, or send less at a time."
    )


def _check_reference(reference: str) -> None:
    if len(reference) > LONGEST_REFERENCE:
        raise UsageError(
            f"the reference {reference[:40]!r}... has {len(reference)} characters: at most {LONGEST_REFERENCE}"
        )


def _check_amount(amount: int) -> None:
    if not 0 < amount <= MAX_AMOUNT:
        raise LedgerRefused(
            f"{format_dollars(amount)} dollars cannot be booked: more than 0, at most {format_dollars(MAX_AMOUNT)}"
        )
