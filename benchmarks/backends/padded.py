"""Texts to padded batches, for the backends that take token ids and a mask."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tokenizers import Tokenizer

from backends import LONGEST, Job, Run

Batch = Callable[[np.ndarray, np.ndarray], np.ndarray]  # int64 ids and mask [n, t] -> float32 [n, width]


def tokenizer_of(job: Job) -> Tokenizer:
    """The model's own, which cuts at LONGEST."""
    tokenizer = Tokenizer.from_file(str(job.folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(LONGEST)
    return tokenizer


def in_sorted_batches(batch: Batch, job: Job) -> Run:
    """Sorted by their number of tokens, longest first, so that as little as possible is padded."""
    tokenizer, size, side_by_side = tokenizer_of(job), job.setting.batch, job.setting.side_by_side
    workers = ThreadPoolExecutor(side_by_side)

    def run(texts: Sequence[str]) -> np.ndarray:
        sequences = [encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts))]
        order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
        groups = [order[start : start + size] for start in range(0, len(order), size)]

        def one(members: list[int]) -> np.ndarray:
            ids = np.zeros((len(members), len(sequences[members[0]])), dtype=np.int64)
            mask = np.zeros_like(ids)
            for row, member in enumerate(members):
                ids[row, : len(sequences[member])] = sequences[member]
                mask[row, : len(sequences[member])] = 1
            return batch(ids, mask)

        batches_of_vectors = (
            list(workers.map(one, groups)) if side_by_side > 1 else [one(members) for members in groups]
        )
        vectors = np.empty((len(sequences), batches_of_vectors[0].shape[1]), dtype=np.float32)
        for members, rows in zip(groups, batches_of_vectors, strict=True):
            vectors[members] = rows
        return vectors

    return run
