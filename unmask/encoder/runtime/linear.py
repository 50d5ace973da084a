"""Batch-invariant linear layers for float32 on a CPU.

A matrix product must sum a row in the same order whatever the other rows are and however many there are. Otherwise the
vector of a text depends on its batch: with MKL, torch's default for float32, a text on which the model is
ill-conditioned moved by 2e-5. Our own compiled kernels are batch-invariant, and so are the GEMMs of oneDNN and
OpenBLAS. The kernels are used where they fit the machine (`kernels.library`), then oneDNN; both are faster with
weights prepacked into their own memory layout. OpenBLAS, which numpy's wheels contain, is used where torch has no
oneDNN, or one that fails the check in `is_batch_invariant`.
"""

from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unmask.encoder.runtime import kernels

# oneDNN sums a single row with another kernel in another order.
_MIN_ROWS = 8
# OpenBLAS multiplies tiles of 4 to 48 rows, the rest of the rows in another order, and small products in yet another.
# Every tile divides a block of this size. A processor for which the place in a tile counts too gets one row at a time.
_BLOCK_ROWS = 96
# Number of rows for which oneDNN chooses the memory layout of a weight.
_EXPECTED_ROWS = 512


class Linear(nn.Linear):
    """`nn.Linear` with a batch-invariant forward when gradients are off: float32 on a CPU.

    The weight is either an ordinary parameter, or prepacked: stored only in the layout of the compiled kernels or of
    oneDNN, with `weight` None. An ordinary weight is reordered at every call, which takes longer and sees every change
    of the parameter. The output has the same bits either way.
    """

    prepacked: Tensor | None = None
    # Of bfloat16 that inputs are split into, for products in bfloat16. 0: products in float32.
    terms = 0

    def prepack(self, dtype: torch.dtype = torch.float32) -> None:
        """Replace the parameter by the faster layout where there is one. `unpack` restores it bit for bit.

        The compiled kernels read a weight in the fewest bits that keep it: in 8 where its rows are steps of one size,
        in 16 where it is made of bfloat16 numbers. With `dtype` bfloat16 any other is rounded to it. They multiply and
        sum in float32. On a processor with AMX, bfloat16 also means products in bfloat16: of the weight with inputs
        that are split into two terms, which keep 16 of their 24 bits. Sums are float32 there too.
        """
        if self.prepacked is not None or not _is_cpu_float32(self.weight):
            return
        if kernels.library() is not None:
            self.terms = terms_of(dtype)
            with torch.inference_mode(False), torch.no_grad():
                self.prepacked = _fewest_bits(self.weight.detach(), dtype, self.terms)
        elif is_batch_invariant():
            self.prepacked = prepack_weight(self.weight.detach())
        else:
            return
        self.register_parameter("weight", None)

    def unpack(self) -> None:
        """Make the weight an ordinary parameter again. Forwards in other threads are not disturbed."""
        if self.prepacked is not None:
            with torch.inference_mode(False), torch.no_grad():
                self.weight = nn.Parameter(self.plain_weight())
            self.prepacked = None

    def stored_weight(self) -> Tensor:
        """The weight as it is stored: prepacked, or [out, in] in row-major layout."""
        return self.weight.detach() if self.prepacked is None else self.prepacked

    def plain_weight(self) -> Tensor:
        """The weight [out, in] in row-major layout."""
        weight = self.stored_weight()
        if weight.is_mkldnn:
            return weight.to_dense()
        if weight.dim() == 5:
            return kernels.weight_of_tiles(weight, self.out_features, self.in_features).float()
        return weight if weight.dim() == 2 else kernels.weight_of(weight, self.out_features).float()

    def forward(self, input: Tensor) -> Tensor:
        """[T, in] -> [T, out]."""
        if torch.is_grad_enabled() or not _is_cpu_float32(input):
            return F.linear(input, self.weight, self.bias)
        weight = self.stored_weight()
        if kernels.library() is not None and not weight.is_mkldnn:
            return kernels.linear(input, weight, self.out_features, self.bias, self.terms)
        return invariant_linear(input, weight, self.bias)


def terms_of(dtype: torch.dtype) -> int:
    """Return in how many bfloat16 terms prepacked layers of a precision split inputs; 0: products in float32."""
    return 2 if dtype == torch.bfloat16 and kernels.has_amx() else 0


def _fewest_bits(weight: Tensor, dtype: torch.dtype, terms: int) -> Tensor:
    """Panels of a weight rounded to `dtype`, in the fewest bits that keep every number."""
    first = weight[:1]  # tells most weights apart without reading them whole
    if kernels.int8_panels_of(first) is not None and (panels := kernels.int8_panels_of(weight)) is not None:
        return panels
    if terms:
        return kernels.tiles_of(weight)
    if dtype == torch.float32 and all(torch.equal(part.bfloat16().float(), part) for part in (first, weight)):
        dtype = torch.bfloat16
    return kernels.panels_of(weight.to(dtype))


