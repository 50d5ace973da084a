"""Accounts, the people who own them, and their sessions.

Passwords are hashed by `hash_password` and checked by `check_password`, which take tens of milliseconds on purpose:
they stand apart from the functions that hold a transaction.
"""

import hashlib
import secrets
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy import Connection

from unmask.accounts import ledger
from unmask.accounts.identity_provider import Identity
from unmask.accounts.keys import Peppers
from unmask.accounts.mail_address import normalize_email, stored_spellings
from unmask.errors import AddressTaken, LedgerRefused, SignInRefused, UsageError
from unmask.storage.database import insert
from unmask.storage.schema import (
    DEFAULT_PLAN,
    accounts,
    entries,
    identities,
    invitations,
    keys,
    notices,
    people,
    sessions,
    votes,
)

if TYPE_CHECKING:
    from argon2 import PasswordHasher

SESSION_MS = 14 * 24 * 3600 * 1000
INVITATION_MS = 24 * 3600 * 1000
SHORTEST_PASSWORD = 10
NO_PASSWORD = ""  # no password fits it
_LONGEST_PASSWORD = 1000
_TAKEN = "this address cannot be used: if it is yours, sign in instead"


@dataclass(frozen=True)
class Account:
    """An account. Amounts in nano-dollars, `created_at` in Unix milliseconds."""

    id: str
    name: str
    plan: str
    state: str
    balance: int
    held: int
    created_at: int

    @property
    def free(self) -> int:
        """Nano-dollars that can be spent now: the balance without held amounts."""
        return self.balance - self.held


@dataclass(frozen=True)
class Person:
    """A person who can sign in."""

    id: str
    account_id: str
    email: str
    admin: bool
    created_at: int


def open_account(connection: Connection, name: str, now: int, *, plan: str = DEFAULT_PLAN) -> str:
    """Create an account. Returns its id.

    Raises:
        UsageError: the name is empty or too long.
    """
    name = name.strip()
    if not 0 < len(name) <= 200:
        raise UsageError("an account needs a name of 1 to 200 characters")
    id = f"acct_{secrets.token_hex(8)}"
    connection.execute(
        accounts.insert(),
        {"id": id, "name": name, "plan": plan, "state": "active", "balance": 0, "held": 0, "created_at": now},
    )
    return id


def account(connection: Connection, id: str) -> Account:
    """Return an account by its id.

    Raises:
        UsageError: there is none of this id.
    """
    row = connection.execute(sa.select(accounts).where(accounts.c.id == id)).one_or_none()
    if row is None:
        raise UsageError(f"there is no account {id!r}: see 'unmask accounts list'")
    return Account(*row)


def all_accounts(connection: Connection, *, limit: int = 1000, after: str = "") -> list[Account]:
    """List accounts with ids greater than `after`, in the order of ids."""
    rows = connection.execute(sa.select(accounts).where(accounts.c.id > after).order_by(accounts.c.id).limit(limit))
    return [Account(*row) for row in rows]


def newest_accounts(connection: Connection, *, limit: int = 50, before: tuple[int, str] | None = None) -> list[Account]:
    """List accounts, newest first.

    Args:
        before: `created_at` and `id` of the last one of the page before.
    """
    statement = sa.select(accounts).order_by(accounts.c.created_at.desc(), accounts.c.id.desc()).limit(limit)
    if before is not None:
        statement = statement.where(
            sa.tuple_(accounts.c.created_at, accounts.c.id) < sa.tuple_(*map(sa.literal, before))
        )
    return [Account(*row) for row in connection.execute(statement)]


def totals(connection: Connection) -> tuple[int, int, int]:
    """Return the number of accounts that are not closed, and the sums of their balances and held amounts."""
    row = connection.execute(
        sa.select(sa.func.count(), sa.func.sum(accounts.c.balance), sa.func.sum(accounts.c.held)).where(
            accounts.c.state != "closed"
        )
    ).one()
    return int(row[0]), int(row[1] or 0), int(row[2] or 0)


def find_account(connection: Connection, name: str) -> Account:
    """Return an account by its id or by the mail address of its owner.

    Raises:
        UsageError: there is none.
    """
    if "@" not in name:
        return account(connection, name)
    row = _by_email(connection, name, people.c.account_id)
    id = None if row is None else row.account_id
    if id is None:
        raise UsageError(f"nobody has the address {name!r}: see 'unmask accounts list'")
    return account(connection, id)


