"""Requests, tokens and latencies of each model by intervals of five minutes, for the last day."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from unmask.router.recent_intervals import RecentIntervals

INTERVAL_S = 300
MAX_INTERVALS = 288  # a day

# Buckets of latencies grow by a fifth, from a millisecond to beyond a minute; an estimate is off by at most a tenth.
_LOG_GROWTH = math.log(1.2)
_NUM_BUCKETS = 62


@dataclass
class TrafficInterval:
    """Counters of one model in one interval. `start` is in Unix seconds, a multiple of `INTERVAL_S`."""

    start: int
    requests: int = 0
    tokens: int = 0
    _latencies: list[int] = field(default_factory=lambda: [0] * (_NUM_BUCKETS + 1))

    def add(self, tokens: int, seconds: float) -> None:
        self.requests += 1
        self.tokens += tokens
        bucket = round(math.log(max(seconds, 0.001) / 0.001) / _LOG_GROWTH)
        self._latencies[min(bucket, _NUM_BUCKETS)] += 1

    def latency_ms(self, quantile: float) -> float:
        """Return a quantile of the latencies in milliseconds, accurate to about a tenth."""
        rank, total = quantile * self.requests, 0
        for bucket, count in enumerate(self._latencies):
            total += count
            if total >= rank and count:
                return math.exp(bucket * _LOG_GROWTH)
        return 0.0


class TrafficHistory:
    """The last day of every model, in bounded memory. Intervals without a request are not stored.

    Args:
        clock: returns Unix seconds; replaced in tests.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._models: dict[str, RecentIntervals[TrafficInterval]] = {}

    def add(self, model: str, tokens: int, seconds: float) -> None:
        """Add a request that a model has answered."""
        if model not in self._models:
            self._models[model] = RecentIntervals(TrafficInterval, INTERVAL_S, MAX_INTERVALS)
        self._models[model].current(self._clock()).add(tokens, seconds)

    def of(self, model: str) -> list[TrafficInterval]:
        """Return the intervals of the last day in which the model answered a request, oldest first."""
        intervals = self._models.get(model)
        return [] if intervals is None else intervals.started_after(self._clock() - MAX_INTERVALS * INTERVAL_S)
