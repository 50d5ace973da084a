"""Sequences into packs: what one forward gets."""

from collections.abc import Sequence


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
