"""Several hands on one queue, with a real model: hands that die, that are late, and that come back."""

import asyncio
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from unmask import Encoder
from unmask.encoder import Prompt
from unmask.engine import Engine
from unmask.engine import engine as engine_module
from unmask.engine.hand import HandLost, HandState, LocalHand, PackVectors
from unmask.errors import DeadlineExceeded, EngineError


@pytest.fixture(scope="module")
def encoder(golden_dir: Path) -> Encoder:
    return Encoder.load(golden_dir / "tiny_llama", dtype="float32")


class FaultyHand(LocalHand):
    """A hand that meets faults.

    Attributes:
        faults: of the next forwards: "late", "lost", or "held" until `gate` is set, and then lost.
        deadly: token ids of a text that ends every hand.
        may_restore: while it is not set, the hand does not come back.
        computed: prompts of each forward that ran.
    """

    state: HandState = "ready"

    def __init__(self, encoder: Encoder, name: str, faults: Sequence[str] = ()) -> None:
        super().__init__(encoder)
        self.name, self.faults = name, deque(faults)
        self.deadly: np.ndarray | None = None
        self.gate, self.begun, self.may_restore = threading.Event(), threading.Event(), threading.Event()
        self.may_restore.set()
        self.computed: list[list[Prompt]] = []
        self._late: Callable[[], None] | None = None

    def forward(
        self, packs: Sequence[Sequence[Prompt]], limit_s: float, deliver: Callable[[int, PackVectors], None]
    ) -> None:
        self.begun.set()
        fault = self.faults.popleft() if self.faults else ""
        if fault == "held":
            self.gate.wait(300)
        ids = [prompt.ids for pack in packs for prompt in pack]
        deadly = self.deadly
        if fault in ("lost", "held") or (deadly is not None and any(np.array_equal(deadly, other) for other in ids)):
            self.state = "starting"
            raise HandLost(is_late=False)
        if fault == "late":
            self.state = "suspect"
            self._late = lambda: super(FaultyHand, self).forward(packs, limit_s, deliver)
            raise HandLost(is_late=True)
        self.computed.append([prompt for pack in packs for prompt in pack])
        super().forward(packs, limit_s, deliver)

    def park(self) -> None:
        self.state = "parked"

    def restore(self) -> bool:
        if not self.may_restore.is_set():
            time.sleep(0.01)
            return False
        late, self._late = self._late, None
        if late is not None:
            late()
        self.state = "ready"
        return True


async def vectors(engine: Engine, texts: list[str], **options) -> np.ndarray:
    return await engine.run(await engine.prepare(texts), **options)


def outcomes(engine: Engine) -> Counter[str]:
    return sum((Counter(hand.forwards) for hand in engine.hands()), Counter())


async def test_two_hands_give_the_bits_of_one_and_lose_nothing_to_faults(encoder: Encoder) -> None:
    hands = [FaultyHand(encoder, "a", ["", "lost", "late", "", "lost"]), FaultyHand(encoder, "b", ["late", "lost"])]
    engine = Engine(encoder, hands=hands)
    calls = [[f"text {i} of call {n} " * (1 + i % 3) for i in range(1 + n % 9)] for n in range(80)]
    results = await asyncio.gather(*(vectors(engine, texts, caller=str(n % 3)) for n, texts in enumerate(calls)))
    while any(hand.faults for hand in hands):
        await vectors(engine, ["one more"])
    for texts, result in zip(calls, results, strict=True):
        np.testing.assert_array_equal(result, encoder.encode(texts))
    assert outcomes(engine)["lost"] == 3 and outcomes(engine)["late"] == 2
    engine.close()
    assert engine.waiting_tokens() == 0


async def test_a_late_answer_counts_if_it_is_the_first(encoder: Encoder) -> None:
    hand = FaultyHand(encoder, "only", ["late"])
    engine = Engine(encoder, hands=[hand])
    np.testing.assert_array_equal(await vectors(engine, ["a", "b c"]), encoder.encode(["a", "b c"]))
    assert hand.computed == []  # by `restore`, and not a second time
    assert engine.waiting_tokens() == 0
    assert (await vectors(engine, ["d"])).shape == (1, encoder.dim)
    assert len(hand.computed) == 1
    engine.close()


async def test_a_text_that_ends_hands_fails_alone(encoder: Encoder) -> None:
    hands = [FaultyHand(encoder, name) for name in "ab"]
    engine = Engine(encoder, hands=hands)
    [poison] = await engine.prepare(["a text that ends every process"])
    for hand in hands:
        hand.deadly = poison.ids
        hand.may_restore.clear()
    calls = [asyncio.create_task(vectors(engine, [f"harmless {i}"])) for i in range(20)]
    dead = asyncio.create_task(engine.run([poison]))
    await asyncio.sleep(0)
    for hand in hands:
        hand.may_restore.set()
    with pytest.raises(EngineError, match="3 replicas ended while they computed it"):
        await dead
    assert all(result.shape == (1, encoder.dim) for result in await asyncio.gather(*calls))
    engine.close()


