"""The way through the gates: which are still to be passed, what each leaves behind, and the steps between them."""

import os
from collections.abc import Callable, Iterator
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
from unmask.onboarding.gates import GATES, Gate, GateResult, OnboardingContext, OnboardingOptions, ProgressReporter
from unmask.storage.database import Database

__all__ = ["OnboardingOptions", "OnboardingResult", "onboard", "output_for"]

# What a visitor may read; what exactly failed may name files of this machine.
_FAILED = "It did not pass the gate '{gate}', and waits."

# What these have been measured with must not be exchanged under their name.
_ANSWERING: tuple[Status, ...] = ("live", "deprecated")

# A gate as it is shown while it runs: entered with its name, and told how far it is.
Show = Callable[[str], AbstractContextManager[ProgressReporter]]


@dataclass(frozen=True)
class GateRun:
    """A gate of one run. `kept` from an earlier one with the same weights and the same questions."""

    gate: str
    passed: bool
    finding: str
    kept: bool = False


@dataclass
class OnboardingResult:
    """What came of an onboarding.

    Attributes:
        model: id of the record.
        status: where the model stands now.
        gates: in their order, up to the first that was not passed.
        told: how many accounts were told that it is live.
        charged: whether the proposed price is charged from now on.
    """

    model: str
    status: Status | None = None
    gates: list[GateRun] = field(default_factory=list)
    told: int = 0
    charged: bool = False

    @property
    def passed(self) -> bool:
        return all(gate.passed for gate in self.gates) and len(self.gates) == len(GATES)


def output_for(model: str) -> Path:
    """The folder of a model's raw files."""
    name = "".join(c if c.isalnum() or c in "-._" else "-" for c in model).strip("-.")
    return home() / "onboarding" / name


def onboard(database: Database, wanted: OnboardingOptions, show: Show, actor: str = "command line") -> OnboardingResult:
    """Take a model through its gates, and live if it passes all of them.

    A gate that was passed by the same weights with the same questions is not run again, so a run that was killed
    continues. A model that does not pass goes back to where it waited. One that is live already is measured anew and
    stays where it is.

    Args:
        database: with the catalogue.
        wanted: what, and how.
        show: for somebody who watches.
        actor: who asks for it.

    Raises:
        UsageError: the model cannot be onboarded from where it stands, or another process is at it.
        CheckpointError: its files are not there, or do not fit each other.
        StorageError: the database or the folder of raw files cannot be written.
    """
    checkpoint = open_checkpoint(wanted.source)
    with _alone(wanted):
        return _onboard(database, wanted, checkpoint, show, actor)


def _onboard(
    database: Database, wanted: OnboardingOptions, checkpoint: Checkpoint, show: Show, actor: str
) -> OnboardingResult:
    result = OnboardingResult(wanted.model)
    with show("files"):
        revision = checkpoint.revision
    with database.begin() as connection:
        record = read_record(connection, wanted.model) or named_record(wanted.model)
        if record.role == "reference":
            raise UsageError(f"{wanted.model} is in the catalogue for others to be measured against, not to be served")
        chosen = wanted.compat or record.compat
        if record.status in _ANSWERING and chosen != record.compat:
            raise UsageError(
                f"{wanted.model} answers in the mode {record.compat!r}: vectors of {chosen!r} would not be the same. "
                "Retire it first, or give it another name"
            )
        if record.status not in _ANSWERING:
            record = put_fields(connection, wanted.model, {"compat": chosen}, source=wanted.source)
        measured = read_catalogue(connection).catalogue.get(wanted.model)
        before = gate_outcomes(connection, wanted.model)
    known = [
        m
        for m in (measured.measurements if measured else ())
        if m.group == SPEED and m.revision == revision and m.hardware == machine()
    ]
    bench = OnboardingContext(wanted, record, checkpoint, known)
    for gate in GATES:
        fingerprint = gate.fingerprint(bench)
        past = before.get(gate.name)
        if past is not None and past.passed and past.fingerprint == fingerprint:
            result.gates.append(GateRun(gate.name, True, past.finding, kept=True))
            continue
        with database.begin() as connection:
            bench.record = _to_benchmarking(connection, bench.record, actor)
        outcome = _pass(database, bench, gate, fingerprint, show)
        result.gates.append(GateRun(gate.name, outcome.passed, outcome.finding))
        if not outcome.passed:
            break
    with database.begin() as connection:
        if not result.passed:
            failed = next(gate.gate for gate in result.gates if not gate.passed)
            if bench.record.status == "benchmarking":
                step(connection, wanted.model, "coming soon", actor=actor, note=_FAILED.format(gate=failed))
        elif bench.record.status in _ANSWERING:
            put_fields(connection, wanted.model, {}, source=wanted.source)
        elif bench.record.status != "staged":
            _to_benchmarking(connection, bench.record, actor)
            step(connection, wanted.model, "staged", actor=actor, note="It passed its gates.")
        result.status = _status(connection, wanted.model)
        if result.passed and result.status == "staged" and not wanted.stage:
            result.told, result.charged = go_live(connection, wanted.model, actor=actor)
            result.status = _status(connection, wanted.model)
    return result


