"""Prices per model and tier, and the plans with their limits."""

from collections.abc import Iterable
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy import Connection

from unmask.errors import NoPrice, UsageError
from unmask.storage.database import insert
from unmask.storage.schema import accounts, plans, prices

TIERS = ("default", "batch")
ANY_MODEL = "*"


@dataclass(frozen=True)
class TariffPrice:
    """Nano-dollars for a million tokens. The model `*` stands for all that have none of their own."""

    model: str
    tier: str
    nano_per_million: int


@dataclass(frozen=True)
class RatePlan:
    """Limits of an account, over all its keys. None is no limit."""

    name: str
    requests_per_minute: int | None
    tokens_per_minute: int | None


def find_price(connection: Connection, model: str, tier: str) -> int:
    """Return nano-dollars per million tokens: the model's price in the tier, else its default one, else that of `*`.

    Raises:
        NoPrice: the operator has set none of them.
    """
    nano = effective_price(all_prices(connection), model, tier)
    if nano is None:
        raise NoPrice(f"The model '{model}' has no price yet: the operator sets it with 'unmask accounts price'.")
    return nano


def effective_price(prices: Iterable[TariffPrice], model: str, tier: str) -> int | None:
    """Return the result of `find_price` from prices that were read before; None if no price applies."""
    amounts = {(price.model, price.tier): price.nano_per_million for price in prices}
    candidates = ((model, tier), (model, "default"), (ANY_MODEL, tier), (ANY_MODEL, "default"))
    return next((amounts[key] for key in candidates if key in amounts), None)


def all_prices(connection: Connection) -> list[TariffPrice]:
    """List all prices."""
    rows = connection.execute(sa.select(prices).order_by(prices.c.model, prices.c.tier.desc()))
    return [TariffPrice(row.model, row.tier, row.nano_per_million) for row in rows]


def set_price(connection: Connection, price: TariffPrice, now: int) -> None:
    """Set or change a price. Requests in flight keep the one they were held at.

    Raises:
        UsageError: an unknown tier, or a price below zero or beyond all measure.
    """
    if price.tier not in TIERS:
        raise UsageError(f"tier {price.tier!r}: choose default or batch")
    if not price.model or not 0 <= price.nano_per_million <= 10**15:
        raise UsageError("a price needs a model, and lies between 0 and a million dollars per million tokens")
    statement = insert(connection, prices).values(
        model=price.model, tier=price.tier, nano_per_million=price.nano_per_million, set_at=now
    )
    connection.execute(
        statement.on_conflict_do_update(
            index_elements=[prices.c.model, prices.c.tier],
            set_={"nano_per_million": statement.excluded.nano_per_million, "set_at": now},
        )
    )


def remove_price(connection: Connection, model: str, tier: str) -> bool:
    """Remove a price. Returns False if there was none."""
    return connection.execute(prices.delete().where(prices.c.model == model, prices.c.tier == tier)).rowcount == 1


def all_plans(connection: Connection) -> list[RatePlan]:
    """List all plans; `default` always exists."""
    rows = connection.execute(sa.select(plans).order_by(plans.c.name))
    return [RatePlan(row.name, row.requests_per_minute, row.tokens_per_minute) for row in rows]


def set_plan(connection: Connection, plan: RatePlan) -> None:
    """Create or change a plan.

    Raises:
        UsageError: a limit is not greater than 0, or there is no name.
    """
    if not plan.name or any(
        limit is not None and limit <= 0 for limit in (plan.requests_per_minute, plan.tokens_per_minute)
    ):
        raise UsageError(f"plan {plan.name!r}: it needs a name, and limits greater than 0")
    statement = insert(connection, plans).values(
        name=plan.name, requests_per_minute=plan.requests_per_minute, tokens_per_minute=plan.tokens_per_minute
    )
    connection.execute(
        statement.on_conflict_do_update(
            index_elements=[plans.c.name],
            set_={
                "requests_per_minute": statement.excluded.requests_per_minute,
                "tokens_per_minute": statement.excluded.tokens_per_minute,
            },
        )
    )


def assign_plan(connection: Connection, account: str, plan: str) -> None:
    """Put an account on a plan.

    Raises:
        UsageError: one of them does not exist.
    """
    names = [one.name for one in all_plans(connection)]
    if plan not in names:
        raise UsageError(f"there is no plan {plan!r}, only {', '.join(names)}")
    if connection.execute(accounts.update().where(accounts.c.id == account).values(plan=plan)).rowcount != 1:
        raise UsageError(f"there is no account {account!r}")
