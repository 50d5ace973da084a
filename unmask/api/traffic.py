"""What each model has answered lately: requests, tokens and latencies by stretches of time, since the start."""

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

STRETCH_S = 300
KEPT = 288  # stretches: a day

# Latencies fall into steps of a fifth, from a millisecond to beyond a minute; an estimate is off by a tenth.
_STEP = math.log(1.2)
_STEPS = 62


@dataclass
class Stretch:
    """One stretch of time of one model. `began` is in Unix seconds, a multiple of the stretch's length."""

    began: int
    requests: int = 0
    tokens: int = 0
    _latencies: list[int] = field(default_factory=lambda: [0] * (_STEPS + 1))

    def add(self, tokens: int, seconds: float) -> None:
        self.requests += 1
        self.tokens += tokens
        step = round(math.log(max(seconds, 0.001) / 0.001) / _STEP)
        self._latencies[min(step, _STEPS)] += 1

    def latency_ms(self, share: float) -> float:
        """The latency that this share of the requests did not exceed, in milliseconds, to about a tenth."""
        wanted, seen = share * self.requests, 0
        for step, count in enumerate(self._latencies):
            seen += count
            if seen >= wanted and count:
                return math.exp(step * _STEP)
        return 0.0


class History:
    """The last day of every model, within bounds: a stretch with no request takes no room.

    Args:
        clock: Unix seconds; for tests.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._models: dict[str, deque[Stretch]] = {}

    def add(self, model: str, tokens: int, seconds: float) -> None:
        """A request that a model has answered."""
        began = int(self._clock()) // STRETCH_S * STRETCH_S
        known = self._models.setdefault(model, deque(maxlen=KEPT))
        # A clock that was set back goes on in the stretch it had come to.
        if not known or known[-1].began < began:
            known.append(Stretch(began))
        known[-1].add(tokens, seconds)

    def of(self, model: str) -> list[Stretch]:
        """The stretches of the last day in which the model answered anything, oldest first."""
        since = self._clock() - KEPT * STRETCH_S
        return [stretch for stretch in self._models.get(model, ()) if stretch.began > since]
