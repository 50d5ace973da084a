"""Many callers on one real, small model."""

import asyncio
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.engine import overload
from tests.engine.overload import assume_speed, until, vectors
from unmask import Encoder
from unmask.encoder import Prompt
from unmask.engine import Engine
from unmask.engine.hand import LocalHand
from unmask.errors import (
    DeadlineExceeded,
    EmptyText,
    EngineError,
    EngineStopped,
    Overloaded,
)


@pytest.fixture(scope="module")
def encoder(golden_dir: Path) -> Encoder:
    return Encoder.load(golden_dir / "tiny_llama")


class Gated(Encoder):
    """The same encoder, whose forward can be held back.

    Attributes:
        gate: forwards wait until it is set.
        begun: set once a forward waits at the gate.
        packs: tokens of each forward that ran.
        broken: raised by the next forward.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.__dict__.update(encoder.__dict__)
        self.gate, self.begun = threading.Event(), threading.Event()
        self.packs: list[int] = []
        self.broken: BaseException | None = None

    def forward_pack(self, prompts: Sequence[Prompt]) -> np.ndarray:
        self.begun.set()
        self.gate.wait(300)
        self.packs.append(sum(len(prompt.ids) for prompt in prompts))
        if self.broken is not None:
            error, self.broken = self.broken, None
            raise error
        return super().forward_pack(prompts)


@pytest.fixture
def gated(encoder: Encoder):
    held = Gated(encoder)
    yield held
    held.gate.set()


TEXTS = ["one", "two words", "a much longer text " * 20, "日本語", "x"]


async def hold_forward(engine: Engine, gated: Gated) -> asyncio.Task[np.ndarray]:
    """Send one short text, and wait until its forward is held back."""
    task = asyncio.create_task(vectors(engine, ["first in the forward"]))
    await until(gated.begun.is_set)
    return task


async def test_concurrent_callers_get_their_own_vectors(encoder: Encoder) -> None:
    engine = Engine(encoder, pack_tokens=300)
    generator = np.random.default_rng(0)
    calls = [[f"{TEXTS[i % 5]} {n}" for i in range(generator.integers(1, 40))] for n in range(60)]
    results = await asyncio.gather(*(vectors(engine, texts) for texts in calls))
    for texts, result in zip(calls, results, strict=True):
        direct = encoder.encode(texts)
        assert np.abs(result - direct).max() <= 1e-5 * np.abs(direct).max()
    assert engine.waiting_tokens() == 0
    engine.close()


async def test_nothing_asked_nothing_done(encoder: Encoder) -> None:
    engine = Engine(encoder)
    assert (await engine.run([])).shape == (0, encoder.dim)
    with pytest.raises(EmptyText):
        await engine.prepare(["fine", ""])
    engine.close()


async def test_a_full_queue_refuses_with_a_time(gated: Gated) -> None:
    engine = Engine(gated, queue_tokens=100, pack_tokens=50)
    first = await hold_forward(engine, gated)
    running = engine.waiting_tokens()
    second = asyncio.create_task(vectors(engine, ["word " * 30]))
    await until(lambda: engine.waiting_tokens() > running)
    with pytest.raises(Overloaded) as refused:
        await vectors(engine, ["word " * 60])
    assert refused.value.retry_after > 0
    gated.gate.set()
    await asyncio.gather(first, second)
    engine.close()


async def test_one_request_larger_than_the_queue_is_served_alone(encoder: Encoder) -> None:
    engine = Engine(encoder, queue_tokens=100, pack_tokens=50)
    assert (await vectors(engine, ["some words here"] * 200)).shape == (200, encoder.dim)
    engine.close()


async def test_what_cannot_meet_its_deadline_is_not_begun(gated: Gated) -> None:
    engine = Engine(gated)
    assume_speed(engine, 1.0)
    ahead = await hold_forward(engine, gated)
    with pytest.raises(Overloaded) as refused:
        await vectors(engine, ["word " * 100], deadline=time.monotonic() + 60)
    assert refused.value.retry_after > 40  # more than 100 seconds of work, and 60 are left
    gated.gate.set()
    await ahead
    assert len(gated.packs) == 1
    engine.close()


@pytest.mark.parametrize("behaviour", ["refusal", "room", "shares"])
async def test_twice_the_load(gated: Gated, behaviour: str) -> None:
    """As with replicas, see `tests/cluster/test_replicas.py`."""
    engine = Engine(gated, pack_tokens=overload.PACK_TOKENS)
    if behaviour == "refusal":
        right = super(Gated, gated).forward_pack(await overload.prompts_of(engine))
        await overload.assert_half_is_refused_at_once(engine, gated.gate.set, right)
    elif behaviour == "room":
        await overload.assert_one_caller_leaves_room(engine, gated.gate.set)
    else:
        await overload.assert_equal_shares(engine, gated.gate.set)
    engine.close()


async def test_a_deadline_that_passes_while_waiting(gated: Gated) -> None:
    engine = Engine(gated, pack_tokens=10)
    blocked = await hold_forward(engine, gated)
    with pytest.raises(DeadlineExceeded):
        await vectors(engine, ["too late"], deadline=time.monotonic() + 0.1)
    gated.gate.set()
    await blocked
    assert len(gated.packs) == 1  # the late one was never computed
    engine.close()


async def test_cancelled_work_leaves_the_queue(gated: Gated) -> None:
    engine = Engine(gated, pack_tokens=10)
    blocked = await hold_forward(engine, gated)
    running = engine.waiting_tokens()
    given_up = asyncio.create_task(vectors(engine, ["never mind"] * 50))
    await until(lambda: engine.waiting_tokens() > running)
    waiting = engine.waiting_tokens()
    given_up.cancel()
    with pytest.raises(asyncio.CancelledError):
        await given_up
    assert engine.waiting_tokens() < waiting
    gated.gate.set()
    await blocked
    await vectors(engine, ["still works"])
    assert len(gated.packs) == 2
    engine.close()


async def test_a_failing_forward_fails_its_own_callers_only(gated: Gated) -> None:
    engine = Engine(gated)
    gated.broken = ValueError("a fault in the forward")
    gated.gate.set()
    with pytest.raises(EngineError, match="the model failed"):
        await vectors(engine, ["unlucky"])
    assert (await vectors(engine, ["lucky"])).shape == (1, gated.dim)
    engine.close()


async def test_out_of_memory_halves_the_pack_and_loses_nothing(gated: Gated) -> None:
    hand = LocalHand(gated, pack_tokens=1024)
    engine = Engine(gated, hands=[hand])
    gated.broken = MemoryError()
    gated.gate.set()
    texts = [f"text number {i} with some words" for i in range(40)]
    result = await vectors(engine, texts)
    np.testing.assert_allclose(result, gated.encode(texts), rtol=0, atol=1e-5)
    assert 256 <= hand.pack_tokens < 1024  # half of the forward, whose size depends on the cores
    engine.close()


async def test_a_vector_that_is_not_finite_is_never_given_out(encoder: Encoder) -> None:
    class Poisoned(Gated):
        def forward_pack(self, prompts: Sequence[Prompt]) -> np.ndarray:
            computed = super().forward_pack(prompts)
            computed[[len(prompt.ids) == 3 for prompt in prompts]] = np.nan
            return computed

    poisoned = Poisoned(encoder)
    poisoned.gate.set()
    engine = Engine(poisoned)
    three = next(text for text in ("a", "b c", "ab", "one", "the") if len(encoder.prompts.build([text])[0].ids) == 3)
    good = asyncio.create_task(vectors(engine, ["a healthy and longer text"]))
    with pytest.raises(EngineError, match="not finite"):
        await vectors(engine, [three])
    assert np.isfinite(await good).all()
    engine.close()


async def test_close_finishes_what_was_accepted(gated: Gated) -> None:
    engine = Engine(gated, pack_tokens=20)
    accepted = asyncio.create_task(vectors(engine, ["some accepted words"] * 10))
    await until(gated.begun.is_set)
    closing = asyncio.create_task(asyncio.to_thread(engine.close, 300))
    await until(lambda: engine._stopping)
    with pytest.raises(EngineStopped):
        await vectors(engine, ["too late"])
    gated.gate.set()
    assert (await accepted).shape == (10, gated.dim)
    await closing