def prepack(module: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Prepack every `Linear` of a module, for faster inference. No other code may hold their weights as parameters."""
    for linear in module.modules():
        if isinstance(linear, Linear):
            linear.prepack(dtype)


def unpack(module: nn.Module) -> None:
    """Make the weight of every `Linear` of a module an ordinary parameter."""
    for linear in module.modules():
        if isinstance(linear, Linear):
            linear.unpack()


def num_parameters(module: nn.Module) -> int:
    """Number of weights of a module, including prepacked and 8-bit weights, which are no parameters."""
    packed_weights = sum(
        part.in_features * part.out_features
        for part in module.modules()
        if isinstance(part, Linear) and part.weight is None
    )
    return packed_weights + sum(parameter.numel() for parameter in module.parameters())


def bits_per_weight(module: nn.Module) -> int:
    """Return the most bits in which a `Linear` layer of a module keeps a weight; 32 for a module without any."""
    linears = [part for part in module.modules() if isinstance(part, Linear)]
    return max((8 * part.stored_weight().element_size() for part in linears), default=32)


def _is_cpu_float32(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32


def invariant_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [T, in], weight [out, in], plain or prepacked -> x @ weight.T + bias, [T, out].

    The bits of a row do not depend on the other rows.
    """
    return (_onednn_linear if is_batch_invariant() else _openblas_linear)(x, weight, bias)


def uses_openblas() -> bool:
    """True if products in float32 on a CPU are numpy's: no compiled kernels, and oneDNN changes the bits of a row."""
    return kernels.library() is None and not is_batch_invariant()


def prepack_weight(weight: Tensor) -> Tensor:
    """Copy of a weight [out, in] in the memory layout that oneDNN's GEMM reads."""
    with torch.inference_mode(False), torch.no_grad():
        return torch.ops.mkldnn._reorder_linear_weight(weight, _EXPECTED_ROWS)


def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = x.shape[0]
    return torch.ops.mkldnn._linear_pointwise(_pad_rows(x, _MIN_ROWS), weight, bias, "none", [], "")[:rows]


def _openblas_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows, step = x.shape[0], _BLOCK_ROWS if _openblas_keeps_rows() else 1
    x = F.pad(x, (0, 0, 0, -rows % step))
    out = torch.empty(x.shape[0], weight.shape[0])
    for first in range(0, len(x), step):
        block = slice(first, first + step)
        _dot(x[block], weight, out[block])
    return (out if bias is None else out.add_(bias.detach()))[:rows]


def _dot(x: Tensor, weight: Tensor, out: Tensor) -> None:
    np.dot(x.numpy(), weight.detach().numpy().T, out=out.numpy())  # the .T is a flag to BLAS, no copy


@cache
def _openblas_keeps_rows() -> bool:
    """True if a row of a block has the same bits at each place in it. Its kernel for Haswell and Zen has not."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_BLOCK_ROWS, 576, generator=generator)
    weight = torch.randn(192, 576, generator=generator)
    plain, turned = torch.empty(_BLOCK_ROWS, 192), torch.empty(_BLOCK_ROWS, 192)
    _dot(x, weight, plain)
    for places in range(1, 12):
        _dot(x.roll(places, 0), weight, turned)
        if not torch.equal(turned, plain.roll(places, 0)):
            return False
    return True


def _pad_rows(x: Tensor, rows: int) -> Tensor:
    return x if x.shape[0] >= rows else F.pad(x, (0, 0, 0, rows - x.shape[0]))


@cache
def is_batch_invariant() -> bool:
    """True if torch has oneDNN's linear and it keeps the bits of a row on this CPU.

    oneDNN chooses its kernel by the CPU. The tests cover the kernels of x86; this checks the one of this machine.
    """
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.inference_mode():
            for out_features, in_features in ((960, 576), (96, 4096)):
                x = torch.randn(1280, in_features, generator=generator)
                weight = torch.randn(out_features, in_features, generator=generator)
                expected = _onednn_linear(x, weight, None)
                prepacked = torch.ops.mkldnn._reorder_linear_weight(weight, _EXPECTED_ROWS)
                for rows in (_MIN_ROWS, 15, 64, 257, 600, 1280):
                    if not torch.equal(_onednn_linear(x[-rows:], prepacked, None), expected[-rows:]):
                        return False
    except (AttributeError, RuntimeError):
        return False
    return True
