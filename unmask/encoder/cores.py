"""Who computes what on a CPU: packs onto cores, and the matrix product that serves them.

A product split over cores ends when the slowest core does, 120 times per forward. So cores get whole packs and meet
once per call; only a pack that is alone shares the cores inside its products. Torch's own operations run on one
thread either way: its waiting OpenMP threads would otherwise hold the cores that the products need.

The products are numpy's (OpenBLAS in its wheels), not torch's (MKL). Speed is the same, but OpenBLAS sums a row in
the same order whatever stands in the other rows, so a text's vector does not depend on its batch; with MKL a text
on which the model is ill-conditioned moved by 2e-5.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from threadpoolctl import ThreadpoolController
from torch import Tensor, nn

_Pack = TypeVar("_Pack")
_Result = TypeVar("_Result")

# OpenBLAS sums very few rows by other kernels, in another order.
_LEAST_ROWS = 8


class Linear(nn.Linear):
    """`nn.Linear` that uses the batch-invariant product where no gradient is wanted: float32 on a CPU."""

    def forward(self, input: Tensor) -> Tensor:
        """[T, in] -> [T, out]."""
        if torch.is_grad_enabled() or input.device.type != "cpu" or input.dtype != torch.float32:
            return F.linear(input, self.weight, self.bias)
        rows = input.shape[0]
        if rows < _LEAST_ROWS:
            input = F.pad(input, (0, 0, 0, _LEAST_ROWS - rows))
        out = torch.empty(input.shape[0], self.out_features)
        np.dot(input.numpy(), self.weight.detach().numpy().T, out=out.numpy())  # the .T is a flag to BLAS, no copy
        if self.bias is not None:
            out += self.bias.detach()
        return out[:rows]


def cores() -> int:
    """Threads that torch was given when this process began to encode."""
    return _before.torch if _users else torch.get_num_threads()


def each_on_a_core(function: Callable[[_Pack], _Result], packs: Sequence[_Pack]) -> list[_Result]:
    """`function` of every pack, in order; several run at once, each on one core, and a single one on all."""
    alone = len(packs) < 2 or cores() < 2
    with _threads(cores() if alone else 1):
        if alone:
            return [function(pack) for pack in packs]
        return list(_workers(cores()).map(function, packs))


@cache
def _workers(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="unmask-core")


class _Threads:
    """Numbers of threads as they were before we changed them."""

    torch = 1
    blas: tuple[int, ...] = ()


_before = _Threads()
_lock = threading.Lock()
_users = 0


@cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController().select(user_api="blas")


@contextmanager
def _threads(per_product: int) -> Iterator[None]:
    """One thread per torch operation and `per_product` per matrix product; then everything as it was.

    These settings belong to the process. Where several callers overlap, the first one's hold until the last is done.
    """
    global _users
    with _lock:
        libraries = _blas().lib_controllers
        if _users == 0:
            _before.torch = torch.get_num_threads()
            _before.blas = tuple(library.get_num_threads() or 1 for library in libraries)
            torch.set_num_threads(1)
            for library in libraries:
                library.set_num_threads(per_product)
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                for library, threads in zip(libraries, _before.blas, strict=True):
                    library.set_num_threads(threads)
                torch.set_num_threads(_before.torch)
