"""Audited changes of the catalogue: each makes the change and appends its audit row, in the caller's transaction."""

from collections.abc import Mapping
from datetime import date
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from unmask.accounts import actions, audit, tariff
from unmask.accounts.audit import Actor
from unmask.catalogue.lifecycle import GATE_NAMES, Status
from unmask.catalogue.model_requests import check_hub_id
from unmask.catalogue.record import Record
from unmask.catalogue.store import gate_outcomes, put_fields, read_record, step
from unmask.catalogue.votes import notify_voters
from unmask.errors import UsageError
from unmask.storage.database import now_ms
from unmask.storage.schema import accounts


def set_fields(connection: Connection, actor: Actor, model: str, fields: Mapping[str, Any]) -> Record:
    """Lay fields over a model's record, see `store.put_fields`."""
    record = put_fields(connection, model, fields)
    audit.append_model_fields(connection, actor, model, fields, now_ms())
    return record


def add_unknown(connection: Connection, model: str) -> bool:
    """Put a model without a record on record, by its hub id. Returns False if it has one.

    Raises:
        UsageError: the id is not one that the hub could have.
    """
    if read_record(connection, model) is not None:
        return False
    check_hub_id(model)
    put_fields(connection, model, {})
    return True


def take_step(
    connection: Connection, actor: Actor, model: str, status: Status, *, note: str = "", until: date | None = None
) -> Record:
    """Take a model one step further in its lifecycle, see `store.step`."""
    record = step(connection, model, status, actor=actor.id, note=note, until=until)
    audit.append_model_step(connection, actor, model, status, now_ms())
    return record


def decide(connection: Connection, actor: Actor, model: str, status: Status, *, until: date | None = None) -> None:
    """Carry out the operator's decision on a page: a step of any model, `go_live` for a staged one.

    A model that went live has two audit rows: "model.live", and "model.step" with the address of the request.

    Raises:
        UsageError: the step does not follow, or the model's id is wrong.
    """
    add_unknown(connection, model)
    record = read_record(connection, model)
    if status == "live" and record is not None and record.status == "staged":
        go_live(connection, model, actor=actor.id)
        audit.append_model_step(connection, actor, model, status, now_ms())
    else:
        take_step(connection, actor, model, status, until=until)


def go_live(connection: Connection, model: str, *, actor: str) -> tuple[int, bool]:
    """Take a staged model live, with everything that depends on it in the same transaction.

    The accounts that voted for it get a notice. Where there are accounts and the model has no price, the proposed one
    is charged: a model without a price answers nobody.

    Args:
        actor: id of a person, or "command line".

    Returns:
        The number of accounts notified, and whether the proposed price is charged from now on.

    Raises:
        UsageError: it is not staged, or has not passed every gate with the weights on record.
    """
    record = read_record(connection, model)
    if record is None or record.status != "staged":
        raise UsageError(f"{model} is {record.status if record else 'unknown'}, and only a staged model can go live")
    past = gate_outcomes(connection, model)
    if missing := [gate for gate in GATE_NAMES if gate not in past or not past[gate].passed]:
        raise UsageError(f"{model} has not passed {', '.join(missing)}: run 'unmask onboard {model}'")
    charged = _charge_proposed_price(connection, record, actor)
    step(connection, model, "live", actor=actor)
    now = now_ms()
    notified = notify_voters(connection, model, now)
    audit.append_model_live(connection, Actor(actor), model, now, revision=record.revision, notified=notified)
    return notified, charged


def _charge_proposed_price(connection: Connection, record: Record, actor: str) -> bool:
    """Charge the proposed price where the model has none and there are accounts. Returns whether that was done."""
    prices = tariff.all_prices(connection)
    own = next((price for price in prices if price.model == record.id and price.tier == "default"), None)
    if own is not None:
        _publish_price(connection, record, own.nano_per_million)
        return False
    has_accounts = connection.scalar(sa.select(accounts.c.id).limit(1)) is not None
    if not has_accounts or not record.prices:
        return False
    proposed = record.prices[0].nanodollars_per_million_tokens
    actions.set_proposed_price(connection, Actor(actor), record.id, proposed, now_ms())
    _publish_price(connection, record, proposed)
    return True


def _publish_price(connection: Connection, record: Record, nano: int) -> None:
    put_fields(connection, record.id, {"prices": [{"nanodollars_per_million_tokens": nano, "estimated": False}]})
