"""Verdicts on providers in the database, and requests to read their file again: every process reads both in a second.

Plain functions of a connection; `Database.begin` and `Database.read` give one.
"""

from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy import Connection

from unmask.accounts.audit import Actor, append_provider_verdict
from unmask.catalogue.store import raise_version
from unmask.errors import UsageError
from unmask.storage.database import now_ms
from unmask.storage.schema import provider_attempts, provider_events

CANARIES = "canaries"  # actor of a quarantine that follows from wrong canary vectors


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A provider was quarantined for a model, or may be admitted again; or the file of providers was to be read again.

    Attributes:
        provider, model: names; "" for "reload", which concerns all.
        verdict: "quarantined" holds until "admitted", which asks for a full run.
        finding: the fault with its subject; "" for admitted.
        passed_at: Unix milliseconds of the last right canary; None for not known.
        actor: "canaries", "command line", or a person's id.
        at: Unix milliseconds.
        number: of its row: a later verdict has a higher one. 0 before it is stored, and without a database.
    """

    provider: str
    model: str
    verdict: Literal["quarantined", "admitted", "reload"]
    finding: str = ""
    passed_at: int | None = None
    actor: str = CANARIES
    at: int = 0
    number: int = 0

    @property
    def is_quarantine(self) -> bool:
        """True if the provider may not answer."""
        return self.verdict == "quarantined"


def add_verdict(connection: Connection, verdict: Verdict) -> int:
    """Append a verdict, for all processes to follow. Returns the number of its row."""
    raise_version(connection)
    added = connection.execute(
        provider_events.insert(),
        {
            "at": now_ms(),
            "provider": verdict.provider,
            "model": verdict.model,
            "verdict": verdict.verdict,
            "finding": verdict.finding,
            "passed_at": verdict.passed_at,
            "actor": verdict.actor,
        },
    )
    return int((added.inserted_primary_key or (0,))[0])


def order_quarantine(connection: Connection, actor: Actor, provider: str, model: str, reason: str) -> None:
    """Take a provider of a model out of traffic by the operator's word. Canaries do not admit it again by themselves.

    Args:
        connection: of a transaction that writes.
        actor: the operator.
        provider, model: names.
        reason: a sentence for the history.
    """
    finding = f"{provider} was quarantined by the operator: {reason}"
    add_verdict(
        connection, Verdict(provider=provider, model=model, verdict="quarantined", finding=finding, actor=actor.id)
    )
    append_provider_verdict(connection, actor, provider, model, "quarantine", now_ms(), reason=reason)


def order_admission(connection: Connection, actor: Actor, provider: str, model: str) -> None:
    """End a quarantine: running servers make a full run, and use the provider only if it passes.

    Raises:
        UsageError: it is not quarantined.
    """
    verdict = read_verdicts(connection).get((provider, model))
    if verdict is None or not verdict.is_quarantine:
        raise UsageError(f"{provider} is not quarantined for {model}: see 'unmask providers history'")
    add_verdict(connection, Verdict(provider=provider, model=model, verdict="admitted", actor=actor.id))
    append_provider_verdict(connection, actor, provider, model, "admit", now_ms())


def read_verdicts(connection: Connection) -> dict[tuple[str, str], Verdict]:
    """Return the last verdict on each (provider, model) that there is one on."""
    latest = (
        sa.select(sa.func.max(provider_events.c.id))
        .where(provider_events.c.verdict != "reload")
        .group_by(provider_events.c.provider, provider_events.c.model)
    )
    rows = connection.execute(sa.select(provider_events).where(provider_events.c.id.in_(latest)))
    return {(row.provider, row.model): _verdict(row) for row in rows}


def is_known(connection: Connection, provider: str, model: str | None = None) -> bool:
    """Return whether there is a verdict on a provider, for a model if one is named, or it was ever asked."""
    for table in (provider_events, provider_attempts):
        rows = sa.select(table.c.id).where(table.c.provider == provider)
        if model is not None:
            rows = rows.where(table.c.model == model)
        if connection.scalar(rows.limit(1)) is not None:
            return True
    return False


def last_reload(connection: Connection) -> int:
    """Return the number of the last request to read the file of providers again; 0 for none."""
    statement = sa.select(sa.func.max(provider_events.c.id)).where(provider_events.c.verdict == "reload")
    return int(connection.scalar(statement) or 0)


def verdict_history(connection: Connection, model: str | None = None, limit: int = 100) -> list[Verdict]:
    """List verdicts, newest first.

    Args:
        model: only those on this model.
        limit: most of them.
    """
    statement = sa.select(provider_events).order_by(provider_events.c.id.desc()).limit(limit)
    if model is not None:
        statement = statement.where(provider_events.c.model == model)
    return [_verdict(row) for row in connection.execute(statement)]


def _verdict(row: sa.Row[Any]) -> Verdict:
    return Verdict(
        provider=row.provider,
        model=row.model,
        verdict=row.verdict,
        finding=row.finding,
        passed_at=row.passed_at,
        actor=row.actor,
        at=row.at,
        number=row.id,
    )
