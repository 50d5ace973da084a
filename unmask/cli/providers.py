"""`unmask providers ...`: who answers for models elsewhere, and whether their vectors are right."""

import asyncio
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from unmask.cli.database import DatabaseUrl, open_database, read_transaction, write_transaction
from unmask.cli.options import ACTOR, AsJson, DayCount
from unmask.errors import UsageError
from unmask.terminal import print_json, print_table, say

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from unmask.router.checks import ModelSource
    from unmask.router.providers import Providers
    from unmask.storage.database import Database

providers = App(name="providers", help="Manage providers of models, and check their vectors.")

_FILE = Path("providers.toml")
ProvidersPath = Annotated[
    Path,
    Parameter(name="--providers", env_var="UNMASK_PROVIDERS", help="File of providers, see the how-to guide."),
]


@providers.command(name="list")
def list_providers(*, file: ProvidersPath = _FILE, as_json: AsJson = False) -> int:
    """Check the file of providers and list what it says."""
    from unmask.accounts.money import format_dollars
    from unmask.router.providers import read_providers

    today = datetime.now(UTC).date()
    rows = [
        (
            provider.name,
            provider.kind,
            model.id,
            model.precision,
            format_dollars(model.cost_on(today)),
            model.priority,
            provider.inputs_per_request(model),
            model.max_tokens,
            provider.data,
            provider.country,
        )
        for provider in read_providers(file).providers
        for model in provider.models
    ]
    headings = ("provider", "kind", "model", "precision", "dollars", "priority", "texts", "tokens", "data", "country")
    print_table(headings, rows, right=("dollars", "priority", "texts", "tokens"), as_json=as_json)
    return 0


@providers.command
def check(
    name: str = "",
    /,
    *,
    file: ProvidersPath = _FILE,
    weights: tuple[str, ...] = (),
    as_json: AsJson = False,
    database: DatabaseUrl = None,
) -> int:
    """Ask providers for all canary texts and compare their vectors with this machine's own.

    The right vectors are computed here once per model and kept in UNMASK_HOME. Exit code 2: a provider's vectors are
    wrong, or it did not answer.

    Parameters
    ----------
    name
        Name of one provider. Default: all of the file.
    weights
        Folder or file with a model's weights, if its id does not say where they are. Repeat it for several models.
    """
    from unmask.router.checks import check_all
    from unmask.router.providers import read_providers

    chosen = _chosen(read_providers(file), name)
    with closing(open_database(database, new=database is None)) as opened:
        sources = _sources(opened, weights)
    results = asyncio.run(check_all(chosen, sources, say))
    if as_json:
        print_json([asdict(result) for result in results])
    else:
        headings = ("provider", "model", "verdict", "precision", "worst", "mean", "finding")
        rows = [
            (
                result.provider,
                result.model,
                "right" if result.passed else "no answer" if result.finding is None else "wrong",
                result.finding.precision if result.finding else None,
                f"{result.finding.worst:.1e}" if result.finding else None,
                f"{result.finding.mean:.1e}" if result.finding else None,
                result.sentence,
            )
            for result in results
        ]
        print_table(headings, rows, right=("worst", "mean"))
    return 0 if all(result.passed for result in results) else 2


@providers.command
def references(model: str, *, output: Path, weights: str | None = None, database: DatabaseUrl = None) -> int:
    """Write the right vectors of a model's canary texts to a file, for servers without its weights.

    Such a server needs the model's tokenizer and configuration, and the file, named under [references] in its file of
    providers. Whoever reads the file can answer the unpublished texts in it: it is readable by its owner alone, and
    should be copied over a secure channel.

    Parameters
    ----------
    model
        Id under which the other servers serve the model.
    output
        File to write, such as model.npz.
    weights
        Folder or file with the weights, if the id does not say where they are.
    """
    from unmask.conformance import store_references
    from unmask.router.checks import ModelSource, references_of

    with closing(open_database(database, new=database is None)) as opened:
        source = _sources(opened, ()).get(model, ModelSource(model))
    source = source._replace(weights=weights or source.weights)
    say(f"the right vectors of {model}: computed, or read from an earlier run")
    computed = references_of(model, source)
    store_references(computed, output)
    say(
        f"{output}: {len(computed.canaries)} canary texts and {len(computed.unpublished.texts)} unpublished ones, of "
        f"the weights {computed.revision}"
    )
    return 0


@providers.command
def quarantine(name: str, model: str, *, reason: str, file: ProvidersPath = _FILE, database: DatabaseUrl = None) -> int:
    """Take a provider of a model out of traffic, in all running servers within a second.

    Parameters
    ----------
    name
        Name of the provider.
    model
        Id of the model.
    reason
        Why, in a sentence for the history.
    """
    from unmask.accounts.audit import COMMAND_LINE
    from unmask.router.verdicts import order_quarantine

    with write_transaction(database) as connection:
        _require_known(connection, file, name, model)
        order_quarantine(connection, COMMAND_LINE, name, model, reason)
    say(f"{name} gets no more requests for {model}; 'unmask providers admit {name} {model}' ends that")
    return 0


