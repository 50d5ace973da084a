"""`unmask accounts price` and `plan`: what a model costs, and how much an account may ask for."""

from typing import Literal

from unmask.cli.accounts import accounts
from unmask.cli.database import DatabaseUrl, read_transaction, write_transaction
from unmask.cli.options import parse_amount
from unmask.cli.terminal import print_table

Tier = Literal["default", "batch"]


@accounts.command
def price(model: str, dollars: str, *, tier: Tier = "default", database: DatabaseUrl = None) -> int:
    """Set what a million tokens cost.

    Parameters
    ----------
    model
        Its id, or "*" for all models without a price of their own.
    dollars
        Per million tokens, such as 0.008.
    tier
        The batch tier costs the same as the default one where it has no price.
    """
    from unmask.accounts import actions, tariff
    from unmask.accounts.audit import COMMAND_LINE
    from unmask.storage.database import now_ms

    amount = parse_amount(dollars, zero=True)
    now = now_ms()
    with write_transaction(database) as connection:
        actions.set_price(connection, COMMAND_LINE, tariff.Price(model, tier, amount), now)
    return 0


@accounts.command
def prices(*, database: DatabaseUrl = None) -> int:
    """All prices, in dollars per million tokens."""
    from unmask.accounts import tariff
    from unmask.accounts.money import format_dollars

    with read_transaction(database) as connection:
        found = tariff.all_prices(connection)
    print_table(("model", "tier", "dollars"), ((p.model, p.tier, format_dollars(p.nano_per_million)) for p in found))
    return 0


@accounts.command
def plan(
    name: str,
    *,
    requests_per_minute: int | None = None,
    tokens_per_minute: int | None = None,
    account: str | None = None,
    database: DatabaseUrl = None,
) -> int:
    """Set the limits of a plan, or with --account put an account on it. Accounts begin on "default".

    Parameters
    ----------
    requests_per_minute, tokens_per_minute
        Over all keys of an account. Left out: no limit.
    account
        Only put this account on the plan.
    """
    from unmask.accounts import actions, people, tariff
    from unmask.accounts.audit import COMMAND_LINE
    from unmask.storage.database import now_ms

    now = now_ms()
    with write_transaction(database) as connection:
        if account is not None:
            id = people.find_account(connection, account).id
            actions.assign_plan(connection, COMMAND_LINE, id, name, now)
        else:
            limits = tariff.Plan(name, requests_per_minute, tokens_per_minute)
            actions.set_plan(connection, COMMAND_LINE, limits, now)
    return 0
