"""Three raylets: bulk encoding gives the bytes of one process, whoever is killed; one sentence for what cannot be."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.api.live import until
from tests.bulk.s3 import FaultyProxy, s3_server, url
from tests.cluster import loaders
from tests.cluster.raylets import Raylets, raylets
from tests.training.tiny import distance, recipe_of, write_pairs
from unmask.bulk import chunks as chunks_module
from unmask.bulk import storage
from unmask.bulk.encode_job import EncodeJob
from unmask.bulk.job import run
from unmask.bulk.parts import read_manifests, read_status
from unmask.bulk.report import EncodeProgress, EncodeReport
from unmask.bulk.storage import Store
from unmask.bulk.units import UNITS_FOLDER
from unmask.cli import main
from unmask.cluster import pool
from unmask.cluster.bulk import cluster_executor
from unmask.cluster.check import check_cluster
from unmask.cluster.connection import connected, import_ray, resources
from unmask.cluster.options import ClusterOptions
from unmask.cluster.training import train_on_cluster
from unmask.encoder.encoder import Encoder
from unmask.errors import ClusterError, EmptyText
from unmask.training.run_folder import RunFolder
from unmask.training.train import run_training

ROOT = Path(__file__).parent.parent.parent
FILES = 9
CAPTURED: dict[str, Any] = {"capture_output": True, "text": True, "cwd": ROOT, "check": False}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Raylets]:
    """A head and two nodes of one processor, to which this process is connected."""
    with raylets() as started:
        started.add()
        started.add()
        with connected(started.address):
            yield started


@pytest.fixture
def job(tmp_path: Path) -> EncodeJob:
    """A job of nine files, so that it has nine units."""
    (tmp_path / "in").mkdir()
    for number in range(FILES):
        texts = [f"{number}, {i}: " + "the river, übersetzt " * (i % 5) for i in range(11 + number)]
        (tmp_path / "in" / f"{number}.txt").write_text("".join(text + "\n" for text in texts))
    return EncodeJob((str(tmp_path / "in"),), f"{tmp_path}/out/")


@pytest.fixture
def model(golden_dir: Path) -> Path:
    return golden_dir / "tiny_llama"


def on_cluster(
    job: EncodeJob,
    cluster: Raylets,
    load: Callable[[], Encoder],
    progress: Callable[[EncodeProgress], None] | None = None,
    **options: Any,
) -> EncodeReport:
    """Encode a job by two workers."""
    chosen = ClusterOptions(cluster=cluster.address, **{"workers": "2", "worker_wait": 590.0, **options})
    return run(job, load, progress, partial(cluster_executor, chosen))


def in_one_process(job: EncodeJob, model: Path, folder: str) -> Path:
    """Encode a job here, to another folder."""
    whole = replace(job, output=str(Path(job.output).with_name(folder)) + "/")
    run(whole, lambda: Encoder.load(model))
    return Path(whole.output)


@pytest.mark.parametrize("ending", ["npy", "jsonl", "parquet"])
def test_one_process_and_two_workers_write_the_same_file(
    cluster: Raylets, job: EncodeJob, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    monkeypatch.setattr(chunks_module, "CHUNK_ROWS", 4)  # 36 chunks: some overtake others
    states: list[EncodeProgress] = []
    here, there = (replace(job, output=f"{tmp_path}/{name}.{ending}") for name in ("here", "there"))
    assert run(here, lambda: Encoder.load(model)).rows == 135
    report = on_cluster(there, cluster, partial(Encoder.load, model), states.append)
    assert (report.rows, report.redone) == (135, 0)
    assert Path(there.output).read_bytes() == Path(here.output).read_bytes()
    assert [state.rows for state in states] == sorted(state.rows for state in states)
    assert {state.activity.workers for state in states} <= {1, 2}


def test_workers_killed_at_each_commit_change_nothing(
    cluster: Raylets, job: EncodeJob, model: Path, tmp_path: Path
) -> None:
    whole = in_one_process(job, model, "whole")
    (tmp_path / "deaths").mkdir()
    deaths = {
        "00001-00000000": "before the part",
        "00003-00000000": "after the part",
        "00005-00000000": "after the manifest",
    }
    report = on_cluster(job, cluster, partial(loaders.dying_at, model, deaths, tmp_path / "deaths"))
    assert sorted(file.name for file in (tmp_path / "deaths").iterdir()) == sorted(deaths)
    assert report.rows == 135 and report.redone >= 3 and report.worker_seconds > 0
    assert loaders.digests(Path(job.output)) == loaders.digests(whole)
    assert read_status(job.output).sha256 == read_status(str(whole)).sha256


def test_a_unit_that_kills_its_workers_is_named_and_all_others_are_done(
    cluster: Raylets, job: EncodeJob, model: Path
) -> None:
    file = Path(job.inputs[0]) / "4.txt"
    file.write_text(file.read_text() + "poison\n")
    (Path(job.inputs[0]) / "7.txt").write_text("a\n\nb\n")  # an empty text fails its unit too
    with pytest.raises(ClusterError, match=r"4\.txt: the piece of rows 1 to 16 killed its worker .* 2 of 9 units fail"):
        on_cluster(job, cluster, partial(loaders.dying_of, model, "poison"))
    assert sorted(read_manifests(Store(job.output))) == [f"0000{i}-00000000" for i in range(FILES) if i not in (4, 7)]
    with pytest.raises(EmptyText, match=r"7\.txt: row 2 \(index 1\) is empty.* All other units are done"):
        run(job, lambda: Encoder.load(model))  # goes on without the cluster
    assert read_status(job.output).units == FILES - 1


def driver_of(job: EncodeJob, model: Path, cluster: Raylets, *moments: str) -> list[str]:
    """Return the command of a process that encodes a job, see `loaders.drive`."""
    script = [sys.executable, "-m", "tests.cluster.loaders"]
    return [*script, job.inputs[0], job.output, str(model), cluster.address, *moments]


def workers_of(job: EncodeJob) -> list[int]:
    """Return the process ids of the workers that finished the units, the last one last."""
    files = [Path(job.output) / name for name in Store(job.output).names(UNITS_FOLDER)]
    files.sort(key=lambda file: file.stat().st_mtime_ns)
    return [int(json.loads(file.read_text())["worker"].rpartition(":")[2]) for file in files]


def test_a_driver_killed_at_each_moment_changes_nothing(cluster: Raylets, job: EncodeJob, model: Path) -> None:
    whole = in_one_process(job, model, "whole")
    moments = ("after the job", "while encoding", "before the end")
    killed = subprocess.run(driver_of(job, model, cluster, *moments), **CAPTURED)
    assert killed.stdout.splitlines() == [f"{moment} -9" for moment in moments], killed.stderr
    assert len(read_manifests(Store(job.output))) == FILES
    assert read_status(job.output).state == "unfinished"
    assert run(job, lambda: Encoder.load(model)).resumed_at == 135
    assert read_status(job.output).sha256 == read_status(str(whole)).sha256
    assert loaders.digests(Path(job.output)) == loaders.digests(whole)


def test_a_killed_machine_changes_nothing(cluster: Raylets, job: EncodeJob, model: Path) -> None:
    whole = in_one_process(job, model, "whole")
    machines: list[int] = []

    def kill_once(state: EncodeProgress) -> None:
        if state.tokens and not machines:
            machines.append(workers_of(job)[-1])
            cluster.kill_machine_of(machines[0])
            cluster.add()

    report = on_cluster(job, cluster, partial(loaders.slow, model, 0.5), kill_once)
    assert report.redone >= 1
    assert loaders.digests(Path(job.output)) == loaders.digests(whole)


def test_a_frozen_machine_does_not_hold_up_the_job(
    cluster: Raylets, job: EncodeJob, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray would notice it after a minute; here it is told to take longer."""
    monkeypatch.setattr(pool, "_LATE_S", 2.0)
    whole = in_one_process(job, model, "whole")
    with ExitStack() as stack:
        frozen: list[int] = []

        def freeze_once(state: EncodeProgress) -> None:
            if not frozen and len(set(workers_of(job))) == 2:  # both are at work
                frozen.append(workers_of(job)[-1])
                stack.enter_context(cluster.frozen_machine_of(frozen[0]))

        (tmp_path / "loaded").mkdir()
        report = on_cluster(job, cluster, partial(loaders.slow_together, model, 0.3, tmp_path / "loaded"), freeze_once)
        assert psutil.Process(frozen[0]).status() == psutil.STATUS_STOPPED
    assert report.redone >= 1
    assert loaders.digests(Path(job.output)) == loaders.digests(whole)


