"""The waiting line of an engine: fair between callers, and quick to give a well-filled pack.

Order is start-time fair queueing (Goyal, Vin, Cheng 1996) over tokens, on two levels: callers share the model
equally, and so do the requests of one caller among themselves. A request of 2,048 texts and a single text overtake
each other in small steps, whoever sent them, and neither starves.

A pack is then chosen from a short horizon of that order: first what has waited too long, then what is nearest in
length to the head of the line. Equal lengths share an attention kernel.
"""

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from unmask.encoder import Prompt


@dataclass(eq=False, slots=True)
class Request:
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
class Sequence:
    """One prompt in line. Sorted by its fair tag among its caller's requests, then by arrival."""

    tag: float
    order: int
    request: Request = field(compare=False)
    index: int = field(compare=False)

    @property
    def prompt(self) -> Prompt:
        return self.request.prompts[self.index]

    @property
    def length(self) -> int:
        return len(self.prompt.ids)


@dataclass(eq=False, slots=True)
class _Caller:
    """One caller's own line.

    Attributes:
        served: tokens it was given, on the queue's clock.
        clock: tag of its last sequence that went; where its next request begins.
    """

    served: float
    clock: float = 0.0
    line: list[Sequence] = field(default_factory=list)


class FairQueue:
    """Not locked: the engine holds its lock around every call. `tokens` is what waits for requests still wanted.

    Args:
        horizon: how many packs' worth of tokens to look over when choosing neighbours by length.
        max_age: seconds after which a sequence goes with the next pack, whatever its length.
    """

    def __init__(self, horizon: int = 4, max_age: float = 0.5) -> None:
        self.tokens = 0
        self._horizon, self._max_age = horizon, max_age
        self._callers: dict[str, _Caller] = {}
        self._clock = 0.0
        self._order = itertools.count()

    def __len__(self) -> int:
        return sum(len(caller.line) for caller in self._callers.values())

    def add(self, request: Request) -> None:
        """Put all prompts of a request in line."""
        caller = self._callers.setdefault(request.caller, _Caller(self._clock))
        if not caller.line:
            caller.served = max(caller.served, self._clock)  # time spent away earns nothing
        tag = caller.clock
        for index, prompt in enumerate(request.prompts):
            heapq.heappush(caller.line, Sequence(tag, next(self._order), request, index))
            tag += len(prompt.ids)
        request.waiting = sum(len(prompt.ids) for prompt in request.prompts)
        self.tokens += request.waiting

    def take(self, budget: int, now: float) -> list[Sequence]:
        """Remove and return one pack of at most `budget` tokens (one longer sequence is a pack by itself).

        Sequences of requests that have ended are dropped on the way. Longest first, equal lengths adjacent.
        """
        candidates = self._candidates(budget * self._horizon)
        if not candidates:
            return []
        head = candidates[0]

        def urgency(sequence: Sequence) -> tuple[bool, float]:
            aged = now - sequence.request.arrived > self._max_age
            return (not aged, sequence.request.arrived if aged else abs(sequence.length - head.length))

        chosen, filled = [head], head.length
        for sequence in sorted(candidates[1:], key=urgency):
            if filled + sequence.length <= budget:
                chosen.append(sequence)
                filled += sequence.length
            else:
                caller = self._callers[sequence.request.caller]
                caller.served -= sequence.length
                heapq.heappush(caller.line, sequence)
        for sequence in chosen:
            caller = self._callers[sequence.request.caller]
            caller.clock = max(caller.clock, sequence.tag)
            sequence.request.waiting -= sequence.length
            self.tokens -= sequence.length
        self._forget_idle()
        return sorted(chosen, key=lambda sequence: -sequence.length)

    def _candidates(self, tokens: int) -> list[Sequence]:
        """The next sequences in fair order, about `tokens` of them, taken out and counted as served."""
        turns = [(caller.served, number, caller) for number, caller in enumerate(self._callers.values()) if caller.line]
        heapq.heapify(turns)
        if turns:
            self._clock = max(self._clock, turns[0][0])
        found: list[Sequence] = []
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

    def drop(self, request: Request) -> None:
        """A request is no longer wanted: its tokens stop counting now, its sequences leave when they come up."""
        self.tokens -= request.waiting
        request.waiting = 0
        request.ended = True

    def expired(self, now: float) -> list[Request]:
        """Requests in line whose deadline has passed."""
        return [request for request in self.requests() if request.deadline <= now]

    def requests(self) -> list[Request]:
        """Every request with a sequence in line that is still wanted."""
        lines = (caller.line for caller in self._callers.values())
        return list({id(s.request): s.request for line in lines for s in line if not s.request.ended}.values())
