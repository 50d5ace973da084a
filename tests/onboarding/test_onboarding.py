"""From a folder to live, through gates that are passed, failed, resumed and killed."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.api.live import until
from tests.fork_server import fork_server
from tests.mirror import BASE, FIRST_STAGE, PUBLISHED, published_mirror, small_data
from unmask.accounts import people, tariff
from unmask.catalogue import Record
from unmask.catalogue.actions import go_live
from unmask.catalogue.canary import cosine, expected_vector
from unmask.catalogue.lifecycle import GATE_NAMES
from unmask.catalogue.measurement import LOCAL, PEAK_MEMORY
from unmask.catalogue.speed import SpeedPoint, points_of
from unmask.catalogue.store import add_measurements, gate_outcomes, put_fields, read_catalogue, read_record, step
from unmask.catalogue.votes import notices_of, vote
from unmask.cli import main
from unmask.encoder import Encoder
from unmask.errors import CheckpointError, UsageError
from unmask.evaluate.memory import measure_memory
from unmask.onboarding import OnboardingOptions, OnboardingResult, onboard
from unmask.onboarding import gates as gates_module
from unmask.onboarding.gates import GATES, Gate, GateResult, in_order_of_needs
from unmask.onboarding.run import output_for
from unmask.storage.database import Database

NAMES = list(GATE_NAMES)


@contextmanager
def unseen(gate: str) -> Iterator[Callable[[int, int], None]]:
    yield lambda done, total: None


@pytest.fixture(autouse=True)
def fresh_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UNMASK_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def memory_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    """A figure for the memory of every model. To measure it takes a process that imports torch."""
    monkeypatch.setattr(gates_module, "measure_memory", lambda *arguments: 500_000_000)


@pytest.fixture
def options(golden_dir: Path, tmp_path: Path) -> OnboardingOptions:
    """A small Llama, with the least that the gates ask for."""
    return OnboardingOptions(
        model="tiny_llama",
        source=str(golden_dir / "tiny_llama"),
        licence="MIT",
        tasks=("STSBenchmark",),
        data=small_data(tmp_path / "data"),
        lengths=(8, 16),
        callers=(1, 2),
        seconds=0.05,
        cost_per_hour=100_000_000,
        command="unmask onboard tiny_llama",
        output=output_for("tiny_llama"),
    )


def record_of(database: Database, model: str) -> Record:
    with database.read() as connection:
        record = read_record(connection, model)
    assert record is not None
    return record


def run(database: Database, options: OnboardingOptions) -> OnboardingResult:
    return onboard(database, options, unseen)


def test_all_gates(
    sqlite: Database, options: OnboardingOptions, fresh_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks: list[int | None] = []

    def measure(*arguments: Any) -> int | None:
        peaks.append(measure_memory(*arguments))
        return peaks[-1]

    monkeypatch.setattr(gates_module, "measure_memory", measure)
    result = run(sqlite, options)
    assert [(gate.gate, gate.passed, gate.reused) for gate in result.gates] == [(name, True, False) for name in NAMES]
    assert result.status == "live" and result.passed
    record = record_of(sqlite, "tiny_llama")
    assert [event.status for event in record.history] == ["coming soon", "benchmarking", "staged", "live"]
    encoder = Encoder.load(options.source)
    assert (record.revision, record.dimensions, record.licence) == (encoder.checkpoint.revision, 64, "MIT")
    assert record.canary and cosine(encoder.encode(record.canary.text)[0], expected_vector(record.canary)) > 0.99999
    assert record.prices[0].estimated and record.prices[0].nanodollars_per_million_tokens > 0
    with sqlite.read() as connection:
        entry = read_catalogue(connection).catalogue.get("tiny_llama")
    assert entry is not None
    # Each gate left a measurement that says how to find it again, and the raw file that it names is there.
    assert len(points_of(entry.figures.sweep)) == 4
    assert [score.what for score in entry.figures.suites[LOCAL, "measured"].tasks] == ["STSBenchmark"]
    assert entry.figures.local is None  # one task is not the suite
    for measurement in entry.measurements:
        assert measurement.raw and measurement.revision and measurement.revision.startswith(str(record.revision))
        raw = fresh_home / measurement.raw.removeprefix("UNMASK_HOME/")
        assert json.loads(raw.read_bytes()), measurement.what
    assert len({measurement.raw for measurement in entry.measurements}) == len(NAMES)
    # One process measured the memory for the gates "load" and "quality".
    figures = [measurement.value for measurement in entry.measurements if measurement.what == PEAK_MEMORY]
    assert len(peaks) == 1 and figures == peaks * 2 and figures[0] > 50_000_000
    price = json.loads((options.output / "price.json").read_bytes())
    best = max(point.tokens_per_second for point in points_of(entry.figures.sweep))
    assert price["cost_nanodollars"] == pytest.approx(100_000_000 / 3600 * 1e6 / best, rel=1e-3)
    assert price["proposed_nanodollars"] == pytest.approx(2 * price["cost_nanodollars"], abs=1)


@pytest.mark.usefixtures("memory_figure")
def test_what_was_passed_is_not_run_again(
    sqlite: Database, options: OnboardingOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    speeds = iter((1000.0, 2000.0))  # tokens per second of the first sweep and of the second
    monkeypatch.setattr(gates_module, "sweep", lambda *arguments: [SpeedPoint(8, 1, next(speeds), 1.0, 1.0)])
    failed = run(sqlite, replace(options, cost_per_hour=None))
    assert [gate.gate for gate in failed.gates if gate.passed] == NAMES[:6]
    assert "--cost-per-hour" in failed.gates[-1].finding and not failed.passed
    assert failed.status == "coming soon"
    assert record_of(sqlite, "tiny_llama").history[-1].note == "It did not pass the gate 'price', and waits."
    again = run(sqlite, options)
    assert [gate.gate for gate in again.gates if not gate.reused] == ["price", "canary"] and again.status == "live"
    # Another question is another gate.
    third = run(sqlite, replace(options, callers=(8,), lengths=(64,)))
    # A higher speed is a lower price.
    assert [gate.gate for gate in third.gates if not gate.reused] == ["speed", "price"]
    assert third.status == "live"  # it answered all the while
    statuses = [event.status for event in record_of(sqlite, "tiny_llama").history]
    assert statuses == ["coming soon", "benchmarking", "coming soon", "benchmarking", "staged", "live"]


@pytest.mark.usefixtures("memory_figure")
@pytest.mark.parametrize(
    ("change", "gate", "finding"),
    [
        ({"licence": None}, "licence", "name it with --licence"),
        ({"tasks": ()}, "quality", "1 of|cannot be read|no file|holds no|--data|is missing"),
        ({"tasks": (), "data": None}, "quality", "--data FOLDER for the suite local, or --task NAME"),
        ({"lengths": (4096,)}, "speed", "no length of 4096 fits the model's 512 tokens"),
    ],
)
def test_a_gate_that_is_not_passed_says_why(
    sqlite: Database, options: OnboardingOptions, change: dict[str, object], gate: str, finding: str
) -> None:
    result = run(sqlite, replace(options, **change))  # pyright: ignore[reportArgumentType] - fields by name
    assert result.gates[-1].gate == gate and not result.gates[-1].passed
    import re

    assert re.search(finding, result.gates[-1].finding), result.gates[-1].finding
    assert record_of(sqlite, "tiny_llama").status == result.status == "coming soon"
    with sqlite.read() as connection:
        assert not gate_outcomes(connection, "tiny_llama")[gate].passed
        assert "tiny_llama" in read_catalogue(connection).sources


@pytest.mark.usefixtures("memory_figure")
def test_wrong_weights_do_not_pass(sqlite: Database, options: OnboardingOptions) -> None:
    with sqlite.begin() as connection:
        put_fields(connection, "tiny_llama", {"dimensions": 2048, "pooling": "mean"})
    failed = run(sqlite, options)
    assert failed.gates[-1].gate == "load" and "dimensions 64 instead of 2048" in failed.gates[-1].finding
    assert run(sqlite, replace(options, replace_specification=True)).status == "live"
    record = record_of(sqlite, "tiny_llama")
    assert record.dimensions == 64 and "dimensions 2048 -> 64" in record.changes[-1].note


@pytest.mark.usefixtures("memory_figure")
def test_parity_with_the_vectors_of_the_reference(
    sqlite: Database, options: OnboardingOptions, golden_dir: Path, tmp_path: Path
) -> None:
    """The published package's own vectors, and then the same ones in the wrong order."""
    pairs = json.loads((golden_dir / "tiny_llama" / "golden.json").read_text(encoding="utf-8"))["pairs"]
    vectors = np.load(golden_dir / "tiny_llama" / "golden.npz")["mean__skip_True"]
    texts, instructions = [text for _, text in pairs], [instruction for instruction, _ in pairs]
    right, perturbed = tmp_path / "right.npz", tmp_path / "wrong.npz"
    np.savez(right, texts=texts, instructions=instructions, vectors=vectors)
    np.savez(perturbed, texts=texts, instructions=instructions, vectors=vectors[::-1])
    failed = run(sqlite, replace(options, compat="reference", reference=perturbed))
    assert failed.gates[-1].gate == "parity" and "has cosine" in failed.gates[-1].finding
    passed = run(sqlite, replace(options, compat="reference", reference=right))
    assert passed.status == "live"
    assert next(gate for gate in passed.gates if gate.gate == "parity").finding.endswith("48 given vectors")
    assert record_of(sqlite, "tiny_llama").compat == "reference"


