"""Training on a cluster: Ray starts the processes that torchrun would start, and starts them again if one is lost.

Ray Train would need a folder that all machines share, and pandas and pydantic. Here only the placement of processes is
needed, and actors can be placed as well. `unmask.training` does the run itself, with its checkpoints.
"""

import os
import platform
import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unmask.cluster.connection import connected, kill_actor, resources
from unmask.cluster.options import ClusterOptions
from unmask.errors import ClusterError, UnmaskError
from unmask.training.loop import TrainingProgress
from unmask.training.recipe import Recipe
from unmask.training.train import TrainingResult, run_training

_TICK_S = 1.0
# Losses in a row without a step that no earlier attempt made. Then the run ends: it would lose its processes again.
_LOSSES = 3


@dataclass(frozen=True)
class _Place:
    node: str
    host: str
    address: str
    port: int  # free a moment ago, for the process of rank 0


@dataclass(frozen=True)
class _State:
    """New lines of the report since the last question, and the last step."""

    lines: tuple[str, ...]
    progress: TrainingProgress | None


class TrainingWorker:
    """An actor that is one process of a run."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._progress: TrainingProgress | None = None

    def place(self) -> _Place:
        """Return where the process is."""
        from ray import get_runtime_context
        from ray.util import get_node_ip_address

        address = get_node_ip_address()
        with socket.socket() as opened:
            opened.bind((address, 0))
            port = opened.getsockname()[1]
        return _Place(get_runtime_context().get_node_id(), platform.node(), address, port)

    def run(
        self, environment: dict[str, str], recipe: Recipe, data: Path, output: Path, resume: bool
    ) -> TrainingResult | UnmaskError:
        """Train as one of the processes that `environment` describes in torchrun's variables."""
        os.environ.update(environment)
        try:
            return run_training(
                recipe, data=data, output=output, resume=resume, progress=self._watch, log=self._lines.append
            )
        except UnmaskError as error:
            return error

    def state(self) -> _State:
        """Return what happened since the last call. It is answered while `run` runs."""
        lines, self._lines[:] = tuple(self._lines), []
        return _State(lines, self._progress)

    def _watch(self, progress: TrainingProgress) -> None:
        self._progress = progress


def train_on_cluster(
    options: ClusterOptions,
    recipe: Recipe,
    *,
    data: Path,
    output: Path,
    resume: bool = False,
    progress: Callable[[TrainingProgress], None] = lambda _: None,
    log: Callable[[str], None] = lambda _: None,
) -> TrainingResult:
    """Train by as many processes as `options` has workers; arguments as those of `run_training`.

    Paths are those of the machines of the cluster. If a process is lost, all are started again and the run continues
    at its last checkpoint.

    Raises:
        ClusterError: as `connected`; or there is no room; or processes are lost again and again.
        UnmaskError: as `run_training`.
    """
    assert options.cluster is not None
    losses, furthest, first_node = 0, 0, ""
    with connected(options.cluster) as ray:
        while True:
            group = _Group(ray, options, first_node)
            try:
                return group.run(recipe, data, output, resume, progress, log)
            except _Lost as lost:
                losses = 1 if lost.step > furthest else losses + 1
                furthest = max(furthest, lost.step)
                if losses >= _LOSSES:
                    place = f"and the run came no further than step {furthest}" if furthest else "before its first step"
                    raise ClusterError(
                        f"a process of the run was lost {losses} times {place}; the machine may lack memory, see "
                        "Ray's logs"
                    ) from lost
                place = f"at step {lost.step}" if lost.step else "before its first step"
                log(f"a process was lost {place}; the run continues at its last checkpoint")
                resume, first_node = True, group.first_node
            finally:
                group.close()


class _Lost(Exception):
    """A process ended; `step` is the last step that the run was seen to make, 0 if none."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step


class _Group:
    """The processes of one attempt. Those of a machine have neighbouring ranks; `first_node` has rank 0 if it can."""

    def __init__(self, ray: Any, options: ClusterOptions, first_node: str) -> None:
        self._ray = ray
        size = options.limits()[0]
        worker = ray.remote(TrainingWorker).options(
            num_cpus=options.worker_cpus, num_gpus=options.worker_gpus, max_restarts=0, max_concurrency=2
        )
        actors = [worker.remote() for _ in range(size)]
        self._actors = actors
        try:
            places = ray.get([actor.place.remote() for actor in actors], timeout=options.worker_wait)
        except ray.exceptions.RayError as error:
            self.close()
            total = resources(ray).total
            raise ClusterError(
                f"the cluster started less than {size} processes of {options.worker_cpus:g} CPUs and "
                f"{options.worker_gpus:g} GPUs in {options.worker_wait:g} s: it has {total.get('CPU', 0):g} CPUs and "
                f"{total.get('GPU', 0):g} GPUs; lower --workers, or add machines"
            ) from error
        order = sorted(range(size), key=lambda i: (places[i].node != first_node, places[i].node))
        self._actors = [actors[i] for i in order]
        self._places = [places[i] for i in order]
        self.first_node = self._places[0].node

    def run(
        self,
        recipe: Recipe,
        data: Path,
        output: Path,
        resume: bool,
        progress: Callable[[TrainingProgress], None],
        log: Callable[[str], None],
    ) -> TrainingResult:
        """Run to the end. Raises _Lost, or the error of a process."""
        first, step = self._actors[0], 0
        running = [
            actor.run.remote(environment, recipe, data, output, resume)
            for actor, environment in zip(self._actors, self._environments(recipe), strict=True)
        ]
        try:
            while True:
                ready, _ = self._ray.wait(running, num_returns=len(running), timeout=_TICK_S)
                state = self._ray.get(first.state.remote())
                for line in state.lines:
                    log(line)
                if state.progress is not None and state.progress.step > step:
                    step = state.progress.step
                    progress(state.progress)
                outcomes = self._ray.get(ready)
                for outcome in outcomes:
                    if isinstance(outcome, UnmaskError):
                        raise outcome
                if len(ready) == len(running):
                    return next(outcome for outcome in outcomes if outcome.is_main)
        except self._ray.exceptions.RayError as error:
            raise _Lost(step) from error

    def _environments(self, recipe: Recipe) -> list[dict[str, str]]:
        counts = Counter(place.node for place in self._places)
        if recipe.shard == "machine" and len(set(counts.values())) > 1:
            raise ClusterError(
                f'shard = "machine" needs equally many processes on each machine, and Ray placed '
                f"{sorted(counts.values())}; choose a number that fills the machines, or set shard = true"
            )
        return [
            {
                "RANK": str(rank),
                "WORLD_SIZE": str(len(self._places)),
                "LOCAL_RANK": "0",  # Ray shows each process only its own GPUs
                "LOCAL_WORLD_SIZE": str(counts[place.node]),
                "MASTER_ADDR": self._places[0].address,
                "MASTER_PORT": str(self._places[0].port),
            }
            for rank, place in enumerate(self._places)
        ]

    def close(self) -> None:
        """End the processes."""
        for actor in self._actors:
            kill_actor(self._ray, actor)
