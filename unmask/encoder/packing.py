"""Sequences into packs: what one forward gets."""

from collections.abc import Sequence

import torch

from unmask.encoder.runtime.linear import cores

# Tokens of one forward on one core: enough that the matrix products run at full speed, few enough that the
# activations between them stay in its cache. An accelerator wants more.
CORE_TOKENS = 1280
ACCELERATOR_TOKENS = 16_384
# Below this a core of its own costs a pack more than it gains: every pack reads all weights.
_LEAST_TOKENS = 64


def pack(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Group sequences into packs of at most `budget` tokens, longest first, equal lengths side by side.

    A single sequence longer than the budget is a pack of its own. The order depends on nothing but the lengths, so
    the same texts are always packed the same way.

    >>> pack([3, 9, 3, 2], budget=10)
    [[1], [0, 2, 3]]
    """
    packs: list[list[int]] = []
    filled = budget + 1
    for index in _longest_first(lengths):
        if filled + lengths[index] > budget:
            packs.append([])
            filled = 0
        packs[-1].append(index)
        filled += lengths[index]
    return packs


def packs_of(lengths: Sequence[int], device: torch.device | str) -> list[list[int]]:
    """All the packs of one call, in the order in which they are to be computed.

    On a CPU every core is busy to the end: there are as many packs for each, about equally large, and the last ones,
    after which the call ends, are dealt out evenly even if that parts equal lengths.
    """
    if torch.device(device).type != "cpu":
        return pack(lengths, ACCELERATOR_TOKENS)
    tokens = sum(lengths)
    at_once = parallel_packs(tokens, device)
    packs = pack(lengths, _least_budget(lengths, _rounds(tokens, at_once) * at_once)) if lengths else []
    packs.sort(key=lambda members: -sum(lengths[i] for i in members))
    last = [i for members in packs[-at_once:] for i in members]
    return packs[:-at_once] + [[last[i] for i in dealt] for dealt in balance([lengths[i] for i in last], at_once)]


def _least_budget(lengths: Sequence[int], count: int) -> int:
    """The smallest budget with which `pack` makes at most so many packs."""
    low = max(max(lengths), -(-sum(lengths) // count))
    high = low + max(lengths)  # then every pack but the last holds more than its share
    while low < high:
        middle = (low + high) // 2
        if len(pack(lengths, middle)) <= count:
            high = middle
        else:
            low = middle + 1
    return low


def balance(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Sequences in at most `count` packs that end at about the same time, each longest first.

    Each goes to the pack with the fewest tokens so far (Graham 1969: at most a third longer than the best way).

    >>> balance([3, 9, 3, 2], 2)
    [[1], [0, 2, 3]]
    """
    packs: list[list[int]] = [[] for _ in range(min(count, len(lengths)))]
    tokens = [0] * len(packs)
    for index in _longest_first(lengths):
        least = tokens.index(min(tokens))
        packs[least].append(index)
        tokens[least] += lengths[index]
    return packs


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda i: -lengths[i])


def parallel_packs(tokens: int, device: torch.device | str) -> int:
    """Into how many packs so many tokens are dealt that are computed together.

    On a CPU one for each core. On an accelerator one, or two of the largest: one goes there and comes back while the
    other is computed.
    """
    if torch.device(device).type != "cpu":
        return 2 if tokens > ACCELERATOR_TOKENS else 1
    return max(1, min(cores(), tokens // _LEAST_TOKENS))


def pack_budget(tokens: int, device: torch.device | str) -> int:
    """Tokens per pack so that `tokens` of work keep every core busy to the end.

    The number of packs is a multiple of those at once, so that no core waits while another does a last one.
    """
    if torch.device(device).type != "cpu":
        return ACCELERATOR_TOKENS
    at_once = parallel_packs(tokens, device)
    return max(1, -(-tokens // (_rounds(tokens, at_once) * at_once)))


def _rounds(tokens: int, at_once: int) -> int:
    return max(1, -(-tokens // (CORE_TOKENS * at_once)))