@pytest.mark.usefixtures("memory_figure")
@pytest.mark.parametrize("content", [b"no numpy", None])
def test_a_broken_reference_is_named(
    sqlite: Database, options: OnboardingOptions, tmp_path: Path, content: bytes | None
) -> None:
    file = tmp_path / "reference.npz"
    if content is None:
        np.savez(file, texts=["a"], vectors=np.zeros((1, 3), dtype=np.float32))
    else:
        file.write_bytes(content)
    failed = run(sqlite, replace(options, reference=file))
    assert failed.gates[-1].gate == "parity" and str(file) in failed.gates[-1].finding


@pytest.mark.usefixtures("memory_figure")
def test_live_weights_are_not_exchanged_under_their_name(sqlite: Database, options: OnboardingOptions, copied) -> None:
    assert run(sqlite, options).status == "live"
    other = copied("tiny_llama")
    file = other / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "rope_theta": 5000.0}))
    result = run(sqlite, replace(options, source=str(other)))
    assert result.gates[-1].gate == "digests" and "vectors of the two do not mix" in result.gates[-1].finding
    assert result.status == "live"
    with sqlite.read() as connection:
        assert read_catalogue(connection).sources["tiny_llama"] == options.source
    with pytest.raises(UsageError, match="answers in the mode 'default'"):
        run(sqlite, replace(options, compat="reference"))
    # Once it is retired the name is free: everything is measured anew, and the old canary is let go.
    with sqlite.begin() as connection:
        step(
            connection,
            "tiny_llama",
            "deprecated",
            actor="me",
            until=record_of(sqlite, "tiny_llama").history[-1].on,
        )
        step(connection, "tiny_llama", "retired", actor="me")
    anew = run(sqlite, replace(options, source=str(other)))
    assert anew.status == "live"
    assert [gate.gate for gate in anew.gates if gate.reused] == ["licence"]  # which these weights had passed above


