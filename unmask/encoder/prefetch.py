"""Prefetch: compute the next item in a background thread."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_Item = TypeVar("_Item")


def prefetch(items: Iterator[_Item]) -> Iterator[_Item]:
    """Yield the same items in the same order; each is computed in a background thread while the one before is used.

    An exception of the iterator is raised in its place, after the items before it.
    """
    end = object()
    with ThreadPoolExecutor(1, thread_name_prefix="unmask-prefetch") as worker:
        pending = worker.submit(next, items, end)
        while (item := pending.result()) is not end:
            pending = worker.submit(next, items, end)
            yield item  # pyright: ignore[reportReturnType] - `end` has gone
