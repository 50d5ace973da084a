"""Requests of accounts for models that the catalogue does not have."""

import re

import sqlalchemy as sa
from sqlalchemy import Connection

from unmask.catalogue.catalogue import shipped_records
from unmask.catalogue.store import put_fields, read_record, step
from unmask.catalogue.votes import vote
from unmask.errors import UsageError
from unmask.storage.schema import catalogue_events, catalogue_records, votes

# The hub's own rule for the names of repositories.
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}", re.ASCII)

# The pages of a model end in these, so a model of such a name would hide the pages of another.
_PAGE_SUFFIXES = (".json", ".md")

# Of one account at a time: requests are read by a person.
MOST_VOTES = 50

# Models that one account may put on record, in all and in a day. A record stays when its votes are withdrawn, and every
# server reads the whole catalogue again after each.
MOST_MODELS = 20
MOST_MODELS_A_DAY = 5
_DAY_MS = 86_400_000


def check_hub_id(model: str) -> None:
    """Check that a name is a valid id of the hub.

    Raises:
        UsageError: it is not.
    """
    if not _HUB_ID.fullmatch(model) or ".." in model or "--" in model:
        raise UsageError(f"{model[:120]!r} is no id of a model: write it as the hub does, like org/name")
    if model.lower().endswith(_PAGE_SUFFIXES):
        raise UsageError(f"{model[:120]!r} ends in .json or .md, as pages of models do: write the id without it")


def request_model(connection: Connection, account: str, model: str, note: str, now: int) -> bool:
    """Store an account's vote for a model that does not answer yet. An unknown model is put on record as requested.

    The account is the actor of that step, which nobody but the operator can read.

    Returns:
        True for the account's first vote for this model.

    Raises:
        UsageError: the model answers already, is no id, or the account has too many open votes or has put too many
            models on record.
    """
    record = read_record(connection, model)
    if record is None:
        check_hub_id(model)
        _check_number(connection, account, now)
        _check_spelling(connection, model)
        put_fields(connection, model, {})
        step(connection, model, "requested", actor=account)
    elif record.role == "reference":
        raise UsageError(f"{model} is here for others to be measured against, and will not be served")
    elif record.status in ("live", "deprecated"):
        raise UsageError(f"{model} answers already")
    others = sa.select(sa.func.count()).where(votes.c.account_id == account, votes.c.model != model)
    if int(connection.scalar(others) or 0) >= MOST_VOTES:
        raise UsageError(f"an account can have {MOST_VOTES} open votes: withdraw one first")
    return vote(connection, account, model, note, now)


def _check_number(connection: Connection, account: str, now: int) -> None:
    """Check that an account may put another model on record.

    Raises:
        UsageError: it has put too many there, in all or in the last 24 hours.
    """
    is_today = sa.case((catalogue_events.c.at > now - _DAY_MS, 1), else_=0)
    counts = sa.select(sa.func.count(), sa.func.sum(is_today)).where(catalogue_events.c.actor == account)
    count, today = connection.execute(counts).one()
    if count >= MOST_MODELS:
        raise UsageError(
            f"an account can name {MOST_MODELS} models that the catalogue does not have: vote for one that is there"
        )
    if (today or 0) >= MOST_MODELS_A_DAY:
        raise UsageError(
            f"an account can name {MOST_MODELS_A_DAY} models a day that the catalogue does not have: try again tomorrow"
        )


def _check_spelling(connection: Connection, model: str) -> None:
    """Check that no model has this id in other letters, large or small. The hub takes both for one.

    Raises:
        UsageError: there is one.
    """
    tables = (catalogue_records, catalogue_events)
    own = [
        id
        for table in tables
        for id in connection.scalars(sa.select(table.c.model).where(sa.func.lower(table.c.model) == model.lower()))
    ]
    record = next((id for id in (*shipped_records(), *own) if id.lower() == model.lower()), None)
    if record is not None:
        raise UsageError(f"{model!r} is here as {record!r}: write it so")
