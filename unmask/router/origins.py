"""`Origins`: notices when another server answers at a provider's address: cheap signs, long before a canary is due.

All times are handed in, in seconds of a monotonic clock.
"""

# A sign that was not seen for so long counts as a new one when it comes back: a provider may have gone back to an
# earlier version.
FORGET_S = 3600.0
# Seconds between two alarms. A full run costs thousands of tokens, and a provider may send another sign each time.
ALARM_S = 600.0
_MOST = 16


class Origins:
    """The signs of an endpoint's answers: its header `server`, and the model's name in the answer.

    Several servers behind one address have a sign each, so all signs of the last hour are known.
    """

    def __init__(self) -> None:
        self._last = ""
        self._seen_at: dict[str, float] = {}
        self._is_due = False
        self._next_alarm = float("-inf")

    def add(self, origin: str, now: float) -> bool:
        """Take the sign of an answer. Returns True if a new one has come, at most once in `ALARM_S`."""
        if origin != self._last or not self._seen_at:
            seen_at = self._seen_at.get(origin, float("-inf"))
            self._is_due |= bool(self._seen_at) and now - seen_at > FORGET_S
            self._last = origin
            if origin not in self._seen_at and len(self._seen_at) >= _MOST:
                del self._seen_at[min(self._seen_at, key=self._seen_at.__getitem__)]
        self._seen_at[origin] = now
        if not self._is_due or now < self._next_alarm:
            return False
        self._is_due, self._next_alarm = False, now + ALARM_S
        return True
