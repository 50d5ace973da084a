"""The fair queue: shares, budget, and no request lost."""

import random
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask.encoder import Prompt
from unmask.encoder.packing import balance
from unmask.engine.queue import FairQueue, QueuedPrompt, QueuedRequest


def request(lengths: list[int], caller: str, arrived: float = 0.0, deadline: float = 1e9) -> QueuedRequest:
    prompts = [Prompt(np.zeros(length, dtype=np.int64), (0, length), length) for length in lengths]
    return QueuedRequest(
        prompts, np.empty((len(prompts), 1)), caller, arrived, deadline, lambda error: None, unfinished=len(prompts)
    )


@settings(max_examples=300)
@given(
    requests=st.lists(
        st.tuples(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.sampled_from("abc"), st.booleans()),
        max_size=8,
    ),
    budget=st.integers(1, 60),
    between=st.lists(st.booleans(), max_size=20),
)
def test_every_sequence_leaves_exactly_once(requests, budget: int, between: list[bool]) -> None:
    queue = FairQueue(horizon=2, max_age=0.5)
    made = [request(lengths, caller) for lengths, caller, _ in requests]
    dropped = {id(one) for one, (_, _, drop) in zip(made, requests, strict=True) if drop}
    left, taken = list(made), []
    for add in [*between, *([True] * len(made))]:
        if add and left:
            one = left.pop()
            queue.add(one)
            if id(one) in dropped:
                queue.drop(one)
        else:
            taken.append(queue.take(budget, now=0.0))
    while len(queue):
        taken.append(queue.take(budget, now=0.0))
    for pack in taken:
        lengths = [sequence.length for sequence in pack]
        assert sum(lengths) <= budget or len(lengths) == 1
        assert lengths == sorted(lengths, reverse=True)
    seen = [(id(sequence.request), sequence.index) for pack in taken for sequence in pack]
    expected = [(id(one), i) for one in made if id(one) not in dropped for i in range(len(one.prompts))]
    assert sorted(seen) == sorted(expected)
    assert queue.tokens == 0 and not queue.requests()


@given(
    lengths=st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=6), min_size=1, max_size=5),
    fates=st.lists(st.sampled_from(["done", "back", "back, then done elsewhere"]), max_size=40),
)
def test_what_is_put_back_comes_again_and_is_counted_once(lengths: list[list[int]], fates: list[str]) -> None:
    queue = FairQueue()
    for number, one in enumerate(lengths):
        queue.add(request(one, "ab"[number % 2]))
    done: list[QueuedPrompt] = []
    fate = iter(fates)
    while len(queue):
        for prompt in queue.take(50, now=0.0):
            became = next(fate, "done")
            if became != "done":
                queue.put_back([prompt])
            if became != "back":
                prompt.done = True
                queue.withdraw(prompt)
                done.append(prompt)
    assert queue.tokens == 0 and not queue.requests()
    assert len(done) == len({id(prompt) for prompt in done}) == sum(map(len, lengths))


@pytest.mark.parametrize("caller", ["bulk", "single"], ids=["same caller", "another caller"])
def test_a_single_text_is_not_behind_a_large_request(caller: str) -> None:
    queue = FairQueue()
    queue.add(request([30] * 2048, "bulk"))
    for _ in range(5):
        queue.take(300, now=0.0)
    single = request([12], caller)
    queue.add(single)
    packs = [queue.take(300, now=0.0) for _ in range(3)]
    assert any(sequence.request is single for pack in packs for sequence in pack)


def test_two_callers_share_tokens_equally() -> None:
    queue = FairQueue(horizon=1)
    queue.add(request([50] * 100, "long"))
    queue.add(request([10] * 500, "short"))
    done = {"long": 0, "short": 0}
    for _ in range(20):
        for sequence in queue.take(200, now=0.0):
            done[sequence.request.caller] += sequence.length
    assert abs(done["long"] - done["short"]) <= 400


