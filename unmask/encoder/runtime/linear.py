"""Who computes what on a CPU: packs onto cores, and the matrix product that serves them.

A product split over cores ends when the slowest core does, 120 times per forward. So cores get whole packs and meet
once per call; only a pack that is alone shares the cores inside its products.

A product must sum a row in the same order whatever stands in the other rows and however many they are, or a text's
vector would depend on its batch: with MKL, torch's own choice for float32, a text on which the model is
ill-conditioned moved by 2e-5. oneDNN's product and OpenBLAS's have that property. oneDNN's is the faster one, above
all with weights that lie in memory in the order in which it reads them; OpenBLAS, in numpy's wheels, stands in where
a torch has no oneDNN, or one that fails the test of rows below.
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

# A single row is summed by another kernel of oneDNN, in another order, and very small products by one of OpenBLAS.
_LEAST_ROWS = 8
_LEAST_MULTIPLICATIONS = 1_000_001
# The number of rows that oneDNN is told to expect when it chooses an order for a weight.
_EXPECTED_ROWS = 512


class Linear(nn.Linear):
    """`nn.Linear` that uses the batch-invariant product where no gradient is wanted: float32 on a CPU.

    Its weight is either a plain parameter or prepacked: kept only in oneDNN's order, and `weight` is None. Each product
    reorders a plain weight anew, which takes 3 to 6 % longer and is right whoever changed it since. The
    bits of a product are the same either way.
    """

    prepacked: Tensor | None = None

    def prepack(self) -> None:
        """Give up the plain weight for the faster form, where there is one. `unpack` gives it back, bit for bit."""
        if self.prepacked is None and _servable(self.weight) and is_batch_invariant():
            self.prepacked = prepacked_weight(self.weight.detach())
            self.register_parameter("weight", None)

    def unpack(self) -> None:
        """Make the weight a plain parameter again. Products that run meanwhile are not disturbed."""
        if self.prepacked is not None:
            with torch.inference_mode(False), torch.no_grad():
                self.weight = nn.Parameter(self.plain_weight())
            self.prepacked = None

    def plain_weight(self) -> Tensor:
        """The weight [out, in] as it would be unsealed."""
        return self.weight.detach() if self.prepacked is None else self.prepacked.to_dense()

    def forward(self, input: Tensor) -> Tensor:
        """[T, in] -> [T, out]."""
        if torch.is_grad_enabled() or not _servable(input):
            return F.linear(input, self.weight, self.bias)
        prepacked = self.prepacked
        return product(input, self.weight if prepacked is None else prepacked, self.bias)


def prepack(module: nn.Module) -> None:
    """Seal every `Linear` in a module, so that its weights serve faster. Nobody may hold them as parameters."""
    for linear in module.modules():
        if isinstance(linear, Linear):
            linear.prepack()


def unpack(module: nn.Module) -> None:
    """Make every weight in a module a plain parameter."""
    for linear in module.modules():
        if isinstance(linear, Linear):
            linear.unpack()


def num_parameters(module: nn.Module) -> int:
    """Number of weights in a module, also of those that are kept in another form."""
    kept = sum(
        part.in_features * part.out_features
        for part in module.modules()
        if isinstance(part, Linear) and part.weight is None
    )
    return kept + sum(parameter.numel() for parameter in module.parameters())


def _servable(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [T, in] times a plain or prepacked weight [out, in]: [T, out]. A row's bits do not depend on the other rows."""
    return (_onednn_product if is_batch_invariant() else _openblas_product)(x, weight, bias)


def prepacked_weight(weight: Tensor) -> Tensor:
    """A weight [out, in] in the order in which oneDNN reads it."""
    with torch.inference_mode(False), torch.no_grad():
        return torch.ops.mkldnn._reorder_linear_weight(weight, _EXPECTED_ROWS)


def _onednn_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = x.shape[0]
    return torch.ops.mkldnn._linear_pointwise(_padded(x, _LEAST_ROWS), weight, bias, "none", [], "")[:rows]


def _openblas_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = x.shape[0]
    x = _padded(x, max(_LEAST_ROWS, -(-_LEAST_MULTIPLICATIONS // weight.numel())))
    out = torch.empty(x.shape[0], weight.shape[0])
    np.dot(x.numpy(), weight.detach().numpy().T, out=out.numpy())  # the .T is a flag to BLAS, no copy
    return (out if bias is None else out.add_(bias.detach()))[:rows]


def _padded(x: Tensor, rows: int) -> Tensor:
    return x if x.shape[0] >= rows else F.pad(x, (0, 0, 0, rows - x.shape[0]))


@cache
def is_batch_invariant() -> bool:
    """Whether torch has oneDNN's product, and it keeps the bits of a row here.

    Which kernel oneDNN takes depends on the processor. The tests cover the kernels of x86; this asks the one at hand.
    """
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.inference_mode():
            for width, inner in ((960, 576), (96, 4096)):
                x = torch.randn(1280, inner, generator=generator)
                weight = torch.randn(width, inner, generator=generator)
                whole = _onednn_product(x, weight, None)
                prepacked = torch.ops.mkldnn._reorder_linear_weight(weight, _EXPECTED_ROWS)
                for rows in (_LEAST_ROWS, 15, 64, 257, 600, 1280):
                    if not torch.equal(_onednn_product(x[-rows:], prepacked, None), whole[-rows:]):
                        return False
    except (AttributeError, RuntimeError):
        return False
    return True


def cores() -> int:
    """Threads that torch was given when this process began to encode."""
    return _before.torch if _users else torch.get_num_threads()


def parallel_map(function: Callable[[_Pack], _Result], packs: Sequence[_Pack]) -> list[_Result]:
    """`function` of every pack, in order; several run at once, each on one core, and a single one on all."""

    def on_one_core(pack: _Pack) -> _Result:
        torch.set_num_threads(1)  # OpenMP counts for each thread that calls it
        return function(pack)

    alone = len(packs) < 2 or cores() < 2
    _keep_freed_memory()
    with _threads(cores() if alone else 1):
        if alone:
            return [function(pack) for pack in packs]
        return list(_workers(cores()).map(on_one_core, packs))


@cache
def _workers(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="unmask-core")


@cache
def _keep_freed_memory() -> None:
    """Let a product's output use the memory of the last one's.

    glibc gives freed blocks back to the system, and a fresh one costs a page fault per 4 KiB: up to an eighth of a
    forward. It stops for blocks up to the size of the largest one it has seen freed, if that is at most 32 MiB.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


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
    """`per_product` threads per matrix product; then everything as it was.

    These settings belong to the process. Where several callers overlap, the first one's hold until the last is done.
    OpenBLAS has threads of its own: beside them torch gets one, as its waiting threads would hold their cores.
    """
    global _users
    with _lock:
        libraries = _blas().lib_controllers
        if _users == 0:
            _before.torch = torch.get_num_threads()
            _before.blas = tuple(library.get_num_threads() or 1 for library in libraries)
            for library in libraries:
                library.set_num_threads(per_product)
        _users += 1
        torch.set_num_threads(per_product if is_batch_invariant() else 1)
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            torch.set_num_threads(_before.torch)
            if _users == 0:
                for library, threads in zip(libraries, _before.blas, strict=True):
                    library.set_num_threads(threads)
