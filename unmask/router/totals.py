"""Totals since the process started, which `/metrics` shows as counters. Adding to them takes about a microsecond."""

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from unmask.accounts.costs import AttemptRecord, Reason
from unmask.errors import DeadlineExceeded, EngineError, NoConformingProvider, NoProvider, Overloaded, ProviderRefused

# Upper limits of the buckets of durations, in seconds: from a provider nearby to the longest deadline of a caller.
DURATION_LIMITS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

RefusalReason = Literal[
    "no_conforming_provider", "no_provider", "retry_budget", "overloaded", "deadline_exceeded", "other"
]
REFUSAL_REASONS: tuple[RefusalReason, ...] = get_args(RefusalReason)

_REASONS: dict[type[EngineError], RefusalReason] = {
    NoConformingProvider: "no_conforming_provider",
    NoProvider: "no_provider",
    ProviderRefused: "retry_budget",
    Overloaded: "overloaded",
    DeadlineExceeded: "deadline_exceeded",
}


class Durations:
    """A histogram of seconds."""

    def __init__(self) -> None:
        self._counts = [0] * (len(DURATION_LIMITS) + 1)
        self.sum = 0.0

    def add(self, seconds: float) -> None:
        """Count a duration."""
        self._counts[bisect_left(DURATION_LIMITS, seconds)] += 1
        self.sum += seconds

    def cumulative(self) -> list[tuple[str, int]]:
        """Return the number of durations up to each limit, as Prometheus writes them; the last one has all."""
        buckets, total = [], 0
        for limit, count in zip((*DURATION_LIMITS, float("inf")), self._counts, strict=True):
            total += count
            buckets.append(("+Inf" if limit == float("inf") else str(limit), total))
        return buckets


@dataclass(eq=False)
class AttemptTotals:
    """All attempts of this process at one endpoint.

    Attributes:
        attempts: number by outcome and reason, canaries included.
        seconds: durations of attempts for callers by outcome.
        tokens: of answers, by our count.
        their_tokens: of the same answers, by the provider's count; without those that it did not count.
    """

    attempts: Counter[tuple[str, Reason]] = field(default_factory=Counter)
    seconds: defaultdict[str, Durations] = field(default_factory=lambda: defaultdict(Durations))
    tokens: int = 0
    their_tokens: int = 0

    def add(self, attempt: AttemptRecord, seconds: float) -> None:
        """Count an attempt that has ended after so many seconds."""
        self.attempts[attempt.outcome, attempt.reason] += 1
        if attempt.reason != "probe":
            self.seconds[attempt.outcome].add(seconds)
        if attempt.outcome == "answered":
            self.tokens += attempt.tokens
            self.their_tokens += attempt.their_tokens or 0


@dataclass(eq=False)
class RoutingTotals:
    """The further attempts for requests of a model, and the requests that nobody answered.

    Attributes:
        retries: number by the outcome of the attempt before; "local" if this server's own engine had failed.
        hedges: number by the answer: True if it was used.
        refusals: number by reason.
    """

    retries: Counter[str] = field(default_factory=Counter)
    hedges: Counter[bool] = field(default_factory=Counter)
    refusals: Counter[RefusalReason] = field(default_factory=Counter)

    def add_attempts(self, attempts: Sequence[AttemptRecord]) -> None:
        """Count the retries and hedges among the attempts of a request, which are in the order in which they ended."""
        before = "local"
        for attempt in attempts:
            if attempt.reason == "retry":
                self.retries[before] += 1
            elif attempt.reason == "hedge":
                self.hedges[attempt.outcome == "answered"] += 1
            before = attempt.outcome

    def add_refusal(self, error: EngineError) -> None:
        """Count a request that was refused."""
        self.refusals[_REASONS.get(type(error), "other")] += 1
