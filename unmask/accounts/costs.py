"""Attempts at providers: what each cost us, beside the one charge that its request costs the caller.

Every attempt is a row: good ones in the transaction of the settlement, all others on their own. Our count of tokens is
charged; a provider's own count decides what it will bill, unless it is absurd.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import sqlalchemy as sa
from sqlalchemy import Connection

from unmask.accounts import money
from unmask.storage.database import RawStatement
from unmask.storage.schema import provider_attempts

Reason = Literal["answer", "retry", "probe"]

# A count that differs from ours by more than this factor is no count: it is missing, or of something else.
_ABSURD = 2.0

_INSERT = RawStatement(
    "INSERT INTO provider_attempts (at, charge, provider, model, milliseconds, outcome, reason, tokens, their_tokens, "
    "cost) VALUES (:at, :charge, :provider, :model, :milliseconds, :outcome, :reason, :tokens, :their_tokens, :cost)"
)


@dataclass(frozen=True, kw_only=True)
class AttemptRecord:
    """One attempt at a provider.

    Attributes:
        at: Unix milliseconds.
        provider, model: names.
        milliseconds: duration.
        outcome: "answered", or the signal of its failure.
        reason: the first attempt of a request is for the answer, the others are retries; canaries are probes.
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
        if self.outcome in ("unreachable", "rate_limited", "no_access", "rejected"):
            return 0
        theirs = self.their_tokens
        usable = theirs is not None and self.tokens / _ABSURD <= theirs <= self.tokens * _ABSURD
        return money.cost(theirs if usable and theirs is not None else self.tokens, self.price)


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
                "cost": attempt.cost,
            },
        )


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
