"""Texts to vectors on this machine: unmask against the peers that install from a package registry.

Same weights, same texts, same threads; each contender in a process of its own, and interleaved: each round times every
contender once, in turn, so that a noisy machine slows all of them alike. A contender that can be run in two ways is
measured in the quicker one. Reported are medians over rounds and the ratios of single rounds. Vectors are compared
with those of transformers in float32 without the causal mask, so that nobody wins by being wrong.

    make bench
    make bench ARGS="--shape 1.3b"
    make bench ARGS="--model path/to/model --texts 128 --rounds 7"
    make bench ARGS="--contenders unmask transformers --dtype bfloat16"

writes encode-SHAPE.json, .md, .svg and .png to --output. `--publish` puts them into pages and measures nothing.
"""

import argparse
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contenders import CONTENDERS, Contender, Setting
from contenders.models import gflop_per_token, natural_texts, token_counts, write_real, write_sheared_llama
from contenders.process import Absent, Process, keep_to
from contenders.report import Report, publish, write, wrong
from rich.console import Console
from rich.table import Table

from unmask import __version__
from unmask.checkpoint import DEFAULT_MODEL
from unmask.errors import UnmaskError

REFERENCE = "transformers"
EVERYONE = tuple(name for name in CONTENDERS if name != "llama-cpp-f16")
# What a shape is measured with unless told otherwise: so many texts that a run ends within minutes. All contenders'
# weights are in memory together, 5 GB each for the large shape, so that one is measured with three of them.
SHAPES: dict[str, dict[str, Any]] = {
    "135m": {"texts": 96, "rounds": 3, "contenders": EVERYONE},
    "1.3b": {"texts": 16, "rounds": 3, "contenders": ("unmask", "unmask-int8", REFERENCE)},
}


def gemm_peak(dtype: torch.dtype) -> dict[str, float]:
    """The best matrix product of the libraries at hand in this precision, in GFLOP/s, at shapes of this kind."""
    best: dict[str, float] = {}
    for rows, inner, columns in ((2048, 576, 1536), (2048, 1536, 576), (2048, 2048, 2048)):
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
    contender: Contender, start: Callable[[Contender, Setting], Process], part: Sequence[str], console: Console
) -> Process:
    """The contender, running in the way that took least time for a part of the texts.

    Raises:
        Absent: it runs in none of them.
    """
    best: tuple[float, Process] | None = None
    reason: Absent | None = None
    for setting in contender.settings:
        try:
            process = start(contender, setting)
            seconds = process.run(part) if len(contender.settings) > 1 else 0.0
        except Absent as error:
            reason = reason or error
            continue
        if len(contender.settings) > 1:
            console.print(f"{contender.name}, {shown(contender, setting)}: {seconds:.1f} s for {len(part)} texts")
        if best is not None:
            slower = max((best, (seconds, process)), key=lambda pair: pair[0])
            slower[1].close()
        if best is None or seconds < best[0]:
            best = seconds, process
    if best is None:
        raise reason or Absent("has no setting to run in")
    return best[1]


def shown(contender: Contender, setting: Setting) -> str:
    """A setting in words."""
    if contender.load.startswith("ours:"):
        return "its own packs"
    beside = f", {setting.side_by_side} at a time" if setting.side_by_side > 1 else ""
    return f"{setting.batch} {contender.unit}{beside}"


