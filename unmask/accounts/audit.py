"""Who did what to accounts, keys, prices and money. Append-only, and never a secret in it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from unmask.storage.schema import audit


@dataclass(frozen=True)
class Event:
    """One line. `at` is in Unix milliseconds; `detail` depends on the action."""

    at: int
    actor: str
    action: str
    subject: str
    detail: dict[str, Any]
    address: str


def note(
    connection: Connection, now: int, actor: str, action: str, subject: str, *, address: str = "", **detail: Any
) -> None:
    """Write a line, in the transaction of what it tells about.

    Args:
        actor: a person's id, a key's id as "key:...", or "command line".
        action: noun.verb, such as "key.create".
        subject: the id of what it was done to.
        address: where it came from.
    """
    connection.execute(
        audit.insert(),
        {
            "at": now,
            "actor": actor,
            "action": action,
            "subject": subject,
            "detail": json.dumps(detail, sort_keys=True),
            "address": address,
        },
    )


def events(
    connection: Connection, *, subjects: Sequence[str] | None = None, limit: int = 100, before: int | None = None
) -> list[tuple[int, Event]]:
    """Lines with their numbers, newest first.

    Args:
        subjects: only of these.
        before: only with lower numbers, for the next page.
    """
    statement = sa.select(audit).order_by(audit.c.id.desc()).limit(limit)
    if subjects is not None:
        statement = statement.where(audit.c.subject.in_(subjects))
    if before is not None:
        statement = statement.where(audit.c.id < before)
    return [
        (row.id, Event(row.at, row.actor, row.action, row.subject, json.loads(row.detail), row.address))
        for row in connection.execute(statement)
    ]
