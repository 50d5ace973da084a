"""Cost of the default model beside another small one: texts a second, one text, start, memory and size.

    python benchmarks/small_models.py MODELS/all-MiniLM-L6-v2
    python benchmarks/small_models.py MODELS/all-MiniLM-L6-v2 --models unmask/smollm2-embed-6l unmask/smollm2-135m-embed

Our models run in unmask, the other one in sentence-transformers: each in a process of its own, on the same threads, in
turns, each loaded and warm. Start and memory are those of a real `unmask serve`, in turns as well. The texts of the
first figure have 4 to 16 words; the one text has six.
"""

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
from backends import BACKENDS, Backend, Setting
from backends.models import texts_of
from backends.process import Process, keep_to
from rich.console import Console
from rich.table import Table
from serving import serving
from turns import turns

from unmask.checkpoint.shipped import SHIPPED

OURS = ("unmask/smollm2-embed-6l", "unmask/smollm2-135m-embed")
ONE_TEXT = "how do I bake rye bread"  # six words


@dataclass
class Costs:
    """Measurements of one model, a number for each round.

    Attributes:
        many: seconds for all texts.
        one: seconds for one text.
        start: seconds from the command to the first vector over HTTP.
        resident, own: megabytes of the server after it: all, and those that no other process shares.
    """

    many: list[float] = field(default_factory=list)
    one: list[float] = field(default_factory=list)
    start: list[float] = field(default_factory=list)
    resident: list[float] = field(default_factory=list)
    own: list[float] = field(default_factory=list)


def measure_encoding(costs: dict[str, Costs], reference: Path, options: argparse.Namespace) -> None:
    """Time many texts and one text with every model, in turns."""
    texts = texts_of("short", options.texts)
    auto = replace(BACKENDS["unmask"], precision=options.dtype)
    theirs = BACKENDS["sentence-transformers"]
    with tempfile.TemporaryDirectory() as scratch, Path(os.devnull).open("wb") as log, ExitStack() as opened:
        processes: dict[str, Process] = {}
        for name in costs:
            is_ours = name in options.models
            backend: Backend = auto if is_ours else theirs
            processes[name] = Process(
                backend, Setting(32), folder=Path(name) if is_ours else reference, scratch=Path(scratch),
                threads=options.threads, dtype="float32", device="cpu", warm=[ONE_TEXT, *texts[:32]], log=log,
            )  # fmt: skip
            opened.enter_context(closing(processes[name]))
        for number in range(options.rounds):
            for name, process in turns(processes.items(), number):
                costs[name].many.append(process.run(texts)[0])
        for number in range(options.repeats):
            for name, process in turns(processes.items(), number):
                costs[name].one.append(process.run([ONE_TEXT])[0])


def measure_start(costs: dict[str, Costs], models: Sequence[str], rounds: int) -> None:
    """Start a server of each model, in turns. The round before the first writes prepacked weights, and is left out."""
    for turn in range(rounds + 1):
        for name in turns(models, turn):
            with serving(name) as server:
                memory = psutil.Process(server.process.pid).memory_full_info()
                if turn:
                    costs[name].start.append(server.first_vector_s)
                    costs[name].resident.append(memory.rss / 1e6)
                    costs[name].own.append(memory.uss / 1e6)


def shipped_mb(model: str) -> float:
    """Megabytes of a shipped model's own files: its layers or its adapter, without the base that models share."""
    shipped = SHIPPED[model]
    folder = shipped.layers_folder or shipped.adapter
    return sum(file.stat().st_size for file in folder.iterdir()) / 1e6 if folder else 0.0


def table_of(costs: dict[str, Costs], texts: int, reference: str) -> Table:
    """Return the table of medians, with the medians of ratios to the reference of single rounds."""
    table = Table(
        "model", "texts/s", "ratio", "one text, ms", "ratio", "start, s", "resident, MB", "own, MB", "files, MB"
    )
    theirs = costs[reference]
    for name, each in costs.items():
        many = statistics.median(b / a for a, b in zip(each.many, theirs.many, strict=True))
        one = statistics.median(a / b for a, b in zip(each.one, theirs.one, strict=True))
        served = [f"{statistics.median(row):.{digits}f}" for row, digits in
                  ((each.start, 2), (each.resident, 0), (each.own, 0))] if each.start else ["", "", ""]  # fmt: skip
        table.add_row(
            name, f"{texts / statistics.median(each.many):.0f}", f"{many:.2f}",
            f"{1000 * statistics.median(each.one):.1f}", f"{one:.2f}", *served,
            f"{shipped_mb(name):.1f}" if name in SHIPPED else "",
        )  # fmt: skip
    return table


def main() -> int:
    """Parse the arguments, measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", type=Path, help="folder of a model of sentence-transformers")
    parser.add_argument("--models", nargs="+", default=list(OURS), help="shipped ids")
    parser.add_argument("--dtype", default="auto", help="precision of ours; the reference runs in float32")
    parser.add_argument("--texts", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=200, help="times that the one text is encoded")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    keep_to(options.threads)
    costs = {name: Costs() for name in (*options.models, options.reference.name)}
    measure_encoding(costs, options.reference, options)
    measure_start(costs, options.models, options.rounds)
    Console(width=140).print(table_of(costs, options.texts, options.reference.name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
