"""`unmask onboard` and `unmask catalogue ...`: models from a request to live, and from live to retired."""

from contextlib import closing
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

from cyclopts import App, Group

from unmask.cli.database import DatabaseUrl, open_database, read_transaction, write_transaction
from unmask.cli.mail import MailFrom, MailUrl, PublicUrl, named_server, send
from unmask.cli.options import ACTOR
from unmask.cli.terminal import print_table, say

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from unmask.catalogue import Record, Status

catalogue = App(name="catalogue", help="The models on record, and the steps of their lifecycle.")

_GATES = Group("What the gates ask")


@catalogue.command(name="list")
def list_models(*, database: DatabaseUrl = None) -> int:
    """All models on record: where they stand, how many want them, and which gates they have passed."""
    from unmask.catalogue import votes
    from unmask.catalogue.lifecycle import GATE_NAMES
    from unmask.catalogue.store import outcomes, read_catalogue

    with read_transaction(database) as connection:
        stored = read_catalogue(connection)
        wanted = votes.counts(connection)
        passed = {id: outcomes(connection, id) for id in stored.sources}
    rows = []
    for entry in stored.catalogue.entries():
        record = entry.record
        gates = passed.get(record.id, {})
        count = sum(gate in gates and gates[gate].passed for gate in GATE_NAMES)
        status = record.status or record.role
        until = record.history[-1].until if record.history else None
        rows.append(
            (
                record.id,
                f"{status} until {until}" if until else status,
                wanted.get(record.id, 0),
                f"{count} of {len(GATE_NAMES)}" if gates else "",
                len(entry.measurements),
            )
        )
    print_table(("model", "status", "wanted by", "gates", "measurements"), rows)
    return 0


@catalogue.command
def gates(model: str, *, database: DatabaseUrl = None) -> int:
    """What came of a model's gates the last time, for the operator alone."""
    from unmask.catalogue.store import outcomes

    with read_transaction(database) as connection:
        found = outcomes(connection, _known(connection, model).id)
    rows = [(one.gate, "passed" if one.passed else "not passed", one.finding) for one in found.values()]
    print_table(("gate", "outcome", "finding"), rows)
    return 0


@catalogue.command
def queue(*, database: DatabaseUrl = None) -> int:
    """What is wanted, most votes first, with the notes on what for."""
    from unmask.catalogue import votes
    from unmask.catalogue.store import read_catalogue

    with read_transaction(database) as connection:
        found = votes.queue(connection)
        stored = read_catalogue(connection)
    rows = []
    for wanted in found:
        entry = stored.catalogue.get(wanted.model)
        status = entry.record.status if entry else None
        rows.append((wanted.model, status or "", wanted.votes, "; ".join(wanted.notes)))
    print_table(("model", "status", "votes", "notes"), rows)
    return 0


@catalogue.command
def add(file: Path, *, database: DatabaseUrl = None) -> int:
    """Add a record from a TOML file, or lay its fields over the one that is there. Its history is not taken over."""
    import msgspec

    from unmask.accounts.audit import COMMAND_LINE
    from unmask.catalogue import read_record
    from unmask.catalogue.actions import set_fields
    from unmask.errors import UsageError

    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} cannot be read: {error}") from error
    record = read_record(text, file.name)
    given = msgspec.toml.decode(text)
    fields = {name: value for name, value in given.items() if name not in ("id", "history")}
    with write_transaction(database) as connection:
        set_fields(connection, COMMAND_LINE, record.id, msgspec.to_builtins(fields))
    say(f"{record.id}: {len(fields)} fields")
    return 0


@catalogue.command
def request(model: str, *, note: str = "", database: DatabaseUrl = None) -> int:
    """Put a model on record that somebody asked for. MODEL is its hub id."""
    _step(database, model, "requested", note=note, new=True)
    return 0


@catalogue.command
def announce(model: str, *, note: str = "", database: DatabaseUrl = None) -> int:
    """Say that a model is coming soon; also takes up one that was retired."""
    _step(database, model, "coming soon", note=note, new=True)
    return 0


@catalogue.command
def live(
    model: str,
    *,
    database: DatabaseUrl = None,
    mail_server: MailUrl = None,
    mail_from: MailFrom = "",
    public_url: PublicUrl = "",
) -> int:
    """Switch a staged model on, and tell those who wanted it."""
    from unmask.catalogue.actions import go_live

    post = named_server(mail_server, mail_from, public_url)
    with closing(open_database(database)) as chosen:
        with chosen.begin() as connection:
            id = _known(connection, model).id
            told, charged = go_live(connection, id, actor=ACTOR)
        say(f"{id} is live; {told} who wanted it were told{', and the proposed price is charged' if charged else ''}")
        if told:
            send(chosen, post)
    return 0


@catalogue.command
def deprecate(model: str, *, until: str, note: str = "", database: DatabaseUrl = None) -> int:
    """Announce the last day on which a live model answers.

    Parameters
    ----------
    until
        That day, as 2026-12-31. /v1/models and a header of every answer say it.
    """
    from datetime import UTC, datetime

    from unmask.errors import UsageError

    try:
        day = date.fromisoformat(until)
    except ValueError as error:
        raise UsageError(f"--until {until}: write a day as 2026-12-31") from error
    if day < datetime.now(UTC).date():
        raise UsageError(f"--until {until}: that day is over; 'unmask catalogue retire' ends a deprecated model")
    _step(database, model, "deprecated", note=note, until=day)
    return 0


@catalogue.command
def restore(model: str, *, note: str = "", database: DatabaseUrl = None) -> int:
    """Take a deprecation back."""
    from unmask.errors import UsageError

    with read_transaction(database) as connection:
        status = _known(connection, model).status
    if status != "deprecated":
        raise UsageError(f"{model} is {status}, and only a deprecation can be taken back")
    _step(database, model, "live", note=note)
    return 0


@catalogue.command
def retire(model: str, *, note: str = "", database: DatabaseUrl = None) -> int:
    """End a deprecated model, or drop one that is not live yet. A running server lets it go at once."""
    _step(database, model, "retired", note=note)
    return 0


def _step(
    database: str | None,
    model: str,
    status: "Status",
    *,
    note: str = "",
    until: date | None = None,
    new: bool = False,
) -> None:
    from unmask.accounts.audit import COMMAND_LINE
    from unmask.catalogue.actions import add_unknown, take_step

    with write_transaction(database) as connection:
        id = model if new and add_unknown(connection, model) else _known(connection, model).id
        take_step(connection, COMMAND_LINE, id, status, note=note, until=until)
    say(f"{id} is {status}{f' until {until}' if until else ''}")


def _known(connection: "Connection", model: str) -> "Record":
    """The record of an id or alias.

    Raises:
        UsageError: there is none.
    """
    from unmask.catalogue.store import read_catalogue
    from unmask.errors import UsageError

    entry = read_catalogue(connection).catalogue.get(model)
    if entry is None:
        raise UsageError(f"no record is called {model!r}: see 'unmask catalogue list'")
    return entry.record
