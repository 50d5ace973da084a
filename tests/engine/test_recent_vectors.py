"""Recent vectors: equal to computed ones, within their memory, and never a canary's."""

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unmask import Encoder
from unmask.encoder import Prompt
from unmask.engine import Engine
from unmask.engine.recent_vectors import RecentVectors, cache_key
from unmask.errors import Overloaded

LIMIT = 10 * (16 + 300)  # ten vectors of four numbers


@pytest.fixture(scope="module")
def encoder(golden_dir: Path) -> Encoder:
    return Encoder.load(golden_dir / "tiny_llama")


class Counting(Encoder):
    """The same encoder, which notes what it computes."""

    def __init__(self, encoder: Encoder) -> None:
        self.__dict__.update(encoder.__dict__)
        self.computed = 0

    def forward_pack(self, prompts: Sequence[Prompt]) -> np.ndarray:
        self.computed += len(prompts)
        return super().forward_pack(prompts)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 20)), max_size=80))
def test_the_least_recently_asked_for_leaves_first(steps: list[tuple[bool, int]]) -> None:
    recent, model = RecentVectors(LIMIT), OrderedDict[int, float]()
    for number, (put, name) in enumerate(steps):
        key = str(name).encode()
        if put:
            recent.put(key, np.full(4, number, dtype=np.float32))
            model.pop(name, None)
            model[name] = number
            if len(model) > 10:
                model.popitem(last=False)
        else:
            vector = recent.get(key)
            assert (None if vector is None else vector[0]) == model.get(name)
            if name in model:
                model.move_to_end(name)
        assert len(recent) == len(model)
        assert recent.bytes == len(model) * (16 + 300)


def test_what_cannot_fit_is_not_kept_and_drives_nothing_out() -> None:
    recent = RecentVectors(LIMIT)
    recent.put(b"small", np.zeros(4, dtype=np.float32))
    recent.put(b"large", np.zeros(4000, dtype=np.float32))
    assert recent.get(b"large") is None
    assert recent.get(b"small") is not None


def test_a_kept_vector_is_a_copy_that_nobody_can_change() -> None:
    recent, vector = RecentVectors(LIMIT), np.ones(4, dtype=np.float32)
    recent.put(b"one", vector)
    vector[:] = 7
    copy = recent.get(b"one")
    assert copy is not None
    assert copy.tolist() == [1, 1, 1, 1]
    with pytest.raises(ValueError, match="read-only"):
        copy[0] = 2


def test_tokens_and_pooled_positions_make_the_key(encoder: Encoder) -> None:
    plain, other = encoder.prompts.build(["one two", "one two three"])
    instructed, _ = encoder.prompts.build(["one two", "x"], "Find this:")
    again = encoder.prompts.build(["one two"])[0]
    keys = [cache_key(prompt) for prompt in (plain, other, instructed)]
    assert len(set(keys)) == 3
    assert cache_key(again) == keys[0]
    moved = Prompt(plain.ids, (plain.pooled[0], plain.pooled[1] - 1), plain.full_length)
    assert cache_key(moved) != keys[0]


async def test_repeated_texts_are_computed_once_and_right(encoder: Encoder) -> None:
    counting = Counting(encoder)
    engine = Engine(counting, cache_bytes=1_000_000)
    texts = ["one", "two words", "one", "three words here", "two words"]
    expected = encoder.encode(texts)
    np.testing.assert_array_equal(await engine.run(await engine.prepare(texts)), expected)
    assert (counting.computed, engine.reused_prompts) == (3, 2)
    again = [*texts, "new"]
    np.testing.assert_array_equal(await engine.run(await engine.prepare(again)), encoder.encode(again))
    assert (counting.computed, engine.reused_prompts) == (4, 7)
    instructed = await engine.run(await engine.prepare(["one"], instruction="Find this:"))
    np.testing.assert_array_equal(instructed, encoder.encode(["one"], instruction="Find this:"))
    assert counting.computed == 5
    engine.close()


async def test_asked_for_afresh_nothing_is_taken_from_memory(encoder: Encoder) -> None:
    counting = Counting(encoder)
    engine = Engine(counting, cache_bytes=1_000_000)
    prompts = await engine.prepare(["one"])
    for _ in range(3):
        await engine.run(prompts, use_cache=False)
    assert counting.computed == 3
    engine.close()


async def test_a_known_text_needs_no_place_in_the_queue(encoder: Encoder) -> None:
    engine = Engine(encoder, queue_tokens=50, cache_bytes=1_000_000)
    repeat = await engine.prepare(["one"])
    await engine.run(repeat)
    waiting = [asyncio.create_task(engine.run(await engine.prepare([f"{i} " + "word " * 30]))) for i in range(6)]
    answers = await asyncio.gather(engine.run(repeat), *waiting, return_exceptions=True)
    assert isinstance(answers[0], np.ndarray)
    assert all(isinstance(answer, np.ndarray | Overloaded) for answer in answers)
    engine.close()


async def test_a_hit_needs_neither_the_queue_nor_the_engines_thread(encoder: Encoder) -> None:
    counting = Counting(encoder)
    engine = Engine(counting, cache_bytes=1_000_000)
    prompts = await engine.prepare(["a text of some words that was asked for before"])
    expected = await engine.run(prompts)
    for _ in range(200):
        hit = asyncio.create_task(engine.run(prompts))
        await asyncio.sleep(0)  # one turn of the loop
        assert hit.done() and np.array_equal(hit.result(), expected)
    assert counting.computed == 1
    engine.close()
