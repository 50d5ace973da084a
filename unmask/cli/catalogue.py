"""`unmask onboard` and `unmask catalogue ...`: models from a request to live, and from live to retired."""

import sys
from contextlib import closing
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, Group, Parameter

from unmask.cli.database import DatabaseUrl, opened, reading, writing
from unmask.cli.mail import MailFrom, MailUrl, PublicUrl, named_server, send
from unmask.cli.program import ACTOR, app, say, table, typed_dollars

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from unmask.catalogue import Record, Status
    from unmask.storage.database import Database

catalogue = App(name="catalogue", help="The models on record, and the steps of their lifecycle.")
app.command(catalogue)

_GATES = Group("What the gates ask")


@app.command
def onboard(
    model: str,
    *,
    weights: Path | None = None,
    compat: Annotated[Literal["default", "reference"] | None, Parameter(group=_GATES)] = None,
    licence: Annotated[str | None, Parameter(group=_GATES)] = None,
    replace_specification: Annotated[bool, Parameter(group=_GATES, negative=())] = False,
    reference: Annotated[Path | None, Parameter(group=_GATES)] = None,
    data: Annotated[Path | None, Parameter(group=_GATES)] = None,
    suite: Annotated[tuple[str, ...], Parameter(group=_GATES, negative=())] = (),
    task: Annotated[tuple[str, ...], Parameter(group=_GATES, negative=())] = (),
    length: Annotated[tuple[int, ...], Parameter(group=_GATES, negative=())] = (),
    callers: Annotated[tuple[int, ...], Parameter(group=_GATES, negative=())] = (),
    seconds: Annotated[float, Parameter(group=_GATES)] = 2.0,
    cost_per_hour: Annotated[str | None, Parameter(group=_GATES)] = None,
    utilisation: Annotated[float, Parameter(group=_GATES)] = 0.5,
    price: Annotated[str | None, Parameter(group=_GATES)] = None,
    stage: Annotated[bool, Parameter(negative=())] = False,
    by: str = "the operator of this server",
    database: DatabaseUrl = None,
    mail_server: MailUrl = None,
    mail_from: MailFrom = "",
    public_url: PublicUrl = "",
) -> int:
    """Take a model through its gates: licence, digests, load, parity, quality, speed, price, canary. Then it is live.

    Run again, it continues: a gate that was passed with the same weights and the same questions is not run again. A
    running server answers for the model about a second later. Exit code 2 if a gate was not passed, 1 if it could not
    begin, as while another run takes the same model through its gates.

    Parameters
    ----------
    model
        Id of a record, a hub id, or a folder in the hub's layout.
    weights
        Folder with the model's files, for an id whose files are not fetched from the hub.
    compat
        "reference" gives the published LLM2Vec vectors, quirks included. Left out: as the record says.
    licence
        Of the weights, where the record does not know it.
    replace_specification
        Where the weights and the record differ, let the weights be right.
    reference
        An .npz with texts and vectors, perhaps instructions, to hold the model against. Left out: transformers.
    data
        Folder that offline tasks are read from.
    suite
        What quality is measured on, as "unmask evaluate" names it. May be repeated. Left out, with no --task: local.
    task
        A task, to measure less than a suite. May be repeated. The record says what was measured.
    length
        Tokens per text in the sweep of speeds. May be repeated. Left out: 16, 64 and 256.
    callers
        Callers at once in the sweep. May be repeated. Left out: 1, 4 and 16.
    seconds
        How long each point of the sweep takes.
    cost_per_hour
        Dollars that the machine costs, for the price.
    utilisation
        Share of the hours that somebody pays for, for the price.
    price
        Dollars per million tokens, instead of the proposed ones.
    stage
        Stop before live; "unmask catalogue live" does the rest.
    by
        Who measures, as the pages say it.
    """
    import shlex

    from rich.console import Console

    from unmask.onboarding import Onboarding
    from unmask.onboarding import onboard as run_onboarding
    from unmask.onboarding.run import output_for
    from unmask.onboarding.sweep import DEFAULT_CALLERS, DEFAULT_LENGTHS
    from unmask.onboarding.terminal import gate_bar, print_result

    post = named_server(mail_server, mail_from, public_url)  # a mistake in it is said before hours of work
    console = Console(stderr=True)
    with closing(opened(database)) as chosen:
        id, source = _named(chosen, model, weights)
        result = run_onboarding(
            chosen,
            Onboarding(
                model=id,
                source=source,
                compat=compat,
                licence=licence,
                replace_specification=replace_specification,
                reference=reference,
                suites=suite,
                tasks=task,
                data=data,
                lengths=length or DEFAULT_LENGTHS,
                callers=callers or DEFAULT_CALLERS,
                seconds=seconds,
                cost_per_hour=None if cost_per_hour is None else typed_dollars(cost_per_hour),
                utilisation=utilisation,
                price=None if price is None else typed_dollars(price, zero=True),
                stage=stage,
                # Without the folders of this machine: the command stands on the model's page.
                command=shlex.join(["unmask", *(_shortened(word) for word in sys.argv[1:])]),
                by=by,
                output=output_for(id),
            ),
            lambda gate: gate_bar(console, gate),
            ACTOR,
        )
        print_result(result, Console())
        if result.told:
            send(chosen, post)
    return 0 if result.passed else 2


