"""What a run shows in a terminal: a bar with loss, speed and time left, the plan of a dry run, a bar while mining."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from unmask.training.layer_probe import LayerScore
from unmask.training.loop import Progress as StepProgress
from unmask.training.plan import Plan


@contextmanager
def training_bar(console: Console) -> Iterator[Callable[[StepProgress], None]]:
    """A function to be told after every step. On anything but a terminal: a line per hundred steps."""
    columns = (
        SpinnerColumn(),
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(bar_width=28),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TextColumn("{task.fields[speed]:,.0f} tokens/s"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[scores]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("train", total=None, loss=float("nan"), speed=0.0, scores="")

        def tell(now: StepProgress) -> None:
            scores = "  ".join(f"{name} {score:.1f}" for name, score in now.scores.items())
            bar.update(
                task, total=now.steps, completed=now.step, loss=now.loss, speed=now.tokens_per_second, scores=scores
            )
            if not console.is_terminal and (now.step % 100 == 0 or now.step == now.steps):
                console.print(
                    f"step {now.step}/{now.steps}  loss {now.loss:.4f}  {now.tokens_per_second:,.0f} tokens/s  {scores}"
                )

        yield tell


def print_plan(plan: Plan, console: Console) -> None:
    """The estimate of a dry run as a table and two lines."""
    table = Table(box=None, pad_edge=False)
    table.add_column("data", no_wrap=True)
    for heading in ("examples", "held out", "tokens each", "per step", "share of steps"):
        table.add_column(heading, justify="right")
    for source in plan.sources:
        count = "streamed" if source.examples is None else f"{source.examples:,}"
        tokens, share = f"{source.tokens_per_example:.0f}", f"{source.share:.1%}"
        table.add_row(source.name, count, f"{source.held_out:,}", tokens, str(source.examples_per_step), share)
    console.print(table)
    hours, minutes = divmod(round(plan.seconds / 60), 60)
    console.print(f"{plan.steps:,} steps, about {plan.tokens:,} tokens; {plan.trained:,} parameters are trained")
    console.print(
        f"estimated: {hours} h {minutes:02d} min on this machine now, {plan.memory_bytes / 1e9:.1f} GB of memory"
    )


@contextmanager
def mining_bar(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A function to be told what is going on, how many steps were done just now, and how many there are in all."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        MofNCompleteColumn(),
        BarColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        tasks: dict[str, TaskID] = {}

        def tell(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], advance=done)

        yield tell


def print_probe(curves: Mapping[str, Sequence[LayerScore]], console: Console) -> None:
    """One row per layer: cosine to the target and the dev sets' correlations, a table for each curve."""
    for name, scores in curves.items():
        table = Table(title=name, title_justify="left", box=None)
        for title in ("layers kept", "cosine", *scores[0].graded):
            table.add_column(title, justify="right")
        for score in scores:
            table.add_row(str(score.layer), f"{score.cosine:.4f}", *(f"{value:.2f}" for value in score.graded.values()))
        console.print(table)