@providers.command
def admit(name: str, model: str, *, database: DatabaseUrl = None) -> int:
    """End a quarantine. Running servers make a full run, and use the provider only if it passes.

    Parameters
    ----------
    name
        Name of the provider.
    model
        Id of the model.
    """
    from unmask.accounts.audit import COMMAND_LINE
    from unmask.router.verdicts import order_admission

    with write_transaction(database) as connection:
        order_admission(connection, COMMAND_LINE, name, model)
    say(f"{name} gets requests for {model} again once its vectors are right in a full check")
    return 0


@providers.command
def reload(*, file: ProvidersPath = _FILE, database: DatabaseUrl = None) -> int:
    """Let all running servers read their file of providers again, within a second.

    The file is checked first, and nothing happens if it is wrong. Requests under way are finished with the providers
    they began with. SIGHUP does the same to one server, which then also looks for other revisions of its models.
    """
    from unmask.router.providers import read_providers
    from unmask.router.verdicts import Verdict, add_verdict

    read_providers(file)
    with write_transaction(database) as connection:
        add_verdict(connection, Verdict(provider="", model="", verdict="reload", actor=ACTOR))
    return 0


@providers.command
def taint(
    name: str = "",
    /,
    *,
    days: DayCount = 90,
    requests: bool = False,
    file: ProvidersPath = _FILE,
    as_json: AsJson = False,
    database: DatabaseUrl = None,
) -> int:
    """List who got answers that may be wrong: those between the last right canary and a quarantine.

    Parameters
    ----------
    name
        Name of a provider. Default: all.
    days
        Only quarantines of so many days.
    requests
        List every charge with its request's id, in place of sums by key.
    """
    from unmask.accounts.taint import tainted_answers, tainted_requests, tainted_windows
    from unmask.storage.database import now_ms

    with read_transaction(database) as connection:
        if name:
            _require_known(connection, file, name)
        windows = tainted_windows(connection, now_ms() - days * 24 * 3600 * 1000)
        windows = [window for window in windows if name in ("", window.provider)]
        if requests:
            headings = ("provider", "model", "charge", "account", "request", "time")
            rows = [
                (window.provider, window.model, charge, account, request, _time(at))
                for window in windows
                for charge, account, request, at in tainted_requests(connection, window)
            ]
        else:
            headings = ("provider", "model", "from", "to", "account", "key", "requests", "tokens", "finding")
            rows = [
                (
                    window.provider,
                    window.model,
                    _time(answers.first),
                    _time(answers.last),
                    answers.account,
                    answers.key,
                    answers.requests,
                    answers.tokens,
                    window.finding,
                )
                for answers in tainted_answers(connection, windows)
                for window in (answers.window,)
            ]
    print_table(headings, rows, right=("requests", "tokens"), as_json=as_json)
    return 0


@providers.command
def history(*, model: str | None = None, as_json: AsJson = False, database: DatabaseUrl = None) -> int:
    """List quarantines and admissions, newest first.

    Parameters
    ----------
    model
        Only those of this model.
    """
    from unmask.router.verdicts import verdict_history

    with read_transaction(database) as connection:
        verdicts = verdict_history(connection, model)
    rows = [
        (
            _time(verdict.at),
            verdict.provider,
            verdict.model,
            verdict.verdict,
            _time(verdict.passed_at) if verdict.passed_at else None,
            verdict.actor,
            verdict.finding,
        )
        for verdict in verdicts
    ]
    headings = ("time", "provider", "model", "verdict", "last right", "by", "finding")
    print_table(headings, rows, as_json=as_json)
    return 0


@providers.command
def bill(
    name: str,
    *,
    month: str,
    invoice: str | None = None,
    file: ProvidersPath = _FILE,
    as_json: AsJson = False,
    database: DatabaseUrl = None,
) -> int:
    """Sum the attempts at a provider in a month, and compare them with its invoice. Times are in UTC.

    Exit code 2: the invoice is for more than one percent more or less.

    Parameters
    ----------
    name
        Name of the provider.
    month
        As 2026-11.
    invoice
        Dollars of the provider's invoice.
    """
    from unmask.accounts import costs
    from unmask.accounts.money import format_dollars

    billed = _amount(invoice, "invoice") if invoice is not None else None
    start, end = _month(month)
    with read_transaction(database) as connection:
        _require_known(connection, file, name)
        lines = costs.bill(connection, name, start, end)
    rows = [(*line[:-1], format_dollars(line.cost)) for line in lines]
    headings = ("model", "reason", "attempts", "tokens", "their tokens", "dollars")
    print_table(headings, rows, right=headings[2:], as_json=as_json)
    if billed is None:
        return 0
    booked = sum(line.cost for line in lines)
    difference = f"{format_dollars(abs(billed - booked))} {'more' if billed >= booked else 'less'}"
    say(f"{format_dollars(booked)} dollars by the books, {format_dollars(billed)} by the invoice: {difference}")
    return 2 if 100 * abs(billed - booked) > booked else 0


