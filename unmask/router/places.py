"""`Places`: HTTP requests that an endpoint takes at a time, shared fairly by the callers who wait for one.

A place that becomes free goes to the waiting caller who holds the fewest there, and among those to the one who was
served longest ago. So a caller with a thousand parts of a request gets at most half of the places while others wait,
and a single place changes hands with every request.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import count

# Share of the newest request in the usual time that a place is held.
_NEWEST_SHARE = 0.1

_LEAST_WAIT_S = 1e-6  # of a request that has to wait at all


class Place:
    """The right to one HTTP request, until it is released.

    Args:
        places: of the endpoint.
        caller: who holds it.
    """

    __slots__ = ("_is_held", "_since", "caller", "places")

    def __init__(self, places: "Places", caller: str) -> None:
        self.places, self.caller = places, caller
        self._since = time.monotonic()
        self._is_held = True

    def release(self) -> None:
        """Give it to whoever waits; nothing if that was done already."""
        if self._is_held:
            self._is_held = False
            self.places.take_back(self, time.monotonic() - self._since)


class _Waiter:
    """A request that waits for a place, at one endpoint or at several."""

    def __init__(self, caller: str) -> None:
        self.caller = caller
        self.place: Place | None = None
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class Places:
    """The places of one endpoint. Used in one event loop.

    Args:
        limit: returns how many there are now; `serve` must be called when it has risen.
    """

    def __init__(self, limit: Callable[[], int]) -> None:
        self._limit = limit
        self._held: Counter[str] = Counter()  # by caller; no zeros
        self._num_held = 0
        self._waiting: dict[str, dict[_Waiter, None]] = {}  # by caller, who comes first is first; no empty ones
        self._turns: dict[str, int] = {}  # caller -> number of the turn when it was served or came
        self._clock = count()
        self._usual_seconds: float | None = None

    @property
    def num_held(self) -> int:
        """Requests under way."""
        return self._num_held

    @property
    def num_waiting(self) -> int:
        """Requests that wait."""
        return sum(map(len, self._waiting.values()))

    def has_room(self) -> bool:
        """True if a request may begin at once."""
        return self._num_held < self._limit() and not self._waiting

    def wait_seconds(self, caller: str, usual_seconds: float) -> float:
        """Return the seconds after which one more request of a caller would have a place, as far as can be known.

        Args:
            caller: who asks.
            usual_seconds: of a request, where none has ended yet.
        """
        if self.has_room():
            return 0.0
        own = len(self._waiting.get(caller, ()))
        ahead = sum(min(len(waiters), own + 1) for other, waiters in self._waiting.items() if other != caller)
        held_for = usual_seconds if self._usual_seconds is None else self._usual_seconds
        return max(_LEAST_WAIT_S, held_for * (own + ahead + 1) / self._limit())

    def batch_seconds(self, requests: int) -> float:
        """Return the seconds that so many requests of one caller take who has all places; 0 where none has ended."""
        return (self._usual_seconds or 0.0) * -(-requests // self._limit())

    def take(self, caller: str) -> Place | None:
        """Return a place if one is free and nobody waits for it."""
        return self._give(caller) if self.has_room() else None

    async def obtain(self, caller: str, until: float) -> Place | None:
        """Return a place as soon as it is the caller's turn; None if that is not before `until`."""
        return self.take(caller) or await first_place([self], caller, until)

    def serve(self) -> None:
        """Give free places to those who wait."""
        while self._waiting and self._num_held < self._limit():
            caller = min(self._waiting, key=lambda one: (self._held[one], self._turns[one]))
            waiter = next(iter(self._waiting[caller]))
            self._leave(waiter)
            if waiter.place is None:  # it may have got one elsewhere in this turn of the loop
                waiter.place = self._give(caller)
                waiter.ready.set_result(None)

    def take_back(self, place: Place, seconds: float) -> None:
        """Count a place as free, which was held for so long. For `Place.release`."""
        before = seconds if self._usual_seconds is None else self._usual_seconds
        self._usual_seconds = before + _NEWEST_SHARE * (seconds - before)
        self._num_held -= 1
        self._held[place.caller] -= 1
        if not self._held[place.caller]:
            del self._held[place.caller]
        self.serve()
        self._forget(place.caller)

    def _give(self, caller: str) -> Place:
        self._num_held += 1
        self._held[caller] += 1
        self._turns[caller] = next(self._clock)
        return Place(self, caller)

    def _enter(self, waiter: _Waiter) -> None:
        self._waiting.setdefault(waiter.caller, {})[waiter] = None
        self._turns.setdefault(waiter.caller, next(self._clock))

    def _leave(self, waiter: _Waiter) -> None:
        waiters = self._waiting.get(waiter.caller, {})
        waiters.pop(waiter, None)
        if not waiters:
            self._waiting.pop(waiter.caller, None)

    def _forget(self, caller: str) -> None:
        """Drop the turn of a caller who has nothing here any more. One who comes again is the last to have come."""
        if caller not in self._held and caller not in self._waiting:
            self._turns.pop(caller, None)


async def first_place(choices: Sequence[Places], caller: str, until: float) -> Place | None:
    """Wait for a place at any of several endpoints. Returns None if none is the caller's turn before `until`.

    A caller who is cancelled leaves nothing behind: a place that it was given in that moment goes to the next one.

    Args:
        choices: places of the endpoints.
        caller: who waits.
        until: `time.monotonic()`.
    """
    waiter = _Waiter(caller)
    for places in choices:
        places._enter(waiter)
    try:
        await asyncio.wait([waiter.ready], timeout=max(0.0, until - time.monotonic()))
    except BaseException:
        if waiter.place is not None:
            waiter.place.release()
        raise
    finally:
        for places in choices:
            places._leave(waiter)
            places._forget(caller)
    return waiter.place
