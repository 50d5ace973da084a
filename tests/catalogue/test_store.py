"""The operator's records override the shipped ones, and history only grows."""

from datetime import date, timedelta
from typing import Any

import msgspec
import pytest

from unmask.catalogue import Measurement, shipped_measurements, shipped_records
from unmask.catalogue.store import (
    GateOutcome,
    add_gate_outcome,
    add_measurements,
    gate_outcomes,
    put_fields,
    read_catalogue,
    read_record,
    source_of,
    step,
    version,
)
from unmask.errors import StorageError, UsageError
from unmask.storage.database import Database

COMING = "McGill-NLP/LLM2Vec-Sheared-LLaMA-mntp-supervised"


def value(model: str, number: float) -> Measurement:
    fields: dict[str, Any] = {"model": model, "group": "onboarding", "what": "size", "unit": "bytes", "value": number,
                              "origin": "measured", "by": "us", "on": date(2026, 1, 1), "revision": "r",
                              "hardware": "h", "command": "c", "raw": "f"}  # fmt: skip
    return Measurement(**fields)


def test_what_is_added_lies_over_what_ships(database: Database) -> None:
    with database.begin() as connection:
        before = read_catalogue(connection)
        assert {e.record.id: e.record for e in before.catalogue.entries()} == shipped_records()
        put_fields(connection, COMING, {"compat": "reference", "summary": "Ours."}, source="/somewhere")
        put_fields(connection, COMING, {"revision": "abc"})
        step(connection, COMING, "benchmarking", actor="me")
        add_measurements(connection, [value(COMING, 1), value(COMING, 2)])
    with database.read() as connection:
        after = read_catalogue(connection)
        assert source_of(connection, COMING) == after.sources[COMING] == "/somewhere"
        assert after.version > before.version == 0
    entry = after.catalogue.get(COMING)
    assert entry is not None
    shipped = shipped_records()[COMING]
    assert (entry.record.compat, entry.record.summary, entry.record.revision) == ("reference", "Ours.", "abc")
    assert entry.record.about == shipped.about and entry.record.parameters == shipped.parameters
    assert entry.record.history[:-1] == shipped.history and entry.record.status == "benchmarking"
    assert entry.measurements[:-2] == shipped_measurements()[COMING]
    assert [m.value for m in entry.figures.gates] == [2]  # the last one stands, both are there
    # The others are as they ship, to the last field.
    others = {e.record.id: e.record for e in after.catalogue.entries() if e.record.id != COMING}
    assert others == {id: record for id, record in shipped_records().items() if id != COMING}


def test_a_field_is_taken_back(database: Database) -> None:
    with database.begin() as connection:
        put_fields(connection, COMING, {"licence": "GPL", "summary": "Ours."})
        record = put_fields(connection, COMING, {"licence": None})
    assert record.licence == shipped_records()[COMING].licence and record.summary == "Ours."


def test_a_model_of_the_operators_own(database: Database) -> None:
    with database.begin() as connection:
        assert read_record(connection, "org/new") is None
        put_fields(connection, "org/new", {"name": "New"})
        created = read_record(connection, "org/new")
        step(connection, "org/new", "requested", actor="me", note="for a test")
    with database.read() as connection:
        record = read_record(connection, "org/new")
        entry = read_catalogue(connection).catalogue.get("org/new-embed")
    assert record is not None and created is not None and entry is not None
    assert entry.record == record and record.created == created.created > 1_700_000_000
    assert record.history[0].note == "for a test" and record.owned_by == "org"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dimensions": "many"}, "Expected `int | null`"),
        ({"nonsense": 1}, "unknown field `nonsense`"),
        ({"history": []}, "history of .* cannot be set"),
        ({"id": "other/name"}, "id of .* cannot be set"),
        ({"links": [{"title": "x", "url": "javascript:alert(1)"}]}, "no https address"),
        ({"compat": "both"}, "Invalid enum value 'both', expected 'default' or 'reference'"),
    ],
)
def test_a_wrong_field_changes_nothing(sqlite: Database, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message), sqlite.begin() as connection:
        put_fields(connection, COMING, fields)
    with sqlite.read() as connection:
        assert version(connection) == 0 and read_record(connection, COMING) == shipped_records()[COMING]


def test_only_steps_that_follow_are_taken(sqlite: Database) -> None:
    tomorrow = date.today() + timedelta(days=1)
    with pytest.raises(UsageError, match="'live' cannot follow 'coming soon'"), sqlite.begin() as connection:
        step(connection, COMING, "live", actor="me")
    with pytest.raises(UsageError, match="'until' belongs to a deprecation"), sqlite.begin() as connection:
        step(connection, COMING, "benchmarking", actor="me", until=tomorrow)
    with sqlite.begin() as connection:
        for status in ("benchmarking", "staged", "live"):
            step(connection, COMING, status, actor="me", on=date(2020, 1, 1))
        record = step(connection, COMING, "deprecated", actor="me", until=tomorrow)
    assert record.history[-1].until == tomorrow
    # A day before the step before it cannot be: it counts as that day.
    assert record.history[-2].on == shipped_records()[COMING].history[-1].on


def test_steps_and_measurements_are_not_taken_back(database: Database) -> None:
    with database.begin() as connection:
        step(connection, COMING, "benchmarking", actor="me")
        add_measurements(connection, [value(COMING, 1)])
    for table in ("catalogue_events", "catalogue_measurements"):
        with pytest.raises(StorageError, match="append-only"), database.begin() as connection:
            connection.exec_driver_sql(f"DELETE FROM {table}")


def test_of_a_gate_the_last_outcome_counts(database: Database) -> None:
    first = GateOutcome("load", "f1", False, "no memory", {})
    second = GateOutcome("load", "f2", True, "1 s", {"parameters": 3})
    with database.begin() as connection:
        for outcome in (first, second):
            add_gate_outcome(connection, COMING, outcome)
    with database.read() as connection:
        assert gate_outcomes(connection, COMING) == {"load": second}
        assert gate_outcomes(connection, "org/other") == {}


def test_a_row_that_cannot_be_read_is_named(sqlite: Database) -> None:
    with sqlite.begin() as connection:
        row = msgspec.json.encode({"model": COMING}).decode()
        connection.exec_driver_sql(
            f"INSERT INTO catalogue_measurements (at, model, measurement) VALUES (1, 'org/x', '{row}')"
        )
    with pytest.raises(UsageError, match="catalogue_measurements about org/x"), sqlite.read() as connection:
        read_catalogue(connection)
