"""Sequences into packs: what one forward gets."""

from collections.abc import Sequence

import torch

from unmask.encoder.cores import cores

# Tokens of one forward on one core: enough that the matrix products run at full speed, few enough that the
# activations between them stay in its cache. An accelerator wants more.
CORE_TOKENS = 1280
ACCELERATOR_TOKENS = 16_384
# Below this a pack costs more in calls than it gains from a core of its own.
_LEAST_TOKENS = 256


def pack(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Group sequences into packs of at most `budget` tokens, longest first, equal lengths side by side.

    A single sequence longer than the budget is a pack of its own. The order depends on nothing but the lengths, so
    the same texts are always packed the same way.

    >>> pack([3, 9, 3, 2], budget=10)
    [[1], [0, 2, 3]]
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    packs: list[list[int]] = []
    filled = budget + 1
    for index in order:
        if filled + lengths[index] > budget:
            packs.append([])
            filled = 0
        packs[-1].append(index)
        filled += lengths[index]
    return packs


def pack_budget(tokens: int, device: torch.device | str) -> int:
    """Tokens per pack so that `tokens` of work keep every core busy to the end.

    The number of packs is a multiple of the number of cores, so that none waits while another does a last one.
    """
    if torch.device(device).type != "cpu":
        return ACCELERATOR_TOKENS
    count = cores()
    rounds = max(1, -(-tokens // (CORE_TOKENS * count)))
    return max(_LEAST_TOKENS, -(-tokens // (rounds * count)))
