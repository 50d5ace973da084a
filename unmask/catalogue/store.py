"""The operator's additions to the catalogue, in the database: fields of records, steps, measurements, gates.

Shipped records are not copied. The database holds the differences: an object of fields that overrides the shipped
record, and steps and measurements that follow the shipped ones. So a newer package brings newer texts, and the
operator's additions stay. Every change raises one version number, which a running server polls.

Plain functions of a connection; `Database.begin` and `Database.read` give one.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy import Connection

from unmask.catalogue.catalogue import Catalogue, named_record, shipped_measurements, shipped_records, with_embed_alias
from unmask.catalogue.lifecycle import Event, Status
from unmask.catalogue.measurement import Measurement
from unmask.catalogue.record import Record
from unmask.errors import UsageError
from unmask.storage.database import Database, insert, now_ms
from unmask.storage.schema import (
    catalogue_events,
    catalogue_gates,
    catalogue_measurements,
    catalogue_records,
    catalogue_version,
)
from unmask.validation import validation_message

_EVENT = msgspec.json.Decoder(Event)
_MEASUREMENT = msgspec.json.Decoder(Measurement)


@dataclass(frozen=True)
class StoredCatalogue:
    """The catalogue: the shipped records with the operator's additions.

    Attributes:
        version: the number that the next change raises.
        catalogue: all entries.
        sources: model id -> place of its weights, for models whose id does not say it.
    """

    version: int
    catalogue: Catalogue
    sources: Mapping[str, str]


@dataclass(frozen=True)
class GateOutcome:
    """The stored outcome of a gate.

    Attributes:
        gate: its name.
        fingerprint: of the weights and the settings of the gate.
        finding: one sentence.
        fields: fields of the record that the gate set.
    """

    gate: str
    fingerprint: str
    passed: bool
    finding: str
    fields: Mapping[str, Any]


def open_database(url: str) -> Database:
    """Open a database and migrate its tables.

    Raises:
        UsageError, StorageError: as `Database`.
    """
    database = Database(url)
    database.migrate()
    return database


def version(connection: Connection) -> int:
    """Return the number that every change raises."""
    return connection.execute(sa.select(catalogue_version.c.number)).scalar_one()


def read_catalogue(connection: Connection) -> StoredCatalogue:
    """Read the whole catalogue, with the operator's additions over the shipped records.

    Raises:
        UsageError: a row does not fit this version's types.
    """
    events = _by_model(connection, catalogue_events, catalogue_events.c.event, _EVENT)
    measured = _by_model(connection, catalogue_measurements, catalogue_measurements.c.measurement, _MEASUREMENT)
    rows = {row.model: row for row in connection.execute(sa.select(catalogue_records))}
    shipped = shipped_records()
    catalogue = Catalogue()
    for id in dict.fromkeys([*shipped, *rows, *events, *measured]):
        fields = json.loads(rows[id].fields) if id in rows else {}
        record = overlaid(id, fields, events.get(id, ()))
        catalogue.put(record, (*shipped_measurements().get(id, ()), *measured.get(id, ())))
    sources = {id: row.source for id, row in rows.items() if row.source}
    return StoredCatalogue(version(connection), catalogue, sources)


def read_record(connection: Connection, model: str) -> Record | None:
    """Read one record by its id, with the operator's additions; None if the model has no record."""
    fields, events = _fields(connection, model), _events(connection, model)
    if fields is None and not events and model not in shipped_records():
        return None
    return overlaid(model, fields or {}, events)


def overlaid(model: str, fields: Mapping[str, Any], events: Sequence[Event] = ()) -> Record:
    """Combine the shipped record with the operator's fields and steps.

    Raises:
        UsageError: a field is unknown or wrong, or a step does not follow.
    """
    below = shipped_records().get(model)
    base: dict[str, Any] = msgspec.to_builtins(below if below is not None else named_record(model))
    history = [*base.pop("history", ()), *msgspec.to_builtins(list(events))]
    try:
        return with_embed_alias(msgspec.convert({**base, **fields, "id": model, "history": history}, Record))
    except msgspec.ValidationError as error:
        raise UsageError(f"the record of {model} would be wrong: {validation_message(error, Record)}") from error


