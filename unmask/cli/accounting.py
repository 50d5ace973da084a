"""`unmask accounts ...` and `unmask ledger ...`: people, keys, prices and money, for the operator."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, Parameter

from unmask.cli.program import app, say

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from unmask.accounts.database import Database

accounts = App(name="accounts", help="People, keys, prices and credit. ACCOUNT is an id or a mail address.")
ledger = App(name="ledger", help="The books.")
app.command(accounts)
app.command(ledger)

_ACTOR = "command line"

DatabaseUrl = Annotated[
    str | None,
    Parameter(
        name="--database",
        env_var="UNMASK_DATABASE",
        help="sqlite:///path or postgresql://user@host/name. Left out: SQLite in UNMASK_HOME.",
    ),
]
Tier = Literal["default", "batch"]


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
    from unmask.accounts import audit, people, tariff
    from unmask.accounts.database import now_ms
    from unmask.accounts.keys import Peppers

    peppers = Peppers()
    hashed = people.hash_password(_password(password_file)) if email else ""
    now = now_ms()
    with _opened(database) as connection:
        if email:
            id = people.sign_up(connection, peppers, email, hashed, now, admin=admin).account_id
        else:
            id = people.open_account(connection, name, now)
        if plan != "default":
            tariff.assign_plan(connection, id, plan)
        audit.note(connection, now, _ACTOR, "account.create", id, plan=plan, admin=admin)
    print(id)  # noqa: T201 - the result
    return 0


@accounts.command(name="list")
def list_accounts(*, database: DatabaseUrl = None) -> int:
    """All accounts with their balances."""
    from unmask.accounts import people
    from unmask.accounts.money import format_dollars

    with _reading(database) as connection:
        found = people.all_accounts(connection, limit=1_000_000)
        owners = {person.account_id: person.email for person in people.everybody(connection)}
    rows = (
        (a.id, owners.get(a.id, a.name), a.state, a.plan, format_dollars(a.balance), format_dollars(a.held))
        for a in found
    )
    _table(("account", "who", "state", "plan", "balance", "held"), rows)
    return 0


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

    amount = _dollars(dollars)
    now = _now()
    with _opened(database) as connection:
        id = people.find_account(connection, account).id
        source = ledger.PROMOTION if gift else ledger.CASH
        done = ledger.top_up(connection, id, amount, reference, now, note=note, source=source)
        if done:
            audit.note(connection, now, _ACTOR, "credit.top_up", id, nano=amount, reference=reference, gift=gift)
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

    amount = _dollars(dollars)
    now = _now()
    with _opened(database) as connection:
        id = people.find_account(connection, account).id
        ledger.pay_out(connection, id, amount, reference, now, note=note)
        audit.note(connection, now, _ACTOR, "credit.pay_out", id, nano=amount, reference=reference)
        balance = people.account(connection, id).balance
    _say_balance(id, balance)
    return 0


@accounts.command
def refund(charge: str, *, note: str = "", database: DatabaseUrl = None) -> int:
    """Give back what a request cost. CHARGE is the answer's header x-unmask-charge."""
    from unmask.accounts import audit, ledger

    now = _now()
    with _opened(database) as connection:
        done = ledger.refund(connection, charge, now, note=note)
        if done:
            audit.note(connection, now, _ACTOR, "credit.refund", charge)
    say(f"{charge} was refunded" if done else f"{charge} was refunded before, or cost nothing")
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
    from unmask.accounts import audit, people
    from unmask.accounts.money import format_dollars
    from unmask.errors import UsageError

    now = _now()
    with _opened(database) as connection:
        found = people.find_account(connection, account)
        if not yes:
            raise UsageError(
                f"{found.id} has {format_dollars(found.balance)} dollars, and closing cannot be undone: add --yes"
            )
        given_up = people.close_account(connection, found.id, now)
        audit.note(connection, now, _ACTOR, "account.close", found.id, given_up_nano=given_up)
    say(f"{found.id} is closed; {format_dollars(given_up)} dollars were given up")
    return 0


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
    from unmask.accounts import audit, keys, people

    now = _now()
    settings = keys.KeySettings(
        name=name,
        scopes=tuple(scope),
        models=model or None,
        networks=network or None,
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        spend_limit=None if spend_limit is None else _dollars(spend_limit, zero=True),
        spend_window=spend_window,
        expires_at=None if days is None else now + int(days * 24 * 3600 * 1000),
    )
    peppers = keys.Peppers()
    with _opened(database) as connection:
        id = people.find_account(connection, account).id
        made = keys.create(connection, peppers, id, settings, now)
        audit.note(connection, now, _ACTOR, "key.create", id, key=keys.key_id(made))
    print(made)  # noqa: T201 - the result
    return 0


