"""`unmask catalogue ...`: models on record, from a request to live, and from live to retired."""

from contextlib import closing
from datetime import UTC, date, datetime
from pathlib import Path

import msgspec
from cyclopts import App
from sqlalchemy import Connection

from unmask.accounts.audit import COMMAND_LINE
from unmask.catalogue import Record, Status, actions, parse_record, votes
from unmask.catalogue.lifecycle import GATE_NAMES
from unmask.catalogue.store import gate_outcomes, read_catalogue
from unmask.cli.database import DatabaseUrl, open_database, read_transaction, write_transaction
from unmask.cli.mail import NO_MAIL, MailOptions, PublicUrl, send_waiting_notices
from unmask.cli.options import ACTOR, AsJson
from unmask.errors import UsageError
from unmask.terminal import print_table, say

catalogue = App(name="catalogue", help="Manage the models on record and their lifecycle.")


@catalogue.command(name="list")
def list_records(*, as_json: AsJson = False, database: DatabaseUrl = None) -> int:
    """List the models on record with their status, votes and passed gates."""
    # The shipped records are there before anything else is.
    with read_transaction(database, new=database is None) as connection:
        stored = read_catalogue(connection)
        vote_counts = votes.count_votes(connection)
        gates = {id: gate_outcomes(connection, id) for id in stored.sources}
    rows = []
    for entry in stored.catalogue.entries():
        record = entry.record
        record_gates = gates.get(record.id, {})
        count = sum(gate in record_gates and record_gates[gate].passed for gate in GATE_NAMES)
        status = record.status or record.role
        until = record.history[-1].until if record.history else None
        rows.append(
            (
                record.id,
                f"{status} until {until}" if until else status,
                vote_counts.get(record.id, 0),
                f"{count} of {len(GATE_NAMES)}" if record_gates else "",
                len(entry.measurements),
            )
        )
    print_table(("model", "status", "votes", "gates", "measurements"), rows, as_json=as_json)
    return 0


@catalogue.command(name="gates")
def list_gates(model: str, *, as_json: AsJson = False, database: DatabaseUrl = None) -> int:
    """List the last results of a model's gates. Only the operator sees them."""
    with read_transaction(database) as connection:
        results = gate_outcomes(connection, _record(connection, model).id)
    rows = [(result.gate, "passed" if result.passed else "not passed", result.finding) for result in results.values()]
    print_table(("gate", "outcome", "finding"), rows, as_json=as_json)
    return 0


@catalogue.command(name="queue")
def list_votes(*, as_json: AsJson = False, database: DatabaseUrl = None) -> int:
    """List the models that people voted for, most votes first, with their notes."""
    with read_transaction(database) as connection:
        queue = votes.queue(connection)
        stored = read_catalogue(connection)
    rows = []
    for item in queue:
        entry = stored.catalogue.get(item.model)
        status = entry.record.status if entry else None
        rows.append((item.model, status or "", item.votes, "; ".join(item.notes)))
    print_table(("model", "status", "votes", "notes"), rows, as_json=as_json)
    return 0


@catalogue.command
def add(file: Path, *, database: DatabaseUrl = None) -> int:
    """Add a record from a TOML file, or update the fields of an existing one. Its history stays."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} cannot be read: {error}") from error
    record = parse_record(text, file.name)
    fields = {name: value for name, value in msgspec.toml.decode(text).items() if name not in ("id", "history")}
    with write_transaction(database, new=True) as connection:
        actions.set_fields(connection, COMMAND_LINE, record.id, msgspec.to_builtins(fields))
    say(f"{record.id}: {len(fields)} fields")
    return 0


@catalogue.command
def request(model: str, *, note: str = "", database: DatabaseUrl = None) -> int:
    """Put a model on record because somebody asked for it. MODEL is its hub id."""
    _take_step(database, model, "requested", note=note, new=True)
    return 0


@catalogue.command
def announce(model: str, *, note: str = "", database: DatabaseUrl = None) -> int:
    """Announce that a model is coming soon. This also takes up a retired one."""
    _take_step(database, model, "coming soon", note=note, new=True)
    return 0


@catalogue.command
def live(model: str, *, database: DatabaseUrl = None, mail: MailOptions = NO_MAIL, public_url: PublicUrl = "") -> int:
    """Take a staged model live and notify the people who voted for it."""
    server = mail.server(public_url)  # refuse a malformed address before anything changes
    with closing(open_database(database)) as opened:
        with opened.begin() as connection:
            id = _record(connection, model).id
            notices, priced = actions.go_live(connection, id, actor=ACTOR)
        price = ", and the proposed price is charged" if priced else ""
        say(f"{id} is live; voters notified: {notices}{price}")
        if notices:
            send_waiting_notices(opened, server)
    return 0


@catalogue.command
def deprecate(model: str, *, until: str, note: str = "", database: DatabaseUrl = None) -> int:
    """Announce the last day on which a live model answers.

    Parameters
    ----------
    until
        The last day, as 2026-12-31. /v1/models and a header of every response name it.
    """
    try:
        day = date.fromisoformat(until)
    except ValueError as error:
        raise UsageError(f"--until {until}: write a day as 2026-12-31") from error
    if day < datetime.now(UTC).date():
        raise UsageError(f"--until {until}: that day is over; 'unmask catalogue retire' ends a deprecated model")
    _take_step(database, model, "deprecated", note=note, until=day)
    return 0


@catalogue.command
def restore(model: str, *, note: str = "", database: DatabaseUrl = None) -> int:
    """Take a deprecation back."""
    with read_transaction(database) as connection:
        status = _record(connection, model).status
    if status != "deprecated":
        raise UsageError(f"{model} is {status}, and only a deprecation can be taken back")
    _take_step(database, model, "live", note=note)
    return 0


@catalogue.command
def retire(model: str, *, note: str = "", database: DatabaseUrl = None) -> int:
    """End a deprecated model, or drop one that is not live yet. A running server removes it at once."""
    _take_step(database, model, "retired", note=note)
    return 0


def _take_step(
    database: str | None, model: str, status: Status, *, note: str = "", until: date | None = None, new: bool = False
) -> None:
    """Give a model another status. `new` adds a record where there is none, and begins a database."""
    with write_transaction(database, new=new) as connection:
        id = model if new and actions.add_unknown(connection, model) else _record(connection, model).id
        actions.take_step(connection, COMMAND_LINE, id, status, note=note, until=until)
    say(f"{id} is {status}{f' until {until}' if until else ''}")


def _record(connection: Connection, model: str) -> Record:
    """Return the record of an id or alias.

    Raises:
        UsageError: there is none.
    """
    entry = read_catalogue(connection).catalogue.get(model)
    if entry is None:
        raise UsageError(f"no record is called {model!r}: see 'unmask catalogue list'")
    return entry.record
