"""Verdicts on providers in the database: every process of a server reads them within a second.

Plain functions of a connection; `Database.begin` and `Database.read` give one.
"""

from dataclasses import dataclass
from typing import Literal

import sqlalchemy as sa
from sqlalchemy import Connection

from unmask.catalogue.store import raise_version
from unmask.storage.database import now_ms
from unmask.storage.schema import provider_events

CANARIES = "canaries"  # actor of a quarantine that nobody ordered


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A provider was quarantined for a model, or may be admitted again.

    Attributes:
        provider, model: names.
        verdict: "quarantined" holds until "admitted", which asks for a full run.
        finding: the fault with its subject; "" for admitted.
        passed_at: Unix milliseconds of the last right canary; None for not known.
        actor: "canaries", "command line", or a person's id.
        at: Unix milliseconds.
    """

    provider: str
    model: str
    verdict: Literal["quarantined", "admitted"]
    finding: str = ""
    passed_at: int | None = None
    actor: str = CANARIES
    at: int = 0


def add_verdict(connection: Connection, verdict: Verdict) -> None:
    """Append a verdict, for all processes to follow."""
    raise_version(connection)
    connection.execute(
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


def read_verdicts(connection: Connection) -> dict[tuple[str, str], str]:
    """Return the finding of each quarantined (provider, model), and "" for those admitted again."""
    latest = sa.select(sa.func.max(provider_events.c.id)).group_by(provider_events.c.provider, provider_events.c.model)
    rows = connection.execute(sa.select(provider_events).where(provider_events.c.id.in_(latest)))
    return {(row.provider, row.model): row.finding if row.verdict == "quarantined" else "" for row in rows}


def verdict_history(connection: Connection, model: str | None = None, limit: int = 100) -> list[Verdict]:
    """List verdicts, newest first.

    Args:
        model: only those on this model.
        limit: most of them.
    """
    statement = sa.select(provider_events).order_by(provider_events.c.id.desc()).limit(limit)
    if model is not None:
        statement = statement.where(provider_events.c.model == model)
    return [
        Verdict(
            provider=row.provider,
            model=row.model,
            verdict=row.verdict,
            finding=row.finding,
            passed_at=row.passed_at,
            actor=row.actor,
            at=row.at,
        )
        for row in connection.execute(statement)
    ]
