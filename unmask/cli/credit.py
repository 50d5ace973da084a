"""`unmask accounts top-up` and the other commands that move money."""

from unmask.accounts import actions, people, usage
from unmask.accounts.audit import COMMAND_LINE
from unmask.accounts.money import format_dollars
from unmask.cli.accounts import accounts
from unmask.cli.database import DatabaseUrl, read_transaction, write_transaction
from unmask.cli.options import AsJson, LineCount, parse_amount
from unmask.storage.database import now_ms
from unmask.terminal import format_time, print_table, say


@accounts.command
def top_up(
    account: str, dollars: str, *, reference: str, note: str = "", gift: bool = False, database: DatabaseUrl = None
) -> int:
    """Add credit to an account. The same reference a second time adds nothing.

    Parameters
    ----------
    dollars
        Amount, such as 12.50.
    reference
        Reference of the payment. Each is booked once.
    note
        Text for the account's owner.
    gift
        Book the amount as a gift: nobody paid for it.
    """
    amount = parse_amount(dollars)
    with write_transaction(database) as connection:
        id = people.find_account(connection, account).id
        added = actions.top_up(connection, COMMAND_LINE, id, amount, reference, now_ms(), note=note, gift=gift)
        balance = people.account(connection, id).balance
    repetition = "" if added else f"the reference {reference!r} is in the books already: nothing was added; "
    say(f"{repetition}{id} has {format_dollars(balance)} dollars")
    return 0


@accounts.command
def pay_out(account: str, dollars: str, *, reference: str, note: str = "", database: DatabaseUrl = None) -> int:
    """Take credit out of an account after you have paid it back.

    Parameters
    ----------
    dollars
        Amount, such as 12.50.
    reference
        Reference of the payment. Each is booked once.
    note
        Text for the account's owner.
    """
    amount = parse_amount(dollars)
    with write_transaction(database) as connection:
        id = people.find_account(connection, account).id
        actions.pay_out(connection, COMMAND_LINE, id, amount, reference, now_ms(), note=note)
        balance = people.account(connection, id).balance
    say(f"{id} has {format_dollars(balance)} dollars")
    return 0


@accounts.command
def refund(charge: str, *, note: str = "", database: DatabaseUrl = None) -> int:
    """Give back the cost of a request. CHARGE is the header x-unmask-charge of its response.

    Parameters
    ----------
    note
        Text for the account's owner.
    """
    with write_transaction(database) as connection:
        changed = actions.refund(connection, COMMAND_LINE, charge, now_ms(), note=note)
    say(f"{charge} was refunded" if changed else f"{charge} was refunded before, or cost nothing")
    return 0


@accounts.command
def statement(account: str, *, lines: LineCount = 100, as_json: AsJson = False, database: DatabaseUrl = None) -> int:
    """List the entries of an account's balance, newest first.

    Parameters
    ----------
    lines
        Most entries to list.
    """
    with read_transaction(database) as connection:
        entries = usage.statement(connection, people.find_account(connection, account).id, limit=lines)
    rows = [
        (entry.number, format_time(entry.at), entry.kind, format_dollars(entry.amount), entry.reference, entry.note)
        for entry in entries
    ]
    headings = ("entry", "when", "what", "dollars", "reference", "note")
    print_table(headings, rows, right=("dollars",), as_json=as_json)
    return 0