@accounts.command
def keys(account: str, *, database: DatabaseUrl = None) -> int:
    """The keys of an account, without their secrets."""
    from unmask.accounts import keys as room
    from unmask.accounts import people
    from unmask.accounts.money import format_dollars

    now = _now()
    with _reading(database) as connection:
        found = room.of_account(connection, people.find_account(connection, account).id, now)
    rows = [
        (
            key.id,
            key.settings.name,
            key.state(now),
            ",".join(key.settings.scopes),
            format_dollars(key.spent),
            "" if key.settings.spend_limit is None else format_dollars(key.settings.spend_limit),
            _when(key.settings.expires_at),
            _when(key.used_at),
        )
        for key in found
    ]
    _table(("key", "name", "state", "scopes", "spent", "of", "until", "last used"), rows)
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
    from unmask.accounts import audit, keys, people

    now = _now()
    peppers = keys.Peppers()
    with _opened(database) as connection:
        id = people.find_account(connection, account).id
        made = keys.rotate(connection, peppers, id, key, now, overlap_ms=int(overlap_hours * 3_600_000))
        audit.note(connection, now, _ACTOR, "key.rotate", id, key=key, by=keys.key_id(made))
    print(made)  # noqa: T201 - the result
    return 0


@accounts.command
def revoke(account: str, key: str, *, database: DatabaseUrl = None) -> int:
    """End a key at once. KEY is its id."""
    from unmask.accounts import audit, keys, people

    now = _now()
    with _opened(database) as connection:
        id = people.find_account(connection, account).id
        done = keys.revoke(connection, id, key, now)
        if done:
            audit.note(connection, now, _ACTOR, "key.revoke", id, key=key)
    say(f"{key} {'is revoked' if done else 'was revoked before'}")
    return 0


@accounts.command
def price(model: str, dollars: str, *, tier: Tier = "default", database: DatabaseUrl = None) -> int:
    """Set what a million tokens cost.

    Parameters
    ----------
    model
        Its id, or "*" for all models without a price of their own.
    dollars
        Per million tokens, such as 0.008.
    tier
        The batch tier costs the same as the default one where it has no price.
    """
    from unmask.accounts import audit, tariff

    amount = _dollars(dollars, zero=True)
    now = _now()
    with _opened(database) as connection:
        tariff.set_price(connection, tariff.Price(model, tier, amount), now)
        audit.note(connection, now, _ACTOR, "price.set", model, tier=tier, nano_per_million=amount)
    return 0


@accounts.command
def prices(*, database: DatabaseUrl = None) -> int:
    """All prices, in dollars per million tokens."""
    from unmask.accounts import tariff
    from unmask.accounts.money import format_dollars

    with _reading(database) as connection:
        found = tariff.all_prices(connection)
    _table(("model", "tier", "dollars"), ((p.model, p.tier, format_dollars(p.nano_per_million)) for p in found))
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
    """Set the limits of a plan, or with --account put an account on it. Accounts begin on "default".

    Parameters
    ----------
    requests_per_minute, tokens_per_minute
        Over all keys of an account. Left out: no limit.
    account
        Only put this account on the plan.
    """
    from unmask.accounts import audit, people, tariff

    now = _now()
    with _opened(database) as connection:
        if account is not None:
            id = people.find_account(connection, account).id
            tariff.assign_plan(connection, id, name)
            audit.note(connection, now, _ACTOR, "plan.assign", id, plan=name)
        else:
            tariff.set_plan(connection, tariff.Plan(name, requests_per_minute, tokens_per_minute))
            limits = {"requests_per_minute": requests_per_minute, "tokens_per_minute": tokens_per_minute}
            audit.note(connection, now, _ACTOR, "plan.set", name, limits=limits)
    return 0


