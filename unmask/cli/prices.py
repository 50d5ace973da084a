"""`unmask accounts price` and `plan`: prices of models and limits of accounts."""

from typing import Literal

from unmask.accounts import actions, people, tariff
from unmask.accounts.audit import COMMAND_LINE
from unmask.accounts.money import format_dollars
from unmask.cli.accounts import accounts
from unmask.cli.database import DatabaseUrl, read_transaction, write_transaction
from unmask.cli.options import AsJson, parse_amount
from unmask.storage.database import now_ms
from unmask.terminal import print_table

Tier = Literal["default", "batch"]


@accounts.command(name="price")
def set_price(model: str, dollars: str, *, tier: Tier = "default", database: DatabaseUrl = None) -> int:
    """Set the price of a million tokens.

    Parameters
    ----------
    model
        Id of the model, or "*" for all models without a price of their own.
    dollars
        Dollars per million tokens, such as 0.008.
    tier
        The batch tier costs the same as the default one where it has no price.
    """
    amount = parse_amount(dollars, zero=True)
    with write_transaction(database, new=True) as connection:
        actions.set_price(connection, COMMAND_LINE, tariff.TariffPrice(model, tier, amount), now_ms())
    return 0


@accounts.command(name="prices")
def list_prices(*, as_json: AsJson = False, database: DatabaseUrl = None) -> int:
    """List all prices, in dollars per million tokens."""
    with read_transaction(database) as connection:
        prices = tariff.all_prices(connection)
    rows = [(price.model, price.tier, format_dollars(price.nano_per_million)) for price in prices]
    print_table(("model", "tier", "dollars"), rows, right=("dollars",), as_json=as_json)
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
    """Set the limits of a plan, or put an account on it. Accounts begin on the plan "default".

    Parameters
    ----------
    requests_per_minute
        Most requests per minute over all keys of an account. Default: no limit.
    tokens_per_minute
        Most tokens per minute over all keys of an account. Default: no limit.
    account
        Put this account on the plan, and leave the limits of the plan as they are.
    """
    with write_transaction(database) as connection:
        if account is not None:
            id = people.find_account(connection, account).id
            actions.assign_plan(connection, COMMAND_LINE, id, name, now_ms())
        else:
            limits = tariff.RatePlan(name, requests_per_minute, tokens_per_minute)
            actions.set_plan(connection, COMMAND_LINE, limits, now_ms())
    return 0
