"""The waiting line of an engine: fair between callers, and quick to give a well-filled pack.

Order is start-time fair queueing (Goyal, Vin, Cheng 1996) over tokens: a sequence's tag is when its caller's earlier
work would be done if all callers shared the model equally. One request of 2,048 texts and a single text therefore
overtake each other in small steps, and neither starves.

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
    """One prompt in line. Sorted by its fair tag, then by arrival."""

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


class FairQueue:
    """Not locked: the engine holds its lock around every call. `tokens` is what waits for requests still wanted.

    Args:
        horizon: how many packs' worth of tokens to look over when choosing neighbours by length.
        max_age: seconds after which a sequence goes with the next pack, whatever its length.
    """

    def __init__(self, horizon: int = 4, max_age: float = 0.5) -> None:
        self.tokens = 0
        self._horizon, self._max_age = horizon, max_age
        self._line: list[Sequence] = []
        self._clock = 0.0
        self._order = itertools.count()
        self._finish: dict[str, float] = {}
        self._waiting: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._line)

    def add(self, request: Request) -> None:
        """Put all prompts of a request in line."""
        tag = max(self._clock, self._finish.get(request.caller, 0.0))
        for index, prompt in enumerate(request.prompts):
            heapq.heappush(self._line, Sequence(tag, next(self._order), request, index))
            tag += len(prompt.ids)
        self._finish[request.caller] = tag
        self._waiting[request.caller] = self._waiting.get(request.caller, 0) + len(request.prompts)
        request.waiting = sum(len(prompt.ids) for prompt in request.prompts)
        self.tokens += request.waiting

    def take(self, budget: int, now: float) -> list[Sequence]:
        """Remove and return one pack of at most `budget` tokens (one longer sequence is a pack by itself).

        Sequences of requests that have ended are dropped on the way. Longest first, equal lengths adjacent.
        """
        candidates: list[Sequence] = []
        seen = 0
        while self._line and seen < budget * self._horizon:
            sequence = heapq.heappop(self._line)
            if sequence.request.ended:
                self._forget(sequence.request.caller)
                continue
            candidates.append(sequence)
            seen += sequence.length
        if not candidates:
            return []
        head = candidates[0]
        self._clock = max(self._clock, head.tag)

        def urgency(sequence: Sequence) -> tuple[bool, float]:
            aged = now - sequence.request.arrived > self._max_age
            return (not aged, sequence.tag if aged else abs(sequence.length - head.length))

        chosen, filled = [head], head.length
        for sequence in sorted(candidates[1:], key=urgency):
            if filled + sequence.length <= budget:
                chosen.append(sequence)
                filled += sequence.length
            else:
                heapq.heappush(self._line, sequence)
        for sequence in chosen:
            sequence.request.waiting -= sequence.length
            self.tokens -= sequence.length
            self._forget(sequence.request.caller)
        return sorted(chosen, key=lambda sequence: -sequence.length)

    def drop(self, request: Request) -> None:
        """A request is no longer wanted: its tokens stop counting now, its sequences leave when they come up."""
        self.tokens -= request.waiting
        request.waiting = 0
        request.ended = True

    def expired(self, now: float) -> list[Request]:
        """Requests in line whose deadline has passed."""
        late = {id(s.request): s.request for s in self._line if not s.request.ended and s.request.deadline <= now}
        return list(late.values())

    def requests(self) -> list[Request]:
        """Every request with a sequence in line that is still wanted."""
        return list({id(s.request): s.request for s in self._line if not s.request.ended}.values())

    def _forget(self, caller: str) -> None:
        self._waiting[caller] -= 1
        if not self._waiting[caller]:
            del self._waiting[caller], self._finish[caller]