@providers.command
def pay(
    name: str,
    dollars: str,
    *,
    reference: str,
    note: str = "",
    file: ProvidersPath = _FILE,
    database: DatabaseUrl = None,
) -> int:
    """Book that a provider's invoice was paid, once per reference. Says what is still owed.

    Parameters
    ----------
    name
        Name of the provider.
    dollars
        As 12.50.
    reference
        Number of the invoice.
    note
        For people.
    """
    from unmask.accounts import costs, ledger
    from unmask.accounts.money import format_dollars
    from unmask.storage.database import now_ms

    with write_transaction(database) as connection:
        _require_known(connection, file, name)
        while costs.book_costs(connection, now_ms()):
            pass
        if not ledger.pay_provider(connection, name, _amount(dollars, "dollars"), reference, now_ms(), note=note):
            say(f"{reference} was booked before: nothing has changed")
        owed = costs.payables(connection).get(name, 0)
    say(f"{format_dollars(owed)} dollars are owed to {name}")
    return 0


@providers.command
def margin(*, month: str, as_json: AsJson = False, database: DatabaseUrl = None) -> int:
    """Compare what callers paid in a month with what providers cost, by provider and model. Times are in UTC.

    Exit code 2: one of them costs more than it earns.

    Parameters
    ----------
    month
        As 2026-11.
    """
    from unmask.accounts import costs
    from unmask.accounts.money import format_dollars

    start, end = _month(month)
    with read_transaction(database) as connection:
        lines = costs.margins(connection, start, end)
    rows = [
        (
            line.provider,
            line.model,
            line.requests,
            format_dollars(line.income),
            format_dollars(line.cost),
            format_dollars(line.profit),
            f"{line.overhead:.1%}",
        )
        for line in lines
    ]
    headings = ("provider", "model", "requests", "income", "cost", "profit", "overhead")
    print_table(headings, rows, right=headings[2:], as_json=as_json)
    return 2 if any(line.profit < 0 for line in lines) else 0


def _require_known(connection: "Connection", file: Path, name: str, model: str | None = None) -> None:
    """Check that a provider is in the file of providers, or in the database: it has a verdict or was asked before.

    Raises:
        UsageError: it is in neither, or the named file cannot be read.
    """
    from unmask.router.providers import read_providers
    from unmask.router.verdicts import is_known

    there = read_providers(file).providers if file.is_file() or file != _FILE else ()
    models = [entry.id for provider in there if provider.name == name for entry in provider.models]
    if (models if model is None else model in models) or is_known(connection, name, model):
        return
    what = f"provider {name!r}" if model is None else f"provider {name!r} of {model}"
    names = ", ".join(provider.name for provider in there)
    where = f"{file} has {names}" if there else f"there is no file {file}"
    raise UsageError(f"there is no {what} in the database, and {where}: name it as there, or another file: --providers")


def _month(month: str) -> tuple[int, int]:
    """Return the first Unix millisecond of a month and of the next one.

    Raises:
        UsageError: it is no month.
    """
    try:
        start = datetime.strptime(month, "%Y-%m").replace(tzinfo=UTC)
    except ValueError:
        raise UsageError(f"--month {month!r}: write it like 2026-11") from None
    end = (start + timedelta(days=31)).replace(day=1)
    return round(start.timestamp() * 1000), round(end.timestamp() * 1000)


def _amount(dollars: str, name: str) -> int:
    from unmask.accounts.money import parse_dollars

    try:
        return parse_dollars(dollars)
    except ValueError as error:
        raise UsageError(f"{name}: {error}") from None


def _time(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _chosen(file: "Providers", name: str) -> "Providers":
    """Return the providers to check."""
    import msgspec

    if not name:
        return file
    matching = tuple(provider for provider in file.providers if provider.name == name)
    if not matching:
        names = ", ".join(provider.name for provider in file.providers) or "none"
        raise UsageError(f"there is no provider {name!r} in the file, only {names}")
    return msgspec.structs.replace(file, providers=matching)


def _sources(database: "Database", weights: Sequence[str]) -> "dict[str, ModelSource]":
    """Return model id -> weights and text handling, for models whose id does not say where the weights are."""
    from unmask.catalogue import record_for
    from unmask.catalogue.store import read_catalogue
    from unmask.router.checks import ModelSource

    with database.read() as connection:
        stored = read_catalogue(connection)
    sources = {
        entry.record.id: ModelSource(stored.sources.get(entry.record.id, entry.record.id), entry.record.compat)
        for entry in stored.catalogue.entries()
    }
    for place in weights:
        record = record_for(place)
        sources[record.id] = ModelSource(place, record.compat)
    return sources