@catalogue.command(name="list")
def list_models(*, database: DatabaseUrl = None) -> int:
    """All models on record: where they stand, how many want them, and which gates they have passed."""
    from unmask.catalogue import votes
    from unmask.catalogue.store import outcomes, read_catalogue
    from unmask.onboarding.gates import GATES

    with reading(database) as connection:
        stored = read_catalogue(connection)
        wanted = votes.counts(connection)
        passed = {id: outcomes(connection, id) for id in stored.sources}
    rows = []
    for entry in stored.catalogue.entries():
        record = entry.record
        gates = passed.get(record.id, {})
        count = sum(gate.name in gates and gates[gate.name].passed for gate in GATES)
        status = record.status or record.role
        until = record.history[-1].until if record.history else None
        rows.append(
            (
                record.id,
                f"{status} until {until}" if until else status,
                wanted.get(record.id, 0),
                f"{count} of {len(GATES)}" if gates else "",
                len(entry.measurements),
            )
        )
    table(("model", "status", "wanted by", "gates", "measurements"), rows)
    return 0


@catalogue.command
def gates(model: str, *, database: DatabaseUrl = None) -> int:
    """What came of a model's gates the last time, for the operator alone."""
    from unmask.catalogue.store import outcomes

    with reading(database) as connection:
        found = outcomes(connection, _known(connection, model).id)
    rows = [(one.gate, "passed" if one.passed else "not passed", one.finding) for one in found.values()]
    table(("gate", "outcome", "finding"), rows)
    return 0


@catalogue.command
def queue(*, database: DatabaseUrl = None) -> int:
    """What is wanted, most votes first, with the notes on what for."""
    from unmask.catalogue import votes
    from unmask.catalogue.store import read_catalogue

    with reading(database) as connection:
        found = votes.queue(connection)
        stored = read_catalogue(connection)
    rows = []
    for wanted in found:
        entry = stored.catalogue.get(wanted.model)
        status = entry.record.status if entry else None
        rows.append((wanted.model, status or "", wanted.votes, "; ".join(wanted.notes)))
    table(("model", "status", "votes", "notes"), rows)
    return 0


@catalogue.command
def add(file: Path, *, database: DatabaseUrl = None) -> int:
    """Add a record from a TOML file, or lay its fields over the one that is there. Its history is not taken over."""
    import msgspec

    from unmask.accounts import audit
    from unmask.catalogue import read_record
    from unmask.catalogue.store import put_fields
    from unmask.errors import UsageError
    from unmask.storage.database import now_ms

    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} cannot be read: {error}") from error
    record = read_record(text, file.name)
    given = msgspec.toml.decode(text)
    fields = {name: value for name, value in given.items() if name not in ("id", "history")}
    with writing(database) as connection:
        put_fields(connection, record.id, msgspec.to_builtins(fields))
        audit.note(connection, now_ms(), ACTOR, "model.fields", record.id, fields=sorted(fields))
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
    from unmask.onboarding.run import take_live

    post = named_server(mail_server, mail_from, public_url)
    with closing(opened(database)) as chosen:
        with chosen.begin() as connection:
            id = _known(connection, model).id
            told, charged = take_live(connection, id, actor=ACTOR)
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

    with reading(database) as connection:
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
    from unmask.accounts import audit
    from unmask.catalogue.requests import check_id
    from unmask.catalogue.store import put_fields, read_record, step
    from unmask.storage.database import now_ms

    with writing(database) as connection:
        if new and read_record(connection, model) is None:
            check_id(model)
            put_fields(connection, model, {})
            id = model
        else:
            id = _known(connection, model).id
        step(connection, id, status, actor=ACTOR, note=note, until=until)
        audit.note(connection, now_ms(), ACTOR, "model.step", id, status=status)
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


def _named(database: "Database", model: str, weights: Path | None) -> tuple[str, str]:
    """The record's id and where its weights are, from what was typed."""
    from unmask.catalogue import record_for
    from unmask.catalogue.requests import check_id
    from unmask.catalogue.store import read_catalogue, source_of
    from unmask.errors import UsageError

    if weights is not None and not weights.expanduser().exists():
        raise UsageError(f"--weights {weights} does not exist")
    with database.read() as connection:
        known = read_catalogue(connection).catalogue
        path = Path(model).expanduser()
        entry = known.get(model)
        if entry is None and path.exists():
            # A mirror of the hub has the organisation's name above the model's.
            entry = known.get("/".join(path.absolute().parts[-2:]))
        id = entry.record.id if entry else record_for(model).id
        before = source_of(connection, id)
    if entry is None and not path.exists():
        check_id(model)
    if weights is not None:
        return id, str(weights.expanduser().absolute())
    if path.exists():
        return id, str(path.absolute())
    return id, before or id


def _shortened(word: str) -> str:
    """A word of the command line, a path by its last part alone."""
    if word.startswith(("smtp://", "smtps://", "sqlite:", "postgres")):
        return word.partition(":")[0] + "://..."
    return Path(word).name if word.startswith(("/", "~", "./", "../")) else word