def test_a_reference_is_not_onboarded(sqlite: Database, options: OnboardingOptions) -> None:
    with pytest.raises(UsageError, match="others to be measured against"):
        run(sqlite, replace(options, model="sentence-transformers/all-MiniLM-L6-v2"))


def test_a_folder_that_holds_no_model(sqlite: Database, options: OnboardingOptions, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="is not a model"):
        run(sqlite, replace(options, source=str(tmp_path / "empty")))
    with sqlite.read() as connection:
        assert read_record(connection, "tiny_llama") is None


@pytest.mark.usefixtures("memory_figure")
def test_staged_and_then_live_with_a_price_and_notices(
    sqlite: Database, options: OnboardingOptions, tmp_path: Path
) -> None:
    with sqlite.begin() as connection:
        account = people.open_account(connection, "somebody", 1)
        vote(connection, account, "tiny_llama", "", 1)
    staged = run(sqlite, replace(options, stage=True))
    assert staged.status == "staged" and staged.notified == 0 and record_of(sqlite, "tiny_llama").prices[0].estimated
    with sqlite.begin() as connection:
        assert go_live(connection, "tiny_llama", actor="me") == (1, True)
    record = record_of(sqlite, "tiny_llama")
    assert record.status == "live" and not record.prices[0].estimated
    with sqlite.read() as connection:
        price = tariff.find_price(connection, "tiny_llama", "default")
        assert price == record.prices[0].nanodollars_per_million_tokens
        assert [notice.model for notice in notices_of(connection, account)] == ["tiny_llama"]


def test_nothing_goes_live_past_its_gates(sqlite: Database) -> None:
    with sqlite.begin() as connection:
        put_fields(connection, "org/m", {})
        for status in ("coming soon", "benchmarking", "staged"):
            step(connection, "org/m", status, actor="me")
        add_measurements(connection, [])
    with (
        pytest.raises(UsageError, match="has not passed licence, digests, load"),
        sqlite.begin() as connection,
    ):
        go_live(connection, "org/m", actor="me")
    with pytest.raises(UsageError, match="only a staged model"), sqlite.begin() as connection:
        go_live(connection, PUBLISHED, actor="me")