def test_a_single_worker_that_freezes_in_its_first_unit_is_replaced(
    cluster: Raylets, job: EncodeJob, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No unit is done by then, so the speed of its start decides; Ray would wait for ever."""
    monkeypatch.setattr(pool, "_FIRST_LATE_S", 1.0)
    monkeypatch.setattr(pool, "_LATE_GROWTH", 1.0)
    whole, stops = in_one_process(job, model, "whole"), tmp_path / "stops"
    stops.mkdir()
    deaths = {"00000-00000000": "before the part"}
    report = on_cluster(job, cluster, partial(loaders.dying_at, model, deaths, stops, signal.SIGSTOP), workers="1")
    assert report.redone >= 1 and [file.name for file in stops.iterdir()] == list(deaths)
    assert loaders.digests(Path(job.output)) == loaders.digests(whole)


def test_an_object_store_that_refuses_and_cuts_connections_gets_the_same_objects(
    cluster: Raylets, job: EncodeJob, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    whole, bucket = in_one_process(job, model, "whole"), tmp_path / "s3" / "bucket"
    bucket.mkdir(parents=True)
    with s3_server(bucket.parent) as port, closing(FaultyProxy(port, cut_after=1000, end_after=8000)) as proxy:
        monkeypatch.setattr(storage, "_PAUSES", (0.0,) * 4)
        there = replace(job, output=url(proxy.port, "bucket/out"))
        report = on_cluster(there, cluster, partial(loaders.of_a_store, model))
        assert report.rows == 135 and proxy.refused > 0 and proxy.cut > 0
        assert read_status(url(port, "bucket/out")).sha256 == read_status(str(whole)).sha256
    assert loaders.digests(bucket / "out") == loaders.digests(whole)


def test_resources_are_those_of_all_machines(cluster: Raylets) -> None:
    with connected(cluster.address) as ray:
        assert resources(ray).total == ray.cluster_resources()
        assert resources(ray).total["CPU"] > 1
        until(lambda: resources(ray).free == ray.available_resources())


def test_a_full_cluster_and_other_versions_are_one_sentence(cluster: Raylets, job: EncodeJob, model: Path) -> None:
    with pytest.raises(ClusterError, match=r"worker \S+ has torch 0\.1, and this process \d.*; install the same"):
        on_cluster(job, cluster, partial(loaders.of_another_version, model), workers="1")
    with pytest.raises(ClusterError, match=r"no worker of 3 CPUs and 0 GPUs in 2 s: it has [0-9.]+ of \d CPUs free"):
        on_cluster(job, cluster, partial(Encoder.load, model), worker_cpus=3.0, worker_wait=2.0)


def test_the_command_line(cluster: Raylets, job: EncodeJob, model: Path) -> None:
    command = [sys.executable, "-m", "unmask", "encode", job.inputs[0], "-o", job.output, "--model", str(model)]
    options = ["--cluster", "auto", "--workers", "1:2", "--progress", "json"]
    environment = {**os.environ, "RAY_ADDRESS": cluster.address}
    refusal = subprocess.run([*command, *options], env={**environment, "RAY_AUTH_TOKEN": "f" * 64}, **CAPTURED)
    assert refusal.returncode == 1
    assert "refuses this process's token; set RAY_AUTH_TOKEN" in refusal.stderr
    done = subprocess.run([*command, *options], env=environment, **CAPTURED)
    assert done.returncode == 0, done.stderr
    *lines, summary = done.stderr.splitlines()
    states = [json.loads(line) for line in lines]
    assert (states[-1]["rows"], states[-1]["total"], states[-1]["redone"]) == (135, 135, 0)
    assert states[-1]["workers"] in (1, 2) and states[-1]["tokens_per_second"] > 0
    assert summary.startswith("135 texts, ")


def test_every_machine_is_checked_and_faults_have_advice(
    cluster: Raylets, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["cluster", "check", cluster.address, "--model", str(model), "--storage", str(tmp_path), "--json"])
    rows = json.loads(capsys.readouterr().out)
    checks = ["versions", "processor", "token", "probe", "from here", "storage, reading", "storage, writing"]
    assert [row["check"] for row in rows] == checks * 2
    values = {check: [row["value"] for row in rows if row["check"] == check] for check in checks}
    assert values["token"] == ["required"] * 2 and len(set(values["probe"])) == len(set(values["versions"])) == 1
    faults = [row for row in rows if row["advice"]]
    assert all(row["value"].endswith(" MB/s") and row["advice"].startswith("slow") for row in faults)
    assert ended.value.code == (1 if faults else 0)
    assert not list(tmp_path.iterdir())
    rows = check_cluster(cluster.address, partial(loaders.of_another_version, tmp_path / "none"), None, 300.0)
    assert [(row.check, row.value) for row in rows if row.check == "model"] == [("model", "cannot be loaded")] * 2


def test_two_training_processes_are_as_one_and_go_on_when_one_is_killed(cluster: Raylets, tmp_path: Path) -> None:
    recipe = recipe_of(steps=20, optimiser={"lr": 1e-2, "epsilon": 1e-4}, checkpoint_every=1)
    data, one, two = write_pairs(tmp_path), tmp_path / "one", tmp_path / "two"
    lines: list[str] = []

    def kill_one() -> None:
        while not (two / "checkpoints" / "step-00000001").exists():
            time.sleep(0.01)
        os.kill(cluster.worker_ids("TrainingWorker")[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    options = ClusterOptions(cluster=cluster.address, workers="2")
    outcome = train_on_cluster(options, recipe, data=data, output=two, log=lines.append)
    assert outcome.folder == two / "adapter"
    assert any(re.match("a process was lost .*; the run continues at its last checkpoint", line) for line in lines)
    run_training(recipe, data=data, output=one)
    states = [RunFolder(run, 1).latest() for run in (two, one)]
    assert states[0] is not None and states[1] is not None
    assert distance(states[0][1]["parameters"], states[1][1]["parameters"]) < 1e-4
    assert [line["step"] for line in RunFolder(two, 1).metrics()] == list(range(1, 21))


def test_a_killed_head_is_one_sentence_and_the_rest_is_done_without_it(
    cluster: Raylets, job: EncodeJob, model: Path
) -> None:
    """It is the last of this file, for it ends the cluster."""
    whole = in_one_process(job, model, "whole")
    import_ray().shutdown()
    with subprocess.Popen(driver_of(job, model, cluster), stderr=subprocess.PIPE, text=True, cwd=ROOT) as driver:
        while not Store(job.output).names(UNITS_FOLDER) and driver.poll() is None:
            time.sleep(0.05)
        cluster.kill_head()
        _, said = driver.communicate()
    assert driver.returncode == 1
    assert re.fullmatch(r"unmask: the cluster's head has not answered for \d+ s; what is done is kept: run .*\n", said)
    assert read_status(job.output).state == "unfinished"
    assert run(job, lambda: Encoder.load(model)).resumed_at > 0
    assert loaders.digests(Path(job.output)) == loaders.digests(whole)
