"""Fairness and promises of an engine at twice the work that it can do in time, whatever computes for it.

The speed of the hands is set and their forwards are held back, so numbers of requests decide and no time does.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence

import numpy as np

from unmask.encoder import Prompt
from unmask.engine import Engine
from unmask.engine.engine import _SAFE_SHARE
from unmask.errors import Overloaded

# Seconds until the deadline of all requests, in which the engine can compute CAPACITY of them. None are waited for.
SECONDS = 6000
CAPACITY = 20
# Tokens of a pack. A request has several.
PACK_TOKENS = 256

Encode = Callable[[Sequence[Prompt]], Awaitable[np.ndarray]]


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what the worker does. It is a thread and sets no asyncio event."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.01)


async def vectors(engine: Engine, texts: list[str], **options) -> np.ndarray:
    return await engine.run(await engine.prepare(texts, truncate=True), **options)


def assume_speed(engine: Engine, tokens_per_second: float) -> None:
    """Take a speed for measured."""
    for hand_thread in engine._hand_threads:
        hand_thread.tokens_per_second = tokens_per_second / len(engine._hand_threads)


async def hold_all(engine: Engine) -> list[asyncio.Task[np.ndarray]]:
    """Give each hand a text, with closed gates. At the speed of before, no hand is late soon."""
    assume_speed(engine, 1.0)
    tasks = []
    for number in range(len(engine._hand_threads)):
        tasks.append(asyncio.create_task(vectors(engine, [f"{number} " + "held " * 50])))
        await until(lambda: sum(hand_thread.tokens > 0 for hand_thread in engine._hand_threads) == len(tasks))
    return tasks


async def prompts_of(engine: Engine) -> list[Prompt]:
    return await engine.prepare([f"{number} " + "word " * 58 for number in range(4)], truncate=True)


async def flood(
    engine: Engine, prompts: Sequence[Prompt], callers: Sequence[str], capacity: int = CAPACITY
) -> list[asyncio.Task[np.ndarray]]:
    """Send the prompts once for each caller, to an engine that can compute them `capacity` times in time."""
    tokens = sum(len(prompt.ids) for prompt in prompts)
    assume_speed(engine, ((capacity + 0.5) * tokens + engine.waiting_tokens()) / SECONDS / _SAFE_SHARE)
    deadline = time.monotonic() + SECONDS
    requests = [engine.run(prompts, deadline=deadline, caller=caller) for caller in callers]
    tasks = [asyncio.create_task(request) for request in requests]
    await asyncio.sleep(0)  # one turn of the loop, in which every request is let in or refused
    return tasks


def refusals(tasks: Sequence[asyncio.Task[np.ndarray]]) -> list[Overloaded]:
    """Return the errors of those that were refused at once; all of them say when to come again."""
    errors = [task.exception() for task in tasks if task.done()]
    refused = [error for error in errors if isinstance(error, Overloaded) and error.retry_after > 0]
    assert len(refused) == len(errors)
    return refused


async def assert_half_is_refused_at_once(engine: Engine, release: Callable[[], None], right: np.ndarray) -> None:
    """Of twice the work that is possible, half is refused before anything is computed, and the rest is done."""
    ahead = await hold_all(engine)
    prompts = await prompts_of(engine)
    tasks = await flood(engine, prompts, [""] * 2 * CAPACITY)
    refused = refusals(tasks)
    assert len(refused) == CAPACITY
    # A request that comes after this time, when as much of the queue is done, is let in, and one before it is not.
    for sooner, is_refused in ((50, True), (-50, False)):
        later = time.monotonic() + SECONDS + refused[-1].retry_after - sooner
        again = asyncio.create_task(engine.run(prompts, deadline=later))
        await asyncio.sleep(0)
        assert again.done() == is_refused
        tasks.append(again)
    refusals(tasks[-2:-1])
    release()
    done = await asyncio.gather(*(task for task in tasks if not task.done() or task.exception() is None))
    assert len(done) == CAPACITY + 1
    for answer in done:
        np.testing.assert_allclose(answer, right, rtol=0, atol=1e-5 * np.abs(right).max())
    await asyncio.gather(*ahead)


async def assert_one_caller_leaves_room(engine: Engine, release: Callable[[], None]) -> None:
    """A caller that sends twice what is possible gets three quarters of it, and another one is let in."""
    ahead = await hold_all(engine)
    prompts = await prompts_of(engine)
    *greedy, other = await flood(engine, prompts, ["a"] * 2 * CAPACITY + ["b"])
    refused = refusals(greedy)
    assert len(greedy) - len(refused) == CAPACITY * 3 // 4
    assert "of this caller" in str(refused[0])
    assert not other.done()
    release()
    await asyncio.gather(*ahead, other, *(task for task in greedy if not task.done()))


async def assert_equal_shares(engine: Engine, release: Callable[[], None]) -> None:
    """A second caller with half the work of the first is done when about as much of the first one's is done."""
    ahead = await hold_all(engine)
    prompts = await prompts_of(engine)
    callers = ["a"] * 120 + ["b"] * 60
    order: list[str] = []
    tasks = await flood(engine, prompts[:1], callers, capacity=200)
    for caller, task in zip(callers, tasks, strict=True):
        task.add_done_callback(lambda _, caller=caller: order.append(caller))
    assert not refusals(tasks)
    release()
    await asyncio.gather(*ahead, *tasks)
    done = order[: len(order) - order[::-1].index("b")].count("a")
    assert 45 <= done <= 75  # 60, but for what is chosen together for its length
