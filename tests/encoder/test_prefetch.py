"""Prefetch: items in order, the next one computed in the background, errors in their place."""

import threading
from collections.abc import Iterator

import pytest

from unmask.encoder.prefetch import prefetch


def test_the_next_item_is_computed_meanwhile_and_an_error_keeps_its_place() -> None:
    begun = [threading.Event() for _ in range(3)]

    def items() -> Iterator[int]:
        for number, event in enumerate(begun):
            event.set()
            if number == 2:
                raise ValueError("the third")
            yield number

    numbers = []
    with pytest.raises(ValueError, match="the third"):
        for number in prefetch(items()):
            assert begun[number + 1].wait(60)
            numbers.append(number)
    assert numbers == [0, 1]
