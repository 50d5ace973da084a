"""`unmask accounts ...`: people, the audit log and backups. Keys, credit and prices have modules of their own."""

import getpass
import sys
from contextlib import closing, suppress
from pathlib import Path

from cyclopts import App

from unmask.accounts import actions, people
from unmask.accounts.audit import COMMAND_LINE, events
from unmask.accounts.keys import Peppers
from unmask.accounts.money import format_dollars
from unmask.accounts.verification import discrepancies
from unmask.cli.database import DatabaseUrl, open_database, read_transaction, write_transaction
from unmask.cli.options import AsJson, LineCount
from unmask.errors import MissingDatabase, UsageError
from unmask.storage import backup as backups
from unmask.storage.database import now_ms
from unmask.terminal import format_time, print_result, print_table, say

accounts = App(
    name="accounts",
    help="Manage people, API keys, prices and credit.\n\nACCOUNT is the id of an account or its person's mail address.",
)


@accounts.command
def create(
    name: str,
    *,
    email: str | None = None,
    password_file: Path | None = None,
    admin: bool = False,
    plan: str = "default",
    database: DatabaseUrl = None,
) -> int:
    """Create an account and print its id.

    Parameters
    ----------
    name
        Name of the account. With --email the address is used instead.
    email
        Address of a person who can sign in to the account. The password is asked for twice.
    password_file
        File whose first line is the password, instead of asking.
    admin
        Make the person an admin, who sees and changes everything.
    plan
        Plan with the limits of the account, see "unmask accounts plan".
    """
    password_hash = ""
    if email is not None:
        # Check the address first, so that a person does not type a password in vain. A missing database is made later.
        people.require_new_address(email)
        with suppress(MissingDatabase), read_transaction(database) as connection:
            people.require_new_address(email, connection)
        password_hash = people.hash_password(_password(password_file))
    peppers = Peppers()
    with write_transaction(database, new=True) as connection:
        id = actions.create_account(
            connection,
            COMMAND_LINE,
            peppers,
            name,
            now_ms(),
            email=email,
            password_hash=password_hash,
            admin=admin,
            plan=plan,
        )
    print_result(id)
    return 0


@accounts.command(name="list")
def list_accounts(*, as_json: AsJson = False, database: DatabaseUrl = None) -> int:
    """List all accounts with their balances in dollars."""
    with read_transaction(database) as connection:
        rows = people.all_accounts(connection, limit=1_000_000)
        owners = {person.account_id: person.email for person in people.list_people(connection)}
        shared = people.shared_mailboxes(connection)
    print_table(
        ("account", "who", "state", "plan", "balance", "held"),
        [
            (row.id, owners.get(row.id, row.name), row.state, row.plan, *map(format_dollars, (row.balance, row.held)))
            for row in rows
        ],
        right=("balance", "held"),
        as_json=as_json,
    )
    for sharing in shared:
        ids = " and ".join(person.account_id for person in sharing)
        say(f"{ids} belong to one mailbox, {sharing[0].email}, in two spellings: ask its owner which one to close")
    return 0


@accounts.command
def freeze(account: str, *, database: DatabaseUrl = None) -> int:
    """Refuse all requests of an account until "unmask accounts thaw". Requests in flight are settled."""
    return _set_frozen(account, True, database)


@accounts.command
def thaw(account: str, *, database: DatabaseUrl = None) -> int:
    """Accept requests of a frozen account again."""
    return _set_frozen(account, False, database)


@accounts.command
def close(account: str, *, yes: bool = False, database: DatabaseUrl = None) -> int:
    """Delete an account for good.

    The person's data is erased, the keys end, and the remaining credit is given up. Pay it out first.

    Parameters
    ----------
    yes
        Confirm. Closing cannot be undone.
    """
    with write_transaction(database) as connection:
        row = people.find_account(connection, account)
        if not yes:
            raise UsageError(
                f"{row.id} has {format_dollars(row.balance)} dollars, and closing cannot be undone: add --yes"
            )
        given_up = actions.close_account(connection, COMMAND_LINE, row.id, now_ms())
    say(f"{row.id} is closed; {format_dollars(given_up)} dollars were given up")
    return 0


@accounts.command(name="audit")
def list_audit_events(*, lines: LineCount = 100, as_json: AsJson = False, database: DatabaseUrl = None) -> int:
    """List changes with their authors, newest first.

    Parameters
    ----------
    lines
        Most changes to list.
    """
    import json

    with read_transaction(database) as connection:
        rows = [
            (
                number,
                format_time(event.at),
                event.actor,
                event.action,
                event.subject,
                event.detail if as_json else json.dumps(event.detail),
                event.address,
            )
            for number, event in events(connection, limit=lines)
        ]
    print_table(("line", "when", "who", "what", "whom", "how", "from"), rows, as_json=as_json)
    return 0


@accounts.command
def backup(file: Path, *, database: DatabaseUrl = None) -> int:
    """Write the whole database to FILE, also while a server runs. Keep a copy of the pepper file as well."""
    with closing(open_database(database)) as source:
        rows = backups.backup(source, file)
    say(f"{rows} rows -> {file}. API keys also need {Peppers().path}, which is not in it: keep a copy elsewhere")
    return 0


@accounts.command
def restore(file: Path, *, database: DatabaseUrl = None) -> int:
    """Read FILE into an empty database, SQLite or Postgres, and check the books."""
    backups.check_head(file)  # before a database is made for it
    with closing(open_database(database, new=True)) as target:
        rows = backups.restore(target, file, check=discrepancies)
    say(f"{rows} rows restored, and the books balance")
    return 0


def _password(file: Path | None) -> str:
    if file is None:
        return _typed_password()
    try:
        # Only a newline ends the line; a password may hold whatever else Unicode counts as a line end.
        return file.read_text(encoding="utf-8-sig").partition("\n")[0].removesuffix("\r")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--password-file {file} cannot be read: {error}") from error


def _typed_password() -> str:
    """Ask twice: a typing error in characters that nobody sees would lock the person out."""
    if sys.stdin is None or not sys.stdin.isatty():
        raise UsageError("there is no terminal to ask for the password on; use --password-file")
    try:
        password = getpass.getpass("Password: ")
        if getpass.getpass("The same again: ") == password:
            return password
    except EOFError:
        raise UsageError("no password was typed; type one, or use --password-file") from None
    raise UsageError("the two passwords differ: nothing was created; run the command again")


def _set_frozen(account: str, frozen: bool, database: str | None) -> int:
    with write_transaction(database) as connection:
        id = people.find_account(connection, account).id
        changed = actions.set_account_frozen(connection, COMMAND_LINE, id, now_ms(), frozen=frozen)
        state = people.account(connection, id).state
    say(f"{id} is {state}{'' if changed else ', as before'}")
    return 0
