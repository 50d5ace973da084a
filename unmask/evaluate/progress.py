"""Progress of an evaluation: the task, its texts, tokens per second, time left."""

from types import TracebackType

from unmask.evaluate.results import TaskScore
from unmask.terminal import Progress, Step


class RunProgress:
    """A `harness.TaskProgress` that shows the running task on stderr, and prints a line when a task ends.

    Args:
        tasks: number of tasks of all models together.
    """

    def __init__(self, tasks: int) -> None:
        self._progress = Progress()
        self._tasks, self._done_tasks = tasks, 0
        self._begin("", "texts", None)

    def _begin(self, name: str, unit: str, total: int | None) -> None:
        self._name, self._unit, self._total, self._done = name, unit, total, 0
        self._texts = self._tokens = 0
        self._seconds = 0.0

    def __enter__(self) -> "RunProgress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.close()

    def begin(self, model: str, task: str, unit: str = "texts") -> None:
        """Show a new task; its number of texts is not known yet."""
        # Word-level tasks do not say how many sentences they are going to read.
        self._begin(f"{model} · {task}", unit, 0 if unit == "texts" else None)
        self._show()

    def expect(self, texts: int) -> None:
        """Add texts that need vectors to the total."""
        self._total = (self._total or 0) + texts

    def finish_texts(self, texts: int) -> None:
        """Advance by texts that have a vector now, computed or from the cache."""
        self._done += texts
        self._show()

    def add_speed(self, texts: int, tokens: int | None, seconds: float) -> None:
        """Count texts that the model has just encoded towards the speed shown."""
        self._texts += texts
        self._tokens += tokens or 0
        self._seconds += seconds

    def finish_task(self, model: str, score: TaskScore, *, from_earlier_run: bool) -> None:
        """Print the score of a task."""
        self._done_tasks += 1
        self._progress.close()
        if score.error is not None:
            self._progress.log(f"{model}  {score.task}  failed: {score.error}")
            return
        duration = "from an earlier run" if from_earlier_run else f"{score.seconds:.0f} s"
        tokens = f", {self._tokens:,} tokens" if self._tokens and not from_earlier_run else ""
        self._progress.log(f"{model}  {score.task}  {score.score or 0.0:.2f}  ({duration}{tokens})")

    def log(self, line: str) -> None:
        """Print a line that stays."""
        self._progress.log(line)

    def _show(self) -> None:
        rate, unit = (self._tokens, "tokens") if self._tokens else (self._texts, "texts")
        speed = (f"{rate / self._seconds:,.0f} {unit}/s",) if self._seconds else ()
        tasks = f"task {self._done_tasks + 1} of {self._tasks}"
        self._progress.show(Step(self._name, self._done, self._total, self._unit, (*speed, tasks)))