@accounts.command
def statement(account: str, *, lines: int = 100, database: DatabaseUrl = None) -> int:
    """What moved an account's balance, newest first."""
    from unmask.accounts import people, usage
    from unmask.accounts.money import format_dollars

    with _reading(database) as connection:
        found = usage.statement(connection, people.find_account(connection, account).id, limit=lines)
    rows = [(str(e.number), _when(e.at), e.kind, format_dollars(e.amount), e.reference, e.note) for e in found]
    _table(("entry", "when", "what", "dollars", "reference", "note"), rows)
    return 0


@accounts.command
def audit(*, lines: int = 100, database: DatabaseUrl = None) -> int:
    """Who did what, newest first."""
    import json

    from unmask.accounts import audit as room

    with _reading(database) as connection:
        found = room.events(connection, limit=lines)
    rows = [
        (str(number), _when(e.at), e.actor, e.action, e.subject, json.dumps(e.detail), e.address) for number, e in found
    ]
    _table(("line", "when", "who", "what", "whom", "how", "from"), rows)
    return 0


@accounts.command
def backup(file: Path, *, database: DatabaseUrl = None) -> int:
    """Write all of it to FILE, also while a server runs. Keep a copy of the pepper file as well."""
    from unmask.accounts.backup import backup as write
    from unmask.accounts.keys import Peppers

    rows = write(_database(database), file)
    say(f"{rows} rows -> {file}. API keys also need {Peppers().path}, which is not in it: keep a copy elsewhere")
    return 0


@accounts.command
def restore(file: Path, *, database: DatabaseUrl = None) -> int:
    """Read FILE into an empty database, of either kind, and check the books."""
    from unmask.accounts.backup import restore as read

    rows = read(_database(database), file)
    say(f"{rows} rows restored, and the books balance")
    return 0


@ledger.command
def verify(*, database: DatabaseUrl = None) -> int:
    """Recompute every balance from the entries. Exit code 2 if anything does not agree."""
    from unmask.accounts.money import format_dollars
    from unmask.accounts.verification import verify as recompute

    with _reading(database) as connection:
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

    now = _now()
    opened = _database(database)
    with opened.read() as connection:
        late = ledger.expired(connection, now, limit=1_000_000)
    count = 0
    for charge in late:
        with opened.begin() as connection:
            count += ledger.expire(connection, charge, now)
    say(f"{count} holds given back")
    return 0


def _database(url: str | None) -> "Database":
    from unmask.accounts.database import Database, default_url

    database = Database(url or default_url())
    database.migrate()
    return database


def _opened(url: str | None) -> "AbstractContextManager[Connection]":
    return _database(url).begin()


def _reading(url: str | None) -> "AbstractContextManager[Connection]":
    return _database(url).read()


def _now() -> int:
    from unmask.accounts.database import now_ms

    return now_ms()


def _dollars(text: str, *, zero: bool = False) -> int:
    from unmask.accounts.money import parse_dollars
    from unmask.errors import UsageError

    try:
        amount = parse_dollars(text)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if amount == 0 and not zero:
        raise UsageError(f"{text} dollars: it must be more than 0")
    return amount


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
    from unmask.accounts import audit, people

    now = _now()
    with _opened(database) as connection:
        id = people.find_account(connection, account).id
        changed = people.freeze(connection, id, frozen=frozen)
        if changed:
            audit.note(connection, now, _ACTOR, "account.freeze" if frozen else "account.thaw", id)
        state = people.account(connection, id).state
    say(f"{id} is {state}{'' if changed else ', as before'}")
    return 0


def _say_balance(account: str, balance: int, before: str = "") -> None:
    from unmask.accounts.money import format_dollars

    say(f"{before}{account} has {format_dollars(balance)} dollars")


def _when(milliseconds: int | None) -> str:
    from datetime import UTC, datetime

    if milliseconds is None:
        return ""
    return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _table(headings: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE, pad_edge=False)
    for heading in headings:
        table.add_column(heading, no_wrap=heading in ("account", "key", "entry", "when"))
    for row in rows:
        table.add_row(*(str(value) for value in row))
    Console().print(table)
