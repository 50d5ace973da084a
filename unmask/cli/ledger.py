"""`unmask accounts top-up` and what else moves money, and `unmask ledger ...`, which counts it."""

from contextlib import closing

from cyclopts import App

from unmask.cli.accounts import accounts
from unmask.cli.database import DatabaseUrl, opened, reading, writing
from unmask.cli.program import ACTOR, app, moment, say, table, typed_dollars

ledger = App(name="ledger", help="The books.")
app.command(ledger)


@accounts.command
def top_up(
    account: str, dollars: str, *, reference: str, note: str = "", gift: bool = False, database: DatabaseUrl = None
) -> int:
    """Add credit. The same reference a second time adds nothing.

    Parameters
    ----------
    dollars
        Such as 12.50.
    reference
        Of the payment; each only once.
    note
        For the account's owner to read.
    gift
        Nobody paid for it.
    """
    from unmask.accounts import audit, ledger, people
    from unmask.storage.database import now_ms

    amount = typed_dollars(dollars)
    now = now_ms()
    with writing(database) as connection:
        id = people.find_account(connection, account).id
        source = ledger.PROMOTION if gift else ledger.CASH
        done = ledger.top_up(connection, id, amount, reference, now, note=note, source=source)
        if done:
            audit.note(connection, now, ACTOR, "credit.top_up", id, nano=amount, reference=reference, gift=gift)
        balance = people.account(connection, id).balance
    _say_balance(
        id, balance, "" if done else f"the reference {reference!r} is in the books already: nothing was added; "
    )
    return 0


@accounts.command
def pay_out(account: str, dollars: str, *, reference: str, note: str = "", database: DatabaseUrl = None) -> int:
    """Take credit out that was paid back outside of here.

    Parameters
    ----------
    reference
        Of the payment; each only once.
    """
    from unmask.accounts import audit, ledger, people
    from unmask.storage.database import now_ms

    amount = typed_dollars(dollars)
    now = now_ms()
    with writing(database) as connection:
        id = people.find_account(connection, account).id
        ledger.pay_out(connection, id, amount, reference, now, note=note)
        audit.note(connection, now, ACTOR, "credit.pay_out", id, nano=amount, reference=reference)
        balance = people.account(connection, id).balance
    _say_balance(id, balance)
    return 0


@accounts.command
def refund(charge: str, *, note: str = "", database: DatabaseUrl = None) -> int:
    """Give back what a request cost. CHARGE is the answer's header x-unmask-charge."""
    from unmask.accounts import audit, ledger
    from unmask.storage.database import now_ms

    now = now_ms()
    with writing(database) as connection:
        done = ledger.refund(connection, charge, now, note=note)
        if done:
            audit.note(connection, now, ACTOR, "credit.refund", charge)
    say(f"{charge} was refunded" if done else f"{charge} was refunded before, or cost nothing")
    return 0


@accounts.command
def statement(account: str, *, lines: int = 100, database: DatabaseUrl = None) -> int:
    """What moved an account's balance, newest first."""
    from unmask.accounts import people, usage
    from unmask.accounts.money import format_dollars

    with reading(database) as connection:
        found = usage.statement(connection, people.find_account(connection, account).id, limit=lines)
    rows = [(str(e.number), moment(e.at), e.kind, format_dollars(e.amount), e.reference, e.note) for e in found]
    table(("entry", "when", "what", "dollars", "reference", "note"), rows)
    return 0


@ledger.command
def verify(*, database: DatabaseUrl = None) -> int:
    """Recompute every balance from the entries. Exit code 2 if anything does not agree."""
    from unmask.accounts.money import format_dollars
    from unmask.accounts.verification import verify as recompute

    with reading(database) as connection:
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
    with closing(opened(database)) as books:
        with books.read() as connection:
            late = ledger.expired(connection, now, limit=1_000_000)
        for charge in late:
            with books.begin() as connection:
                count += ledger.expire(connection, charge, now)
    say(f"{count} holds given back")
    return 0


def _say_balance(account: str, balance: int, before: str = "") -> None:
    from unmask.accounts.money import format_dollars

    say(f"{before}{account} has {format_dollars(balance)} dollars")
