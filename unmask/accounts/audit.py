"""The audit log of changes of accounts, keys, prices, money and models. Append-only, without secrets.

Only this package appends to the log. `unmask.accounts.actions` makes a change and its audit row in one transaction;
for changes of the catalogue and of providers, which stand above this package, there are the `append_model_...`
functions and `append_provider_verdict`.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from unmask.storage.schema import audit


@dataclass(frozen=True)
class Actor:
    """The author of an action.

    Attributes:
        id: a person's id, a key's id as "key:...", or "command line".
        address: IP address of the request, or "" where there is none.
    """

    id: str
    address: str = ""


COMMAND_LINE = Actor("command line")


@dataclass(frozen=True)
class AuditEvent:
    """One row of the audit log. `at` is in Unix milliseconds; `detail` depends on the action."""

    at: int
    actor: str
    action: str
    subject: str
    detail: dict[str, Any]
    address: str


def append(connection: Connection, actor: Actor, action: str, subject: str, now: int, **detail: Any) -> None:
    """Append a row, in the transaction of the change that it describes. Not to be called outside this package.

    Args:
        action: noun.verb, such as "key.create".
        subject: id of the changed account, key, model or person.
        now: Unix milliseconds.
        detail: JSON values, never a secret.
    """
    connection.execute(
        audit.insert(),
        {
            "at": now,
            "actor": actor.id,
            "action": action,
            "subject": subject,
            "detail": json.dumps(detail, sort_keys=True),
            "address": actor.address,
        },
    )


def append_model_step(connection: Connection, actor: Actor, model: str, status: str, now: int) -> None:
    """Record that a model took a step of its lifecycle."""
    append(connection, actor, "model.step", model, now, status=status)


def append_model_fields(connection: Connection, actor: Actor, model: str, fields: Iterable[str], now: int) -> None:
    """Record which fields of a model's record were set, by name."""
    append(connection, actor, "model.fields", model, now, fields=sorted(fields))


def append_model_live(
    connection: Connection, actor: Actor, model: str, now: int, *, revision: str | None, notified: int
) -> None:
    """Record that a model went live with the weights of a revision, and how many accounts were notified."""
    append(connection, actor, "model.live", model, now, revision=revision, told=notified)


def append_provider_verdict(
    connection: Connection, actor: Actor, provider: str, model: str, verdict: str, now: int, *, reason: str = ""
) -> None:
    """Record that the operator quarantined a provider of a model, or let it be admitted again."""
    detail = {"model": model} | ({"reason": reason} if reason else {})
    append(connection, actor, f"provider.{verdict}", provider, now, **detail)


def events(
    connection: Connection, *, subjects: Sequence[str] | None = None, limit: int = 100, before: int | None = None
) -> list[tuple[int, AuditEvent]]:
    """List rows with their numbers, newest first.

    Args:
        subjects: only rows about these ids.
        before: only rows with lower numbers, for the next page.
    """
    statement = sa.select(audit).order_by(audit.c.id.desc()).limit(limit)
    if subjects is not None:
        statement = statement.where(audit.c.subject.in_(subjects))
    if before is not None:
        statement = statement.where(audit.c.id < before)
    return [
        (row.id, AuditEvent(row.at, row.actor, row.action, row.subject, json.loads(row.detail), row.address))
        for row in connection.execute(statement)
    ]
