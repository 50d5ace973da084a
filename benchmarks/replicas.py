"""Replicas: what one adds to a short request, and whether anybody notices that they are killed and frozen.

    python benchmarks/replicas.py [--pairs 500] [--requests 1000] [--callers 8] [--replicas 2] [--fault-every 5]

The first part sends a short request to an engine of this process and to one with a replica on Ray, in turns.
The second sends requests from many callers while a replica is killed (SIGKILL), stopped for a while (SIGSTOP, SIGCONT)
or stopped for good at random moments. A vector that differs from this process's in one bit counts as wrong.
"""

import argparse
import asyncio
import os
import random
import signal
import statistics
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch

from unmask.cluster.connection import connected
from unmask.cluster.options import ReplicaOptions
from unmask.cluster.replicas import ReplicaHand, open_replicas
from unmask.encoder import Encoder, LoadOptions
from unmask.encoder.precision_choices import processor_name
from unmask.engine import Engine
from unmask.errors import EngineError

TEXT = "A ferry leaves the small harbour twice a day."
LONGEST_FREEZE_S = 8.0


def open_engine(model: str, replicas: int) -> tuple[Engine, list[ReplicaHand]]:
    """Return an engine whose model is computed by replicas, and its hands."""
    load = partial(Encoder.load, model, dtype="float32")
    options = ReplicaOptions(replicas=str(replicas))
    encoder, group = open_replicas(model, LoadOptions(dtype="float32"), load, options)
    return Engine(encoder, hands=group.hands), group.hands


async def measure_hop(here: Engine, there: Engine, pairs: int) -> None:
    """Print the time that a replica adds to a short request."""
    prompts = await here.prepare([TEXT])
    times: dict[str, list[float]] = {"here": [], "replica": []}
    processor: dict[str, list[float]] = {"here": [], "replica": []}
    for turn in range(pairs + 20):
        for name, engine in (("here", here), ("replica", there)):
            began, spent = time.perf_counter(), time.process_time()
            await engine.run(prompts)
            if turn >= 20:  # the first ones warm up
                times[name].append(1000 * (time.perf_counter() - began))
                processor[name].append(1000 * (time.process_time() - spent))
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, values in times.items():
        p90, spent = statistics.quantiles(values, n=10)[-1], statistics.median(processor[name])
        print(f"{name}: median {medians[name]:.2f} ms, p90 {p90:.2f} ms, processor time here {spent:.2f} ms")
    print(f"added by a replica: {medians['replica'] - medians['here']:.2f} ms in the median of {pairs} pairs")


@dataclass
class Faults:
    """Faults made at random until `stop` is set, with their counts."""

    hands: list[ReplicaHand]
    every_s: float
    draw: random.Random
    stop: threading.Event = field(default_factory=threading.Event)
    counts: dict[str, int] = field(default_factory=lambda: {"killed": 0, "frozen for a while": 0, "frozen for good": 0})

    def run(self) -> None:
        """Make faults."""
        while not self.stop.wait(self.draw.uniform(0, 2 * self.every_s)):
            ready = [hand for hand in self.hands if hand.state == "ready"]
            if not ready:
                continue
            process = int(self.draw.choice(ready).place.rpartition(":")[2])
            kind = self.draw.choice(list(self.counts))
            self.counts[kind] += 1
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL if kind == "killed" else signal.SIGSTOP)
                if kind == "frozen for a while":
                    self.stop.wait(self.draw.uniform(0, LONGEST_FREEZE_S))
                    os.kill(process, signal.SIGCONT)


async def measure_faults(engine: Engine, encoder: Encoder, arguments: argparse.Namespace, faults: Faults) -> int:
    """Send requests while faults are made; print and return how many failed or were wrong."""
    draw, failed, mistakes = random.Random(arguments.seed), 0, 0
    seconds: list[float] = []
    works = [
        [f"{TEXT} {number}.{i}" * draw.choice((1, 3, 20)) for i in range(draw.choice((1, 4, 32)))]
        for number in range(arguments.requests)
    ]
    work = iter(works)

    async def caller(name: str) -> None:
        nonlocal failed, mistakes
        for texts in work:
            began = time.monotonic()
            prompts = await engine.prepare(texts, truncate=True)
            try:
                vectors = await engine.run(prompts, deadline=began + arguments.deadline, caller=name)
            except EngineError as error:
                failed += 1
                print(f"failed: {error}")
                continue
            seconds.append(time.monotonic() - began)
            mistakes += not np.array_equal(vectors, await asyncio.to_thread(encoder.encode, texts))

    thread = threading.Thread(target=faults.run, daemon=True)
    thread.start()
    await asyncio.gather(*(caller(f"caller {number}") for number in range(arguments.callers)))
    faults.stop.set()
    thread.join()
    made = ", ".join(f"{count} {kind}" for kind, count in faults.counts.items())
    print(f"{arguments.requests} requests, replicas {made}: {failed} failed, {mistakes} wrong")
    if seconds:
        print(f"seconds: median {statistics.median(seconds):.2f}, longest {max(seconds):.2f}")
    for hand in engine.hands():
        print(f"{hand.name}: {hand.state}, forwards {hand.forwards}")
    return failed + mistakes


def main() -> int:
    """Parse the arguments, and measure. The exit code is 1 if a request failed or was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(Path(__file__).parent.parent / "tests" / "golden" / "tiny_llama"))
    parser.add_argument("--cluster", default="local", help="auto, HOST:PORT, or local")
    parser.add_argument("--pairs", type=int, default=500)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--callers", type=int, default=8)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--fault-every", type=float, default=5.0, help="mean seconds between two faults")
    parser.add_argument("--deadline", type=float, default=120.0, help="seconds that a request may take")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(processor_name())
    torch.set_num_threads(1)  # as a replica of one processor has
    encoder = Encoder.load(arguments.model, dtype="float32")
    with connected(arguments.cluster):
        here, (there, _) = Engine(encoder), open_engine(arguments.model, 1)
        asyncio.run(measure_hop(here, there, arguments.pairs))
        here.close()
        there.close()
        engine, hands = open_engine(arguments.model, arguments.replicas)
        faults = Faults(hands, arguments.fault_every, random.Random(arguments.seed))
        try:
            return 1 if asyncio.run(measure_faults(engine, encoder, arguments, faults)) else 0
        finally:
            engine.close(0)


if __name__ == "__main__":
    sys.exit(main())
