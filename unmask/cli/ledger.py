"""`unmask ledger ...`: check the books."""

from contextlib import closing

from cyclopts import App

from unmask.cli.database import DatabaseUrl, open_database, read_transaction
from unmask.cli.terminal import say

ledger = App(name="ledger", help="Check the books.")


@ledger.command
def verify(*, database: DatabaseUrl = None) -> int:
    """Recompute every balance from the entries. Exit code 2 if anything does not agree."""
    from unmask.accounts.money import format_dollars
    from unmask.accounts.verification import verify as recompute

    with read_transaction(database) as connection:
        found = recompute(connection)
    for drift in found.drift:
        say(str(drift))
    settled, held = format_dollars(found.settled), format_dollars(found.held)
    print(  # noqa: T201 - the result
        f"{found.accounts} accounts, {found.entries} entries, {found.charges} charges; "
        f"{settled} dollars charged, {held} held; drift: {len(found.drift) or 'none'}"
    )
    return 2 if found.drift else 0


@ledger.command
def sweep(*, database: DatabaseUrl = None) -> int:
    """Give back holds whose server died. A running server does it by itself every few seconds."""
    from unmask.accounts import ledger
    from unmask.storage.database import now_ms

    now = now_ms()
    count = 0
    with closing(open_database(database)) as books:
        with books.read() as connection:
            late = ledger.expired(connection, now, limit=1_000_000)
        for charge in late:
            with books.begin() as connection:
                count += ledger.expire(connection, charge, now)
    say(f"{count} holds given back")
    return 0
