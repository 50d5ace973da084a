"""One run through the gates: which are still to pass, the rows that each writes, and the steps of the lifecycle."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
from sqlalchemy import Connection

from unmask.catalogue.actions import go_live
from unmask.catalogue.catalogue import named_record
from unmask.catalogue.lifecycle import Status
from unmask.catalogue.measurement import SPEED
from unmask.catalogue.record import Record
from unmask.catalogue.store import (
    GateOutcome,
    add_gate_outcome,
    add_measurements,
    gate_outcomes,
    put_fields,
    read_catalogue,
    read_record,
    step,
)
from unmask.checkpoint import Checkpoint, open_checkpoint
from unmask.disk import atomic_write, try_lock
from unmask.errors import StorageError, UnmaskError, UsageError
from unmask.evaluate.run import machine
from unmask.home import home
from unmask.onboarding.gates import (
    GATES,
    Gate,
    GateResult,
    OnboardingContext,
    ProgressReporter,
    in_order_of_needs,
)
from unmask.onboarding.options import OnboardingOptions
from unmask.storage.database import Database

# Visitors read this note. The finding itself may name files of this machine.
_FAILED = "It did not pass the gate '{gate}', and waits."

# Models that answer requests: their weights must not be replaced under their name.
_ANSWERING: tuple[Status, ...] = ("live", "deprecated")

# Shows a gate while it runs: entered with the gate's name, gives a function that reports progress.
GateDisplay = Callable[[str], AbstractContextManager[ProgressReporter]]


@dataclass(frozen=True)
class GateRun:
    """A gate in one run. `reused` if an earlier run passed it with the same weights and settings."""

    gate: str
    passed: bool
    finding: str
    reused: bool = False


@dataclass
class OnboardingResult:
    """The result of an onboarding.

    Attributes:
        model: id of the record.
        status: of the model after the run.
        gates: in their order, up to the first that was not passed.
        notified: number of accounts that got a notice that the model is live.
        price_charged: the proposed price is charged from now on.
    """

    model: str
    status: Status | None = None
    gates: list[GateRun] = field(default_factory=list)
    notified: int = 0
    price_charged: bool = False

    @property
    def passed(self) -> bool:
        """True if all gates were passed."""
        return all(gate.passed for gate in self.gates) and len(self.gates) == len(GATES)


def output_for(model: str) -> Path:
    """Return the folder of a model's raw files."""
    name = "".join(c if c.isalnum() or c in "-._" else "-" for c in model).strip("-.")
    return home() / "onboarding" / name


def onboard(
    database: Database, options: OnboardingOptions, display: GateDisplay, actor: str = "command line"
) -> OnboardingResult:
    """Take a model through its gates, and live if it passes all of them.

    A gate that the same weights passed with the same settings is not run again, so an interrupted run continues. A
    model that does not pass returns to "coming soon". A model that is live already is measured again and stays live.

    Args:
        database: with the catalogue.
        options: the model, and the settings of its gates.
        display: shows each gate while it runs.
        actor: id of a person, or "command line".

    Raises:
        UsageError: the model cannot be onboarded from its status, or another process is onboarding it.
        CheckpointError: its files are missing, or do not fit each other.
        StorageError: the database or the folder of raw files cannot be written.
    """
    checkpoint = open_checkpoint(options.source)
    with _onboarding_lock(options):
        with display("files"):
            _ = checkpoint.revision  # reads every file, which may take a while
        context, earlier = _begin(database, options, checkpoint)
        gates = _run_gates(database, context, earlier, display, actor)
        return _finish(database, context, OnboardingResult(options.model, gates=gates), actor)


def _begin(
    database: Database, options: OnboardingOptions, checkpoint: Checkpoint
) -> tuple[OnboardingContext, dict[str, GateOutcome]]:
    """Put the model on record, and return its context with the last outcome of each gate.

    Raises:
        UsageError: the model cannot be onboarded from its status.
    """
    model = options.model
    with database.begin() as connection:
        record = read_record(connection, model) or named_record(model)
        if record.role == "reference":
            raise UsageError(f"{model} is in the catalogue for others to be measured against, not to be served")
        compat = options.compat or record.compat
        if record.status in _ANSWERING and compat != record.compat:
            raise UsageError(
                f"{model} answers in the mode {record.compat!r}: vectors of {compat!r} would not be the same. "
                "Retire it first, or give it another name"
            )
        if record.status not in _ANSWERING:
            record = put_fields(connection, model, {"compat": compat}, source=options.source)
        entry = read_catalogue(connection).catalogue.get(model)
        earlier = gate_outcomes(connection, model)
    speeds = [
        measurement
        for measurement in (entry.measurements if entry else ())
        if measurement.group == SPEED
        and measurement.revision == checkpoint.revision
        and measurement.hardware == machine()
    ]
    return OnboardingContext(options, record, checkpoint, speeds), earlier


