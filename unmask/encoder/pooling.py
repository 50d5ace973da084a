"""Pooling: hidden states of a pack to one vector per sequence."""

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


def _first(states: Tensor) -> Tensor:
    return states[0]


def _last(states: Tensor) -> Tensor:
    return states[-1]


# Pooled states [P, W] of one sequence -> its vector [W].
_POOLERS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": _mean,
    "weighted_mean": _weighted_mean,
    "eos_token": _last,
    "last_token": _last,
    "first_token": _first,
}
POOLINGS = (*_POOLERS, "bos_token")


def pool(hidden: Tensor, prompts: Sequence[Prompt], pooling: str) -> Tensor:
    """Return the vectors of a pack. `pool_bags` is the same for a GPU.

    Args:
        hidden: hidden states of all sequences end to end, [T, W].
        prompts: the sequences of the pack, in the same order.
        pooling: one of POOLINGS. `bos_token` takes the first state of a sequence, which is BOS; `first_token` the first
            of the pooled positions.

    Returns:
        [len(prompts), W] in float32, summed in float32 whatever the weights' precision.
    """
    vectors = []
    # One split rather than a slice per prompt: the gradient of each slice would be as large as the whole pack.
    for prompt, sequence in zip(prompts, hidden.split([len(prompt.ids) for prompt in prompts]), strict=True):
        first, stop = _pooled_span(prompt, pooling)
        states = sequence[first:stop].float()  # [P, W]
        vectors.append(_POOLERS["last_token" if pooling == "bos_token" else pooling](states))
    return torch.stack(vectors)


def _pooled_span(prompt: Prompt, pooling: str) -> tuple[int, int]:
    return (0, 1) if pooling == "bos_token" else prompt.pooled


class PoolingBags(NamedTuple):
    """The pooled states of a pack and their weights, grouped by sequence.

    Attributes:
        rows: index of each pooled state in the pack, [P].
        weights: weight of each state in the vector of its sequence, float32 [P]; they sum to 1 per sequence.
        starts: first entry of each sequence in `rows`, [N].
    """

    rows: np.ndarray
    weights: np.ndarray
    starts: np.ndarray


def pooling_bags(prompts: Sequence[Prompt], pooling: str) -> PoolingBags:
    """Describe `pool` as indices and weights, which can be sent to a GPU."""
    begins = np.cumsum([0, *(len(prompt.ids) for prompt in prompts[:-1])])
    first, stop = np.array([_pooled_span(prompt, pooling) for prompt in prompts]).T + begins
    if pooling == "first_token":
        stop = first + 1
    elif pooling not in ("mean", "weighted_mean"):
        first = stop - 1
    counts = stop - first
    starts = counts.cumsum() - counts
    place = np.arange(counts.sum()) - np.repeat(starts, counts)  # within its sequence
    totals = counts
    shares = np.ones(len(place))
    if pooling == "weighted_mean":
        shares, totals = place + 1.0, counts * (counts + 1) / 2
    weights = (shares / np.repeat(totals, counts)).astype(np.float32)
    return PoolingBags(np.repeat(first, counts) + place, weights, starts)


def pool_bags(hidden: Tensor, rows: Tensor, weights: Tensor, bags: Tensor) -> Tensor:
    """Return the vectors of a pack in a few kernels, whatever its number of sequences.

    Args:
        hidden: hidden states of all sequences end to end, [T, W].
        rows, weights: as in `PoolingBags`; entries behind the last sequence are ignored.
        bags: first entry in `rows` of each sequence, and the end of the last one, [N+1].

    Returns:
        [N, W] in float32, summed in float32.
    """
    summed = F.embedding_bag(rows, hidden.float(), bags, mode="sum", per_sample_weights=weights)  # [N+1, W]
    return summed[:-1]  # the last bag holds the ignored entries
