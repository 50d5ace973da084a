"""Packs: complete, within budget, and the same vectors whatever the cores."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unmask import Encoder
from unmask.encoder.cores import each_on_a_core
from unmask.encoder.packing import CORE_TOKENS, pack, pack_budget


@given(lengths=st.lists(st.integers(1, 600), max_size=80), budget=st.integers(1, 1000))
def test_every_sequence_is_in_one_pack(lengths: list[int], budget: int) -> None:
    packs = pack(lengths, budget)
    assert sorted(index for members in packs for index in members) == list(range(len(lengths)))
    for members in packs:
        assert sum(lengths[i] for i in members) <= budget or len(members) == 1
        ordered = [lengths[i] for i in members]
        assert ordered == sorted(ordered, reverse=True)


@given(tokens=st.integers(0, 1_000_000))
def test_a_budget_shares_the_work(tokens: int) -> None:
    budget = pack_budget(tokens, "cpu")
    assert 256 <= budget <= CORE_TOKENS


def test_threads_are_as_before_even_after_an_error() -> None:
    before = torch.get_num_threads()
    seen: list[int] = []

    def work(item: int) -> int:
        seen.append(torch.get_num_threads())
        if item == 3:
            raise ValueError("a fault in one pack")
        return item * 2

    assert each_on_a_core(work, [1, 2]) == [2, 4]
    with pytest.raises(ValueError, match="fault"):
        each_on_a_core(work, [1, 2, 3, 4])
    assert torch.get_num_threads() == before
    assert before == 1 or set(seen) == {1}


def test_one_thread_and_many_give_the_same_vectors(golden_dir: Path) -> None:
    encoder = Encoder.load(golden_dir / "tiny_llama")
    texts = [f"text number {i} " * (1 + i % 17) for i in range(200)]
    many = encoder.encode(texts)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        one = encoder.encode(texts)
    finally:
        torch.set_num_threads(before)
    assert np.abs(many - one).max() <= 1e-5 * np.linalg.norm(one, axis=1).min()
