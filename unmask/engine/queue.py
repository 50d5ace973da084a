"""`FairQueue`: the queue of an engine, fair between callers, and able to fill a forward with texts of like length.

The order is start-time fair queueing (Goyal, Vin, Cheng 1996) over tokens, on two levels: callers share the model
equally, and so do the requests of one caller. A request of 2,048 texts and a request of one text proceed in turns,
and neither starves.

A forward is then filled from a short horizon of that order: first prompts that have waited too long, then prompts
nearest in length to the head of the queue. Equal lengths share an attention kernel.

Fairness lets later requests overtake earlier ones, but must not break the deadline of an admitted request. Before a
forward starts, the queue tests whether all other requests could still meet their deadlines after it, in order of
earliest deadline first (if that order is late, every order is: Jackson 1955). If not, the requests with the earliest
deadlines go instead.
"""

import bisect
import heapq
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from unmask.encoder import Prompt


@dataclass(eq=False, slots=True)
class QueuedRequest:
    """The prompts of one request, and their vectors.

    Attributes:
        caller: identifies the fair share that the request takes.
        arrived, deadline: `time.monotonic()`; after the deadline the result is not needed.
        done: called once, from the hand's thread, with None or the error that ended the request.
        waiting: number of its tokens in the queue.
        waiting_prompts: number of its prompts in the queue.
        unfinished: number of its prompts without a vector.
        ended: True once it has its result, or will get none.
    """

    prompts: list[Prompt]
    vectors: np.ndarray
    caller: str
    arrived: float
    deadline: float
    done: Callable[[BaseException | None], None]
    waiting: int = 0
    waiting_prompts: int = 0
    unfinished: int = 0
    ended: bool = False


@dataclass(order=True, slots=True)
class QueuedPrompt:
    """One prompt in the queue. Sorts by its fair tag among its caller's requests, then by arrival.

    Attributes:
        waiting: True while it is in the queue.
        done: True once it has its vector.
        times_late, times_lost: number of forwards with it that were late, and whose hand died.
    """

    tag: float
    order: int
    request: QueuedRequest = field(compare=False)
    index: int = field(compare=False)
    waiting: bool = field(default=True, compare=False)
    done: bool = field(default=False, compare=False)
    times_late: int = field(default=0, compare=False)
    times_lost: int = field(default=0, compare=False)

    @property
    def prompt(self) -> Prompt:
        return self.request.prompts[self.index]

    @property
    def length(self) -> int:
        return len(self.prompt.ids)


@dataclass(eq=False, slots=True)
class _CallerQueue:
    """The queue of one caller.

    Attributes:
        served: tokens computed for it, on the queue's clock.
        clock: tag of its last prompt that was taken; its next request starts there.
        heap: its waiting prompts, a heap by tag.
    """

    served: float
    clock: float = 0.0
    heap: list[QueuedPrompt] = field(default_factory=list)