def put_fields(connection: Connection, model: str, fields: Mapping[str, Any], *, source: str | None = None) -> Record:
    """Override fields of a model's record. Earlier overrides of other fields stay.

    Args:
        fields: in the form that JSON has for them. None takes a field back to what ships.
        source: where the weights are; left out, it stays as it was.

    Raises:
        UsageError: a field is unknown or wrong, or belongs to the history, which only `step` writes.
    """
    if forbidden := {"id", "history"}.intersection(fields):
        raise UsageError(f"{', '.join(sorted(forbidden))} of {model} cannot be set: steps are taken one by one")
    raise_version(connection)
    before = _fields(connection, model)
    if before is None:
        before = {} if model in shipped_records() else {"created": now_ms() // 1000}
    after = {name: value for name, value in {**before, **fields}.items() if value is not None}
    record = overlaid(model, after, _events(connection, model))
    values = {"fields": json.dumps(after, ensure_ascii=False), "changed_at": now_ms()}
    if source is not None:
        values["source"] = source
    statement = insert(connection, catalogue_records).values(model=model, **values)
    connection.execute(statement.on_conflict_do_update(index_elements=[catalogue_records.c.model], set_=values))
    return record


def source_of(connection: Connection, model: str) -> str | None:
    """Return the place of a model's weights, if its id does not say it."""
    return connection.scalar(sa.select(catalogue_records.c.source).where(catalogue_records.c.model == model))


def step(
    connection: Connection,
    model: str,
    status: Status,
    *,
    actor: str,
    note: str = "",
    until: date | None = None,
    on: date | None = None,
) -> Record:
    """Take a model one step further in its lifecycle. Does not check the gates, see `actions.go_live`.

    Args:
        actor: a person's id, the id of an account that asks for the model, or "command line".
        note: why, in a sentence that everybody may read.
        until: for a deprecation, the last day on which it answers.
        on: the day; left out, today.

    Raises:
        UsageError: the step does not follow from the one before it.
    """
    raise_version(connection)
    record = read_record(connection, model)
    day = on or datetime.now(UTC).date()
    if record is not None and record.history:
        # A record that was written where it was already tomorrow must not stop everything until then.
        day = max(day, record.history[-1].on)
    try:
        event = Event(status=status, on=day, note=note, until=until)
    except ValueError as error:
        raise UsageError(f"{model} cannot become {status}: {error}") from error
    after = overlaid(model, _fields(connection, model) or {}, [*_events(connection, model), event])
    content = msgspec.json.encode(event).decode()
    connection.execute(catalogue_events.insert(), {"at": now_ms(), "model": model, "actor": actor, "event": content})
    return after


def add_measurements(connection: Connection, measurements: Iterable[Measurement]) -> None:
    """Append measurements. They are never removed."""
    rows = [
        {"at": now_ms(), "model": one.model, "measurement": msgspec.json.encode(one).decode()} for one in measurements
    ]
    if rows:
        connection.execute(catalogue_measurements.insert(), rows)
        raise_version(connection)


def add_gate_outcome(connection: Connection, model: str, outcome: GateOutcome) -> None:
    """Append the outcome of a gate."""
    row = {"gate": outcome.gate, "fingerprint": outcome.fingerprint, "passed": outcome.passed}
    row |= {"finding": outcome.finding, "fields": json.dumps(outcome.fields, ensure_ascii=False)}
    connection.execute(catalogue_gates.insert(), {"at": now_ms(), "model": model, **row})


def gate_outcomes(connection: Connection, model: str) -> dict[str, GateOutcome]:
    """Return the last outcome of each gate, by name."""
    rows = connection.execute(
        sa.select(catalogue_gates).where(catalogue_gates.c.model == model).order_by(catalogue_gates.c.id)
    )
    return {
        row.gate: GateOutcome(row.gate, row.fingerprint, row.passed, row.finding, json.loads(row.fields))
        for row in rows
    }


def _fields(connection: Connection, model: str) -> dict[str, Any] | None:
    content = connection.scalar(sa.select(catalogue_records.c.fields).where(catalogue_records.c.model == model))
    return None if content is None else json.loads(content)


def _events(connection: Connection, model: str) -> list[Event]:
    rows = connection.execute(
        sa.select(catalogue_events.c.event).where(catalogue_events.c.model == model).order_by(catalogue_events.c.id)
    )
    return [_EVENT.decode(row.event) for row in rows]


def _by_model(
    connection: Connection, table: sa.Table, column: sa.Column[Any], decoder: msgspec.json.Decoder[Any]
) -> dict[str, list[Any]]:
    rows: dict[str, list[Any]] = {}
    for model, content in connection.execute(sa.select(table.c.model, column).order_by(table.c.id)):
        try:
            rows.setdefault(model, []).append(decoder.decode(content))
        except msgspec.DecodeError as error:
            raise UsageError(f"a row of {table.name} about {model} cannot be read: {error}") from error
    return rows


def raise_version(connection: Connection) -> None:
    """Raise the number by which running servers notice a change."""
    # Each change begins with this statement. On Postgres it locks the row, so that changes run one after the other.
    connection.execute(catalogue_version.update().values(number=catalogue_version.c.number + 1))
