"""A pool of equal workers on a cluster that computes pure functions of tasks.

Each worker is an actor that Ray places and never restarts. The pool itself replaces a worker that is lost and gives its
tasks to others. So a task that kills its workers is known by name and becomes a failure, where Ray would try for ever.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Generic, TypeVar

from unmask.cluster.options import ClusterOptions
from unmask.errors import ClusterError, UnmaskError

_Task = TypeVar("_Task")
# Attempts at a task, each of which killed its worker or raised an exception that is none of ours.
ATTEMPTS = 3
# A task waits at a worker while another is computed there, so that the worker need not wait for the next one.
_TASKS_PER_WORKER = 2
_TICK_S = 1.0


@dataclass(eq=False)
class _Worker(Generic[_Task]):
    """An actor, and the tasks that it was given, the one it computes first."""

    actor: Any
    tasks: deque[tuple[Any, _Task]] = field(default_factory=deque)  # Ray's reference of the outcome, and the task


class WorkerPool(Generic[_Task]):
    """Workers of one class, as a context manager. Entering waits for the first one.

    Args:
        ray: the module, connected.
        worker: class of the actors, with a method `load()` that prepares one and returns its description, or the error
            that prevents it.
        arguments: of its constructor.
        name_of: name of a task in messages, equal for equal tasks.
        agree: called with each description; raises if the worker may not take part.

    Attributes:
        redone: tasks that were given out again, because their worker was lost.

    Raises:
        ClusterError: no worker could start in time, or workers die while they load.
        UnmaskError: the error of `load`.
    """

    def __init__(
        self,
        ray: Any,
        worker: type,
        arguments: tuple[Any, ...],
        options: ClusterOptions,
        name_of: Callable[[_Task], Hashable],
        agree: Callable[[Any], None],
    ) -> None:
        self._ray, self._options, self._name_of, self._agree = ray, options, name_of, agree
        remote = ray.remote(worker).options(
            num_cpus=options.worker_cpus, num_gpus=options.worker_gpus, max_restarts=0, max_task_retries=0
        )
        self._new = lambda: remote.remote(*arguments)
        self._least, most = options.limits()
        self._most = most if most is not None else max(self._least, self._fitting())
        self._loading: dict[Any, tuple[Any, Any]] = {}  # by reference of a description: actor, reference of its place
        self._workers: list[_Worker[_Task]] = []
        self._waiting: deque[_Task] = deque()
        self._attempts: Counter[Hashable] = Counter()
        # Tasks that were at a lost worker together, by name: which of them killed it is seen when each runs alone.
        self._suspects: set[Hashable] = set()
        self._lost_loading = 0
        self._alone_since = time.monotonic()  # the time from which no worker is ready
        self.redone = 0

    @property
    def size(self) -> int:
        """Return the number of workers that are ready."""
        return len(self._workers)

    def __enter__(self) -> "WorkerPool[_Task]":
        try:
            while not self._workers:
                self._grow(self._least)
                self._collect()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all workers."""
        for actor in [*(actor for actor, _ in self._loading.values()), *(worker.actor for worker in self._workers)]:
            self._ray.kill(actor)
        self._loading.clear()
        self._workers.clear()

    def outcomes(
        self, tasks: Iterator[_Task], method: str, may_take: Callable[[], bool] = lambda: True
    ) -> Iterator[tuple[_Task, Any]]:
        """Yield each task with its outcome, in the order in which they are finished.

        An outcome is what the worker's method returned, or the `ClusterError` of a task that failed ATTEMPTS times.

        Args:
            method: name of the worker's method, which takes a task.
            may_take: false while no further task may begin.
        """
        more = True
        while True:
            while more and may_take() and self._load() + len(self._waiting) <= _TASKS_PER_WORKER * len(self._workers):
                task = next(tasks, None)
                more = task is not None
                if task is not None:
                    self._waiting.append(task)
            self._hand_out(method)
            if self._waiting:
                self._grow(min(self._most, max(self._least, 2 * len(self._workers))))
            if not more and not self._waiting and not self._load():
                return
            yield from self._collect()

    def _load(self) -> int:
        return sum(len(worker.tasks) for worker in self._workers)

    def _hand_out(self, method: str) -> None:
        # While a suspect waits no worker gets a second task, so that one is soon free for the suspect alone.
        deepest = 1 if any(map(self._is_suspect, self._waiting)) else _TASKS_PER_WORKER
        for depth in range(deepest):
            for worker in self._workers:
                alone = any(self._is_suspect(task) for _, task in worker.tasks)
                if self._waiting and len(worker.tasks) == depth and not alone:
                    task = self._waiting.popleft()
                    worker.tasks.append((getattr(worker.actor, method).remote(task), task))

    def _is_suspect(self, task: _Task) -> bool:
        return self._name_of(task) in self._suspects

    def _grow(self, size: int) -> None:
        while len(self._workers) + len(self._loading) < size:
            actor = self._new()
            place = actor.place.remote()
            self._loading[actor.load.remote()] = actor, place

    def _collect(self) -> Iterator[tuple[_Task, Any]]:
        """Wait a moment for what is ready, and yield the outcomes in it. (No generator: it runs at the call.)"""
        running = {reference: worker for worker in self._workers for reference, _ in worker.tasks}
        references = [*self._loading, *running]
        ready, _ = self._ray.wait(references, num_returns=len(references), timeout=0)
        if not ready:
            ready, _ = self._ray.wait(references, num_returns=1, timeout=_TICK_S)
            self._require_room()
        outcomes: list[tuple[_Task, Any]] = []
        for reference in ready:
            if reference in self._loading:
                self._begin(reference)
            elif running[reference] in self._workers:  # not lost a moment ago
                outcomes += self._finish(running[reference], reference)
        return iter(outcomes)

    def _require_room(self) -> None:
        """Raise ClusterError if there has been no worker for too long, and none that is loading."""
        if self._workers or time.monotonic() < self._alone_since + self._options.worker_wait:
            return
        places = [place for _, place in self._loading.values()]
        if not self._ray.wait(places, num_returns=1, timeout=0)[0]:  # loading takes as long as it takes
            raise self._no_room()

    def _begin(self, reference: Any) -> None:
        """Add a worker that is loaded."""
        actor, _ = self._loading.pop(reference)
        try:
            description = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            self._lost_loading += 1
            if self._lost_loading < ATTEMPTS:
                return
            self._most = len(self._workers)  # go on with those that there are
            if not self._workers:
                raise ClusterError(
                    f"workers end while they load the model ({_reason(error)}); give them more memory, or see the logs "
                    "of Ray"
                ) from error
            return
        if isinstance(description, UnmaskError):
            raise description
        self._agree(description)
        self._lost_loading = 0
        self._workers.append(_Worker(actor))

    def _finish(self, worker: _Worker[_Task], reference: Any) -> list[tuple[_Task, Any]]:
        """Take the outcome of a task off its worker, or the worker off the pool if it is lost."""
        exceptions = self._ray.exceptions
        task = next(task for own, task in worker.tasks if own == reference)
        try:
            outcome = self._ray.get(reference)
        except exceptions.RayTaskError as error:
            worker.tasks.remove((reference, task))
            return self._again(task, f"raised {type(error.cause).__name__} in its worker")
        except exceptions.RayError as error:
            return self._lose(worker, f"killed its worker ({_reason(error)})")
        worker.tasks.remove((reference, task))
        self._suspects.discard(self._name_of(task))
        return [(task, outcome)]

    def _lose(self, worker: _Worker[_Task], fault: str) -> list[tuple[_Task, Any]]:
        """Take a lost worker off the pool, and keep the outcomes that it delivered before."""
        self._workers.remove(worker)
        self._alone_since = time.monotonic()
        self._ray.kill(worker.actor)
        outcomes: list[tuple[_Task, Any]] = []
        lost: list[_Task] = []
        for reference, task in worker.tasks:
            try:
                outcomes.append((task, self._ray.get(reference)))
            except self._ray.exceptions.RayError:
                lost.append(task)
        self._suspects.update(map(self._name_of, lost))
        if len(lost) == 1:
            return outcomes + self._again(lost[0], fault)
        # The outcome of the first may be lost on its way although the second killed the worker.
        self._waiting.extendleft(reversed(lost))
        self.redone += len(lost)
        return outcomes

    def _again(self, task: _Task, fault: str) -> list[tuple[_Task, Any]]:
        """Give a task to another worker, or to none if it had its attempts."""
        name = self._name_of(task)
        self._attempts[name] += 1
        if self._attempts[name] >= ATTEMPTS:
            self._suspects.discard(name)
            return [(task, ClusterError(f"{name} {fault}, as in {ATTEMPTS - 1} attempts before"))]
        self._waiting.appendleft(task)
        self.redone += 1
        return []

    def _fitting(self) -> int:
        """Return how many workers fit into the cluster as it is now, at least one."""
        total = self._ray.cluster_resources()
        shares = [("CPU", self._options.worker_cpus), ("GPU", self._options.worker_gpus)]
        return max(1, min((int(total.get(name, 0) / share) for name, share in shares if share), default=1))

    def _no_room(self) -> ClusterError:
        total, free = self._ray.cluster_resources(), self._ray.available_resources()
        counts = ", ".join(f"{free.get(name, 0):g} of {total.get(name, 0):g} {name}s free" for name in ("CPU", "GPU"))
        return ClusterError(
            f"the cluster started no worker of {self._options.worker_cpus:g} CPUs and {self._options.worker_gpus:g} "
            f"GPUs in {self._options.worker_wait:g} s: it has {counts}; end other work there, add machines, or lower "
            "--worker-cpus"
        )


def _reason(error: Exception) -> str:
    """Return what Ray says of a lost worker, in a few words."""
    text = str(error)
    for sign, reason in (
        ("out of memory", "the machine had no memory left"),
        ("OOM", "the machine had no memory left"),
        ("node", "its machine is gone"),
    ):
        if sign in text and "Worker exit type: SYSTEM_ERROR" not in text:
            return reason
    return "the process ended"
