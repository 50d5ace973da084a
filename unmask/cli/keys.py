"""`unmask accounts key` and the other commands about API keys."""

from typing import Annotated, Literal

from cyclopts import Parameter

from unmask.cli.accounts import accounts
from unmask.cli.database import DatabaseUrl, read_transaction, write_transaction
from unmask.cli.options import parse_amount
from unmask.cli.terminal import format_time, print_result, print_table, say


@accounts.command
def key(
    account: str,
    *,
    name: str = "",
    scope: Annotated[tuple[Literal["embeddings", "account"], ...], Parameter(negative=())] = ("embeddings", "account"),
    model: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    network: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    requests_per_minute: int | None = None,
    tokens_per_minute: int | None = None,
    spend_limit: str | None = None,
    spend_window: Literal["day", "week", "month"] | None = None,
    days: float | None = None,
    database: DatabaseUrl = None,
) -> int:
    """Make an API key and print it. It is shown this once.

    Parameters
    ----------
    scope
        What it is for. May be repeated; left out, for all.
    model
        A model it may call. May be repeated; left out, all.
    network
        An address or block it may come from, like 203.0.113.0/24. May be repeated; left out, any.
    spend_limit
        Dollars it may spend.
    spend_window
        When that starts anew, in UTC; left out, never.
    days
        How long it works; left out, until it is revoked.
    """
    from unmask.accounts import actions, keys, people
    from unmask.accounts.audit import COMMAND_LINE
    from unmask.storage.database import now_ms

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
        expires_at=None if days is None else now + int(days * 24 * 3600 * 1000),
    )
    peppers = keys.Peppers()
    with write_transaction(database) as connection:
        id = people.find_account(connection, account).id
        made = actions.create_key(connection, COMMAND_LINE, peppers, id, settings, now)
    print_result(made)
    return 0


@accounts.command
def keys(account: str, *, database: DatabaseUrl = None) -> int:
    """The keys of an account, without their secrets."""
    from unmask.accounts import keys as room
    from unmask.accounts import people
    from unmask.accounts.money import format_dollars
    from unmask.storage.database import now_ms

    now = now_ms()
    with read_transaction(database) as connection:
        found = room.of_account(connection, people.find_account(connection, account).id, now)
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
        for key in found
    ]
    print_table(("key", "name", "state", "scopes", "spent", "of", "until", "last used"), rows)
    return 0


@accounts.command
def rotate(account: str, key: str, *, overlap_hours: float = 24.0, database: DatabaseUrl = None) -> int:
    """Make a new key with the settings of an old one, and print it.

    Parameters
    ----------
    key
        The old one's id: the part between "um_" and the next "_".
    overlap_hours
        How long the old one goes on working.
    """
    from unmask.accounts import actions, keys, people
    from unmask.accounts.audit import COMMAND_LINE
    from unmask.storage.database import now_ms

    now = now_ms()
    peppers = keys.Peppers()
    with write_transaction(database) as connection:
        id = people.find_account(connection, account).id
        overlap_ms = int(overlap_hours * 3_600_000)
        made = actions.rotate_key(connection, COMMAND_LINE, peppers, id, key, now, overlap_ms=overlap_ms)
    print_result(made)
    return 0


@accounts.command
def revoke(account: str, key: str, *, database: DatabaseUrl = None) -> int:
    """End a key at once. KEY is its id."""
    from unmask.accounts import actions, people
    from unmask.accounts.audit import COMMAND_LINE
    from unmask.storage.database import now_ms

    now = now_ms()
    with write_transaction(database) as connection:
        id = people.find_account(connection, account).id
        done = actions.revoke_key(connection, COMMAND_LINE, id, key, now)
    say(f"{key} {'is revoked' if done else 'was revoked before'}")
    return 0