def passes(database: Database, name: str) -> bool:
    with database.read() as connection:
        outcome = gate_outcomes(connection, PUBLISHED).get(name)
    return outcome is not None and outcome.passed


def onboard_without_end(command: Sequence[str], home: Path) -> None:
    """Run the command in a process of its own, with ten minutes for each point of its speed."""
    os.environ["UNMASK_HOME"] = str(home)
    gates_module.measure_memory = lambda *arguments: None
    sys.argv = ["unmask", *command, "--seconds", "600"]
    main()


def test_one_run_at_a_time_and_killed_in_the_middle_it_continues(
    unmask: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
    golden_dir: Path,
    fresh_home: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The command of the two-step case: a second one beside it, then killed while it measures speed, and again."""
    folder = published_mirror(golden_dir, tmp_path / "mirror")
    command = ["onboard", PUBLISHED, "--weights", str(folder),
               "--replace-specification", "--compat", "reference", "--task", "STSBenchmark",
               "--data", str(small_data(tmp_path / "data")), "--length", "8", "--callers", "1",
               "--cost-per-hour", "0.10"]  # fmt: skip
    first = fork_server().Process(target=onboard_without_end, args=(command, fresh_home), daemon=True)
    first.start()
    until(lambda: (output_for(PUBLISHED) / "quality.json").exists() or not first.is_alive(), 300)
    database = Database(f"sqlite:///{fresh_home / 'accounts' / 'accounts.sqlite'}")
    until(lambda: passes(database, "quality"))
    history = record_of(database, PUBLISHED).history
    again = [*command, "--seconds", "0.05"]
    monkeypatch.setattr(sys, "argv", ["unmask", *again])
    capsys.readouterr()  # the libraries that wrote the mirror print as well
    beside = unmask(*again)
    assert beside.returncode == 1 and beside.stdout == ""
    (line,) = beside.stderr.strip().splitlines()
    assert line.startswith(f"unmask: {PUBLISHED} is being onboarded already, by process {first.pid} since 20")
    assert "UTC: wait for that run, or end it and run the same command again" in line
    assert first.exitcode is None and record_of(database, PUBLISHED).history == history
    first.kill()
    first.join()
    assert record_of(database, PUBLISHED).status == "benchmarking"
    second = unmask(*again)
    assert second.returncode == 0, second.stderr
    rows = [line.split() for line in second.stdout.splitlines()]
    verdicts = {row[0]: row[1] for row in rows if len(row) > 2}
    assert [verdicts[name] for name in NAMES] == ["kept"] * 5 + ["passed"] * 3
    record = record_of(database, PUBLISHED)
    assert record.status == "live" and record.dimensions == 64
    # The command stands on the page, without the folders of this machine.
    with database.read() as connection:
        entry = read_catalogue(connection).catalogue.get(PUBLISHED)
        outcomes = gate_outcomes(connection, PUBLISHED)
    assert entry is not None and str(tmp_path) not in str(entry.measurements) and str(tmp_path) not in str(entry.record)
    ours = [m for m in entry.measurements if m.by == "the operator of this server"]
    assert all(m.command and m.command.startswith(f"unmask onboard {PUBLISHED} --weights LLM2Vec") for m in ours)
    assert outcomes["licence"].finding.startswith("MIT; the licence of its base is not on record; ")
    # What is served later is this: both adapters on the base, in the reference's way.
    by_hand = Encoder.load(
        tmp_path / "mirror" / BASE, adapters=[tmp_path / "mirror" / FIRST_STAGE, folder], compat="reference"
    )
    assert record.canary and cosine(by_hand.encode(record.canary.text)[0], expected_vector(record.canary)) > 0.99999
    database.close()


def test_the_gates_run_in_the_order_that_the_catalogue_names() -> None:
    assert tuple(gate.name for gate in GATES) == GATE_NAMES


def gate(name: str, *needs: str) -> Gate:
    return Gate(name, lambda context: None, lambda context, report_progress: GateResult(""), needs)


def test_gates_are_ordered_by_what_they_need() -> None:
    shuffled = [gate("price", "speed"), gate("canary", "load"), gate("speed", "load"), gate("load")]
    assert [one.name for one in in_order_of_needs(shuffled)] == ["load", "canary", "speed", "price"]
    assert in_order_of_needs(GATES) == list(GATES)


@pytest.mark.parametrize(
    "gates", [[gate("price", "speed")], [gate("a", "b"), gate("b", "a")]], ids=["missing", "cycle"]
)
def test_needs_that_cannot_be_met_are_refused(gates: list[Gate]) -> None:
    with pytest.raises(ValueError, match="cannot be met"):
        in_order_of_needs(gates)