@contextmanager
def _alone(wanted: OnboardingOptions) -> Iterator[None]:
    """One process at a time takes a model through its gates. The lock ends with the process, however that ends.

    Raises:
        UsageError: another process has it.
        StorageError: the folder of raw files cannot be written.
    """
    path = wanted.output / "lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b")  # what is in it was written by whoever holds it
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}; set UNMASK_HOME elsewhere") from error
    with file:
        if not try_lock(file):
            file.seek(0)
            owner = file.read().decode() or "another process"
            raise UsageError(
                f"{wanted.model} is being onboarded already, by {owner}: wait for that run, or end it and run the "
                "same command again, which goes on after the gates that were passed"
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} since {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC".encode())
        file.flush()
        yield


def _pass(database: Database, bench: OnboardingContext, gate: Gate, fingerprint: str, show: Show) -> GateOutcome:
    """Run a gate, and write down what came of it, all of it or nothing."""
    began = datetime.now(UTC)
    try:
        with show(gate.name) as tell:
            found = gate.run(bench, tell)
    except StorageError:
        raise  # a full disk is no fault of the model's
    except UnmaskError as error:
        outcome = GateOutcome(gate.name, fingerprint, False, str(error), {})
        with database.begin() as connection:
            add_gate_outcome(connection, bench.wanted.model, outcome)
        return outcome
    outcome = GateOutcome(gate.name, fingerprint, True, found.finding, found.fields)
    _write_raw(bench, gate, found, began)
    with database.begin() as connection:
        if found.fields:
            bench.record = put_fields(connection, bench.wanted.model, found.fields)
        add_measurements(connection, found.measurements)
        add_gate_outcome(connection, bench.wanted.model, outcome)
    bench.measured = [*bench.measured, *found.measurements]
    return outcome


def _write_raw(bench: OnboardingContext, gate: Gate, found: GateResult, began: datetime) -> None:
    content: dict[str, Any] = {
        "model": bench.wanted.model,
        "gate": gate.name,
        "revision": bench.checkpoint.revision,
        "finding": found.finding,
        "command": bench.wanted.command,
        "machine": machine(),
        "began": began.isoformat(timespec="seconds"),
        "ended": datetime.now(UTC).isoformat(timespec="seconds"),
        **found.raw,
        "measurements": found.measurements,
    }
    with atomic_write(bench.wanted.output / f"{gate.name}.json") as partial:
        partial.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=1))


def _to_benchmarking(connection: Connection, record: Record, actor: str) -> Record:
    """On the way to where gates are run, by the steps that lead there; a model that answers stays where it is."""
    way: dict[Status | None, tuple[Status, ...]] = {
        None: ("coming soon", "benchmarking"),
        "requested": ("coming soon", "benchmarking"),
        "retired": ("coming soon", "benchmarking"),
        "coming soon": ("benchmarking",),
        "staged": ("benchmarking",),
    }
    for status in way.get(record.status, ()):
        record = step(connection, record.id, status, actor=actor)
    return record


def _status(connection: Connection, model: str) -> Status | None:
    record = read_record(connection, model)
    return record.status if record else None
