"""`unmask ledger ...`: check the books."""

from contextlib import closing
from dataclasses import asdict

from cyclopts import App

from unmask.accounts import ledger as books
from unmask.accounts import verification
from unmask.accounts.money import format_dollars
from unmask.cli.database import DatabaseUrl, open_database, read_transaction
from unmask.cli.options import AsJson
from unmask.storage.database import now_ms
from unmask.terminal import print_json, print_sentence, say

ledger = App(name="ledger", help="Check the books.")


@ledger.command
def verify(*, as_json: AsJson = False, database: DatabaseUrl = None) -> int:
    """Recompute every balance from the entries. Exit code 2 if one does not agree."""
    with read_transaction(database) as connection:
        report = verification.verify(connection)
    if as_json:
        print_json(asdict(report))
        return 2 if report.drift else 0
    for drift in report.drift:
        say(str(drift))
    settled, held = format_dollars(report.settled), format_dollars(report.held)
    print_sentence(
        f"{report.accounts} accounts, {report.entries} entries, {report.charges} charges; "
        f"{settled} dollars charged, {held} held; {report.attempts} attempts at providers for "
        f"{format_dollars(report.cost)}; drift: {len(report.drift) or 'none'}"
    )
    return 2 if report.drift else 0


@ledger.command
def sweep(*, database: DatabaseUrl = None) -> int:
    """Give back holds whose server died. A running server does so every few seconds."""
    now = now_ms()
    count = 0
    with closing(open_database(database)) as opened:
        with opened.read() as connection:
            expired = books.expired_holds(connection, now, limit=1_000_000)
        for charge in expired:
            with opened.begin() as connection:
                count += books.expire(connection, charge, now)
    say(f"{count} holds given back")
    return 0
