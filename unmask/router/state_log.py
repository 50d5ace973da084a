"""`StateLog`: lines for the operator about failures of an endpoint and changes of its breaker, and few of them.

A line has the kind of a failure, its HTTP status, and length and digest of the provider's words. The words themselves
may quote keys or texts, and are in no line. All times are handed in, in seconds of a monotonic clock.
"""

import logging
from collections import Counter, deque
from typing import Literal

from unmask.router.breaker import BreakerState
from unmask.router.signals import AttemptFailed

log = logging.getLogger("unmask")

FailureOf = Literal["request", "canaries"]

# Lines about one endpoint in this time. A provider that fails and recovers all day has no more of them.
MAX_LINES = 10
PERIOD_S = 600.0
# Failed requests of one kind have a line in this time: the first one, with the number of those before it.
REPEAT_S = 60.0

_STATES: dict[BreakerState, str] = {
    "closed": "its breaker is closed, and it gets requests again",
    "open": "its breaker is open, and it gets no requests",
    "half_open": "its breaker is half open, and canaries decide",
    "held": "its breaker is held open, since our account or configuration there is refused",
}


class StateLog:
    """The state of an endpoint as the log last had it.

    A change that the limit leaves out is looked at again with the next call, so the log ends with the true state.

    Args:
        provider, model: names.
    """

    def __init__(self, provider: str, model: str) -> None:
        self._subject = f"{provider} for {model}"
        self._breaker: BreakerState = "closed"
        self._is_silent = False
        self._cause, self._level = "", logging.WARNING  # of the last failure; the exception would keep texts in memory
        self._failed_at: dict[str, float] = {}
        self._unlogged: Counter[str] = Counter()
        self._lines: deque[float] = deque()

    def note_failure(self, failure: AttemptFailed, of: FailureOf, breaker: BreakerState, now: float) -> None:
        """Log a failure: with the change of the breaker that it caused, or else on its own.

        Args:
            failure: of a request or of canaries.
            of: which of them.
            breaker: its state after the failure.
            now: time.
        """
        self._cause = f"{failure.signal}: {failure}"
        self._level = logging.ERROR if failure.signal == "no_access" else logging.WARNING
        if breaker != self._breaker:
            self.note_breaker(breaker, now)
        elif of == "canaries":
            if not self._is_silent and self._has_room(now):
                self._is_silent = True
                log.log(self._level, "%s: canaries have no answer: %s", self._subject, self._cause)
        elif now - self._failed_at.get(failure.signal, float("-inf")) < REPEAT_S:
            self._unlogged[failure.signal] += 1
        else:
            self._failed_at[failure.signal] = now
            more = self._unlogged.pop(failure.signal, 0)
            since = f" ({more} more such failures since the last line)" if more else ""
            log.log(self._level, "%s: a request failed: %s%s", self._subject, self._cause, since)

    def note_breaker(self, breaker: BreakerState, now: float) -> None:
        """Log the state of the breaker if the log has another one. A recovery is never left out."""
        if breaker == self._breaker or not (breaker == "closed" or self._has_room(now)):
            return
        self._breaker = breaker
        if breaker in ("open", "held"):
            log.log(self._level, "%s: %s: %s", self._subject, _STATES[breaker], self._cause)
        else:
            log.warning("%s: %s", self._subject, _STATES[breaker])

    def note_canaries(self) -> None:
        """Log that canaries are answered again, if the log says that they are not."""
        if self._is_silent:
            self._is_silent = False
            log.warning("%s: canaries are answered again", self._subject)

    def _has_room(self, now: float) -> bool:
        """True, and count it, if there is room for one more line."""
        while self._lines and self._lines[0] <= now - PERIOD_S:
            self._lines.popleft()
        if len(self._lines) >= MAX_LINES:
            return False
        self._lines.append(now)
        return True