def set_frozen(connection: Connection, id: str, *, frozen: bool) -> bool:
    """Freeze an account, or thaw it. A frozen account cannot call models; requests in flight are settled.

    Freezing ends the sessions of its people. They may sign in again to read their pages, but are no admins until the
    account is thawed.

    Returns:
        False if it was so before.
    """
    before, after = ("active", "frozen") if frozen else ("frozen", "active")
    done = connection.execute(
        accounts.update().where(accounts.c.id == id, accounts.c.state == before).values(state=after)
    )
    if done.rowcount != 1:
        account(connection, id)
    elif frozen:
        own = sa.select(people.c.id).where(people.c.account_id == id)
        connection.execute(sessions.delete().where(sessions.c.person_id.in_(own)))
    return done.rowcount == 1


def close_account(connection: Connection, id: str, now: int) -> int:
    """Close an account: delete its people, sessions, names and votes, revoke its keys, and forfeit its credit.

    Entries and charges stay in the books, without anything that identifies a person.

    Returns:
        The nano-dollars that are forfeited.

    Raises:
        LedgerRefused: requests of it are in flight.
    """
    closed = connection.execute(
        accounts.update()
        .where(accounts.c.id == id, accounts.c.state != "closed", accounts.c.held == 0)
        .values(state="closed", name="")
        .returning(accounts.c.balance)
    ).one_or_none()
    if closed is None:
        state = account(connection, id).state
        raise LedgerRefused(
            "the account is closed already" if state == "closed" else "requests are in flight: try again in a minute"
        )
    if closed.balance:
        ledger.pay_out(connection, id, closed.balance, f"closing {id}", now, to=ledger.FORFEITED)
    own = sa.select(people.c.id).where(people.c.account_id == id)
    for table in (sessions, identities):
        connection.execute(table.delete().where(table.c.person_id.in_(own)))
    connection.execute(people.delete().where(people.c.account_id == id))
    for table in (votes, notices):
        connection.execute(table.delete().where(table.c.account_id == id))
    connection.execute(
        keys.update()
        .where(keys.c.account_id == id)
        .values(name="", networks=None, revoked_at=sa.func.coalesce(keys.c.revoked_at, now))
    )
    return closed.balance


@cache
def _hasher() -> "PasswordHasher":
    from argon2 import PasswordHasher

    return PasswordHasher(time_cost=3, memory_cost=65_536, parallelism=1)  # RFC 9106's second choice, one lane


@cache
def _dummy_hash() -> str:
    return _hasher().hash(secrets.token_hex(16))


def hash_password(password: str) -> str:
    """Return the argon2id hash of a password.

    Raises:
        UsageError: it is too short or too long.
    """
    if not SHORTEST_PASSWORD <= len(password) <= _LONGEST_PASSWORD:
        raise UsageError(f"a password needs {SHORTEST_PASSWORD} to {_LONGEST_PASSWORD} characters")
    return _hasher().hash(password)


def check_password(stored: str | None, password: str) -> bool:
    """Check a password against the stored hash. Without a stored hash it takes as long and returns False."""
    from argon2.exceptions import VerificationError

    try:
        _hasher().verify(stored or _dummy_hash(), password[:_LONGEST_PASSWORD])
    except VerificationError:
        return False
    return stored is not None


def require_new_address(email: str, connection: Connection | None = None) -> None:
    """Check that a person can be made with an address: its form, and with `connection` that nobody has it.

    Raises:
        UsageError: it is no mail address.
        AddressTaken: the address is taken.
    """
    normalize_email(email)
    if connection is not None and _by_email(connection, email, people.c.id) is not None:
        raise AddressTaken(_TAKEN)


