"""`unmask accounts top-up` and what else moves money, and `unmask ledger ...`, which counts it."""

from unmask.cli.accounts import accounts
from unmask.cli.database import DatabaseUrl, read_transaction, write_transaction
from unmask.cli.options import parse_amount
from unmask.cli.terminal import format_time, print_table, say


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
    from unmask.accounts import actions, people
    from unmask.accounts.audit import COMMAND_LINE
    from unmask.storage.database import now_ms

    amount = parse_amount(dollars)
    now = now_ms()
    with write_transaction(database) as connection:
        id = people.find_account(connection, account).id
        done = actions.top_up(connection, COMMAND_LINE, id, amount, reference, now, note=note, gift=gift)
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
    from unmask.accounts import actions, people
    from unmask.accounts.audit import COMMAND_LINE
    from unmask.storage.database import now_ms

    amount = parse_amount(dollars)
    now = now_ms()
    with write_transaction(database) as connection:
        id = people.find_account(connection, account).id
        actions.pay_out(connection, COMMAND_LINE, id, amount, reference, now, note=note)
        balance = people.account(connection, id).balance
    _say_balance(id, balance)
    return 0


@accounts.command
def refund(charge: str, *, note: str = "", database: DatabaseUrl = None) -> int:
    """Give back what a request cost. CHARGE is the answer's header x-unmask-charge."""
    from unmask.accounts import actions
    from unmask.accounts.audit import COMMAND_LINE
    from unmask.storage.database import now_ms

    now = now_ms()
    with write_transaction(database) as connection:
        done = actions.refund(connection, COMMAND_LINE, charge, now, note=note)
    say(f"{charge} was refunded" if done else f"{charge} was refunded before, or cost nothing")
    return 0


@accounts.command
def statement(account: str, *, lines: int = 100, database: DatabaseUrl = None) -> int:
    """What moved an account's balance, newest first."""
    from unmask.accounts import people, usage
    from unmask.accounts.money import format_dollars

    with read_transaction(database) as connection:
        entries = usage.statement(connection, people.find_account(connection, account).id, limit=lines)
    rows = [(str(e.number), format_time(e.at), e.kind, format_dollars(e.amount), e.reference, e.note) for e in entries]
    print_table(("entry", "when", "what", "dollars", "reference", "note"), rows)
    return 0


def _say_balance(account: str, balance: int, before: str = "") -> None:
    from unmask.accounts.money import format_dollars

    say(f"{before}{account} has {format_dollars(balance)} dollars")