def cosine(vectors: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """Mean and worst cosine, row by row."""
    products = (vectors * reference).sum(1)
    values = products / np.linalg.norm(vectors, axis=1) / np.linalg.norm(reference, axis=1)
    return float(values.mean()), float(values.min())


def processor() -> str:
    """The processor's own name for itself, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def measure(options: argparse.Namespace, scratch: Path, console: Console) -> Report:
    """Everybody loaded, then the rounds.

    Raises:
        UnmaskError: the model cannot be read.
        Absent: unmask or the reference does not run.
    """
    load_before = os.getloadavg()[0]
    folder = scratch / "model"
    revision = write_real(options.model, folder) if options.shape == "135m" else write_sheared_llama(folder)
    texts = natural_texts(options.texts)
    counts = token_counts(folder, texts)
    tokens = int(counts.sum())
    by_length = [texts[i] for i in np.argsort(counts)]
    log_file = options.output / f"encode-{options.shape}.log"
    processes: dict[str, Process] = {}
    absent: dict[str, str] = {}
    with log_file.open("wb") as log:

        def start(contender: Contender, setting: Setting, dtype: str = options.dtype) -> Process:
            warm = [by_length[0], by_length[len(by_length) // 2], by_length[-1]]
            return Process(
                contender,
                setting,
                folder=folder,
                scratch=scratch,
                threads=options.threads,
                dtype=dtype,
                warm=warm,
                log=log,
            )

        try:
            for name in options.contenders:
                try:
                    processes[name] = quickest(CONTENDERS[name], start, by_length[::2], console)
                    console.print(f"{CONTENDERS[name].name}: ready, loaded in {processes[name].load_seconds:.1f} s")
                except Absent as error:
                    absent[name] = str(error)
                    console.print(f"{CONTENDERS[name].name}: {error}")
            reference = None
            if REFERENCE not in processes or options.dtype != "float32":
                process = start(CONTENDERS[REFERENCE], Setting(), "float32")
                _, reference = process.run_for_vectors(texts, scratch / "vectors.npy")
                process.close()
            vectors: dict[str, np.ndarray] = {}
            seconds: dict[str, list[float]] = {name: [] for name in processes}
            peaks: list[dict[str, float]] = []
            for number in range(options.rounds):
                peaks.append(gemm_peak(getattr(torch, options.dtype)))
                for name, process in list(processes.items()):
                    try:
                        took, vectors[name] = process.run_for_vectors(texts, scratch / "vectors.npy")
                        seconds[name].append(took)
                    except Absent as error:
                        absent[name] = str(error)
                        del processes[name]
                console.print(f"round {number + 1} of {options.rounds}")
        finally:
            for process in processes.values():
                process.close()
    if "unmask" in absent:
        raise Absent(f"unmask itself did not run ({absent['unmask']}); see {log_file}")
    reference = vectors[REFERENCE] if reference is None else reference
    versions = {"unmask": __version__, "python": platform.python_version()}
    for process in processes.values():
        for package, version in process.versions.items():
            if process.contender.environment is None:
                versions[package] = version
            elif package in process.contender.install.split():
                versions[package] = f"{version} with transformers {process.versions.get('transformers')}"
    peak = statistics.median(max(peak.values()) for peak in peaks)
    gflop = gflop_per_token(folder)
    rows: list[dict[str, Any]] = []
    for name in options.contenders:
        contender = CONTENDERS[name]
        row = {"name": contender.name, "precision": contender.precision or options.dtype, "absent": absent.get(name)}
        if name not in absent:
            times, process = seconds[name], processes[name]
            ratios = [theirs / ours for theirs, ours in zip(times, seconds["unmask"], strict=True)]
            mean, worst = cosine(vectors[name], reference)
            row |= {
                "setting": shown(contender, process.setting),
                "load_seconds": process.load_seconds,
                "seconds": times,
                "tokens_per_second": tokens / statistics.median(times),
                "slowest": tokens / max(times),
                "quickest": tokens / min(times),
                "ratio": statistics.median(ratios),
                "ratio_per_round": ratios,
                "share_of_peak": tokens / statistics.median(times) * gflop / peak,
                "cosine_mean": mean,
                "cosine_worst": worst,
            }
        rows.append(row)
    return {
        "shape": options.shape,
        "model": options.model if options.shape == "135m" else "Sheared-LLaMA-1.3B's shape, random weights",
        "revision": revision,
        "mix": f"{len(texts)} texts, {tokens} tokens, median {int(np.median(counts))}, longest {counts.max()}",
        "tokens": tokens,
        "rounds": options.rounds,
        "threads": options.threads,
        "dtype": options.dtype,
        "gemm_gflops": peaks,
        "peak_gflops": peak,
        "gflop_per_token": gflop,
        "versions": versions,
        "machine": {"processor": processor(), "cores": os.cpu_count(), "load_before": load_before},
        "command": shlex.join(["python", *sys.argv]),
        "rows": rows,
    }


def console_table(report: Report) -> Table:
    table = Table("contender", "tokens/s", "spread", "unmask is faster by", "of peak", "cosine mean / worst", "how")
    for row in report["rows"]:
        if row["absent"]:
            table.add_row(row["name"], row["absent"])
            continue
        mark = " ✗" if wrong(row) else ""
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
    parser.add_argument("--model", default=DEFAULT_MODEL, help="instead of the default model, with --shape 135m")
    parser.add_argument("--texts", type=int, help="left out: 96 for 135m, 16 for 1.3b")
    parser.add_argument("--rounds", type=int, help="left out: 3")
    parser.add_argument(
        "--contenders", nargs="+", choices=tuple(CONTENDERS), metavar="NAME", help=", ".join(CONTENDERS)
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="where a contender has both"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, default=Path("bench-results"), help="folder for what is written")
    parser.add_argument(
        "--publish", nargs="+", type=Path, metavar="PAGE", help="put what --output has into these pages"
    )
    parser.add_argument("--keep", type=Path, default=Path("docs/performance"), help="where --publish copies the runs")
    options = parser.parse_args(arguments)
    for name, value in SHAPES[options.shape].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if "unmask" not in options.contenders:
        options.contenders = ["unmask", *options.contenders]  # the ratios are to it
    if options.texts < 2 or options.rounds < 1:
        parser.error("--texts must be at least 2 and --rounds at least 1")
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
            report = measure(options, Path(scratch), console)
        written = write(report, options.output)
    except (UnmaskError, Absent, ValueError, OSError) as error:
        console.print(f"encode: {error}", markup=False)
        sys.exit(1)
    Console().print(console_table(report))
    console.print(f"{report['mix']}; peak {report['peak_gflops']:.0f} GFLOP/s; written to {written.with_suffix('.*')}")


if __name__ == "__main__":
    main()