class FairQueue:
    """A fair queue without a lock: the engine holds its lock around every call.

    Args:
        horizon: size of the choice of neighbours in length, in forwards.
        max_age: seconds after which a prompt goes with the next forward, whatever its length.

    Attributes:
        tokens: waiting tokens of all requests that have not ended.
    """

    def __init__(self, horizon: int = 4, max_age: float = 0.5) -> None:
        self.tokens = 0
        self._horizon, self._max_age = horizon, max_age
        self._callers: dict[str, _CallerQueue] = {}
        self._by_deadline: list[QueuedRequest] = []  # by deadline; may hold requests without waiting prompts
        self._awaited = 0  # number of waiting prompts
        self._stored = 0  # number of prompts in all heaps, with those that nobody awaits
        self._clock = 0.0
        self._order = itertools.count()

    def __len__(self) -> int:
        return self._awaited

    def add(self, request: QueuedRequest) -> None:
        """Queue all prompts of a request."""
        caller = self._callers.setdefault(request.caller, _CallerQueue(self._clock))
        if not caller.heap:
            caller.served = max(caller.served, self._clock)  # an idle caller gains no credit
        tag = caller.clock
        for index, prompt in enumerate(request.prompts):
            heapq.heappush(caller.heap, QueuedPrompt(tag, next(self._order), request, index))
            tag += len(prompt.ids)
        request.waiting = sum(len(prompt.ids) for prompt in request.prompts)
        request.waiting_prompts = len(request.prompts)
        self.tokens += request.waiting
        self._awaited += request.waiting_prompts
        self._stored += request.waiting_prompts
        bisect.insort(self._by_deadline, request, key=_deadline)

    def lateness(self, new_tokens: int, deadline: float, *, now: float, rate: float, running: int = 0) -> float:
        """Return the greatest lateness of any request if a new one were admitted; 0 or less if none would be late.

        Args:
            new_tokens, deadline: size and deadline of the new request.
            rate: tokens per second that the engine is sure to compute.
            running: tokens of the running forward.

        Returns:
            Seconds.
        """
        return max(self._lateness(now, rate, running, new=(new_tokens, deadline)), default=(-float("inf"), 0))[0]

    def queued_tokens(self, caller: str) -> int:
        """Return the number of a caller's waiting tokens."""
        return sum(request.waiting for request in self._by_deadline if request.caller == caller)

    def num_callers(self) -> int:
        """Return the number of callers with waiting tokens."""
        return len({request.caller for request in self.requests()})

    def _lateness(
        self,
        now: float,
        rate: float,
        running: int,
        *,
        new: tuple[int, float] = (0, float("inf")),
        taken: Mapping[int, int] | None = None,
    ) -> list[tuple[float, int]]:
        """Return (seconds late, position by deadline) of the waiting requests, served by earliest deadline first.

        Requests with earlier deadlines than the new one are skipped: it does not delay them. Also skipped are requests
        that would miss their deadline even if they had the model alone.

        Args:
            new: tokens and deadline of a request that might be admitted.
            taken: id of a request -> its tokens in the forward about to start, which are not waiting any more.
        """
        latenesses: list[tuple[float, int]] = []
        new_tokens, new_deadline = new
        tokens = running
        for position, request in enumerate(self._by_deadline):
            waiting = request.waiting - (taken.get(id(request), 0) if taken else 0)
            left = request.deadline - now
            if not request.waiting or waiting > left * rate:
                continue
            if not waiting:  # all its prompts are taken, and have their vectors when that forward ends
                latenesses.append((running / rate - left, position))
                continue
            if new_tokens and request.deadline > new_deadline:
                tokens += new_tokens
                latenesses.append((tokens / rate - (new_deadline - now), position))
                new_tokens = 0
            tokens += waiting
            if not new_tokens:
                latenesses.append((tokens / rate - left, position))
        if new_tokens:
            latenesses.append(((tokens + new_tokens) / rate - (new_deadline - now), len(self._by_deadline)))
        return latenesses

    def take(
        self, budget: int, now: float, *, rate: float | None = None, running: int = 0, share: float = 1.0
    ) -> list[QueuedPrompt]:
        """Remove and return the prompts of the next forward, longest first.

        They have at most `budget` tokens; a single prompt may have more. Prompts of ended requests are removed on the
        way.

        Args:
            budget: most tokens of the forward.
            now: `time.monotonic()`.
            rate: tokens per second that the engine is sure to compute; None if unknown: deadlines are then ignored.
            running: tokens of other forwards that are running.
            share: part of the rate that computes this forward.
        """
        self._by_deadline = [request for request in self._by_deadline if request.waiting]
        chosen = self._fair_choice(budget, now)
        if chosen and rate:
            urgent = self._urgent_requests(chosen, now, rate, running)
            if urgent:
                for prompt in chosen:
                    self._put_back(prompt)
                chosen = self._take_by_deadline(urgent, budget, now, rate * share)
        for prompt in chosen:
            prompt.waiting = False
            caller = self._callers[prompt.request.caller]
            caller.clock = max(caller.clock, prompt.tag)
            self._count(prompt, -1)
        self._forget_idle()
        return sorted(chosen, key=lambda prompt: -prompt.length)

    def put_back(self, prompts: Sequence[QueuedPrompt]) -> None:
        """Queue prompts again that were taken, at their old places. Those that nobody awaits are left out."""
        for prompt in prompts:
            request = prompt.request
            if request.ended or prompt.done:
                continue
            if request not in self._by_deadline:
                bisect.insort(self._by_deadline, request, key=_deadline)
            prompt.waiting = True
            self._count(prompt, 1)
            self._callers.setdefault(request.caller, _CallerQueue(self._clock))
            self._put_back(prompt)

    def withdraw(self, prompt: QueuedPrompt) -> None:
        """Stop waiting for a prompt that has its vector from elsewhere."""
        if prompt.waiting and not prompt.request.ended:
            self._count(prompt, -1)
        prompt.waiting = False
        self._purge()

    def _count(self, prompt: QueuedPrompt, change: int) -> None:
        """Count a prompt that begins to wait (1) or stops (-1)."""
        prompt.request.waiting += change * prompt.length
        prompt.request.waiting_prompts += change
        self.tokens += change * prompt.length
        self._awaited += change

    def _urgent_requests(
        self, chosen: list[QueuedPrompt], now: float, rate: float, running: int
    ) -> list[QueuedRequest]:
        """Return the requests that must go before `chosen`: all up to the first that would be late after it."""
        taken: dict[int, int] = {}
        for prompt in chosen:
            taken[id(prompt.request)] = taken.get(id(prompt.request), 0) + prompt.length
        latenesses = self._lateness(now, rate, running + sum(taken.values()), taken=taken)
        return next((self._by_deadline[: position + 1] for late, position in latenesses if late > 0), [])

    def _take_by_deadline(
        self, requests: list[QueuedRequest], budget: int, now: float, rate: float
    ) -> list[QueuedPrompt]:
        """Take a forward of these requests, strictly by deadline, that ends before the first deadline."""
        ids = {id(request) for request in requests}
        heaps = [caller.heap for caller in self._callers.values()]
        waiting = [prompt for heap in heaps for prompt in heap if id(prompt.request) in ids and _is_awaited(prompt)]
        chosen: list[QueuedPrompt] = []
        tokens = 0
        for prompt in sorted(waiting, key=lambda prompt: (prompt.request.deadline, prompt)):
            if chosen:
                seconds = (tokens + prompt.length) / rate
                if tokens + prompt.length > budget or seconds > chosen[0].request.deadline - now:
                    break
            chosen.append(prompt)
            tokens += prompt.length
        chosen_ids = {id(prompt) for prompt in chosen}
        for name in {prompt.request.caller for prompt in chosen}:
            caller = self._callers[name]
            caller.heap = [prompt for prompt in caller.heap if id(prompt) not in chosen_ids]
            heapq.heapify(caller.heap)
        self._stored -= len(chosen)
        for prompt in chosen:
            self._callers[prompt.request.caller].served += prompt.length
        return chosen

    def _put_back(self, prompt: QueuedPrompt) -> None:
        caller = self._callers[prompt.request.caller]
        caller.served -= prompt.length
        heapq.heappush(caller.heap, prompt)
        self._stored += 1

    def _fair_choice(self, budget: int, now: float) -> list[QueuedPrompt]:
        """Take the prompts of the next forward in fair order, and count them as served."""
        candidates = self._candidates(budget * self._horizon)
        if not candidates:
            return []
        head = candidates[0]

        def by_age_and_length(prompt: QueuedPrompt) -> tuple[bool, float]:
            aged = now - prompt.request.arrived > self._max_age
            return (not aged, prompt.request.arrived if aged else abs(prompt.length - head.length))

        chosen, tokens = [head], head.length
        for prompt in sorted(candidates[1:], key=by_age_and_length):
            if tokens + prompt.length <= budget:
                chosen.append(prompt)
                tokens += prompt.length
            else:
                self._put_back(prompt)
        return chosen

    def _candidates(self, tokens: int) -> list[QueuedPrompt]:
        """Take the next prompts in fair order, with about `tokens` tokens, and count them as served."""
        turns = [(caller.served, number, caller) for number, caller in enumerate(self._callers.values()) if caller.heap]
        heapq.heapify(turns)
        if turns:
            self._clock = max(self._clock, turns[0][0])
        candidates: list[QueuedPrompt] = []
        total = 0
        while turns and total < tokens:
            _, number, caller = heapq.heappop(turns)
            prompt = heapq.heappop(caller.heap)
            self._stored -= 1
            if _is_awaited(prompt):
                candidates.append(prompt)
                total += prompt.length
                caller.served += prompt.length
            if caller.heap:
                heapq.heappush(turns, (caller.served, number, caller))
        return candidates

    def _forget_idle(self) -> None:
        if not len(self):
            # The queue is empty: the next caller starts level with all others.
            self._clock = max((caller.served for caller in self._callers.values()), default=self._clock)
        idle = [name for name, caller in self._callers.items() if not caller.heap and caller.served <= self._clock]
        for name in idle:
            del self._callers[name]

    def drop(self, request: QueuedRequest) -> None:
        """End a request. Its tokens stop counting now; its prompts leave the queue soon."""
        self.tokens -= request.waiting
        self._awaited -= request.waiting_prompts
        request.waiting = request.waiting_prompts = 0
        request.ended = True
        self._purge()

    def _purge(self) -> None:
        """Remove the prompts that nobody awaits, once they are more than the others: `take` may not come for long."""
        if self._stored <= 2 * self._awaited:
            return
        for caller in self._callers.values():
            caller.heap = [prompt for prompt in caller.heap if _is_awaited(prompt)]
            heapq.heapify(caller.heap)
        self._by_deadline = [request for request in self._by_deadline if request.waiting]
        self._stored = self._awaited
        self._forget_idle()

    def expired(self, now: float) -> list[QueuedRequest]:
        """Return the waiting requests whose deadline has passed."""
        return [request for request in self.requests() if request.deadline <= now]

    def requests(self) -> list[QueuedRequest]:
        """Return all waiting requests that have not ended, the earliest deadline first."""
        return [request for request in self._by_deadline if request.waiting]


def _is_awaited(prompt: QueuedPrompt) -> bool:
    return prompt.waiting and not prompt.request.ended


def _deadline(request: QueuedRequest) -> float:
    return request.deadline
