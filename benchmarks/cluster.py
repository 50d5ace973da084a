"""Bulk encoding on a cluster: what workers add, what this process costs, and what a large job would cost.

    python benchmarks/cluster.py workers [--rounds 3] [--seconds 25 | --texts 2048] [--model NAME]
    python benchmarks/cluster.py scheduling [--most 8] [--unit-seconds 1] [--units 12]
    python benchmarks/cluster.py driver [--units 5000] [--unit-texts 8] [--words 12]
    python benchmarks/cluster.py estimate [--texts 1e9] [--gpus 64] [--price-per-gpu-hour 3.00] ...

`workers` encodes the same texts by one process and by two workers in turn, each time in a new process, and compares
tokens per second: of the computing alone, from the time when all workers have loaded the model, and of the whole
command. A short try chooses how many texts keep one process computing for --seconds; three rounds then take about five
minutes. It needs a machine that does nothing else. In `scheduling` and `driver` the model sleeps for tokens / rate in
place of its forward, so that workers need hardly a processor: `scheduling` divides the tokens per second of 1, 2, 4 ...
workers by what they sleep for, `driver` shows the processor time and the memory that a unit costs the process that
hands units out. `estimate` measures nothing. It computes hours, dollars and failures of a job from assumptions, which
are its options.

Each part starts a Ray cluster on this machine or takes a running one, and prints a table.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from unmask.bulk.chunks import CHUNK_CHARACTERS, CHUNK_ROWS, Chunk
from unmask.bulk.encode_job import EncodeJob
from unmask.bulk.executor import Executor, local_executor
from unmask.bulk.job import run
from unmask.bulk.report import EncodeProgress
from unmask.bulk.storage import Store
from unmask.bulk.units import JOB_FILE, UNIT_CHUNKS, Unit
from unmask.cluster.bulk import ClusterExecutor, cluster_executor
from unmask.cluster.connection import connected
from unmask.cluster.options import ClusterOptions
from unmask.encoder.encoder import Encoder
from unmask.encoder.precision_choices import processor_name
from unmask.encoder.prompts import Prompt

_TINY = Path(__file__).parent.parent / "tests" / "golden" / "tiny_llama"
# Seconds between two looks at workers that load, and of the try that chooses the number of texts.
_WAIT_S, _TRY_S = 0.1, 2.0
_LEAST_CHUNKS = 8
_WORDS = ("the", "river", "bends", "where", "old", "stones", "hold", "water", "and", "boats", "wait", "for", "wind")


@dataclass(frozen=True, kw_only=True)
class JobAssumptions:
    """Assumptions of an estimate. Each is an option of `estimate`.

    Attributes:
        texts: number of texts.
        tokens_per_text: tokens of a text.
        characters_per_token: characters of a token.
        gpus: number of GPUs, each with a worker.
        parameters: of the model; two operations each for a token.
        gpu_tflops: peak of a GPU in bfloat16 without sparsity, 1e12 operations/s. 989 is an H100.
        utilisation: part of the peak that is reached. Not measured: unmask has not been run on a GPU.
        price_per_gpu_hour: dollars. H100s were offered for 2 to 5 dollars in May 2026.
        gpu_hours_per_failure: 419 interruptions in 54 days of 16,384 GPUs are one in 50,700 hours (Llama 3, 2024).
        preemptions_per_gpu_hour: of machines that may be taken back; 0 for others.
        minutes_per_loss: until a machine that is lost is replaced, its model loaded.
        driver_texts_per_s: texts/s that the process reads, cuts and hands out; see `driver`.
        start_minutes: until all workers have loaded the model.
        dimensions: numbers of a vector, 4 bytes each.
    """

    texts: float = 1e9
    tokens_per_text: float = 128.0
    characters_per_token: float = 4.0
    gpus: float = 64.0
    parameters: float = 134.5e6
    gpu_tflops: float = 989.0
    utilisation: float = 0.25
    price_per_gpu_hour: float = 3.00
    gpu_hours_per_failure: float = 50_700.0
    preemptions_per_gpu_hour: float = 0.0
    minutes_per_loss: float = 10.0
    driver_texts_per_s: float = 100_000.0
    start_minutes: float = 5.0
    dimensions: float = 576.0


@dataclass(frozen=True)
class JobEstimate:
    """Outcome of an estimate.

    Attributes:
        tokens_per_s: of one GPU.
        gpu_hours: wall time that the GPUs alone would need, without start and losses.
        driver_hours: wall time that the process that hands out units needs.
        hours: wall time of the job.
        dollars: for all GPUs, from start to end.
        losses: GPUs that fail or are taken back.
        redone: units that are computed again, two for each loss.
        units: of the job.
        terabytes: of the vectors.
    """

    tokens_per_s: float
    gpu_hours: float
    driver_hours: float
    hours: float
    dollars: float
    losses: float
    redone: float
    units: float
    terabytes: float


def estimate_job(job: JobAssumptions) -> JobEstimate:
    """Compute what a job takes. The slower of GPUs and driver decides; what is lost is computed again."""
    tokens_per_s = job.gpu_tflops * 1e12 * job.utilisation / (2 * job.parameters)
    gpu_hours = job.texts * job.tokens_per_text / (tokens_per_s * job.gpus) / 3600
    driver_hours = job.texts / job.driver_texts_per_s / 3600
    losses_per_gpu_hour = 1 / job.gpu_hours_per_failure + job.preemptions_per_gpu_hour
    # A loss costs one GPU its replacement, and its two units.
    characters = job.tokens_per_text * job.characters_per_token
    texts_per_unit = UNIT_CHUNKS * min(CHUNK_ROWS, CHUNK_CHARACTERS / characters)
    unit_hours = texts_per_unit * job.tokens_per_text / tokens_per_s / 3600
    lost_share = losses_per_gpu_hour * (job.minutes_per_loss / 60 + 2 * unit_hours)
    if lost_share >= 1:
        raise SystemExit("machines are lost faster than they are replaced; the job would not end")
    hours = job.start_minutes / 60 + max(gpu_hours / (1 - lost_share), driver_hours)
    losses = losses_per_gpu_hour * hours * job.gpus
    return JobEstimate(
        tokens_per_s=tokens_per_s,
        gpu_hours=gpu_hours,
        driver_hours=driver_hours,
        hours=hours,
        dollars=hours * job.gpus * job.price_per_gpu_hour,
        losses=losses,
        redone=2 * losses,
        units=job.texts / texts_per_unit,
        terabytes=job.texts * job.dimensions * 4 / 1e12,
    )


def sleeping(tokens_per_s: float) -> Encoder:
    """Return an encoder that sleeps in place of its forward. It is called in the worker."""
    encoder = Encoder.load(_TINY)
    dim = encoder.dim

    def encode_prompts(prompts: list[Prompt]) -> np.ndarray:
        time.sleep(sum(len(prompt.ids) for prompt in prompts) / tokens_per_s)
        return np.zeros((len(prompts), dim), np.float32)

    encoder.encode_prompts = encode_prompts  # pyright: ignore[reportAttributeAccessIssue]
    return encoder


def texts_of(count: int, words: int = 12) -> list[str]:
    """Return texts of so many words, the same each time."""
    draw = random.Random(0)
    return [" ".join(draw.choices(_WORDS, k=words)) for _ in range(count)]


@dataclass(frozen=True)
class TimedRun:
    """One encoding of the texts, in a process of its own.

    Attributes:
        tokens: tokens of all texts.
        start_s: from the start of the process until all workers have loaded the model.
        computing_s: from then until the last vectors are there.
        whole_s: from the start of the process to its end.
    """

    tokens: int
    start_s: float
    computing_s: float
    whole_s: float

    def speeds(self) -> tuple[float, float]:
        """Return the tokens per second of the computing alone, and of the whole command."""
        return self.tokens / self.computing_s, self.tokens / self.whole_s


def compare_workers(rounds: int, count: int | None, seconds: float, model: str) -> None:
    """Encode by one process and by two workers in turn."""
    count = count or _texts_for(seconds, model)
    # A file is cut into chunks of its own. Eight or more equal ones, four per worker, end at about the same time.
    rows = min(CHUNK_ROWS, -(-count // _LEAST_CHUNKS))
    files = 2 * max(_LEAST_CHUNKS // 2, round(count / rows / 2))
    texts = texts_of(files * rows)
    _say(f"{files} files of {rows} texts\n")
    runs: dict[str, list[TimedRun]] = {"one process": [], "two workers": []}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "texts"
        source.mkdir()
        for i in range(files):
            lines = (f"{text}\n" for text in texts[i * rows : (i + 1) * rows])
            (source / f"{i:04d}.txt").write_text("".join(lines))
        for number in range(1, rounds + 1):
            for workers, (name, done) in enumerate(runs.items()):
                _say(f"round {number} of {rounds}, {name}: ", end="")
                done.append(_timed_run(source, f"{folder}/{number}-{name}.npy", 2 * workers, model))
                alone, whole = done[-1].speeds()
                times = f"start {done[-1].start_s:.1f} s, computing {done[-1].computing_s:.1f} s"
                _say(f"{times} ({alone:,.0f} tokens/s), whole {done[-1].whole_s:.1f} s ({whole:,.0f} tokens/s)")
            contents = {file.read_bytes() for file in Path(folder).glob(f"{number}-*.npy")}
            assert len(contents) == 1, "the outputs differ"
    _say("")
    print_workers(runs)


def print_workers(runs: dict[str, list[TimedRun]]) -> None:
    """Print the speeds of one process and of workers, and the quotient of the best and of each round."""
    rows, best = [], {}
    for part, title in enumerate(("computing alone", "whole command")):
        for name, done in runs.items():
            speeds = [run.speeds()[part] for run in done]
            best[title, name] = max(speeds)
            rows.append((title, name, f"{max(speeds):,.0f}", ", ".join(f"{speed:,.0f}" for speed in speeds)))
    print_rows(("", "", "tokens/s, best", "all rounds"), rows)
    first, second = runs
    for part, title in enumerate(("computing alone", "whole command")):
        pairs = [b.speeds()[part] / a.speeds()[part] for a, b in zip(runs[first], runs[second], strict=True)]
        quotient = best[title, second] / best[title, first]
        _say(f"{second} / {first}, {title}: {quotient:.2f}; round by round {', '.join(f'{q:.2f}' for q in pairs)}")


def _texts_for(seconds: float, model: str) -> int:
    """Return about how many texts one process encodes in so many seconds."""
    _say("speed of one process, a short try: ", end="")
    encoder = Encoder.load(model, dtype="float32")
    texts, done = texts_of(64), 0
    encoder.encode(texts)
    began = time.monotonic()
    while time.monotonic() < began + _TRY_S:
        encoder.encode(texts)
        done += len(texts)
    per_second = done / (time.monotonic() - began)
    _say(
        f"{per_second:,.0f} texts/s, so {round(seconds * per_second):,} texts for {seconds:g} s of computing: ", end=""
    )
    return round(seconds * per_second)


def _timed_run(source: Path, output: str, workers: int, model: str) -> TimedRun:
    """Encode in a new process, as `encode_once`."""
    command = [sys.executable, __file__, "once", str(source), output, "--workers", str(workers), "--model", model]
    began = time.monotonic()
    report = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    whole = time.monotonic() - began
    ready, last, tokens = json.loads(report.splitlines()[-1])
    return TimedRun(tokens, ready - began, last - ready, whole)


def encode_once(source: str, output: str, workers: int, model: str) -> None:
    """Encode a file by this process, or by workers once all of them are ready. Print when it began and ended."""
    ready, last, tokens = 0.0, 0.0, 0

    @contextmanager
    def executor(job: EncodeJob, load_encoder: Callable[[], Encoder]) -> Iterator[Executor]:
        nonlocal ready
        own = partial(cluster_executor, ClusterOptions(cluster="local", workers=str(workers or 1)))
        with (own if workers else local_executor)(job, load_encoder) as opened:
            if isinstance(opened, ClusterExecutor):
                for _ in opened.pool.outcomes(pieces(opened), "encode_chunk"):
                    pass
            ready = time.monotonic()
            yield opened

    def pieces(opened: ClusterExecutor) -> Iterator[Chunk]:
        """Yield pieces of one text while workers load: the pool looks for new workers only while it works."""
        number = 0
        while opened.activity.workers < workers:
            time.sleep(_WAIT_S)
            texts = texts_of(1)
            yield Chunk(0, "warm-up", number, texts, True, len(texts[0]))
            number += 1

    def watch(state: EncodeProgress) -> None:
        nonlocal last, tokens
        last, tokens = time.monotonic(), state.tokens

    run(EncodeJob((source,), output), partial(Encoder.load, model, dtype="float32"), watch, executor)
    print(json.dumps([ready, last, tokens]))


def _say(text: str, end: str = "\n") -> None:
    """Print at once: whoever waits wants to see how far it is."""
    print(text, end=end, flush=True)


def measure_scheduling(most: int, unit_seconds: float, units: int) -> None:
    """Compare the speed of 1, 2, 4 ... workers with what they sleep for."""
    unit_texts = texts_of(64)
    encoder = Encoder.load(_TINY)
    tokens = int(encoder.count_tokens(unit_texts).sum())
    rate = tokens / unit_seconds
    rows = []
    sizes = [size for size in (1, 2, 4, 8, 16, 32) if size <= most]
    for size in sizes:
        seconds = _timed_units(size, units * size, unit_texts, partial(sleeping, rate))
        speed = units * size * tokens / seconds
        rows.append((size, f"{speed:,.0f}", f"{size * rate:,.0f}", f"{speed / (size * rate):.3f}"))
    print_rows(("workers", "tokens/s", "as they sleep", "share"), rows)


def _timed_units(size: int, count: int, texts: list[str], load: Callable[[], Encoder]) -> float:
    """Return the seconds that workers take for units, from the time when all of them are there."""
    began = 0.0
    with tempfile.TemporaryDirectory() as folder:
        job = EncodeJob((folder,), f"{folder}/out/")
        Store(job.output).put(JOB_FILE, b"{}")
        options = ClusterOptions(cluster="auto", workers=str(size), worker_cpus=0)
        with cluster_executor(options, job, load) as executor:

            def units() -> Iterator[Unit]:
                nonlocal began
                number = 0
                # Units of one text keep the pool going while workers load, and let them import what they need.
                more = 6 * size
                while executor.activity.workers < size or more > 0:
                    more -= executor.activity.workers == size
                    yield Unit(number, [Chunk(1, "warm-up", number, texts[:1], True, len(texts[0]))])
                    number += 1
                began = time.monotonic()
                for i in range(count):
                    yield Unit(i, [Chunk(0, "texts", i * len(texts), texts, True, sum(map(len, texts)))])

            for outcome in executor.encode_units(units()):
                assert not hasattr(outcome, "error"), outcome
            return time.monotonic() - began


def measure_driver(units: int, unit_texts: int, words: int) -> None:
    """Show what units cost the process that hands them out, and its memory as they pass."""
    process = psutil.Process()
    states: list[tuple[int, float, int]] = []  # rows, processor time, bytes

    def watch(state: EncodeProgress) -> None:
        if state.rows // unit_texts >= len(states) * max(units // 10, 1):
            states.append((state.rows, time.process_time(), process.memory_info().rss))

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "in"
        source.mkdir()
        content = "".join(f"{text}\n" for text in texts_of(unit_texts, words))
        for number in range(units):
            (source / f"{number:06d}.txt").write_text(content)
        job = EncodeJob((str(source),), f"{folder}/out/")
        options = ClusterOptions(cluster="auto", workers="2", worker_cpus=0)
        began = time.monotonic()
        report = run(job, partial(sleeping, 1e9), watch, partial(cluster_executor, options))
    first, last = states[0], states[-1]
    per_unit = (last[1] - first[1]) / (last[0] - first[0]) * unit_texts
    seconds = time.monotonic() - began
    megabytes = [rss / 1e6 for _, _, rss in states]
    print_rows(
        ("", ""),
        [
            ("units of texts", f"{units:,} of {unit_texts:,} of {words} words"),
            ("processor time per unit", f"{per_unit * 1000:.1f} ms"),
            ("texts per second of processor time", f"{unit_texts / per_unit:,.0f}"),
            ("wall time with the start of Ray", f"{seconds:.0f} s for {report.rows:,} texts"),
            ("memory, every tenth", ", ".join(f"{value:.0f}" for value in megabytes) + " MB"),
            ("memory, last minus second", f"{megabytes[-1] - megabytes[1]:+.0f} MB"),
        ],
    )


def print_estimate(job: JobAssumptions) -> None:
    """Print assumptions and outcome."""
    outcome = estimate_job(job)
    print_rows(("assumed", ""), [(field.name, f"{getattr(job, field.name):,g}") for field in fields(job)])
    print()
    print_rows(("estimated", ""), [(field.name, f"{getattr(outcome, field.name):,.3g}") for field in fields(outcome)])


def print_rows(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table in Markdown."""
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    workers = parts.add_parser("workers")
    workers.add_argument("--rounds", type=int, default=3)
    workers.add_argument("--texts", type=int, help="about so many, in place of --seconds")
    workers.add_argument("--seconds", type=float, default=25.0, help="of computing by one process, about")
    workers.add_argument("--model", default="unmask/smollm2-135m-embed")
    once = parts.add_parser("once", help="one run of `workers`")
    once.add_argument("source")
    once.add_argument("output")
    once.add_argument("--workers", type=int, required=True)
    once.add_argument("--model", required=True)
    scheduling = parts.add_parser("scheduling")
    scheduling.add_argument("--most", type=int, default=8)
    scheduling.add_argument("--unit-seconds", type=float, default=1.0)
    scheduling.add_argument("--units", type=int, default=12, help="for each worker")
    driver = parts.add_parser("driver")
    driver.add_argument("--units", type=int, default=5000)
    driver.add_argument("--unit-texts", type=int, default=8)
    driver.add_argument("--words", type=int, default=12)
    for part in (scheduling, driver):
        part.add_argument("--cluster", default="local", help="HOST:PORT of a running one, where the machine is busy")
    estimate = parts.add_parser("estimate")
    for field in fields(JobAssumptions):
        estimate.add_argument(f"--{field.name.replace('_', '-')}", type=float, default=field.default)
    chosen = parser.parse_args()
    if chosen.part == "estimate":
        print_estimate(JobAssumptions(**{field.name: getattr(chosen, field.name) for field in fields(JobAssumptions)}))
        return
    if chosen.part == "once":
        encode_once(chosen.source, chosen.output, chosen.workers, chosen.model)
        return
    _say(f"{processor_name()}, load {os.getloadavg()[0]:.1f}\n")
    if chosen.part == "workers":
        compare_workers(chosen.rounds, chosen.texts, chosen.seconds, chosen.model)
    else:
        with connected(chosen.cluster):
            if chosen.part == "scheduling":
                measure_scheduling(chosen.most, chosen.unit_seconds, chosen.units)
            else:
                measure_driver(chosen.units, chosen.unit_texts, chosen.words)


if __name__ == "__main__":
    main()
