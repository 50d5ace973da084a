"""`turns`: the order in which a round measures its subjects."""

from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def turns(subjects: Iterable[T], number: int) -> list[T]:
    """Return the subjects in the order of round `number`, from 0: everybody is first in turn.

    Whoever comes first may find a rested processor: on one machine that was worth 7 %.
    """
    listed = list(subjects)
    first = number % len(listed)
    return listed[first:] + listed[:first]
