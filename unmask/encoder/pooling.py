"""From the states of a sequence to one vector."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from unmask.encoder.prompt import Prompt


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
        first, stop = (0, 1) if pooling == "bos_token" else prompt.pooled
        states = sequence[first:stop].float()  # [P, W]
        vectors.append(_POOLERS["last_token" if pooling == "bos_token" else pooling](states))
    return torch.stack(vectors)
