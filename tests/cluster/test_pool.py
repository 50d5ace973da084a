"""The pool alone, on a stand-in for Ray with its own clock: whatever becomes of workers, a task has one outcome."""

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask.cluster import pool as pool_module
from unmask.cluster.connection import Resources
from unmask.cluster.options import ClusterOptions
from unmask.cluster.pool import ATTEMPTS, WorkerPool
from unmask.errors import ClusterError

# Fates of an attempt at a task: it takes as long as others, kills its worker, never ends, or takes long.
FATES = ("fine", "killed", "hangs", "long")
TASK_S, LONG_S = 30.0, 400.0


class RayError(Exception):
    """As Ray's, where a worker is lost."""


class RayTaskError(RayError):
    """As Ray's, where a task raised."""


@dataclass(eq=False)
class Reference:
    """A result that comes at a time."""

    at: float
    value: Any


@dataclass(eq=False)
class Actor:
    """A worker that computes one task after the other, from the fates that its tasks have."""

    cluster: "StandIn"
    free_at: float = 0.0
    answers: list[Reference] = field(default_factory=list)

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=lambda *tasks: self._call(method, *tasks))

    def _call(self, method: str, task: int | None = None) -> Reference:
        if task is None:
            return Reference(0.0, (0.0, "a description"))
        fate = self.cluster.fate_of(task)
        began = max(self.free_at, self.cluster.now)
        seconds = {"fine": TASK_S, "killed": TASK_S / 2, "hangs": float("inf"), "long": LONG_S}[fate]
        answer = Reference(began + seconds, RayError() if fate == "killed" else task * 10)
        self.free_at = float("inf") if fate == "killed" else answer.at
        self.answers.append(answer)
        if fate == "killed":  # with all that waits there
            self.cluster.deaths.append((answer.at, self))
        elif self.free_at == float("inf"):
            for at, actor in self.cluster.deaths:
                if actor is self:
                    answer.at, answer.value = at, RayError()
        return answer


class StandIn:
    """Stands in for the part of the module ray that the pool uses."""

    def __init__(self, fates: dict[int, list[str]]) -> None:
        self.exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)
        self.now = 0.0
        self.deaths: list[tuple[float, Actor]] = []
        self._fates = {task: deque(names) for task, names in fates.items()}

    def monotonic(self) -> float:
        return self.now

    def fate_of(self, task: int) -> str:
        return self._fates[task].popleft() if self._fates[task] else "fine"

    def remote(self, _: type) -> Any:
        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda: Actor(self)))

    def wait(self, references: list[Reference], num_returns: int, timeout: float) -> tuple[list[Reference], list[Any]]:
        if timeout:
            self.now = max(self.now, min([self.now + timeout, *(reference.at for reference in references)]))
        ready = [reference for reference in references if reference.at <= self.now]
        return ready[:num_returns], []

    def get(self, reference: Reference) -> Any:
        assert reference.at <= self.now, "the pool would wait for a worker that may be lost"
        if isinstance(reference.value, Exception):
            raise reference.value
        return reference.value

    def kill(self, actor: Actor) -> None:
        for answer in actor.answers:
            if answer.at > self.now:
                answer.at, answer.value = self.now, RayError()


def outcomes_of(fates: dict[int, list[str]], workers: str, patch: pytest.MonkeyPatch) -> tuple[StandIn, list[Any], int]:
    """Run tasks whose attempts have these fates; return the stand-in, the outcomes, and how many were redone."""
    ray = StandIn(fates)
    patch.setattr(pool_module, "time", ray)
    patch.setattr(pool_module, "head_answers", lambda _: True)
    patch.setattr(pool_module, "resources", lambda _: Resources({"CPU": 4.0}, {}))
    options = ClusterOptions(cluster="auto", workers=workers)
    pool = WorkerPool[int](ray, object, (), options, str, lambda _: 1.0, lambda _: None, lambda _: 1 / TASK_S)
    with pool:
        tasks: Iterator[int] = iter(sorted(fates))
        return ray, list(pool.outcomes(tasks, "compute")), pool.redone


@settings(deadline=None)
@given(st.lists(st.lists(st.sampled_from(FATES), max_size=3), max_size=12), st.sampled_from(["1", "2", "1:4"]))
def test_every_task_has_one_outcome(fates: list[list[str]], workers: str) -> None:
    by_task = {0: [], **dict(enumerate(fates, 1))}
    with pytest.MonkeyPatch.context() as patch:
        _, outcomes, _ = outcomes_of(by_task, workers, patch)
    assert Counter(task for task, _ in outcomes) == dict.fromkeys(by_task, 1)
    for task, outcome in outcomes:
        if isinstance(outcome, ClusterError):
            assert len([fate for fate in by_task[task] if fate != "fine"]) >= ATTEMPTS
        else:
            assert outcome == task * 10


def test_the_tasks_of_a_worker_that_hangs_are_done_elsewhere_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    fates = {task: ["hangs"] if task == 3 else [] for task in range(20)}
    ray, outcomes, redone = outcomes_of(fates, "2", monkeypatch)
    assert sorted(outcomes) == [(task, task * 10) for task in range(20)]
    assert 1 <= redone <= 2
    # Ten tasks each, a wait of three times a task, and the second task of that worker once more.
    assert ray.now <= 20 * TASK_S


def test_a_task_that_always_hangs_is_named_and_one_that_is_long_is_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    fates = {task: [] for task in range(8)} | {2: ["hangs"] * ATTEMPTS, 5: ["long"] * ATTEMPTS}
    _, outcomes, _ = outcomes_of(fates, "2", monkeypatch)
    by_task = dict(outcomes)
    assert isinstance(by_task[2], ClusterError)
    assert str(by_task[2]).startswith("2 took its worker more than ")
    assert by_task[5] == 50


def test_a_single_worker_that_hangs_in_its_first_task_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    fates = {task: ["hangs"] if task == 0 else [] for task in range(4)}
    ray, outcomes, redone = outcomes_of(fates, "1", monkeypatch)
    assert sorted(outcomes) == [(task, task * 10) for task in range(4)]
    assert redone == 2  # it, and the one that waited behind it
    # Late by its speed at the start, and given up after as long again and more.
    first = pool_module._FIRST_LATE_FACTOR * TASK_S
    assert first < ray.now <= pool_module._LATE_GROWTH * first + 5 * TASK_S
