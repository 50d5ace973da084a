"""Votes of accounts for models, the operator's queue, and the notices when a model goes live.

The number of votes is public. The accounts and their notes are not: a function that returns them takes the account,
or is for the operator.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy import Connection

from unmask.errors import UsageError
from unmask.storage.database import insert
from unmask.storage.schema import notices, people, votes

LONGEST_NOTE = 500


@dataclass(frozen=True)
class Vote:
    """One account's vote. `at` is in Unix milliseconds."""

    account: str
    model: str
    note: str
    at: int


@dataclass(frozen=True)
class QueuedModel:
    """A model in the operator's queue, with the notes of the voters, newest first."""

    model: str
    votes: int
    newest: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Notice:
    """A notice to an account: a model that it voted for went live."""

    model: str
    at: int
    seen: bool


@dataclass(frozen=True)
class Letter:
    """A notice to send by mail."""

    account: str
    model: str
    to: str


def vote(connection: Connection, account: str, model: str, note: str, now: int) -> bool:
    """Vote for a model. A second vote changes the note. Returns True for the first one.

    Raises:
        UsageError: the note is too long, or has characters that no text has.
    """
    note = " ".join(note.split())
    if len(note) > LONGEST_NOTE or not note.isprintable():
        raise UsageError(f"a note may have {LONGEST_NOTE} characters, all of them printable")
    statement = insert(connection, votes).values(account_id=account, model=model, note=note, at=now)
    first = connection.execute(
        statement.on_conflict_do_nothing(index_elements=[votes.c.account_id, votes.c.model]).returning(votes.c.model)
    ).one_or_none()
    if first is None:
        connection.execute(
            votes.update().where(votes.c.account_id == account, votes.c.model == model).values(note=note)
        )
    return first is not None


def withdraw(connection: Connection, account: str, model: str) -> bool:
    """Withdraw a vote. Returns False if there was none."""
    return connection.execute(votes.delete().where(votes.c.account_id == account, votes.c.model == model)).rowcount == 1


def count_votes(connection: Connection) -> dict[str, int]:
    """Return the number of votes of each model that has any."""
    rows = connection.execute(sa.select(votes.c.model, sa.func.count()).group_by(votes.c.model))
    return {model: int(count) for model, count in rows}


def votes_of(connection: Connection, account: str) -> dict[str, Vote]:
    """Return an account's own votes, by model."""
    rows = connection.execute(sa.select(votes).where(votes.c.account_id == account).order_by(votes.c.at))
    return {row.model: Vote(row.account_id, row.model, row.note, row.at) for row in rows}


def queue(connection: Connection) -> list[QueuedModel]:
    """List the models with votes for the operator: most votes first, then the oldest vote first."""
    by_model: dict[str, list[Vote]] = {}
    for row in connection.execute(sa.select(votes).order_by(votes.c.at.desc(), votes.c.account_id)):
        by_model.setdefault(row.model, []).append(Vote(row.account_id, row.model, row.note, row.at))
    queued = [
        (
            min(vote.at for vote in cast),
            QueuedModel(model, len(cast), cast[0].at, tuple(v.note for v in cast if v.note)),
        )
        for model, cast in by_model.items()
    ]
    return [
        queued_model for _, queued_model in sorted(queued, key=lambda item: (-item[1].votes, item[0], item[1].model))
    ]


def notify_voters(connection: Connection, model: str, now: int) -> int:
    """Turn the votes for a model that went live into notices. Returns their number."""
    rows = connection.execute(sa.select(votes.c.account_id).where(votes.c.model == model)).scalars().all()
    for account in rows:
        fresh = {"at": now, "seen_at": None, "mailed_at": None}
        statement = insert(connection, notices).values(account_id=account, model=model, **fresh)
        connection.execute(
            statement.on_conflict_do_update(index_elements=[notices.c.account_id, notices.c.model], set_=fresh)
        )
    connection.execute(votes.delete().where(votes.c.model == model))
    return len(rows)


def notices_of(connection: Connection, account: str) -> list[Notice]:
    """List an account's own notices, newest first."""
    rows = connection.execute(
        sa.select(notices).where(notices.c.account_id == account).order_by(notices.c.at.desc(), notices.c.model)
    )
    return [Notice(row.model, row.at, row.seen_at is not None) for row in rows]


def mark_notices_read(connection: Connection, account: str, now: int) -> int:
    """Mark an account's notices as read. Returns the number of new ones."""
    unseen = notices.c.account_id == account, notices.c.seen_at.is_(None)
    return connection.execute(notices.update().where(*unseen).values(seen_at=now)).rowcount


def claim_letters(connection: Connection, now: int, limit: int = 10) -> list[Letter]:
    """Return letters of notices that were not mailed, and mark these as mailed, so that no other process sends them.

    Args:
        limit: most notices that are claimed, and lost if the process is killed. One may be several letters.

    Returns:
        [] if no letter is left. A notice of an account without people counts as mailed.
    """
    oldest = sa.select(notices.c.account_id, notices.c.model).where(notices.c.mailed_at.is_(None))
    oldest = oldest.order_by(notices.c.account_id, notices.c.model).limit(limit).with_for_update(skip_locked=True)
    while claimed := connection.execute(oldest).all():
        for row in claimed:
            mine = notices.c.account_id == row.account_id, notices.c.model == row.model
            connection.execute(notices.update().where(*mine).values(mailed_at=now))
        owners: dict[str, list[str]] = {}
        accounts: Sequence[str] = sorted({row.account_id for row in claimed})
        for row in connection.execute(
            sa.select(people.c.account_id, people.c.email).where(people.c.account_id.in_(accounts))
        ):
            owners.setdefault(row.account_id, []).append(row.email)
        letters = [
            Letter(row.account_id, row.model, address) for row in claimed for address in owners.get(row.account_id, ())
        ]
        if letters:
            return letters
    return []


def count_unsent_letters(connection: Connection) -> int:
    """Return the number of letters that were not mailed."""
    letters = sa.select(sa.func.count()).select_from(notices).join(people, people.c.account_id == notices.c.account_id)
    return connection.scalar(letters.where(notices.c.mailed_at.is_(None))) or 0


def unclaim_letter(connection: Connection, letter: Letter) -> None:
    """Mark a letter that could not be sent as not mailed, so that it is tried again."""
    mine = notices.c.account_id == letter.account, notices.c.model == letter.model
    connection.execute(notices.update().where(*mine).values(mailed_at=None))
