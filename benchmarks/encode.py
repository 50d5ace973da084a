"""Texts to vectors on this machine: unmask against the peers that install from a package registry.

Same weights, same texts, same threads; each backend in a process of its own, and interleaved: each round times every
backend once and begins with another one, so that a noisy machine slows all of them alike. A backend that can be run in
two ways is measured in the quicker one. Reported are medians over rounds and the ratios of single rounds. Vectors are
compared with those of transformers in float32 without the causal mask, so that nobody wins by being wrong.

    make bench
    make bench ARGS="--shape 1.3b"
    make bench ARGS="--model path/to/model --texts 128 --rounds 7"
    make bench ARGS="--backends unmask transformers --dtype bfloat16"
    make bench ARGS="--device cuda --mix short"

writes encode-SHAPE.json (with -MIX, -DEVICE and -DTYPE where they are not natural, cpu and its default), .md, .svg and
.png to --output.
`--publish` puts them into pages and measures nothing.
"""

import argparse
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from backends import BACKENDS, BATCHES, GPU_BACKENDS, GPU_BATCHES, Backend, Setting
from backends.models import MIXES, SHEARED_LLAMA, gflop_per_token, texts_of, token_counts, write_random, write_real
from backends.process import Absent, Process, keep_to
from backends.report import Report, Row, is_wrong, publish, write
from rich.console import Console
from rich.table import Table
from turns import turns

from unmask import __version__
from unmask.errors import UnmaskError

REFERENCE = "transformers"
EVERYONE = tuple(name for name in BACKENDS if name != "llama-cpp-f16")
# Defaults for each shape: as many texts as a run of a few minutes allows. The weights of all backends are in memory
# together, 5 GB each for the large shape, so the large shape has only three backends.
SHAPES: dict[str, dict[str, Any]] = {
    "135m": {"texts": 64, "rounds": 3, "backends": EVERYONE},
    "1.3b": {"texts": 16, "rounds": 3, "backends": ("unmask", "unmask-int8", REFERENCE)},
}
# Rows, inner numbers and columns of the products whose speed is the peak: two of the default model, and a large one.
PRODUCTS = ((2048, 576, 1536), (2048, 1536, 576), (2048, 2048, 2048))
ON_A_GPU: dict[str, Any] = {"texts": 8192, "rounds": 5, "backends": GPU_BACKENDS, "dtype": "bfloat16"}


def gemm_peak(dtype: torch.dtype, device: str) -> dict[str, float]:
    """Return the speed of the best GEMM of the installed libraries in a precision, in GFLOP/s."""
    best: dict[str, float] = {}
    if device != "cpu":
        a, b = (torch.randn(8192, 8192, device=device).to(dtype) for _ in range(2))
        seconds = []
        for _ in range(12):
            torch.accelerator.synchronize()
            began = time.perf_counter()
            torch.mm(a, b)
            torch.accelerator.synchronize()
            seconds.append(time.perf_counter() - began)
        return {"torch": 2 * 8192**3 / min(seconds) / 1e9}
    for rows, inner, columns in PRODUCTS:
        a, b = torch.randn(rows, inner).to(dtype), torch.randn(inner, columns).to(dtype)
        out = torch.empty(rows, columns, dtype=dtype)
        products: dict[str, Callable[[], object]] = {"torch": partial(torch.mm, a, b, out=out)}
        if dtype == torch.float32:
            products["numpy"] = partial(np.dot, a.numpy(), b.numpy(), out=out.numpy())
        if torch.backends.mkldnn.is_available():
            packed = torch.ops.mkldnn._reorder_linear_weight(b.T.contiguous(), rows)
            products["oneDNN"] = partial(torch.ops.mkldnn._linear_pointwise, a, packed, None, "none", [], "")
        for name, product in products.items():
            seconds = []
            for _ in range(12):
                began = time.perf_counter()
                product()
                seconds.append(time.perf_counter() - began)
            best[name] = max(best.get(name, 0.0), 2 * rows * inner * columns / min(seconds) / 1e9)
    return best


