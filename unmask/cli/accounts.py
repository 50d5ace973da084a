"""`unmask accounts ...`: the accounts themselves, the audit log, and backups of all of it.

The commands about keys, credit and prices are in `keying`, `crediting` and `pricing`.
"""

from contextlib import closing
from pathlib import Path

from cyclopts import App

from unmask.cli.database import DatabaseUrl, open_database, read_transaction, write_transaction
from unmask.cli.terminal import format_time, print_result, print_table, say

accounts = App(name="accounts", help="People, keys, prices and credit. ACCOUNT is an id or a mail address.")


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
    """Make an account, with --email also somebody who can sign in to it. Prints the account's id.

    Parameters
    ----------
    name
        What it is called; with --email its person's address is used instead.
    email
        Address to sign in with. The password is asked for.
    password_file
        File whose first line is the password, instead of asking.
    admin
        Let the person see and do everything.
    plan
        Limits of the account, see "unmask accounts plan".
    """
    from unmask.accounts import actions, people
    from unmask.accounts.audit import COMMAND_LINE
    from unmask.accounts.keys import Peppers
    from unmask.storage.database import now_ms

    peppers = Peppers()
    hashed = people.hash_password(_password(password_file)) if email else ""
    now = now_ms()
    with write_transaction(database) as connection:
        id = actions.create_account(
            connection,
            COMMAND_LINE,
            peppers,
            name,
            now,
            email=email,
            password_hash=hashed,
            admin=admin,
            plan=plan,
        )
    print_result(id)
    return 0


@accounts.command(name="list")
def list_accounts(*, database: DatabaseUrl = None) -> int:
    """All accounts with their balances."""
    from unmask.accounts import people
    from unmask.accounts.money import format_dollars

    with read_transaction(database) as connection:
        found = people.all_accounts(connection, limit=1_000_000)
        owners = {person.account_id: person.email for person in people.everybody(connection)}
    rows = (
        (a.id, owners.get(a.id, a.name), a.state, a.plan, format_dollars(a.balance), format_dollars(a.held))
        for a in found
    )
    print_table(("account", "who", "state", "plan", "balance", "held"), rows)
    return 0


@accounts.command
def freeze(account: str, *, database: DatabaseUrl = None) -> int:
    """Let an account call nothing until "unmask accounts thaw". Requests in flight are settled."""
    return _set_frozen(account, True, database)


@accounts.command
def thaw(account: str, *, database: DatabaseUrl = None) -> int:
    """Let a frozen account call again."""
    return _set_frozen(account, False, database)


@accounts.command
def close(account: str, *, yes: bool = False, database: DatabaseUrl = None) -> int:
    """Delete an account: who it was is forgotten, its keys end, its credit is given up. Pay out first.

    Parameters
    ----------
    yes
        Do it: it cannot be undone.
    """
    from unmask.accounts import actions, people
    from unmask.accounts.audit import COMMAND_LINE
    from unmask.accounts.money import format_dollars
    from unmask.errors import UsageError
    from unmask.storage.database import now_ms

    now = now_ms()
    with write_transaction(database) as connection:
        found = people.find_account(connection, account)
        if not yes:
            raise UsageError(
                f"{found.id} has {format_dollars(found.balance)} dollars, and closing cannot be undone: add --yes"
            )
        given_up = actions.close_account(connection, COMMAND_LINE, found.id, now)
    say(f"{found.id} is closed; {format_dollars(given_up)} dollars were given up")
    return 0


@accounts.command
def audit(*, lines: int = 100, database: DatabaseUrl = None) -> int:
    """Who did what, newest first."""
    import json

    from unmask.accounts import audit as room

    with read_transaction(database) as connection:
        found = room.events(connection, limit=lines)
    rows = [
        (str(number), format_time(e.at), e.actor, e.action, e.subject, json.dumps(e.detail), e.address)
        for number, e in found
    ]
    print_table(("line", "when", "who", "what", "whom", "how", "from"), rows)
    return 0


@accounts.command
def backup(file: Path, *, database: DatabaseUrl = None) -> int:
    """Write all of it to FILE, also while a server runs. Keep a copy of the pepper file as well."""
    from unmask.accounts.keys import Peppers
    from unmask.storage.backup import backup as write

    with closing(open_database(database)) as everything:
        rows = write(everything, file)
    say(f"{rows} rows -> {file}. API keys also need {Peppers().path}, which is not in it: keep a copy elsewhere")
    return 0


@accounts.command
def restore(file: Path, *, database: DatabaseUrl = None) -> int:
    """Read FILE into an empty database, of either kind, and check the books."""
    from unmask.accounts.verification import discrepancies
    from unmask.storage.backup import restore as read

    with closing(open_database(database)) as empty:
        rows = read(empty, file, check=discrepancies)
    say(f"{rows} rows restored, and the books balance")
    return 0


def _password(file: Path | None) -> str:
    import getpass

    from unmask.errors import UsageError

    if file is None:
        return getpass.getpass("Password: ")
    try:
        return (file.read_text(encoding="utf-8").splitlines() or [""])[0]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--password-file {file} cannot be read: {error}") from error


def _set_frozen(account: str, frozen: bool, database: str | None) -> int:
    from unmask.accounts import actions, people
    from unmask.accounts.audit import COMMAND_LINE
    from unmask.storage.database import now_ms

    now = now_ms()
    with write_transaction(database) as connection:
        id = people.find_account(connection, account).id
        changed = actions.freeze_account(connection, COMMAND_LINE, id, now, frozen=frozen)
        state = people.account(connection, id).state
    say(f"{id} is {state}{'' if changed else ', as before'}")
    return 0
