"""The waiting line of an engine: fair between callers, and quick to give a well-filled pack.

Order is start-time fair queueing (Goyal, Vin, Cheng 1996) over tokens, on two levels: callers share the model
equally, and so do the requests of one caller among themselves. A request of 2,048 texts and a single text overtake
each other in small steps, whoever sent them, and neither starves.

What goes together is then chosen from a short horizon of that order: first what has waited too long, then what is
nearest in length to the head of the line. Equal lengths share an attention kernel.

Fairness lets the late overtake the early, so it must not break a promise: who was let in with a deadline keeps it.
Before a forward starts, the line asks whether everybody else could still be served in time after it, earliest deadline
first (if that order is late, every order is: Jackson 1955). If not, the earliest deadlines go instead.
"""

import bisect
import heapq
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from unmask.encoder import Prompt


@dataclass(eq=False, slots=True)
class QueuedRequest:
    """One caller's prompts and the vectors they become.

    Attributes:
        deadline: `time.monotonic()` after which nobody wants the result.
        waiting: its tokens still in line.
        unfinished: its prompts without a vector yet.
        ended: it has its result, or will get none.
        done: called once, from the worker's thread, with None or the error that ended the request.
    """

    prompts: list[Prompt]
    vectors: np.ndarray
    caller: str
    arrived: float
    deadline: float
    done: Callable[[BaseException | None], None]
    waiting: int = 0
    unfinished: int = 0
    ended: bool = False


@dataclass(order=True, slots=True)
class QueuedPrompt:
    """One prompt in line. Sorted by its fair tag among its caller's requests, then by arrival."""

    tag: float
    order: int
    request: QueuedRequest = field(compare=False)
    index: int = field(compare=False)

    @property
    def prompt(self) -> Prompt:
        return self.request.prompts[self.index]

    @property
    def length(self) -> int:
        return len(self.prompt.ids)


@dataclass(eq=False, slots=True)
class _CallerQueue:
    """One caller's own line.

    Attributes:
        served: tokens it was given, on the queue's clock.
        clock: tag of its last sequence that went; where its next request begins.
    """

    served: float
    clock: float = 0.0
    line: list[QueuedPrompt] = field(default_factory=list)