def quickest(
    backend: Backend,
    settings: Sequence[Setting],
    start: Callable[[Backend, Setting], Process],
    part: Sequence[str],
    console: Console,
) -> Process:
    """Return the process of a backend, in the setting that was fastest on a part of the texts.

    Raises:
        Absent: it runs in none of them.
    """
    best: tuple[float, Process] | None = None
    reason: Absent | None = None
    for setting in settings:
        try:
            process = start(backend, setting)
            seconds = process.run(part)[0] if len(settings) > 1 else 0.0
        except Absent as error:
            reason = reason or error
            continue
        if len(settings) > 1:
            console.print(
                f"{backend.name}, {setting_in_words(backend, setting)}: {seconds:.1f} s for {len(part)} texts"
            )
        if best is not None:
            slower = max((best, (seconds, process)), key=lambda pair: pair[0])
            slower[1].close()
        if best is None or seconds < best[0]:
            best = seconds, process
    if best is None:
        raise reason or Absent("has no setting to run in")
    return best[1]


def setting_in_words(backend: Backend, setting: Setting) -> str:
    """Describe a setting."""
    if backend.load.startswith("ours:"):
        return "its own packs"
    beside = f", {setting.side_by_side} at a time" if setting.side_by_side > 1 else ""
    return f"{setting.batch} {backend.unit}{beside}"


