"""Work that is done one step ahead of whoever uses it."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_Item = TypeVar("_Item")


def prefetch(items: Iterator[_Item]) -> Iterator[_Item]:
    """The same items; each is made in a thread of its own while the one before is used.

    What making an item raises comes in its place, after the items before it.
    """
    end = object()
    with ThreadPoolExecutor(1, thread_name_prefix="unmask-ahead") as worker:
        making = worker.submit(next, items, end)
        while (item := making.result()) is not end:
            making = worker.submit(next, items, end)
            yield item  # pyright: ignore[reportReturnType] - `end` has gone