class FairQueue:
    """Not locked: the engine holds its lock around every call. `tokens` is what waits for requests still wanted.

    Args:
        horizon: how many forwards' worth of tokens to look over when choosing neighbours by length.
        max_age: seconds after which a sequence goes with the next forward, whatever its length.
    """

    def __init__(self, horizon: int = 4, max_age: float = 0.5) -> None:
        self.tokens = 0
        self._horizon, self._max_age = horizon, max_age
        self._callers: dict[str, _CallerQueue] = {}
        self._due: list[QueuedRequest] = []  # by deadline; `take` removes those without waiting prompts
        self._clock = 0.0
        self._order = itertools.count()

    def __len__(self) -> int:
        return sum(len(caller.line) for caller in self._callers.values())

    def add(self, request: QueuedRequest) -> None:
        """Put all prompts of a request in line."""
        caller = self._callers.setdefault(request.caller, _CallerQueue(self._clock))
        if not caller.line:
            caller.served = max(caller.served, self._clock)  # time spent away earns nothing
        tag = caller.clock
        for index, prompt in enumerate(request.prompts):
            heapq.heappush(caller.line, QueuedPrompt(tag, next(self._order), request, index))
            tag += len(prompt.ids)
        request.waiting = sum(len(prompt.ids) for prompt in request.prompts)
        self.tokens += request.waiting
        bisect.insort(self._due, request, key=_deadline)

    def lateness(self, own: int, deadline: float, *, now: float, rate: float, running: int = 0) -> float:
        """Seconds by which somebody would be late if `own` more tokens came, due by `deadline`; at most 0 if nobody.

        Args:
            rate: tokens per second that can be counted on.
            running: tokens of the forward that is under way.
        """
        return max(self._lateness(now, rate, running, own=(own, deadline)), default=(-float("inf"), 0))[0]

    def queued_tokens(self, caller: str) -> int:
        """A caller's tokens in line."""
        return sum(request.waiting for request in self._due if request.caller == caller)

    def num_callers(self) -> int:
        """How many callers wait for something."""
        return len({request.caller for request in self.requests()})

    def _lateness(
        self,
        now: float,
        rate: float,
        running: int,
        *,
        own: tuple[int, float] = (0, float("inf")),
        taken: Mapping[int, int] | None = None,
    ) -> list[tuple[float, int]]:
        """(seconds late, place in the line of deadlines) of each who waits, served by earliest deadline.

        Those before `own` in that order are left out: it does not touch them. So is whoever could not be served in
        time if the whole model were theirs: nothing is owed to them that could still be given.
        """
        found: list[tuple[float, int]] = []
        tokens, extra = running, own[0]
        for place, request in enumerate(self._due):
            waiting = request.waiting - (taken.get(id(request), 0) if taken else 0)
            left = request.deadline - now
            if not request.waiting or waiting > left * rate:
                continue
            if not waiting:  # all of it is taken, and has its vectors when that forward ends
                found.append((running / rate - left, place))
                continue
            if extra and request.deadline > own[1]:
                tokens += extra
                found.append((tokens / rate - (own[1] - now), place))
                extra = 0
            tokens += waiting
            if not extra:
                found.append((tokens / rate - left, place))
        if extra:
            found.append(((tokens + extra) / rate - (own[1] - now), len(self._due)))
        return found

    def take(self, budget: int, now: float, *, rate: float | None = None) -> list[QueuedPrompt]:
        """Remove and return what the next forward computes: at most `budget` tokens, or one sequence that is longer.

        Sequences of requests that have ended are dropped on the way. Longest first, equal lengths adjacent.

        Args:
            rate: tokens per second that can be counted on; None: not known, and no deadline is looked at.
        """
        self._due = [request for request in self._due if request.waiting]
        chosen = self._fair_choice(budget, now)
        if chosen and rate:
            pressed = self._pressed(chosen, now, rate)
            if pressed:
                for sequence in chosen:
                    self._put_back(sequence)
                chosen = self._earliest(pressed, budget, now, rate)
        for sequence in chosen:
            caller = self._callers[sequence.request.caller]
            caller.clock = max(caller.clock, sequence.tag)
            sequence.request.waiting -= sequence.length
            self.tokens -= sequence.length
        self._forget_idle()
        return sorted(chosen, key=lambda sequence: -sequence.length)

    def _pressed(self, chosen: list[QueuedPrompt], now: float, rate: float) -> list[QueuedRequest]:
        """Who must go before `chosen` because somebody would be late after it: all up to the first of those."""
        taken: dict[int, int] = {}
        for sequence in chosen:
            taken[id(sequence.request)] = taken.get(id(sequence.request), 0) + sequence.length
        after = self._lateness(now, rate, sum(taken.values()), taken=taken)
        return next((self._due[: place + 1] for late, place in after if late > 0), [])

    def _earliest(self, requests: list[QueuedRequest], budget: int, now: float, rate: float) -> list[QueuedPrompt]:
        """A forward of theirs, strictly by deadline, and over before the first of them."""
        theirs = {id(request) for request in requests}
        lines = [caller.line for caller in self._callers.values()]
        waiting = [s for line in lines for s in line if id(s.request) in theirs and not s.request.ended]
        chosen: list[QueuedPrompt] = []
        filled = 0
        for sequence in sorted(waiting, key=lambda s: (s.request.deadline, s)):
            if chosen:
                seconds = (filled + sequence.length) / rate
                if filled + sequence.length > budget or seconds > chosen[0].request.deadline - now:
                    break
            chosen.append(sequence)
            filled += sequence.length
        gone = {id(sequence) for sequence in chosen}
        for name in {sequence.request.caller for sequence in chosen}:
            caller = self._callers[name]
            caller.line = [sequence for sequence in caller.line if id(sequence) not in gone]
            heapq.heapify(caller.line)
        for sequence in chosen:
            self._callers[sequence.request.caller].served += sequence.length
        return chosen

    def _put_back(self, sequence: QueuedPrompt) -> None:
        caller = self._callers[sequence.request.caller]
        caller.served -= sequence.length
        heapq.heappush(caller.line, sequence)

    def _fair_choice(self, budget: int, now: float) -> list[QueuedPrompt]:
        """What goes next as fairness has it, taken out and counted as served."""
        candidates = self._candidates(budget * self._horizon)
        if not candidates:
            return []
        head = candidates[0]

        def urgency(sequence: QueuedPrompt) -> tuple[bool, float]:
            aged = now - sequence.request.arrived > self._max_age
            return (not aged, sequence.request.arrived if aged else abs(sequence.length - head.length))

        chosen, filled = [head], head.length
        for sequence in sorted(candidates[1:], key=urgency):
            if filled + sequence.length <= budget:
                chosen.append(sequence)
                filled += sequence.length
            else:
                self._put_back(sequence)
        return chosen

    def _candidates(self, tokens: int) -> list[QueuedPrompt]:
        """The next sequences in fair order, about `tokens` of them, taken out and counted as served."""
        turns = [(caller.served, number, caller) for number, caller in enumerate(self._callers.values()) if caller.line]
        heapq.heapify(turns)
        if turns:
            self._clock = max(self._clock, turns[0][0])
        found: list[QueuedPrompt] = []
        seen = 0
        while turns and seen < tokens:
            _, number, caller = heapq.heappop(turns)
            sequence = heapq.heappop(caller.line)
            if not sequence.request.ended:
                found.append(sequence)
                seen += sequence.length
                caller.served += sequence.length
            if caller.line:
                heapq.heappush(turns, (caller.served, number, caller))
        return found

    def _forget_idle(self) -> None:
        if not len(self):
            # Nobody waits: whoever comes next starts level with everybody else.
            self._clock = max((caller.served for caller in self._callers.values()), default=self._clock)
        idle = [name for name, one in self._callers.items() if not one.line and one.served <= self._clock]
        for name in idle:
            del self._callers[name]

    def drop(self, request: QueuedRequest) -> None:
        """A request is no longer wanted: its tokens stop counting now, its sequences leave when they come up."""
        self.tokens -= request.waiting
        request.waiting = 0
        request.ended = True

    def expired(self, now: float) -> list[QueuedRequest]:
        """Requests in line whose deadline has passed."""
        return [request for request in self.requests() if request.deadline <= now]

    def requests(self) -> list[QueuedRequest]:
        """Every request with a sequence in line that is still wanted, the earliest deadline first."""
        return [request for request in self._due if request.waiting]


def _deadline(request: QueuedRequest) -> float:
    return request.deadline