def test_many_requests_give_no_caller_a_larger_share() -> None:
    queue = FairQueue(horizon=1)
    for _ in range(50):
        queue.add(request([20] * 10, "many"))
    queue.add(request([20] * 500, "one"))
    done = {"many": 0, "one": 0}
    for _ in range(20):
        for sequence in queue.take(200, now=0.0):
            done[sequence.request.caller] += sequence.length
    assert abs(done["many"] - done["one"]) <= 400


def test_callers_are_forgotten_when_they_are_done() -> None:
    queue = FairQueue()
    for number in range(1000):
        queue.add(request([5], f"caller {number}"))
        queue.take(100, now=0.0)
    assert len(queue._callers) < 10


@pytest.mark.parametrize("alive", [0, 3])
def test_requests_that_nobody_awaits_are_freed_although_nobody_takes(alive: int) -> None:
    queue = FairQueue()
    for number in range(alive):
        queue.add(request([5], f"alive {number}"))
    gone = []
    for number in range(100):
        one = request([5, 7], f"caller {number}", deadline=number)
        queue.add(one)
        gone.append(weakref.ref(one.done))
        queue.drop(one)
        del one
    assert sum(ref() is not None for ref in gone) <= alive
    assert (len(queue), queue.tokens, len(queue.requests())) == (alive, 5 * alive, alive)
    assert len(queue._callers) <= 2 * alive
    assert len(queue.take(100, now=0.0)) == alive and not len(queue)


def test_neighbours_in_length_go_together() -> None:
    queue = FairQueue()
    queue.add(request([10, 20, 10, 30, 10, 25], "a"))
    assert [sequence.length for sequence in queue.take(40, now=0.0)] == [10, 10, 10]


def test_what_has_waited_too_long_goes_next() -> None:
    queue = FairQueue(max_age=0.5)
    queue.add(request([10], "a", arrived=10.0))
    old = request([90], "b", arrived=9.0)
    queue.add(old)
    for _ in range(20):
        queue.add(request([10], "c", arrived=10.0))
    assert any(sequence.request is old for sequence in queue.take(100, now=10.1))


def test_choosing_from_a_long_line_looks_at_few(monkeypatch: pytest.MonkeyPatch) -> None:
    queue = FairQueue()
    for caller in range(50):
        queue.add(request([20] * 1000, str(caller)))
    looked_at: list[int] = []

    def length(prompt: QueuedPrompt) -> int:
        looked_at.append(id(prompt))
        return len(prompt.prompt.ids)

    monkeypatch.setattr(QueuedPrompt, "length", property(length))
    assert len(queue.take(2048, now=0.0)) == 102
    assert len(set(looked_at)) <= 4 * 103  # of 50,000


class Clock:
    """A model that computes `rate` tokens a second and nothing else, on a clock of its own."""

    def __init__(self, rate: float, budget: int) -> None:
        self.queue, self.rate, self.budget = FairQueue(), rate, budget
        self.now, self.free, self.running = 0.0, 0.0, 0
        self.late: list[QueuedRequest] = []

    def until(self, moment: float) -> None:
        """Run packs until `moment`; the one under way then goes on."""
        while len(self.queue) and self.free <= moment:
            self.now = max(self.now, self.free)
            pack = self.queue.take(self.budget, self.now, rate=self.rate)
            self.running = sum(sequence.length for sequence in pack)
            self.free = self.now + self.running / self.rate
            for sequence in pack:
                sequence.request.unfinished -= 1
                if not sequence.request.unfinished and self.free > sequence.request.deadline + 1e-6:
                    self.late.append(sequence.request)
        self.now = max(self.now, moment)

    def offer(self, one: QueuedRequest) -> bool:
        """Admit a request if no admitted one would miss its deadline for it."""
        running = self.running if self.free > self.now else 0
        own = sum(len(prompt.ids) for prompt in one.prompts)
        late = self.queue.lateness(own, one.deadline, now=self.now, rate=self.rate, running=running)
        if late > 0:
            return False
        self.queue.add(one)
        return True


