"""How far a run has come, on a terminal: the task, its texts, tokens per second, time left."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from unmask.evaluate.results import TaskScore


class RunProgress:
    """Bars while a task runs and a line when it is done; off a terminal, the lines alone. A `harness.TaskProgress`."""

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
        self._whole = self._bars.add_task("tasks", total=tasks, unit="", speed="")
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
        """A task begins; its own number of texts is not known yet."""
        self._texts = self._tokens = 0
        self._seconds = 0.0
        self._bars.remove_task(self._current)
        # Word-level tasks do not say how many sentences they are going to read.
        total = 0 if unit == "texts" else None
        self._current = self._bars.add_task(f"{model} · {task}", total=total, unit=unit, speed="")

    def expect(self, texts: int) -> None:
        """So many more texts need vectors."""
        (current,) = (task for task in self._bars.tasks if task.id == self._current)
        self._bars.update(self._current, total=(current.total or 0) + texts)

    def settled(self, texts: int) -> None:
        """So many of them have one."""
        self._bars.advance(self._current, texts)

    def computed(self, texts: int, tokens: int | None, seconds: float) -> None:
        """So many were computed just now."""
        self._texts += texts
        self._tokens += tokens or 0
        self._seconds += seconds
        rate, unit = (self._tokens, "tokens") if self._tokens else (self._texts, "texts")
        if self._seconds:
            self._bars.update(self._current, speed=f" · {rate / self._seconds:,.0f} {unit}/s")

    def done(self, model: str, score: TaskScore, kept: bool) -> None:
        """A task is over, or was before this run."""
        self._bars.advance(self._whole)
        self._bars.update(self._current, visible=False)
        if score.error is not None:
            line = Text.assemble(f"{model}  {score.task}  ", ("failed: " + score.error, "red"))
        else:
            took = "from an earlier run" if kept else f"{score.seconds:.0f} s"
            read = f", {self._tokens:,} tokens" if self._tokens and not kept else ""
            line = Text(f"{model}  {score.task}  {score.score or 0.0:.2f}  ({took}{read})")
        self._bars.console.print(line, soft_wrap=True, highlight=False)

    def say(self, line: str) -> None:
        """A line of its own, at its time of day off a terminal."""
        stamp = "" if self._console.is_terminal else time.strftime("%H:%M:%S ")
        self._bars.console.print(Text(stamp + line), soft_wrap=True, highlight=False)
