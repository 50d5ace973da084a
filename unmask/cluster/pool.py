"""A pool of equal workers on a cluster that computes pure functions of tasks.

Each worker is an actor that Ray places and never restarts. The pool itself replaces a worker that is lost and gives its
tasks to others. So a task that kills its workers is known by name and becomes a failure, where Ray would try for ever.

Ray takes a minute to notice a machine that hangs, and never notices a process that does. So the pool has a clock of its
own: a worker is late when it takes several times as long as its earlier tasks did, or, in its first task, as its speed
at its start lets expect. Its tasks go to others and it gets no more until it answers. The first answer to a task
counts.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Generic, TypeVar

from unmask.cluster.connection import head_answers, kill_actor, resources
from unmask.cluster.options import ClusterOptions
from unmask.errors import ClusterError, UnmaskError

_Task = TypeVar("_Task")
# Attempts at a task, each of which killed its worker or raised an exception that is none of ours.
ATTEMPTS = 3
# A task waits at a worker while another is computed there, so that the worker need not wait for the next one.
_TASKS_PER_WORKER = 2
_TICK_S = 1.0
# A worker is late after this many times the expected time of a task, and after this many seconds at least. Reading and
# writing take time that has nothing to do with a task's size.
_LATE_FACTOR = 3.0
_LATE_S = 20.0
# The same two numbers until a first task is finished. Before that, the speed is a rough guess from a few texts.
_FIRST_LATE_FACTOR = 10.0
_FIRST_LATE_S = 60.0
# Growth of a task's time limit with each attempt, so that a task that is only long is finished.
_LATE_GROWTH = 4.0
# Seconds between two questions to the head, and without an answer until it is given up.
_HEAD_ASK_S, _HEAD_S = 5.0, 15.0


@dataclass
class _Pace:
    """Seconds that tasks took, and their sizes."""

    seconds: float = 0.0
    size: float = 0.0

    def add(self, seconds: float, size: float) -> None:
        self.seconds += seconds
        self.size += size


@dataclass(eq=False)
class _Worker(Generic[_Task]):
    """An actor.

    Attributes:
        tasks: Ray's references of the outcomes, and the tasks that it was given, the one it computes first.
        speed: size per second at its start.
        began: time at which it began that task.
        pace: of the tasks that it finished.
        late: its tasks are given to others.
        paid_from: time at which it began to load.
    """

    actor: Any
    speed: float
    tasks: deque[tuple[Any, _Task]] = field(default_factory=deque)
    began: float = 0.0
    pace: _Pace = field(default_factory=_Pace)
    late: bool = False
    paid_from: float = 0.0


class WorkerPool(Generic[_Task]):
    """Workers of one class, as a context manager. Entering waits for the first one.

    Args:
        ray: the module, connected.
        worker: class of the actors, with a method `load()` that prepares one and returns the seconds that this took
            and its description, or the error that prevents it.
        arguments: of its constructor.
        name_of: name of a task in messages, equal for equal tasks.
        size_of: number above 0 that the time of a task grows with.
        agree: called with each description; raises if the worker may not take part.
        speed_of: size per second of a worker at its start, from its description.

    Attributes:
        redone: tasks that were given out again, because their worker was lost or late.

    Raises:
        ClusterError: no worker could start in time, workers die while they load, or the cluster's head is gone.
        UnmaskError: the error of `load`.
    """

    def __init__(
        self,
        ray: Any,
        worker: type,
        arguments: tuple[Any, ...],
        options: ClusterOptions,
        name_of: Callable[[_Task], Hashable],
        size_of: Callable[[_Task], float],
        agree: Callable[[Any], None],
        speed_of: Callable[[Any], float],
    ) -> None:
        self._ray, self._options, self._agree = ray, options, agree
        self._name_of, self._size_of, self._speed_of = name_of, size_of, speed_of
        remote = ray.remote(worker).options(
            num_cpus=options.worker_cpus, num_gpus=options.worker_gpus, max_restarts=0, max_task_retries=0
        )
        self._new = lambda: remote.remote(*arguments)
        self._least, most = options.limits()
        self._most = most if most is not None else max(self._least, self._fitting())
        self._loading: dict[Any, tuple[Any, Any]] = {}  # by reference of a description: actor, reference of its place
        self._workers: list[_Worker[_Task]] = []
        self._waiting: deque[_Task] = deque()
        self._open: set[Hashable] = set()  # names of the tasks that have no outcome yet
        self._attempts: Counter[Hashable] = Counter()
        # Tasks that were at a lost worker together, by name: which of them killed it is seen when each runs alone.
        self._suspects: set[Hashable] = set()
        self._lost_loading = 0
        self._lost_seconds = 0.0  # of workers that are gone
        self._pace = _Pace()  # of all workers
        self._alone_since = time.monotonic()  # the time from which no worker is ready
        self._head_asked = self._alone_since
        self._head_gone: float | None = None  # the time from which the head does not answer
        self.redone = 0

    @property
    def size(self) -> int:
        """Return the number of workers that are ready and not late."""
        return sum(not worker.late for worker in self._workers)

    @property
    def worker_seconds(self) -> float:
        """Return the time that workers were there, from the begin of their loading, all together."""
        now = time.monotonic()
        return self._lost_seconds + sum(now - worker.paid_from for worker in self._workers)

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
            kill_actor(self._ray, actor)
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
            while more and may_take() and self._load() + len(self._waiting) <= _TASKS_PER_WORKER * self.size:
                task = next(tasks, None)
                more = task is not None
                if task is not None:
                    self._open.add(self._name_of(task))
                    self._waiting.append(task)
            self._hand_out(method)
            if self._waiting:
                self._grow(min(self._most, max(self._least, 2 * len(self._workers))))
            if not more and not self._open:
                return
            yield from self._collect()

    def _load(self) -> int:
        return sum(len(worker.tasks) for worker in self._workers if not worker.late)

    def _hand_out(self, method: str) -> None:
        # While a suspect waits no worker gets a second task, so that one is soon free for the suspect alone.
        deepest = 1 if any(map(self._is_suspect, self._waiting)) else _TASKS_PER_WORKER
        for depth in range(deepest):
            for worker in self._workers:
                alone = any(self._is_suspect(task) for _, task in worker.tasks)
                if self._waiting and len(worker.tasks) == depth and not alone and not worker.late:
                    task = self._waiting.popleft()
                    worker.began = worker.began if worker.tasks else time.monotonic()
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
        self._require_head()
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
        for worker in [worker for worker in self._workers if worker.tasks and worker.tasks[0][0] not in ready]:
            outcomes += self._watch(worker)
        return iter(outcomes)

    def _require_head(self) -> None:
        """Raise ClusterError if the head has not answered for too long. Workers go on without it for a while."""
        now = time.monotonic()
        if now < self._head_asked + _HEAD_ASK_S:
            return
        self._head_asked = now
        if head_answers(self._ray):
            self._head_gone = None
            return
        self._head_gone = self._head_gone or now
        if now >= self._head_gone + _HEAD_S:
            raise ClusterError(
                f"the cluster's head has not answered for {now - self._head_gone:.0f} s; what is done is kept: run the "
                "same command again, on a new cluster or without one"
            )

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
            answer = self._ray.get(reference)
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
        if isinstance(answer, UnmaskError):
            raise answer
        seconds, description = answer
        self._agree(description)
        self._lost_loading = 0
        self._workers.append(_Worker(actor, self._speed_of(description), paid_from=time.monotonic() - seconds))

    def _finish(self, worker: _Worker[_Task], reference: Any) -> list[tuple[_Task, Any]]:
        """Take the outcome of a task off its worker, or the worker off the pool if it is lost."""
        exceptions = self._ray.exceptions
        task = next(task for own, task in worker.tasks if own == reference)
        try:
            outcome = self._ray.get(reference)
        except exceptions.RayTaskError as error:
            self._take(worker, reference, task)
            return self._again(worker, task, f"raised {type(error.cause).__name__} in its worker")
        except exceptions.RayError as error:
            return self._lose(worker, f"killed its worker ({_reason(error)})")
        seconds, size = self._take(worker, reference, task), self._size_of(task)
        if not isinstance(outcome, UnmaskError):  # a refusal takes no time
            worker.pace.add(seconds, size)
            self._pace.add(seconds, size)
        return self._deliver(task, outcome)

    def _take(self, worker: _Worker[_Task], reference: Any, task: _Task) -> float:
        """Take a task off its worker, which now begins the next one; return the seconds that it took."""
        worker.tasks.remove((reference, task))
        now = time.monotonic()
        seconds, worker.began, worker.late = now - worker.began, now, False
        return seconds

    def _deliver(self, task: _Task, outcome: Any) -> list[tuple[_Task, Any]]:
        """Return the outcome of a task, unless another worker was faster."""
        name = self._name_of(task)
        if name not in self._open:
            return []
        self._open.discard(name)
        self._suspects.discard(name)
        self._waiting = deque(other for other in self._waiting if self._name_of(other) != name)
        return [(task, outcome)]

    def _watch(self, worker: _Worker[_Task]) -> list[tuple[_Task, Any]]:
        """Give the tasks of a worker that is late to others, and later give up the worker itself."""
        _, task = worker.tasks[0]
        name = self._name_of(task)
        limit = self._seconds_allowed(worker, self._size_of(task)) * _LATE_GROWTH ** self._attempts[name]
        seconds = time.monotonic() - worker.began
        if seconds <= limit:
            return []
        if worker.late:
            self._drop(worker)
            return []
        worker.late = True
        others = [other for _, other in list(worker.tasks)[1:] if self._is_missing(other, worker)]
        self._waiting.extendleft(reversed(others))
        self.redone += len(others)
        self._suspects.add(name)
        return self._again(worker, task, f"took its worker more than {limit:.0f} s")

    def _seconds_allowed(self, worker: _Worker[_Task], size: float) -> float:
        """Return the seconds after which a worker is late with its first attempt at a task."""
        pace = worker.pace if worker.pace.size else self._pace
        if pace.size:
            return max(_LATE_S, _LATE_FACTOR * pace.seconds / pace.size * size)
        return max(_FIRST_LATE_S, _FIRST_LATE_FACTOR * size / worker.speed)

    def _drop(self, worker: _Worker[_Task]) -> None:
        self._workers.remove(worker)
        self._alone_since = time.monotonic()
        self._lost_seconds += self._alone_since - worker.paid_from
        kill_actor(self._ray, worker.actor)

    def _lose(self, worker: _Worker[_Task], fault: str) -> list[tuple[_Task, Any]]:
        """Take a lost worker off the pool, and keep the outcomes that it delivered before."""
        self._drop(worker)
        outcomes: list[tuple[_Task, Any]] = []
        lost: list[_Task] = []
        for reference, task in worker.tasks:
            try:
                outcomes += self._deliver(task, self._ray.get(reference))
            except self._ray.exceptions.RayError:
                if self._is_missing(task, worker):
                    lost.append(task)
        self._suspects.update(map(self._name_of, lost))
        if len(lost) == 1:
            return outcomes + self._again(worker, lost[0], fault)
        # The outcome of the first may be lost on its way although the second killed the worker.
        self._waiting.extendleft(reversed(lost))
        self.redone += len(lost)
        return outcomes

    def _is_missing(self, task: _Task, worker: _Worker[_Task]) -> bool:
        """True if a task has no outcome, and no other worker computes it, except late ones."""
        name = self._name_of(task)
        on_time = [other for other in self._workers if other is not worker and not other.late]
        others = [task for other in on_time for _, task in other.tasks]
        return name in self._open and all(self._name_of(other) != name for other in [*self._waiting, *others])

    def _again(self, worker: _Worker[_Task], task: _Task, fault: str) -> list[tuple[_Task, Any]]:
        """Give a task that a worker failed at to another one, or to none if it had its attempts."""
        if not self._is_missing(task, worker):
            return []
        name = self._name_of(task)
        self._attempts[name] += 1
        if self._attempts[name] >= ATTEMPTS:
            return self._deliver(task, ClusterError(f"{name} {fault}, as in {ATTEMPTS - 1} attempts before"))
        self._waiting.appendleft(task)
        self.redone += 1
        return []

    def _fitting(self) -> int:
        """Return how many workers fit into the cluster as it is now, at least one."""
        total = resources(self._ray).total
        shares = [("CPU", self._options.worker_cpus), ("GPU", self._options.worker_gpus)]
        return max(1, min((int(total.get(name, 0) / share) for name, share in shares if share), default=1))

    def _no_room(self) -> ClusterError:
        return ClusterError(
            f"the cluster started no worker of {self._options.worker_cpus:g} CPUs and {self._options.worker_gpus:g} "
            f"GPUs in {self._options.worker_wait:g} s: it has {resources(self._ray)}; end other work there, add "
            "machines, or lower --worker-cpus"
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
