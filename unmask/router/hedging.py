"""Hedging: when an answer takes longer than almost all others, another provider is asked as well. The first one counts.

A hedge costs money twice and could finish off providers that are busy, so `ModelEndpoints` sets many conditions.
All times are handed in, in seconds of a monotonic clock.
"""

import asyncio
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

SHARE = 0.05  # of a model's tokens
MAX_TOKENS = 2048
MIN_SAMPLES = 100
MIN_DELAY_S = 0.045

_BUCKETS = (64, 512, MAX_TOKENS)  # tokens of a request
_QUANTILE = 0.95
_SAMPLES = 256


class UsualSeconds:
    """Durations of an endpoint's last answers, by the size of the request."""

    def __init__(self) -> None:
        self._seconds = [deque[float](maxlen=_SAMPLES) for _ in _BUCKETS]

    def add(self, tokens: int, seconds: float) -> None:
        """Take the duration of an answer."""
        if tokens <= MAX_TOKENS:
            self._seconds[bisect_left(_BUCKETS, tokens)].append(seconds)

    def hedge_delay(self, tokens: int) -> float | None:
        """Return the seconds within which 95 % of requests of this size are answered; None if too few are known."""
        if tokens > MAX_TOKENS:
            return None
        seconds = self._seconds[bisect_left(_BUCKETS, tokens)]
        if len(seconds) < MIN_SAMPLES:
            return None
        return max(MIN_DELAY_S, sorted(seconds)[int(_QUANTILE * len(seconds))])


async def first_result(
    first: Coroutine[Any, Any, T], delay: float, second: Callable[[], Coroutine[Any, Any, T] | None]
) -> T:
    """Return the first result that is not None, and cancel whatever else is under way.

    Args:
        first: work to begin at once.
        delay: seconds after which `second` is called if there is no result.
        second: returns the other work; None for none after all.

    Raises:
        Exception: that of the work that failed, if there is no result; of two, that of the later one.
    """
    tasks = [asyncio.ensure_future(first)]
    failed: asyncio.Task[T] | None = None
    try:
        done, _ = await asyncio.wait(tasks, timeout=delay)
        if not done and (other := second()) is not None:
            tasks.append(asyncio.ensure_future(other))
        pending = set(tasks)
        while True:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            ended = [task for task in tasks if task in done]
            good = [task for task in ended if not task.exception() and task.result() is not None]
            if good:
                return good[0].result()
            failed = next((task for task in ended if task.exception()), failed)
            if not pending:
                return (failed or ended[0]).result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
