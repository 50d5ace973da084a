"""An onboarding on a terminal: a bar for the gate that runs, a line when it is done, a table at the end."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from unmask.onboarding.gates import Tell
from unmask.onboarding.run import Result


@contextmanager
def gate_bar(console: Console, gate: str) -> Iterator[Tell]:
    """A bar while a gate runs; off a terminal, its name and how long it took. Quality draws bars of its own."""
    began = time.perf_counter()
    quiet = not console.is_terminal or gate == "quality"
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    if quiet:
        console.print(Text(f"{time.strftime('%H:%M:%S')} {gate}"), highlight=False)
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True, disable=quiet) as bar:
        task = bar.add_task(gate, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
    console.print(Text(f"{gate}: {time.perf_counter() - began:.1f} s"), highlight=False)


def print_result(result: Result, console: Console) -> None:
    """What each gate found, and where the model stands."""
    table = Table(box=box.SIMPLE, pad_edge=False)
    for heading in ("gate", "outcome", "finding"):
        table.add_column(heading, no_wrap=heading != "finding")
    for gate in result.gates:
        verdict = Text("not passed", "red") if not gate.passed else Text("kept" if gate.kept else "passed", "green")
        table.add_row(gate.gate, verdict, Text(gate.finding))
    console.print(table)
    console.print(Text(f"{result.model} is {result.status}."), highlight=False)
    if result.told:
        console.print(f"{result.told} who wanted it were told.", highlight=False)
    if result.charged:
        console.print("The proposed price is charged from now on; 'unmask accounts price' changes it.", highlight=False)
