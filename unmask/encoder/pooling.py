"""From the states of a sequence to one vector."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unmask.encoder.prompts import Prompt


def _mean(states: Tensor) -> Tensor:
    return states.mean(dim=0)


def _weighted_mean(states: Tensor) -> Tensor:
    # Position weights of SGPT (arXiv 2202.08904): the later a token, the more it counts.
    weights = torch.arange(1, len(states) + 1, device=states.device, dtype=states.dtype)
    return (weights / weights.sum()) @ states


def _last(states: Tensor) -> Tensor:
    return states[-1]


# How the pooled states [P, W] of one sequence become its vector [W].
_POOLERS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": _mean,
    "weighted_mean": _weighted_mean,
    "eos_token": _last,
    "last_token": _last,
}
POOLINGS = (*_POOLERS, "bos_token")


def pool(hidden: Tensor, prompts: Sequence[Prompt], pooling: str) -> Tensor:
    """Vectors of a pack.

    Args:
        hidden: states of all sequences end to end, [T, W].
        prompts: the pack's sequences, in the same order.
        pooling: one of POOLINGS. `bos_token` takes the first state of a sequence, which is BOS.

    Returns:
        [len(prompts), W] in float32. The sum is taken in float32 too, whatever the weights' precision.
    """
    vectors = []
    # One split rather than a slice per prompt: the gradient of each slice would be as large as the whole pack.
    for prompt, sequence in zip(prompts, hidden.split([len(prompt.ids) for prompt in prompts]), strict=True):
        first, stop = _pooled(prompt, pooling)
        states = sequence[first:stop].float()  # [P, W]
        vectors.append(_POOLERS["last_token" if pooling == "bos_token" else pooling](states))
    return torch.stack(vectors)


def _pooled(prompt: Prompt, pooling: str) -> tuple[int, int]:
    return (0, 1) if pooling == "bos_token" else prompt.pooled


class Bags(NamedTuple):
    """The pooled states of a pack, those of one sequence together.

    Attributes:
        rows: which state of the pack, [P].
        weights: how much of it goes into the vector, float32 [P]; of one sequence they add up to 1.
        starts: where each sequence begins in `rows`, [N].
    """

    rows: np.ndarray
    weights: np.ndarray
    starts: np.ndarray


def bags_of(prompts: Sequence[Prompt], pooling: str) -> Bags:
    """What `pool` does to a pack, as numbers that can be sent to a GPU."""
    begins = np.cumsum([0, *(len(prompt.ids) for prompt in prompts[:-1])])
    first, stop = np.array([_pooled(prompt, pooling) for prompt in prompts]).T + begins
    if pooling not in ("mean", "weighted_mean"):
        first = stop - 1
    counts = stop - first
    starts = counts.cumsum() - counts
    place = np.arange(counts.sum()) - np.repeat(starts, counts)  # within its sequence
    totals = counts
    shares = np.ones(len(place))
    if pooling == "weighted_mean":
        shares, totals = place + 1.0, counts * (counts + 1) / 2
    weights = (shares / np.repeat(totals, counts)).astype(np.float32)
    return Bags(np.repeat(first, counts) + place, weights, starts)


def pool_bags(hidden: Tensor, rows: Tensor, weights: Tensor, bags: Tensor) -> Tensor:
    """Vectors of a pack in a few kernels, however many its sequences are.

    Args:
        hidden: states of all sequences end to end, [T, W].
        rows, weights: as in `Bags`, with any rows at all behind the last sequence's.
        bags: where each sequence begins in `rows`, and where the last one ends, [N+1].

    Returns:
        [N, W] in float32, summed in float32.
    """
    summed = F.embedding_bag(rows, hidden.float(), bags, mode="sum", per_sample_weights=weights)  # [N+1, W]
    return summed[:-1]  # the last bag is all that comes after
