"""`unmask onboard`."""

import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Group, Parameter

from unmask.cli.database import DatabaseUrl, open_database
from unmask.cli.mail import MailFrom, MailUrl, PublicUrl, named_server, send
from unmask.cli.options import ACTOR, parse_amount

if TYPE_CHECKING:
    from unmask.storage.database import Database

_GATES = Group("Gates")


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
    with closing(open_database(database)) as chosen:
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
                cost_per_hour=None if cost_per_hour is None else parse_amount(cost_per_hour),
                utilisation=utilisation,
                price=None if price is None else parse_amount(price, zero=True),
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


def _named(database: "Database", model: str, weights: Path | None) -> tuple[str, str]:
    """The record's id and where its weights are, from what was typed."""
    from unmask.catalogue import record_for
    from unmask.catalogue.requests import check_id
    from unmask.catalogue.store import read_catalogue, source_of
    from unmask.errors import UsageError

    if weights is not None and not weights.expanduser().exists():
        raise UsageError(f"--weights {weights} does not exist")
    with database.read() as connection:
        records = read_catalogue(connection).catalogue
        path = Path(model).expanduser()
        entry = records.get(model)
        if entry is None and path.exists():
            # A mirror of the hub has the organisation's name above the model's.
            entry = records.get("/".join(path.absolute().parts[-2:]))
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
