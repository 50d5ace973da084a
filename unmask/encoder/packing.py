"""Grouping sequences into packs, and the batching policy of a device.

A pack is what one forward computes. `Encoder.encode` packs the texts of a call with `packs_of`; the engine takes a
batch from its queue with `parallel_packs` and `pack_budget`, and splits it with `balance`. Both use the same two
numbers, so a text costs the same on either way.
"""

from collections.abc import Sequence

import torch

from unmask.encoder.runtime.threads import num_threads

# Tokens per forward on one core: enough that the matrix products run at full speed, few enough that the activations
# between them stay in its cache. An accelerator needs more to be busy.
CORE_TOKENS = 1280
ACCELERATOR_TOKENS = 16_384
# With fewer tokens a pack on its own core costs more than it gains: every pack reads all weights.
_MIN_PACK_TOKENS = 64


def packs_of(lengths: Sequence[int], device: torch.device | str) -> list[list[int]]:
    """Return all packs of one call, as indices into `lengths`, in the order in which they should be computed.

    On a CPU every core is busy to the end: each gets the same number of packs of nearly equal size. The last round is
    balanced, even if that separates sequences of equal length.
    """
    if torch.device(device).type != "cpu":
        return pack(lengths, ACCELERATOR_TOKENS)
    tokens = sum(lengths)
    parallel = parallel_packs(tokens, device)
    packs = pack(lengths, _smallest_budget(lengths, _rounds(tokens, parallel) * parallel)) if lengths else []
    packs.sort(key=lambda members: -sum(lengths[i] for i in members))
    last_round = [i for members in packs[-parallel:] for i in members]
    balanced = balance([lengths[i] for i in last_round], parallel)
    return packs[:-parallel] + [[last_round[i] for i in members] for members in balanced]


def parallel_packs(tokens: int, device: torch.device | str, threads: int | None = None) -> int:
    """Number of packs that are computed at the same time when `tokens` wait.

    On a CPU one per core. On an accelerator one, or two of the largest: one is transferred while the other is computed.

    Args:
        threads: cores of the process that computes; None for this process's.
    """
    if torch.device(device).type != "cpu":
        return 2 if tokens > ACCELERATOR_TOKENS else 1
    return max(1, min(threads or num_threads(), tokens // _MIN_PACK_TOKENS))


def pack_budget(tokens: int, device: torch.device | str, threads: int | None = None) -> int:
    """Return the number of tokens per pack, so that `tokens` of work keep every core busy to the end.

    The number of packs is a multiple of `parallel_packs`, so that no core waits while another computes a last one.
    """
    if torch.device(device).type != "cpu":
        return ACCELERATOR_TOKENS
    parallel = parallel_packs(tokens, device, threads)
    return max(1, -(-tokens // (_rounds(tokens, parallel) * parallel)))


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


def balance(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Split sequences into at most `count` packs of nearly equal size, each longest first.

    Each goes to the pack with the fewest tokens so far (Graham 1969: at most a third longer than the best way).

    >>> balance([3, 9, 3, 2], 2)
    [[1], [0, 2, 3]]
    """
    packs: list[list[int]] = [[] for _ in range(min(count, len(lengths)))]
    tokens = [0] * len(packs)
    for index in _longest_first(lengths):
        smallest = tokens.index(min(tokens))
        packs[smallest].append(index)
        tokens[smallest] += lengths[index]
    return packs


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda i: -lengths[i])


def _smallest_budget(lengths: Sequence[int], count: int) -> int:
    """Return the smallest budget with which `pack` makes at most `count` packs."""
    low = max(max(lengths), -(-sum(lengths) // count))
    high = low + max(lengths)  # then every pack but the last holds more than its share
    while low < high:
        middle = (low + high) // 2
        if len(pack(lengths, middle)) <= count:
            high = middle
        else:
            low = middle + 1
    return low


def _rounds(tokens: int, parallel: int) -> int:
    """Number of packs that each core computes one after the other."""
    return max(1, -(-tokens // (CORE_TOKENS * parallel)))
