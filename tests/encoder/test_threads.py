"""Packs on cores: thread counts are restored, and vectors do not depend on the number of threads."""

from pathlib import Path

import numpy as np
import pytest
import torch

from unmask import Encoder
from unmask.encoder.runtime.threads import parallel_map


def test_threads_are_as_before_even_after_an_error() -> None:
    before = torch.get_num_threads()
    seen: list[int] = []

    def work(item: int) -> int:
        seen.append(torch.get_num_threads())
        if item == 3:
            raise ValueError("a fault in one pack")
        return item * 2

    assert parallel_map(work, [1, 2]) == [2, 4]
    with pytest.raises(ValueError, match="fault"):
        parallel_map(work, [1, 2, 3, 4])
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
