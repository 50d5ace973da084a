"""Packs: complete, within budget, and the same vectors whatever the cores."""

from unittest.mock import patch

from hypothesis import given
from hypothesis import strategies as st

from unmask.encoder.packing import CORE_TOKENS, balance, pack, pack_budget, packs_of, parallel_packs


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
    at_once, budget = parallel_packs(tokens, "cpu"), pack_budget(tokens, "cpu")
    assert 1 <= budget <= CORE_TOKENS
    assert -(-tokens // budget) % at_once == 0 or tokens < 2 * at_once * CORE_TOKENS
    assert at_once == 1 or budget >= 64


@given(lengths=st.lists(st.integers(1, 600), max_size=80), count=st.integers(1, 6))
def test_packs_of_a_call_are_even(lengths: list[int], count: int) -> None:
    with patch("unmask.encoder.packing.num_threads", lambda: count):
        packs = packs_of(lengths, "cpu")
    assert sorted(index for members in packs for index in members) == list(range(len(lengths)))
    if not lengths:
        return
    sizes = [sum(lengths[i] for i in members) for members in packs]
    assert max(sizes) <= CORE_TOKENS + max(lengths)
    cores = [0] * count  # that take the next pack when they are free
    for size in sizes:
        cores[cores.index(min(cores))] += size
    assert max(cores) - min(cores) <= max(lengths) or sum(lengths) < 128 * count


@given(lengths=st.lists(st.integers(1, 512), max_size=60), count=st.integers(1, 8))
def test_dealt_packs_are_even(lengths: list[int], count: int) -> None:
    packs = balance(lengths, count)
    assert len(packs) == min(count, len(lengths)) and all(packs)
    assert sorted(index for members in packs for index in members) == list(range(len(lengths)))
    sizes = [sum(lengths[i] for i in members) for members in packs]
    for members in packs:  # without its last sequence, no pack is longer than another
        assert sum(lengths[i] for i in members[:-1]) <= min(sizes)


def test_few_tokens_stay_together_and_a_gpu_gets_large_packs() -> None:
    assert packs_of([10, 20, 30], "cpu") == [[2, 1, 0]]
    assert parallel_packs(16_384, "cuda") == 1 and parallel_packs(16_385, "cuda") == 2
    assert [len(members) for members in packs_of([512] * 64, "cuda")] == [32, 32]