@settings(max_examples=300)
@given(
    arrivals=st.lists(
        st.tuples(
            st.floats(0, 0.4),
            st.lists(st.integers(1, 50), min_size=1, max_size=30),
            st.sampled_from("abcd"),
            st.floats(0.05, 6),
        ),
        max_size=40,
    ),
    budget=st.integers(50, 300),
)
def test_who_was_let_in_keeps_the_deadline(arrivals, budget: int) -> None:
    clock = Clock(rate=1000.0, budget=budget)
    for pause, lengths, caller, patience in arrivals:
        clock.until(clock.now + pause)
        clock.offer(request(lengths, caller, arrived=clock.now, deadline=clock.now + patience))
    clock.until(1e6)
    assert not clock.late
    assert clock.queue.tokens == 0


@pytest.mark.parametrize("seed", range(5))
def test_cores_that_work_side_by_side_keep_the_deadlines(seed: int) -> None:
    """Two cores, each with half of the speed, are asked for twice the work that they can do, for five minutes."""
    chance = random.Random(seed)
    queue, rate, promised = FairQueue(), 800.0, 600.0
    late, tokens, now, due, running = [], 0, 0.0, 0.0, 0
    while now < 300:
        chosen = queue.take(2 * min(1280, max(64, -(-queue.tokens // 2))), now, rate=promised)
        running = sum(sequence.length for sequence in chosen)
        tokens += running
        ends = now if chosen else due
        for members in balance([sequence.length for sequence in chosen], 2):
            pack = [chosen[i] for i in members]
            over = now + 2 * sum(sequence.length for sequence in pack) / rate
            ends = max(ends, over)
            late.extend(sequence for sequence in pack if over > sequence.request.deadline)
        while due <= ends:
            lengths = [min(400, int(chance.lognormvariate(3.4, 0.9)) + 1) for _ in range(8)]
            if queue.lateness(sum(lengths), due + 5.0, now=due, rate=promised, running=running) <= 0:
                queue.add(request(lengths, f"{due}", arrived=due, deadline=due + 5.0))
            due += chance.expovariate(2 * rate / 350)
        now = ends
    assert late == []
    assert tokens / now > 0.95 * rate  # and the cores are busy


def test_small_requests_that_overtake_do_not_make_a_large_one_late() -> None:
    clock = Clock(rate=1000.0, budget=200)
    assert clock.offer(request([50] * 80, "bulk", deadline=5.0))  # 4 of the 5 seconds
    let_in = 0
    for number in range(100):
        clock.until(number * 0.05)
        let_in += clock.offer(request([40] * 2, f"{number}", arrived=clock.now, deadline=clock.now + 5.0))
    clock.until(1e6)
    assert not clock.late
    assert let_in > 50  # twice of what can be done was asked for


def test_without_pressure_the_order_is_the_fair_one() -> None:
    fair, promised = FairQueue(), FairQueue()
    for queue in (fair, promised):
        queue.add(request([30] * 50, "bulk", deadline=60.0))
        queue.add(request([10] * 50, "small", deadline=90.0))
    for _ in range(10):
        plain = [(s.request.caller, s.index) for s in fair.take(300, now=0.0)]
        assert [(s.request.caller, s.index) for s in promised.take(300, now=0.0, rate=1000.0)] == plain


def test_a_lost_deadline_is_nobodys_hindrance() -> None:
    queue = FairQueue()
    queue.add(request([50] * 100, "lost", deadline=1.0))  # 5 seconds of work
    assert queue.lateness(100, 2.0, now=0.0, rate=1000.0) <= 0
    queue.add(request([50] * 4, "in time", deadline=0.25))
    taken = queue.take(200, now=0.0, rate=1000.0)
    assert {sequence.request.caller for sequence in taken} == {"in time"}