def sign_up(
    connection: Connection,
    peppers: Peppers,
    email: str,
    password_hash: str,
    now: int,
    *,
    free_credit: int = 0,
    admin: bool = False,
) -> Person:
    """Create a person with an account of their own.

    Args:
        free_credit: nano-dollars, given once per mail address, also if the account was closed in between.

    Raises:
        AddressTaken: the address is taken.
    """
    require_new_address(email, connection)
    email = normalize_email(email)
    own = open_account(connection, email, now)
    id = f"person_{secrets.token_hex(8)}"
    row = {
        "id": id,
        "account_id": own,
        "email": email,
        "password": password_hash,
        "admin": admin,
        "created_at": now,
    }
    made = connection.execute(
        insert(connection, people)
        .values(row)
        .on_conflict_do_nothing(index_elements=[people.c.email])
        .returning(people.c.id)
    )
    if made.one_or_none() is None:
        raise AddressTaken(_TAKEN)
    if free_credit:
        give_free_credit(connection, peppers, own, email, free_credit, now)
    return Person(id, own, email, admin, now)


def give_free_credit(connection: Connection, peppers: Peppers, account: str, email: str, amount: int, now: int) -> bool:
    """Add the free credit, once per mail address for ever. Returns False if the address had it before."""
    mark = peppers.permanent_digest(f"free credit {normalize_email(email)}")
    earlier = connection.scalar(
        sa.select(entries.c.id).where(entries.c.kind == "free_credit", entries.c.reference == mark)
    )
    if earlier is not None:
        return False
    return ledger.top_up(connection, account, amount, mark, now, note="free credit", source=ledger.PROMOTION)


def stored_password(connection: Connection, email: str) -> tuple[str, str] | None:
    """Return the person's id and stored hash of a mail address, for `check_password`; None if it is unknown."""
    row = _by_email(connection, email, people.c.id, people.c.password)
    return None if row is None else (row.id, row.password)


def _by_email(connection: Connection, email: str, *columns: sa.Column[Any]) -> sa.Row[Any] | None:
    """Return columns of the person with a mail address, also of one stored in an older spelling of the mailbox."""
    spellings = stored_spellings(email)
    rows = connection.execute(sa.select(people.c.email, *columns).where(people.c.email.in_(spellings))).all()
    return min(rows, key=lambda row: spellings.index(row.email), default=None)


def shared_mailboxes(connection: Connection) -> list[tuple[Person, ...]]:
    """List people who share a mailbox in different spellings, from before there was one spelling for each.

    Their accounts may hold credit, so nobody merges them but an admin. Each signs in with the spelling of their own.
    """
    owners: dict[str, list[Person]] = defaultdict(list)
    for person in list_people(connection):
        with suppress(UsageError):
            owners[normalize_email(person.email)].append(person)
    return [tuple(sharing) for sharing in owners.values() if len(sharing) > 1]


def person_of_identity(connection: Connection, identity: Identity) -> Person | None:
    """Return the person with an identity. Only issuer and subject count: a mail address can change its owner."""
    row = connection.execute(
        sa.select(people.c.id, people.c.account_id, people.c.email, people.c.admin, people.c.created_at)
        .join(identities, identities.c.person_id == people.c.id)
        .where(identities.c.issuer == identity.issuer, identities.c.subject == identity.subject)
    ).one_or_none()
    return None if row is None else Person(*row)


def add_identity(connection: Connection, person: str, identity: Identity, now: int) -> None:
    """Let a person sign in with an identity.

    Raises:
        AddressTaken: it is another person's.
    """
    row = {"issuer": identity.issuer, "subject": identity.subject, "person_id": person, "created_at": now}
    made = connection.execute(
        insert(connection, identities)
        .values(row)
        .on_conflict_do_nothing(index_elements=[identities.c.issuer, identities.c.subject])
    )
    if made.rowcount != 1:
        owner = person_of_identity(connection, identity)
        if owner is None or owner.id != person:
            raise AddressTaken(
                "this sign-in belongs to another account here: sign in with it and delete that one first"
            )


def identities_of(connection: Connection, person: str) -> list[str]:
    """List the issuers of a person's identities."""
    statement = sa.select(identities.c.issuer).where(identities.c.person_id == person).order_by(identities.c.issuer)
    return [row.issuer for row in connection.execute(statement)]


def remove_identity(connection: Connection, person: str, issuer: str) -> None:
    """Unlink a person's identity of an issuer, and end their sessions.

    Raises:
        UsageError: they have none there, or no password to sign in with instead.
    """
    if not has_password(connection, person):
        raise UsageError("set a password first: there would be no way left to sign in")
    removed = connection.execute(
        identities.delete().where(identities.c.person_id == person, identities.c.issuer == issuer)
    )
    if not removed.rowcount:
        raise UsageError("this sign-in is not linked to your account")
    connection.execute(sessions.delete().where(sessions.c.person_id == person))


