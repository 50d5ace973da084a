"""`Breaker`: takes an endpoint out of traffic when it fails, and lets a canary decide when it comes back.

All times are handed in, in seconds of a monotonic clock.
"""

import random
from collections import deque
from typing import Literal

BreakerState = Literal["closed", "open", "half_open", "held"]

RUN = 5  # failures in a row
WINDOW_S = 30.0
MIN_REQUESTS = 10
MIN_SUCCESS = 0.8
FIRST_S = 5.0
MAX_S = 300.0
ALONE_MAX_S = 30.0


class Breaker:
    """State of one endpoint: closed (traffic), open (none), half-open (one canary), held (open: our account fails).

    Opens after `RUN` failures in a row, or when fewer than `MIN_SUCCESS` of at least `MIN_REQUESTS` outcomes within
    `WINDOW_S` were successes. Stays open for `FIRST_S`, twice as long each time, with jitter, up to `MAX_S`.

    Args:
        draw: for the jitter.
    """

    def __init__(self, draw: random.Random) -> None:
        self._draw = draw
        self._run = 0
        self._outcomes: deque[tuple[float, bool]] = deque()
        self._state: BreakerState = "closed"
        self._until = 0.0
        self._out_since = float("inf")
        self._times = 0
        self._is_held = False

    @property
    def state(self) -> BreakerState:
        """Its state."""
        return "held" if self._is_held and self._state == "open" else self._state

    @property
    def probe_at(self) -> float:
        """Time at which the next canary is due; infinity unless open or held."""
        return self._until if self._state == "open" else float("inf")

    def seconds_out(self, now: float) -> float:
        """Return the seconds since it last let traffic in; 0 while it does."""
        return max(0.0, now - self._out_since)

    def lets_in(self) -> bool:
        """True if traffic may go to the endpoint."""
        return self._state == "closed"

    def succeeded(self, now: float) -> None:
        """Count a good answer."""
        if self._state == "closed":
            self._run = 0
            self._add(now, True)

    def failed(self, now: float, *, in_run: bool = True, alone: bool = False) -> None:
        """Count a failure.

        Args:
            now: time.
            in_run: it counts in the run of failures; otherwise in the rate alone, as for a busy provider.
            alone: the model has no other endpoint, so this one is asked again sooner.
        """
        if self._state != "closed":
            return  # a request that began before it opened
        self._run += in_run
        self._add(now, False)
        good = sum(ok for _, ok in self._outcomes)
        too_many = len(self._outcomes) >= MIN_REQUESTS and good < MIN_SUCCESS * len(self._outcomes)
        if self._run >= RUN or too_many:
            self._open(now, alone=alone)

    def hold(self, now: float, *, alone: bool = False) -> None:
        """Open it at once: our account there or its configuration is wrong, which is seldom over soon.

        Canaries are due all the same. The refusal may have been a mistake of a moment.

        Args:
            now: time.
            alone: as for `failed`.
        """
        self._is_held = True
        if self._state == "closed":
            self._open(now, alone=alone)

    def probe(self, now: float) -> bool:
        """Return True if a canary is due now, and turn half-open: nobody else gets True until its outcome is known."""
        if self._state != "open" or now < self._until:
            return False
        self._state = "half_open"
        return True

    def probed(self, passed: bool, now: float, *, alone: bool = False) -> None:
        """Close it, or open it for longer, by the outcome of a canary.

        Args:
            passed: the canary's vector was right.
            now: time.
            alone: as for `failed`.
        """
        if self._state != "half_open":
            return
        if passed:
            self.close()
        else:
            self._open(now, alone=alone)

    def close(self) -> None:
        """Let traffic in again, with no memory of earlier failures."""
        self._state, self._times, self._run, self._is_held = "closed", 0, 0, False
        self._out_since = float("inf")
        self._outcomes.clear()

    def _add(self, now: float, ok: bool) -> None:
        self._outcomes.append((now, ok))
        while self._outcomes[0][0] <= now - WINDOW_S:
            self._outcomes.popleft()

    def _open(self, now: float, *, alone: bool) -> None:
        self._out_since = min(self._out_since, now)
        seconds = min(FIRST_S * 2**self._times, ALONE_MAX_S if alone else MAX_S)
        self._state, self._until = "open", now + seconds * self._draw.uniform(0.5, 1.0)
        self._times = min(self._times + 1, 10)
        self._run = 0
        self._outcomes.clear()
