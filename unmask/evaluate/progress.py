"""Progress of an evaluation on a terminal: the task, its texts, tokens per second, time left."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from unmask.evaluate.results import TaskScore


class RunProgress:
    """A `harness.TaskProgress` that draws bars while a task runs and prints a line when it ends.

    Where standard error is no terminal, it prints the lines alone.
    """

    def __init__(self, tasks: int) -> None:
        self._console = Console(stderr=True)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}{task.fields[speed]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._all_tasks = self._bars.add_task("tasks", total=tasks, unit="", speed="")
        self._current = self._bars.add_task("", visible=False, unit="", speed="")
        self._texts = self._tokens = 0
        self._seconds = 0.0

    def __enter__(self) -> "RunProgress":
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def begin(self, model: str, task: str, unit: str = "texts") -> None:
        """Show a new task; its number of texts is not known yet."""
        self._texts = self._tokens = 0
        self._seconds = 0.0
        self._bars.remove_task(self._current)
        # Word-level tasks do not say how many sentences they are going to read.
        total = 0 if unit == "texts" else None
        self._current = self._bars.add_task(f"{model} · {task}", total=total, unit=unit, speed="")

    def expect(self, texts: int) -> None:
        """Add texts that need vectors to the total."""
        (current,) = (task for task in self._bars.tasks if task.id == self._current)
        self._bars.update(self._current, total=(current.total or 0) + texts)

    def finish_texts(self, texts: int) -> None:
        """Advance by texts that have a vector now, computed or from the cache."""
        self._bars.advance(self._current, texts)

    def add_speed(self, texts: int, tokens: int | None, seconds: float) -> None:
        """Count texts that the model has just encoded towards the speed shown."""
        self._texts += texts
        self._tokens += tokens or 0
        self._seconds += seconds
        rate, unit = (self._tokens, "tokens") if self._tokens else (self._texts, "texts")
        if self._seconds:
            self._bars.update(self._current, speed=f" · {rate / self._seconds:,.0f} {unit}/s")

    def finish_task(self, model: str, score: TaskScore, *, from_earlier_run: bool) -> None:
        """Print the score of a task."""
        self._bars.advance(self._all_tasks)
        self._bars.update(self._current, visible=False)
        if score.error is not None:
            line = Text.assemble(f"{model}  {score.task}  ", ("failed: " + score.error, "red"))
        else:
            duration = "from an earlier run" if from_earlier_run else f"{score.seconds:.0f} s"
            tokens = f", {self._tokens:,} tokens" if self._tokens and not from_earlier_run else ""
            line = Text(f"{model}  {score.task}  {score.score or 0.0:.2f}  ({duration}{tokens})")
        self._bars.console.print(line, soft_wrap=True, highlight=False)

    def print(self, line: str) -> None:
        """Print a line, with the time of day where standard error is no terminal."""
        stamp = "" if self._console.is_terminal else time.strftime("%H:%M:%S ")
        self._bars.console.print(Text(stamp + line), soft_wrap=True, highlight=False)
