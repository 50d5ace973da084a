"""Requests and tokens per minute, by the generic cell rate algorithm.

A bucket is one number: the moment by which everything taken so far would have flowed in evenly. Taking `n` of a
limit of `L` per minute moves it by 60 n / L seconds, and is refused if it would then lie more than a minute ahead.
So a quiet caller may use a whole minute's worth at once, and never more than that beyond the even flow.
"""

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from unmask.errors import RateLimited

_PERIOD_S = 60.0


@dataclass(frozen=True)
class Draw:
    """What to take from one bucket.

    Attributes:
        bucket: whose it is, such as "key:abc:tokens".
        limit: per minute.
        amount: how many; 0 only looks.
    """

    bucket: str
    limit: int
    amount: int


@dataclass(frozen=True)
class Level:
    """A bucket after a draw.

    Attributes:
        limit: per minute.
        remaining: how many could be taken at once now.
        reset_s: seconds until it is full again.
    """

    limit: int
    remaining: int
    reset_s: float


class Limiter(Protocol):
    """Where the buckets are. In this process (`LocalLimiter`), or shared by several."""

    async def take(self, draws: Sequence[Draw], kind: str) -> list[Level]:
        """Take all draws, or none of them.

        Args:
            kind: "requests" or "tokens", for the message.

        Raises:
            RateLimited: one bucket does not hold so much now.
        """
        ...


class LocalLimiter:
    """Buckets in this process. With several servers each has its own, so that a caller gets up to so many times more.

    Args:
        clock: seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._full_at: dict[str, float] = {}
        self._lock = threading.Lock()
        self._swept = clock()

    async def take(self, draws: Sequence[Draw], kind: str) -> list[Level]:
        """As `Limiter.take`."""
        return self.take_now(draws, kind)

    def take_now(self, draws: Sequence[Draw], kind: str) -> list[Level]:
        """As `Limiter.take`, for callers without an event loop."""
        with self._lock:
            now = self._clock()
            self._sweep(now)
            after: dict[str, float] = {}
            for draw in draws:
                start = max(after.get(draw.bucket, self._full_at.get(draw.bucket, now)), now)
                full_at = start + draw.amount * _PERIOD_S / draw.limit
                wait = full_at - now - _PERIOD_S
                # Sums of sixtieths are not exact; a millionth of a second is not worth a refusal.
                if wait > 1e-6:
                    raise _refused(draw, kind, wait, start - now)
                after[draw.bucket] = full_at
            self._full_at |= after
            return [_level(draw.limit, after[draw.bucket] - now) for draw in draws]

    def _sweep(self, now: float) -> None:
        """Forget full buckets: they are what a new one would be."""
        if now - self._swept >= _PERIOD_S:
            self._full_at = {bucket: full_at for bucket, full_at in self._full_at.items() if full_at > now}
            self._swept = now


def _level(limit: int, ahead: float) -> Level:
    return Level(limit, max(0, math.floor((_PERIOD_S - ahead) * limit / _PERIOD_S + 1e-6)), max(0.0, ahead))


def _refused(draw: Draw, kind: str, wait: float, ahead: float) -> RateLimited:
    unit = "RPM" if kind == "requests" else "TPM"
    if draw.amount > draw.limit:
        return RateLimited(
            f"Request too large on {kind} per min ({unit}): Limit {draw.limit}, Requested {draw.amount}. "
            "Send fewer at a time.",
            kind,
            None,
        )
    used = draw.limit - _level(draw.limit, ahead).remaining
    return RateLimited(
        f"Rate limit reached on {kind} per min ({unit}): Limit {draw.limit}, Used {used}, "
        f"Requested {draw.amount}. Please try again in {wait:.3g}s.",
        kind,
        wait,
    )
