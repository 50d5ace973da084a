"""Many callers on one real, small model."""

import asyncio
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from unmask import Encoder
from unmask.encoder import Prompt
from unmask.encoder.runtime.threads import num_threads
from unmask.engine import Engine
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
    """The same encoder, whose forward can be held back."""

    def __init__(self, encoder: Encoder) -> None:
        self.__dict__.update(encoder.__dict__)
        self.gate = threading.Event()
        self.packs: list[int] = []
        self.broken: BaseException | None = None

    def forward_pack(self, prompts: Sequence[Prompt]) -> np.ndarray:
        self.gate.wait(30)
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


async def vectors(engine: Engine, texts: list[str], **options) -> np.ndarray:
    return await engine.run(await engine.prepare(texts, truncate=True), **options)


async def until_idle(engine: Engine) -> None:
    """Wait for the worker to have finished its round, speed measurement included."""
    while engine.waiting_tokens():  # noqa: ASYNC110 - the worker is a thread and sets no asyncio event
        await asyncio.sleep(0.01)


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
    first = asyncio.create_task(vectors(engine, ["word " * 20]))
    await asyncio.sleep(0.05)
    second = asyncio.create_task(vectors(engine, ["word " * 30]))
    await asyncio.sleep(0.05)
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
    gated.gate.set()
    await vectors(engine, ["word " * 100] * 10)
    await until_idle(engine)
    engine.tokens_per_second = 100.0
    gated.gate.clear()
    ahead = asyncio.create_task(vectors(engine, ["word " * 100]))
    await asyncio.sleep(0.05)
    with pytest.raises(Overloaded) as refused:
        await vectors(engine, ["word " * 100], deadline=time.monotonic() + 0.5)
    assert 0.5 < refused.value.retry_after < 10
    gated.gate.set()
    await ahead
    engine.close()


class Paced(Encoder):
    """The same encoder at 2,000 tokens a second, whatever the machine."""

    def __init__(self, encoder: Encoder) -> None:
        self.__dict__.update(encoder.__dict__)

    def forward_pack(self, prompts: Sequence[Prompt]) -> np.ndarray:
        began = time.monotonic()
        vectors = super().forward_pack(prompts)
        tokens = sum(len(prompt.ids) for prompt in prompts) * num_threads()  # each core runs a pack of its own
        time.sleep(max(0.0, began + tokens / 2000 - time.monotonic()))
        return vectors


async def test_in_overload_who_is_let_in_is_served_in_time(encoder: Encoder) -> None:
    engine = Engine(Paced(encoder), pack_tokens=256)
    await vectors(engine, ["word " * 60] * 10)
    await until_idle(engine)
    outcomes: dict[str, list[float]] = {}

    async def ask(texts: list[str], caller: str) -> None:
        began = time.monotonic()
        try:
            await vectors(engine, texts, deadline=began + 2.0, caller=caller)
            outcome = "served"
        except Overloaded as error:
            assert 0 < error.retry_after < 10
            outcome = "refused"
        except DeadlineExceeded:
            outcome = "late"
        outcomes.setdefault(outcome, []).append(time.monotonic() - began)

    tasks = []
    for number in range(60):  # 3 seconds of about twice of what can be done; each request is a caller of its own
        tasks.append(asyncio.create_task(ask(["word " * (10 + 40 * (number % 3))] * 4, "")))
        await asyncio.sleep(0.05)
    await asyncio.gather(*tasks)
    assert "late" not in outcomes
    assert len(outcomes["served"]) > 15 and outcomes["refused"]
    assert max(outcomes["refused"]) < 0.2
    engine.close()


async def test_one_caller_leaves_room_for_another(encoder: Encoder) -> None:
    engine = Engine(Paced(encoder), pack_tokens=256)
    await vectors(engine, ["word " * 60] * 10)
    await until_idle(engine)
    deadline = time.monotonic() + 4
    flood = [asyncio.create_task(vectors(engine, ["word " * 60] * 4, deadline=deadline, caller="a")) for _ in range(60)]
    await asyncio.sleep(0.05)
    assert (await vectors(engine, ["word " * 60] * 4, deadline=deadline, caller="b")).shape == (4, encoder.dim)
    answers = await asyncio.gather(*flood, return_exceptions=True)
    refused = [answer for answer in answers if isinstance(answer, BaseException)]
    assert refused and all(isinstance(answer, Overloaded) for answer in refused)
    assert "of this caller" in str(refused[0])
    assert len(flood) - len(refused) > 4
    engine.close()


async def test_a_deadline_that_passes_while_waiting(gated: Gated) -> None:
    engine = Engine(gated, pack_tokens=10)
    blocked = asyncio.create_task(vectors(engine, ["first in the forward"]))
    await asyncio.sleep(0.05)
    with pytest.raises(DeadlineExceeded):
        await vectors(engine, ["too late"], deadline=time.monotonic() + 0.1)
    gated.gate.set()
    await blocked
    assert len(gated.packs) == 1  # the late one was never computed
    engine.close()


async def test_cancelled_work_leaves_the_queue(gated: Gated) -> None:
    engine = Engine(gated, pack_tokens=10)
    blocked = asyncio.create_task(vectors(engine, ["first in the forward"]))
    await asyncio.sleep(0.05)
    given_up = asyncio.create_task(vectors(engine, ["never mind"] * 50))
    await asyncio.sleep(0.05)
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
    engine = Engine(gated, pack_tokens=1024)
    gated.broken = MemoryError()
    gated.gate.set()
    texts = [f"text number {i} with some words" for i in range(40)]
    result = await vectors(engine, texts)
    np.testing.assert_allclose(result, gated.encode(texts), rtol=0, atol=1e-5)
    assert engine._pack_tokens == 256
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
    await asyncio.sleep(0.05)
    closing = asyncio.create_task(asyncio.to_thread(engine.close))
    await asyncio.sleep(0.05)
    with pytest.raises(EngineStopped):
        await vectors(engine, ["too late"])
    gated.gate.set()
    assert (await accepted).shape == (10, gated.dim)
    await closing