def cosine(vectors: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """Return the mean and the worst cosine of corresponding rows."""
    products = (vectors * reference).sum(1)
    values = products / np.linalg.norm(vectors, axis=1) / np.linalg.norm(reference, axis=1)
    return float(values.mean()), float(values.min())


def processor() -> str:
    """Return the processor's model name, if the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


@dataclass
class Rounds:
    """Measurements of each backend, by its key.

    Attributes:
        processes: those that ran to the end.
        absent: why the others did not.
        seconds: of each round.
        vectors: of the last round.
        reference: those of transformers in float32.
        peaks: the best matrix products at the start of each round.
    """

    processes: dict[str, Process]
    absent: dict[str, str]
    seconds: dict[str, list[float]]
    vectors: dict[str, np.ndarray]
    reference: np.ndarray
    peaks: list[dict[str, float]]


def measure(
    options: argparse.Namespace,
    texts: list[str],
    by_length: list[str],
    start: Callable[..., Process],
    file: Path,
    console: Console,
) -> Rounds:
    """Load all backends, then time each of them in every round.

    Raises:
        Absent: unmask or the reference does not run.
    """
    results = Rounds({}, {}, {}, {}, np.empty(0), [])
    try:
        for name in options.backends:
            try:
                backend, begin = BACKENDS[name], partial(start, dtype=options.dtype)
                process = quickest(backend, settings_of(backend, options), begin, by_length[::2], console)
            except Absent as error:
                results.absent[name] = str(error)
                console.print(f"{BACKENDS[name].name}: {error}", markup=False)
                continue
            results.processes[name], results.seconds[name] = process, []
            console.print(f"{BACKENDS[name].name}: ready, loaded in {process.load_seconds:.1f} s")
        own_reference = REFERENCE not in results.processes or options.dtype != "float32"
        if own_reference:
            process = start(BACKENDS[REFERENCE], Setting(), dtype="float32")
            _, results.reference = process.run(texts, file)
            process.close()
        for number in range(options.rounds):
            results.peaks.append(gemm_peak(getattr(torch, options.dtype), options.device))
            for name, process in turns(results.processes.items(), number):
                try:
                    seconds, results.vectors[name] = process.run(texts, file)
                except Absent as error:
                    results.absent[name] = str(error)
                    del results.processes[name]
                    continue
                results.seconds[name].append(seconds)
            console.print(f"round {number + 1} of {options.rounds}")
        for name in ("unmask", *(() if own_reference else (REFERENCE,))):
            if name in results.absent:
                raise Absent(f"{name}, without which there is nothing to compare: {results.absent[name]}")
        if not own_reference:
            results.reference = results.vectors[REFERENCE]
    finally:
        for process in results.processes.values():
            process.close()
    return results


def settings_of(backend: Backend, options: argparse.Namespace) -> Sequence[Setting]:
    """Return the settings to try: the backend's own, unless the device or `--batch` names others."""
    if backend.settings != BATCHES:
        return backend.settings
    if options.batch:
        return (Setting(options.batch),)
    return BATCHES if options.device == "cpu" else GPU_BATCHES


def rows_of(options: argparse.Namespace, results: Rounds, tokens: int, peak_tokens: float) -> list[Row]:
    """Return a row for each chosen backend."""
    rows: list[Row] = []
    for name in options.backends:
        backend = BACKENDS[name]
        row: Row = {
            "name": backend.name,
            "precision": backend.precision or options.dtype,
            "absent": results.absent.get(name),
        }
        rows.append(row)
        if row["absent"]:
            continue
        times, process = results.seconds[name], results.processes[name]
        ratios = [theirs / ours for theirs, ours in zip(times, results.seconds["unmask"], strict=True)]
        mean, worst = cosine(results.vectors[name], results.reference)
        speed = tokens / statistics.median(times)
        row |= {
            "setting": setting_in_words(backend, process.setting),
            "load_seconds": process.load_seconds,
            "seconds": times,
            "tokens_per_second": speed,
            "slowest": tokens / max(times),
            "quickest": tokens / min(times),
            "ratio": statistics.median(ratios),
            "ratio_per_round": ratios,
            "share_of_peak": speed / peak_tokens,
            "cosine_mean": mean,
            "cosine_worst": worst,
        }
    return rows


def versions_of(processes: Iterable[Process]) -> dict[str, str]:
    """Return the package versions of all measured backends."""
    versions = {"unmask": __version__, "python": platform.python_version()}
    for process in processes:
        for package, version in process.versions.items():
            if process.backend.environment is None:
                versions[package] = version
            elif package in process.backend.install.split():
                versions[package] = f"{version} with transformers {process.versions.get('transformers')}"
    return versions


def run(options: argparse.Namespace, scratch: Path, console: Console) -> Report:
    """Write the weights, measure, and put everything together.

    Raises:
        UnmaskError: the model cannot be read.
        Absent: unmask or the reference does not run.
    """
    load_before = os.getloadavg()[0]
    folder = scratch / "model"
    revision = write_real(options.model, folder) if options.shape == "135m" else write_random(SHEARED_LLAMA, folder)
    texts = texts_of(options.mix, options.texts)
    counts = token_counts(folder, texts)
    by_length = [texts[i] for i in np.argsort(counts)]
    name = "-".join(["encode", options.shape, *{options.mix} - {"natural"}, *{options.device.split(":")[0]} - {"cpu"}])
    if options.device == "cpu" and options.dtype != "float32":
        name += f"-{options.dtype}"
    with (options.output / f"{name}.log").open("wb") as log:
        start = partial(
            Process,
            folder=folder,
            scratch=scratch,
            threads=options.threads,
            device=options.device,
            warm=[by_length[0], by_length[len(by_length) // 2], by_length[-1]],
            log=log,
        )
        results = measure(options, texts, by_length, start, scratch / "vectors.npy", console)
    tokens, gflop = int(counts.sum()), gflop_per_token(folder)
    peak = statistics.median(max(products.values()) for products in results.peaks)
    return {
        "name": name,
        "shape": options.shape,
        "model": options.model if options.shape == "135m" else "Sheared-LLaMA-1.3B's shape, random weights",
        "revision": revision,
        "mix": f"{len(texts)} texts, {tokens} tokens, median {int(np.median(counts))}, longest {counts.max()}",
        "tokens": tokens,
        "rounds": options.rounds,
        "threads": options.threads,
        "dtype": options.dtype,
        "gemm_gflops": results.peaks,
        "peak_gflops": peak,
        "gflop_per_token": gflop,
        "versions": versions_of(results.processes.values()),
        "machine": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "load_before": load_before,
            "gpu": None if options.device == "cpu" else torch.cuda.get_device_name(options.device),
        },
        "command": shlex.join(["python", *sys.argv]),
        "rows": rows_of(options, results, tokens, peak / gflop),
    }


def console_table(report: Report) -> Table:
    table = Table("backend", "tokens/s", "spread", "unmask is faster by", "of peak", "cosine mean / worst", "how")
    for row in report["rows"]:
        if row["absent"]:
            table.add_row(row["name"], row["absent"])
            continue
        mark = " ✗" if is_wrong(row) else ""
        table.add_row(
            row["name"],
            f"{row['tokens_per_second']:.0f}",
            f"{row['slowest']:.0f}-{row['quickest']:.0f}",
            f"{row['ratio']:.2f}x" if row["name"] != "unmask" else "",
            f"{row['share_of_peak']:.0%}",
            f"{row['cosine_mean']:.6f} / {row['cosine_worst']:.6f}{mark}",
            f"{row['precision']}, {row['setting']}",
        )
    return table


def options_of(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="135m", help="1.3b: a Llama with random weights")
    parser.add_argument("--model", default="unmask/smollm2-135m-embed", help="with --shape 135m")
    parser.add_argument("--device", default="cpu", help="cuda: on a GPU, whose own product is then the peak")
    parser.add_argument("--mix", choices=MIXES, default="natural", help="lengths of the texts")
    parser.add_argument("--texts", type=int, help="left out: 64 for 135m, 16 for 1.3b, 8,192 on a GPU")
    parser.add_argument("--rounds", type=int, help="left out: 3, on a GPU 5")
    parser.add_argument(
        "--batch", type=int, help="texts that PyTorch's peers pad together; left out: the quicker of 32 and 8"
    )
    parser.add_argument(
        "--backends",
        nargs="+",
        choices=tuple(BACKENDS),
        metavar="NAME",
        help=", ".join(BACKENDS),
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="where a backend has both; left out: float32, on a GPU bfloat16",
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, default=Path("bench-results"), help="folder for what is written")
    parser.add_argument(
        "--publish", nargs="+", type=Path, metavar="PAGE", help="put what --output has into these pages"
    )
    parser.add_argument("--keep", type=Path, default=Path("docs/performance"), help="where --publish copies the runs")
    options = parser.parse_args(arguments)
    left_out = {"dtype": "float32"} | SHAPES[options.shape] | (ON_A_GPU if options.device != "cpu" else {})
    for name, value in left_out.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if "unmask" not in options.backends:
        options.backends = ["unmask", *options.backends]  # the ratios are to it
    if options.device != "cpu" and (others := set(options.backends) - set(GPU_BACKENDS)):
        parser.error(f"--device {options.device}: {', '.join(sorted(others))} can be measured on a processor only")
    if options.texts < 2 or options.rounds < 1 or (options.batch or 1) < 1:
        parser.error("--texts must be at least 2, --rounds and --batch at least 1")
    return options


def main() -> None:
    options = options_of()
    console = Console(stderr=True)
    try:
        if options.publish:
            for line in publish(options.output, options.keep, options.publish):
                console.print(line)
            return
        keep_to(options.threads)
        torch.set_num_threads(options.threads)
        options.output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="unmask-bench-") as scratch:
            report = run(options, Path(scratch), console)
        written = write(report, options.output)
    except (UnmaskError, Absent, ValueError, OSError) as error:
        console.print(f"encode: {error}", markup=False)
        sys.exit(1)
    screen = Console()
    if not screen.is_terminal:
        screen = Console(width=160)  # a file has room
    screen.print(console_table(report))
    console.print(f"{report['mix']}; peak {report['peak_gflops']:.0f} GFLOP/s; written to {written.with_suffix('.*')}")


if __name__ == "__main__":
    main()
