"""`unmask accounts key` and the other commands for API keys."""

from typing import Literal

from unmask.accounts import actions, keys, people
from unmask.accounts.audit import COMMAND_LINE
from unmask.accounts.money import format_dollars
from unmask.cli.accounts import accounts
from unmask.cli.database import DatabaseUrl, read_transaction, write_transaction
from unmask.cli.options import AsJson, duration_ms, parse_amount
from unmask.storage.database import now_ms
from unmask.terminal import format_time, print_result, print_table, say


@accounts.command(name="key")
def create_key(
    account: str,
    *,
    name: str = "",
    scope: tuple[Literal["embeddings", "account"], ...] = ("embeddings", "account"),
    model: tuple[str, ...] = (),
    network: tuple[str, ...] = (),
    requests_per_minute: int | None = None,
    tokens_per_minute: int | None = None,
    spend_limit: str | None = None,
    spend_window: Literal["day", "week", "month"] | None = None,
    days: float | None = None,
    database: DatabaseUrl = None,
) -> int:
    """Create an API key and print it. It is printed only this once.

    Parameters
    ----------
    name
        Name of the key in lists.
    scope
        Use of the key. Repeat it for several. Default: all.
    model
        Model that the key may call. Repeat it for several. Default: all.
    network
        Address or block that requests may come from, like 203.0.113.0/24. Repeat it for several. Default: any.
    requests_per_minute
        Most requests per minute. Default: the plan's limit alone.
    tokens_per_minute
        Most tokens per minute. Default: the plan's limit alone.
    spend_limit
        Most dollars that the key may spend.
    spend_window
        Period after which the spend limit starts anew, in UTC. Default: never.
    days
        Days until the key ends, 1 or more. Default: it works until it is revoked.
    """
    now = now_ms()
    settings = keys.KeySettings(
        name=name,
        scopes=tuple(scope),
        models=model or None,
        networks=network or None,
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        spend_limit=None if spend_limit is None else parse_amount(spend_limit, zero=True),
        spend_window=spend_window,
        expires_at=None if days is None else now + duration_ms(days, "--days", hours=24, least=1),
    )
    with write_transaction(database) as connection:
        id = people.find_account(connection, account).id
        secret = actions.create_key(connection, COMMAND_LINE, keys.Peppers(), id, settings, now)
    print_result(secret)
    return 0


@accounts.command(name="keys")
def list_keys(account: str, *, as_json: AsJson = False, database: DatabaseUrl = None) -> int:
    """List the keys of an account, without their secrets."""
    now = now_ms()
    with read_transaction(database) as connection:
        account_keys = keys.list_keys(connection, people.find_account(connection, account).id, now)
    rows = [
        (
            key.id,
            key.settings.name,
            key.state(now),
            ",".join(key.settings.scopes),
            format_dollars(key.spent),
            "" if key.settings.spend_limit is None else format_dollars(key.settings.spend_limit),
            format_time(key.settings.expires_at),
            format_time(key.used_at),
        )
        for key in account_keys
    ]
    print_table(("key", "name", "state", "scopes", "spent", "of", "until", "last used"), rows, as_json=as_json)
    return 0


@accounts.command
def rotate(account: str, key: str, *, overlap_hours: float = 24.0, database: DatabaseUrl = None) -> int:
    """Create a key with the settings of an old one, and print it.

    Parameters
    ----------
    key
        Id of the old key: the part between "um_" and the next "_".
    overlap_hours
        Hours for which the old key still works.
    """
    overlap_ms = duration_ms(overlap_hours, "--overlap-hours", hours=1, least=0)
    with write_transaction(database) as connection:
        id = people.find_account(connection, account).id
        secret = actions.rotate_key(connection, COMMAND_LINE, keys.Peppers(), id, key, now_ms(), overlap_ms=overlap_ms)
    print_result(secret)
    return 0


@accounts.command
def revoke(account: str, key: str, *, database: DatabaseUrl = None) -> int:
    """End a key at once. KEY is its id."""
    with write_transaction(database) as connection:
        id = people.find_account(connection, account).id
        changed = actions.revoke_key(connection, COMMAND_LINE, id, key, now_ms())
    say(f"{key} {'is revoked' if changed else 'was revoked before'}")
    return 0