def _run_gates(
    database: Database,
    context: OnboardingContext,
    earlier: Mapping[str, GateOutcome],
    display: GateDisplay,
    actor: str,
) -> list[GateRun]:
    """Run the gates that the earlier outcomes do not cover, up to the first that is not passed."""
    runs: list[GateRun] = []
    for gate in in_order_of_needs(GATES):
        fingerprint = gate.fingerprint(context)
        past = earlier.get(gate.name)
        if past is not None and past.passed and past.fingerprint == fingerprint:
            runs.append(GateRun(gate.name, True, past.finding, reused=True))
            continue
        with database.begin() as connection:
            context.record = _to_benchmarking(connection, context.record, actor)
        outcome = _run_gate(database, context, gate, fingerprint, display)
        runs.append(GateRun(gate.name, outcome.passed, outcome.finding))
        if not outcome.passed:
            break
    return runs


def _finish(database: Database, context: OnboardingContext, result: OnboardingResult, actor: str) -> OnboardingResult:
    """Take the steps of the lifecycle that follow from the gates, and complete the result."""
    options, model, status = context.options, context.options.model, context.record.status
    with database.begin() as connection:
        if not result.passed:
            failed = next(gate.gate for gate in result.gates if not gate.passed)
            if status == "benchmarking":
                step(connection, model, "coming soon", actor=actor, note=_FAILED.format(gate=failed))
        elif status in _ANSWERING:
            put_fields(connection, model, {}, source=options.source)
        elif status != "staged":
            _to_benchmarking(connection, context.record, actor)
            step(connection, model, "staged", actor=actor, note="It passed its gates.")
        result.status = _status(connection, model)
        if result.passed and result.status == "staged" and not options.stage:
            result.notified, result.price_charged = go_live(connection, model, actor=actor)
            result.status = _status(connection, model)
    return result


@contextmanager
def _onboarding_lock(options: OnboardingOptions) -> Iterator[None]:
    """Keep other processes from onboarding the same model. The lock ends with the process, also when it is killed.

    Raises:
        UsageError: another process has the lock.
        StorageError: the folder of raw files cannot be written.
    """
    path = options.output / "lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b")  # the owner of the lock has written its process id into it
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}; set UNMASK_HOME elsewhere") from error
    with file:
        if not try_lock(file):
            file.seek(0)
            owner = file.read().decode() or "another process"
            raise UsageError(
                f"{options.model} is being onboarded already, by {owner}: wait for that run, or end it and run the "
                "same command again, which goes on after the gates that were passed"
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} since {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC".encode())
        file.flush()
        yield


def _run_gate(
    database: Database, context: OnboardingContext, gate: Gate, fingerprint: str, display: GateDisplay
) -> GateOutcome:
    """Run a gate, and write its fields, measurements and outcome in one transaction."""
    model = context.options.model
    began = datetime.now(UTC)
    try:
        with display(gate.name) as report_progress:
            result = gate.run(context, report_progress)
    except StorageError:
        raise  # a full disk says nothing about the model
    except UnmaskError as error:
        outcome = GateOutcome(gate.name, fingerprint, False, str(error), {})
        with database.begin() as connection:
            add_gate_outcome(connection, model, outcome)
        return outcome
    outcome = GateOutcome(gate.name, fingerprint, True, result.finding, result.fields)
    _write_raw(context, gate, result, began)
    with database.begin() as connection:
        if result.fields:
            context.record = put_fields(connection, model, result.fields)
        add_measurements(connection, result.measurements)
        add_gate_outcome(connection, model, outcome)
    context.measurements = [*context.measurements, *result.measurements]
    return outcome


def _write_raw(context: OnboardingContext, gate: Gate, result: GateResult, began: datetime) -> None:
    content: dict[str, Any] = {
        "model": context.options.model,
        "gate": gate.name,
        "revision": context.checkpoint.revision,
        "finding": result.finding,
        "command": context.options.command,
        "machine": machine(),
        "began": began.isoformat(timespec="seconds"),
        "ended": datetime.now(UTC).isoformat(timespec="seconds"),
        **result.raw,
        "measurements": result.measurements,
    }
    with atomic_write(context.options.output / f"{gate.name}.json") as partial:
        partial.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=1))


def _to_benchmarking(connection: Connection, record: Record, actor: str) -> Record:
    """Take the steps that lead to "benchmarking". A model that answers keeps its status."""
    steps: dict[Status | None, tuple[Status, ...]] = {
        None: ("coming soon", "benchmarking"),
        "requested": ("coming soon", "benchmarking"),
        "retired": ("coming soon", "benchmarking"),
        "coming soon": ("benchmarking",),
        "staged": ("benchmarking",),
    }
    for status in steps.get(record.status, ()):
        record = step(connection, record.id, status, actor=actor)
    return record


def _status(connection: Connection, model: str) -> Status | None:
    record = read_record(connection, model)
    return record.status if record else None
