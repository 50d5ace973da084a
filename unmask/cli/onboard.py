"""`unmask onboard`."""

import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Group, Parameter

from unmask.cli.database import DatabaseUrl, open_database
from unmask.cli.mail import NO_MAIL, MailOptions, PublicUrl, send_waiting_notices
from unmask.cli.options import ACTOR, AsJson, amount_option
from unmask.errors import UsageError
from unmask.onboarding.options import DEFAULT_LENGTHS, OnboardingOptions
from unmask.terminal import Progress, Step, print_json, print_sentence, print_table

if TYPE_CHECKING:
    from unmask.onboarding import OnboardingResult
    from unmask.storage.database import Database

_INTERNAL = Parameter(parse=False)


@Parameter(name="*", group=Group("Gates", sort_key=10))
@dataclass(frozen=True, kw_only=True)
class OnboardOptions(OnboardingOptions):
    """`OnboardingOptions` on a command line. Here are the fields that differ as options."""

    model: Annotated[str, _INTERNAL] = ""
    source: Annotated[str, _INTERNAL] = ""
    suites: Annotated[tuple[str, ...], Parameter(name="--suite")] = ()
    tasks: Annotated[tuple[str, ...], Parameter(name="--task")] = ()
    lengths: Annotated[tuple[int, ...], Parameter(name="--length")] = DEFAULT_LENGTHS
    cost_per_hour: Annotated[int | None, amount_option()] = None
    price: Annotated[int | None, amount_option(zero=True)] = None
    command: Annotated[str, _INTERNAL] = ""
    output: Annotated[Path, _INTERNAL] = Path()


def onboard(
    model: str,
    *,
    weights: Path | None = None,
    options: OnboardOptions = OnboardOptions(),
    database: DatabaseUrl = None,
    mail: MailOptions = NO_MAIL,
    public_url: PublicUrl = "",
    as_json: AsJson = False,
) -> int:
    """Measure a model and take it live.

    The model passes these gates: licence, digests, load, parity, quality, speed, price, canary. An interrupted run
    continues when you repeat the command: a gate is skipped if the same weights passed it with the same settings. A
    running server answers for the model about a second later.

    Exit code 2: a gate was not passed. Exit code 1: the run could not begin, for example because another run has the
    same model.

    Parameters
    ----------
    model
        Id of a record, a hub id, or a folder in the hub's layout.
    weights
        Folder with the model's files, if they are not fetched from the hub.
    """
    from unmask.onboarding import onboard as run_onboarding
    from unmask.onboarding.run import output_for

    server = mail.server(public_url)  # refuse a malformed address before hours of work
    with closing(open_database(database, new=True)) as opened, Progress() as progress:
        id, source = _record_and_source(opened, model, weights)
        # The command stands on the model's page, so it names no folder of this machine.
        command = shlex.join(["unmask", *(_shortened(word) for word in sys.argv[1:])])
        result = run_onboarding(
            opened,
            replace(options, model=id, source=source, command=command, output=output_for(id)),
            lambda gate: _gate_progress(progress, gate),
            ACTOR,
        )
        progress.close()
        if as_json:
            print_json({**asdict(result), "passed": result.passed})
        else:
            _print_gates(result)
        if result.notified:
            send_waiting_notices(opened, server)
    return 0 if result.passed else 2


@contextmanager
def _gate_progress(progress: Progress, gate: str) -> Iterator[Callable[[int, int], None]]:
    """Show a gate while it runs and log its duration."""
    began = time.perf_counter()
    progress.log(gate)
    yield lambda done, total: progress.show(Step(gate, done, total))
    progress.close()
    progress.log(f"{gate}: {time.perf_counter() - began:.1f} s")


def _print_gates(result: "OnboardingResult") -> None:
    """Print the findings of the gates and the status of the model."""
    rows = []
    for gate in result.gates:
        verdict = "not passed" if not gate.passed else "kept" if gate.reused else "passed"
        rows.append((gate.gate, verdict, gate.finding))
    print_table(("gate", "outcome", "finding"), rows)
    print_sentence(f"{result.model} is {result.status}.")
    if result.notified:
        print_sentence(f"Voters notified: {result.notified}.")
    if result.price_charged:
        print_sentence("The proposed price is charged from now on; 'unmask accounts price' changes it.")


def _record_and_source(database: "Database", model: str, weights: Path | None) -> tuple[str, str]:
    """Return the record's id and the place of its weights, from the user's words."""
    from unmask.catalogue import record_for
    from unmask.catalogue.model_requests import check_hub_id
    from unmask.catalogue.store import read_catalogue, source_of

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
        earlier_source = source_of(connection, id)
    if entry is None and not path.exists():
        check_hub_id(model)
    if weights is not None:
        return id, str(weights.expanduser().absolute())
    if path.exists():
        return id, str(path.absolute())
    return id, earlier_source or id


def _shortened(word: str) -> str:
    """Return a word of the command line; of a path only its last part, of a URL only its scheme."""
    if word.startswith(("smtp://", "smtps://", "sqlite:", "postgres")):
        return word.partition(":")[0] + "://..."
    return Path(word).name if word.startswith(("/", "~", "./", "../")) else word