async def test_callers_share_several_hands_equally(encoder: Encoder) -> None:
    hands = [FaultyHand(encoder, name) for name in "ab"]
    for hand in hands:
        hand.pack_tokens = 60
        hand.may_restore.clear()
    engine = Engine(encoder, hands=hands)
    many = asyncio.create_task(vectors(engine, ["some words of the first caller"] * 300, caller="many"))
    other_words = ["some words of the other caller"] * 10
    few = [asyncio.create_task(vectors(engine, other_words, caller="few")) for _ in range(9)]
    while engine.waiting_tokens() < 390 * 5:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    for hand in hands:
        hand.may_restore.set()
    await asyncio.gather(*few)
    [other] = await engine.prepare(other_words[:1])
    rows = [prompt for hand in hands for forward in hand.computed for prompt in forward]
    of_few = sum(np.array_equal(prompt.ids, other.ids) for prompt in rows)
    assert of_few == 90
    assert len(rows) - of_few <= 90 + 60  # as much for the caller with one large request, and the forwards under way
    await many
    engine.close()


async def test_closing_waits_for_work_that_may_be_lost(encoder: Encoder) -> None:
    hands = [FaultyHand(encoder, "a", ["held"]), FaultyHand(encoder, "b", ["held"])]
    engine = Engine(encoder, hands=hands)
    accepted = asyncio.create_task(vectors(engine, ["some accepted words"] * 5))
    while not any(hand.begun.is_set() for hand in hands):  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    closing = asyncio.create_task(asyncio.to_thread(engine.close, 300))
    while not engine._stopping:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    for hand in hands:
        hand.gate.set()
    assert (await accepted).shape == (5, encoder.dim)
    await closing


async def test_hands_that_never_come_back_fail_a_request_at_its_deadline(encoder: Encoder) -> None:
    hand = FaultyHand(encoder, "only", ["lost"])
    engine = Engine(encoder, hands=[hand])
    hand.may_restore.clear()
    with pytest.raises(
        EngineError, match=r"the deadline passed after \d+\.\d\d s, before the vectors were ready: allow more"
    ):
        await vectors(engine, ["a text"], deadline=time.monotonic() + 0.2)
    hand.may_restore.set()
    assert (await vectors(engine, ["another"])).shape == (1, encoder.dim)
    engine.close()


async def test_requests_that_time_out_while_no_hand_works_leave_nothing(encoder: Encoder) -> None:
    hand = FaultyHand(encoder, "a")
    hand.may_restore.clear()
    engine = Engine(encoder, hands=[hand])
    prompts = encoder.prompts.build(["a text", "another one"])
    for number in range(5):
        with pytest.raises(DeadlineExceeded):
            await engine.run(prompts, deadline=time.monotonic(), caller=f"caller {number}")
    assert engine.waiting_tokens() == 0 and not engine._queue._callers and not engine._queue._by_deadline
    await asyncio.to_thread(engine.close, 1.0)
    thread = engine._hand_threads[0].thread
    assert thread is not None
    thread.join(30)
    assert not thread.is_alive()


@pytest.mark.parametrize("raises", [False, True])
async def test_a_forward_that_fails_is_no_measure_of_the_speed(encoder: Encoder, raises: bool) -> None:
    class FailingHand(LocalHand):
        def forward(
            self, packs: Sequence[Sequence[Prompt]], limit_s: float, deliver: Callable[[int, PackVectors], None]
        ) -> None:
            if raises:
                raise ValueError("a bug")
            for number, pack in enumerate(packs):
                deliver(number, PackVectors(np.zeros((len(pack), encoder.dim)), {0: EngineError("not finite")}))

    engine = Engine(encoder, hands=[FailingHand(encoder)])
    with pytest.raises(EngineError):
        await vectors(engine, ["a text of many words " * 20] * 20)
    await asyncio.to_thread(engine.close)  # the forward is counted after its requests have ended
    assert engine.tokens_per_second is None


async def test_hands_are_used_while_many_tokens_wait(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "_SHRINK_S", 0.3)
    monkeypatch.setattr(engine_module, "_CHECK_S", 0.1)
    hands = [FaultyHand(encoder, name) for name in "abcd"]
    engine = Engine(encoder, hands=hands, least_hands=1)
    while [hand.state for hand in engine.hands()] != ["ready", "parked", "parked", "parked"]:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    await vectors(engine, ["few tokens"])
    hands[0].faults.append("held")
    prompts = await engine.prepare(["some words that wait"] * 2000)
    tokens = sum(len(prompt.ids) for prompt in prompts)
    engine._hand_threads[0].tokens_per_second = tokens / (2.5 * engine_module._GROW_S)  # so that three hands are needed
    task = asyncio.create_task(engine.run(prompts))
    while not hands[1].computed or not hands[2].computed:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    hands[0].gate.set()
    np.testing.assert_array_equal((await task)[:1], encoder.encode(["some words that wait"]))
    assert hands[3].computed == []
    while [hand.state for hand in engine.hands()][1:] != ["parked"] * 3:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    assert (await vectors(engine, ["one hand is left"])).shape == (1, encoder.dim)
    engine.close()
