"""CPU threads: whole packs on cores, instead of each matrix product split over cores.

A split product ends when the slowest core does, 120 times per forward. Whole packs, one thread each, wait for each
other once per call. Only a single pack uses all cores inside its products.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

import torch
from threadpoolctl import ThreadpoolController

from unmask.encoder.runtime.linear import uses_openblas

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def num_threads() -> int:
    """Return torch's number of threads, as it was before this process began to encode."""
    return _saved.torch if _users else torch.get_num_threads()


def parallel_map(function: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
    """Return `function` of every item, in order: several at once, each on one core; a single one on all cores."""

    def on_one_core(item: _Item) -> _Result:
        torch.set_num_threads(1)  # OpenMP counts for each thread that calls it
        return function(item)

    single = len(items) < 2 or num_threads() < 2
    _keep_freed_memory()
    with _threads_per_product(num_threads() if single else 1):
        if single:
            return [function(item) for item in items]
        return list(_workers(num_threads()).map(on_one_core, items))


@cache
def _workers(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="unmask-core")


_team_lock = threading.Lock()


def run_parts(run: Callable[[int, int], None], reserve: Callable[[int], object]) -> None:
    """Run the parts of one computation at the same time, on as many cores as this thread's products may use.

    The parts wait for each other at barriers, so all must run. If another team has the cores, there is a single part.

    Args:
        run: computes a part, given its index and the number of parts.
        reserve: called once before, with the number of parts; what it returns is kept until the end.
    """
    parts = torch.get_num_threads()
    alone = parts < 2 or not _team_lock.acquire(blocking=False)
    memory = reserve(1 if alone else parts)
    if alone:
        run(0, 1)
    else:
        try:
            others = [_team(parts - 1).submit(run, part, parts) for part in range(1, parts)]
            run(0, parts)
            for other in others:
                other.result()
        finally:
            _team_lock.release()
    del memory


@cache
def _team(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="unmask-part")


@cache
def _keep_freed_memory() -> None:
    """Make glibc reuse the memory of one product's output for the next.

    glibc returns freed blocks to the system, and a fresh one costs a page fault per 4 KiB: up to an eighth of a
    forward. It stops for blocks up to the size of the largest one it has seen freed, if that is at most 32 MiB.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


class _ThreadCounts:
    """Thread counts of torch and the BLAS libraries before we changed them."""

    torch = 1
    blas: tuple[int, ...] = ()


_saved = _ThreadCounts()
_lock = threading.Lock()
_users = 0


@cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController().select(user_api="blas")


@contextmanager
def _threads_per_product(count: int) -> Iterator[None]:
    """Use `count` threads per matrix product during the block; restore the counts afterwards.

    These settings belong to the process. Where several callers overlap, the first one's hold until the last is done.
    OpenBLAS has threads of its own: beside them torch gets one, as its waiting threads would hold their cores.
    """
    global _users
    with _lock:
        libraries = _blas().lib_controllers
        if _users == 0:
            _saved.torch = torch.get_num_threads()
            _saved.blas = tuple(library.get_num_threads() or 1 for library in libraries)
            for library in libraries:
                library.set_num_threads(count)
        _users += 1
        torch.set_num_threads(1 if uses_openblas() else count)
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            torch.set_num_threads(_saved.torch)
            if _users == 0:
                for library, threads in zip(libraries, _saved.blas, strict=True):
                    library.set_num_threads(threads)
