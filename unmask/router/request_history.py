"""`RequestHistory`: outcomes, latencies and speed of the last requests to an endpoint, in bounded memory."""

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from unmask.router.recent_intervals import RecentIntervals
from unmask.router.signals import SignalName

Outcome = Literal["answered", "discarded"] | SignalName

DAY_S = 24 * 3600
_INTERVAL_S = 60
_LATENCY_S = 30 * 60.0
_MAX_ANSWERS = 20_000  # of which percentiles are computed; at a high rate these are the newest of the 30 minutes
_MIN_REQUESTS = 100  # below this, an uptime would be chance

# Outcomes that say nothing about the provider's health: it was busy, or we or the caller were at fault.
_NOT_COUNTED: frozenset[Outcome] = frozenset({"rate_limited", "rejected", "cancelled", "discarded"})


@dataclass(frozen=True)
class Percentiles:
    """Percentiles of some measure; None where there was no request."""

    p50: float
    p75: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Percentiles | None":
        """Compute the percentiles of values; None if there are none."""
        if not values:
            return None
        return cls(*(round(float(value), 4) for value in np.percentile(values, (50, 75, 90, 99))))


@dataclass
class _Minute:
    start: int
    outcomes: Counter[Outcome] = field(default_factory=Counter)


class _RecentAnswer(NamedTuple):
    at: float
    seconds: float
    tokens: int


class RequestHistory:
    """The last day of one endpoint. Times are those of `time.monotonic()`.

    Outcomes are counted by the minute: right at any rate, and a period may include up to a minute more than it says.
    """

    def __init__(self) -> None:
        # A day touches one minute more than it has.
        self._minutes = RecentIntervals(_Minute, _INTERVAL_S, DAY_S // _INTERVAL_S + 1)
        self._answers: deque[_RecentAnswer] = deque(maxlen=_MAX_ANSWERS)

    def add(self, outcome: Outcome, tokens: int, seconds: float, now: float) -> None:
        """Count a request that has just ended."""
        self._minutes.current(now).outcomes[outcome] += 1
        if outcome == "answered":
            self._answers.append(_RecentAnswer(now, seconds, tokens))

    def outcomes(self, seconds: float, now: float) -> Counter[Outcome]:
        """Return the number of requests of the last seconds by outcome."""
        total: Counter[Outcome] = Counter()
        for minute in self._minutes.started_after(now - seconds - _INTERVAL_S):
            total.update(minute.outcomes)
        return total

    def uptime(self, seconds: float, now: float) -> float | None:
        """Return the share of good answers in the last seconds; None for fewer than 100 requests."""
        counts = self.outcomes(seconds, now)
        requests = sum(count for outcome, count in counts.items() if outcome not in _NOT_COUNTED)
        return None if requests < _MIN_REQUESTS else round(counts["answered"] / requests, 4)

    def latency(self, now: float) -> Percentiles | None:
        """Return percentiles of the seconds of the answers of the last 30 minutes."""
        return Percentiles.of([answer.seconds for answer in self._recent_answers(now)])

    def throughput(self, now: float) -> Percentiles | None:
        """Return percentiles of the tokens per second of the answers of the last 30 minutes."""
        return Percentiles.of([answer.tokens / max(answer.seconds, 1e-6) for answer in self._recent_answers(now)])

    def _recent_answers(self, now: float) -> list[_RecentAnswer]:
        return [answer for answer in self._answers if answer.at > now - _LATENCY_S]
