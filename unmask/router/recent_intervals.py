"""`RecentIntervals`: counters by intervals of a fixed length, in bounded memory at any rate of requests."""

from collections import deque
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar


class Interval(Protocol):
    """Counters of one interval. `start` is in seconds, a multiple of the interval's length."""

    start: int


IntervalType = TypeVar("IntervalType", bound=Interval)


class RecentIntervals(Generic[IntervalType]):
    """The newest intervals, oldest first. Those without a request are not stored.

    Args:
        new: makes the counters of an interval from its start.
        seconds: length of an interval.
        limit: number of intervals that are kept.
    """

    def __init__(self, new: Callable[[int], IntervalType], seconds: int, limit: int) -> None:
        self._new, self.seconds = new, seconds
        self._intervals: deque[IntervalType] = deque(maxlen=limit)

    def current(self, now: float) -> IntervalType:
        """Return the interval that `now` falls in. After a clock was set back, this is the newest one."""
        start = int(now) // self.seconds * self.seconds
        if not self._intervals or self._intervals[-1].start < start:
            self._intervals.append(self._new(start))
        return self._intervals[-1]

    def started_after(self, since: float) -> list[IntervalType]:
        """Return the intervals that started after `since`, oldest first."""
        return [interval for interval in self._intervals if interval.start > since]