def has_password(connection: Connection, person: str) -> bool:
    """True if a person has a password. One who signed up with an identity has none at first."""
    return connection.scalar(sa.select(people.c.password).where(people.c.id == person)) not in (None, NO_PASSWORD)


def set_password(connection: Connection, person: str, password_hash: str) -> None:
    """Set a person's password, and end all their sessions."""
    connection.execute(people.update().where(people.c.id == person).values(password=password_hash))
    connection.execute(sessions.delete().where(sessions.c.person_id == person))


def create_session(connection: Connection, person: str, now: int) -> str:
    """Create a session. Returns the token for the cookie; only its digest is stored."""
    token = secrets.token_urlsafe(32)
    connection.execute(
        sessions.insert(),
        {"digest": _digest(token), "person_id": person, "created_at": now, "expires_at": now + SESSION_MS},
    )
    return token


def person_of_session(connection: Connection, token: str, now: int) -> Person:
    """Return the person of a session. The person of a frozen account is no admin.

    Raises:
        SignInRefused: there is no such session, or it has expired.
    """
    admin = sa.and_(people.c.admin, accounts.c.state == "active")
    row = connection.execute(
        sa.select(people.c.id, people.c.account_id, people.c.email, admin, people.c.created_at)
        .select_from(people)
        .join(accounts, accounts.c.id == people.c.account_id)
        .join(sessions, sessions.c.person_id == people.c.id)
        .where(sessions.c.digest == _digest(token), sessions.c.expires_at > now)
    ).one_or_none()
    if row is None:
        raise SignInRefused("you are not signed in, or not any more")
    return Person(*row)


def session_start(connection: Connection, token: str) -> int:
    """Return the start of a session in Unix milliseconds; 0 if there is none."""
    return connection.scalar(sa.select(sessions.c.created_at).where(sessions.c.digest == _digest(token))) or 0


def delete_session(connection: Connection, token: str) -> None:
    """Delete a session."""
    connection.execute(sessions.delete().where(sessions.c.digest == _digest(token)))


def delete_expired_sessions(connection: Connection, now: int) -> int:
    """Delete expired sessions. Returns their number."""
    return connection.execute(sessions.delete().where(sessions.c.expires_at <= now)).rowcount


def invite_first_admin(connection: Connection, now: int) -> str | None:
    """Create the invitation of the first admin, valid once and for a day. Returns its token; None if there is an admin.

    Earlier invitations become invalid.
    """
    if connection.scalar(sa.select(sa.func.count()).where(people.c.admin)):
        return None
    connection.execute(invitations.delete().where(invitations.c.purpose == "first_admin"))
    token = secrets.token_urlsafe(32)
    row = {"digest": _digest(token), "purpose": "first_admin", "expires_at": now + INVITATION_MS}
    connection.execute(invitations.insert(), row)
    return token


def accept_invitation(connection: Connection, token: str, now: int) -> None:
    """Use up the token of `invite_first_admin`, before `sign_up(admin=True)` in the same transaction.

    Raises:
        SignInRefused: it is none, was used or is too old.
    """
    used = connection.execute(
        invitations.update()
        .where(
            invitations.c.digest == _digest(token),
            invitations.c.purpose == "first_admin",
            invitations.c.used_at.is_(None),
            invitations.c.expires_at > now,
        )
        .values(used_at=now)
    )
    if used.rowcount != 1:
        raise SignInRefused("this link was used or is too old: restart the server for a new one")


def list_people(connection: Connection, account: str | None = None) -> list[Person]:
    """List people of one account or all, in the order of their mail addresses."""
    statement = sa.select(
        people.c.id, people.c.account_id, people.c.email, people.c.admin, people.c.created_at
    ).order_by(people.c.email)
    if account is not None:
        statement = statement.where(people.c.account_id == account)
    return [Person(*row) for row in connection.execute(statement)]


def _digest(token: Any) -> str:
    return hashlib.sha256(str(token).encode()).hexdigest()
