"""8-bit weights and 8-bit activations on a CPU: almost twice the speed of float32.

A fast 8-bit GEMM allows one scale per token and one per row of a weight. A decoder does not fit that as it is: a few of
its channels are a hundred times larger than the rest, and would leave the rest a handful of steps. So the input of
every linear layer is rotated first, in blocks of 64 by a Hadamard matrix, which spreads an outlier evenly over its
block (QuaRot, arXiv 2404.00456). The weights are rotated alike, so the exact result is the same. On SmolLM2-135M that
takes the worst cosine to float32 from 0.96 to above 0.99, and three layers in float32 to 0.997.

Sums of integers are exact, so a text has the same vector, to the bit, in any batch.
"""

from collections.abc import Collection
from functools import cache

import torch
from torch import Tensor, nn

from unmask.encoder.runtime import kernels
from unmask.encoder.runtime.linear import Linear, invariant_linear, is_batch_invariant, prepack_weight
from unmask.errors import UsageError

# Cache key. Change it whenever int8 output changes: cached vectors and resumed jobs are matched by it.
INT8_PRECISION = "int8, inputs turned by a fast transform, the first tenth of the layers in float32"
# Channels rotated together: more would spread outliers further, and take longer to rotate.
_BLOCK_SIZE = 64
# Zero point of the activations: oneDNN's fast GEMM reads unsigned bytes.
_ZERO_POINT = 128
# From here on, float32 has whole numbers only: adding it rounds, and leaves the integer in the last byte.
_ROUNDING_OFFSET = 2.0**23
_EXPECTED_ROWS = 512
# The first 1/N of the layers stay in float32: their rounding errors would pass through all others.
_FLOAT32_FRACTION = 10


class Int8Linear(Linear):
    """A `Linear` with 8-bit weights only: for inference, without gradients, and without a way back to float32."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_parameter("weight", None)
        self.bias = linear.bias
        block = _block_size(linear.in_features)
        self.rotation = prepack_weight(_rotation(block).T.contiguous()) if block > 1 else None
        self.block = block
        plain = linear.plain_weight() if isinstance(linear, Linear) else linear.weight.detach()
        weight = plain.float()  # [out, in]
        if block > 1:
            weight = (weight.view(-1, block) @ _rotation(block)).view_as(weight)
        top = _weight_limit()
        scale = weight.abs().amax(1).clamp_min_(torch.finfo(torch.float32).tiny).div_(top)  # [out]
        steps = (weight / scale[:, None]).round_().clamp_(-top, top).to(torch.int8)
        self.scale = scale
        self.zero = torch.zeros(self.out_features, dtype=torch.int32)
        self.packed = torch.ops.onednn.qlinear_prepack(steps, [_EXPECTED_ROWS, self.in_features])

    def prepack(self, dtype: torch.dtype = torch.float32) -> None:
        """Nothing to do: the 8-bit weight is prepacked already."""

    def stored_weight(self) -> Tensor:
        """Return the 8-bit weight, in the layout of oneDNN."""
        return self.packed

    def unpack(self) -> None:
        """Nothing to do: no float32 weight is left."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out], float32."""
        x = input.reshape(-1, self.in_features).float()
        bias = None if self.bias is None else self.bias.detach().float()
        if self.block == _BLOCK_SIZE and kernels.library() is not None:
            steps, sizes = kernels.quantise_rows(x, _signs(self.block))
            out = kernels.rescale_rows(_int8_gemm(steps, self.packed, self.scale, self.zero), sizes, bias)
        else:
            steps, sizes = self._quantise_rows(x)
            out = _int8_gemm(steps, self.packed, self.scale, self.zero).mul_(sizes[:, None])  # [T, out]
            out = out if bias is None else out.add_(bias)
        return out.view(*input.shape[:-1], self.out_features)

    def _quantise_rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The same as `kernels.quantise_rows`, without compiled kernels and for any block."""
        if self.rotation is None:
            x = x.clone()
        else:
            x = invariant_linear(x.reshape(-1, self.block), self.rotation, None).view(-1, self.in_features)
        # The fastest way to the largest magnitude: `vector_norm` takes 26 times as long.
        largest = torch.maximum(x.amax(1, keepdim=True), x.amin(1, keepdim=True).neg_()).clamp_min_(1e-30)  # [T, 1]
        # The last byte of this sum is the rounded value, in at most a quarter of the time of a cast to bytes.
        steps = x.mul_(127.0 / largest).add_(_ROUNDING_OFFSET + _ZERO_POINT).view(torch.int32).to(torch.uint8)
        return steps, largest[:, 0] / 127.0


def quantise(module: nn.Module) -> None:
    """Replace the `Linear` layers of a decoder by `Int8Linear`, one at a time, so that memory never holds both.

    The first tenth of the layers stays in float32.

    Raises:
        UsageError: the module has none, or this machine has no exact 8-bit product.
    """
    layers: list[nn.Module] = list(getattr(module, "layers", []))
    float32_modules = {id(part) for layer in layers[: len(layers) // _FLOAT32_FRACTION] for part in layer.modules()}
    if not any(isinstance(part, Linear) for part in module.modules()):
        raise UsageError("dtype='int8' needs an architecture of unmask's own table; choose float32 or bfloat16")
    _quantise(module, Linear, float32_modules)


def quantise_torch(module: nn.Module) -> None:
    """Replace every `nn.Linear` of another library's module by `Int8Linear`. The module is float32, on a CPU.

    Raises:
        UsageError: it has none, or this machine has no exact 8-bit product.
    """
    # No class derived from it: some of torch's read the weight of such a layer themselves.
    if not any(type(part) is nn.Linear for part in module.modules()):
        raise UsageError("dtype='int8': this model has no linear layers; choose float32")
    _quantise(module, nn.Linear, set())


def _quantise(module: nn.Module, kind: type[nn.Linear], float32_modules: Collection[int]) -> None:
    if not is_batch_invariant() or not _weight_limit():
        raise UsageError("dtype='int8': torch has no exact 8-bit product on this machine; choose float32")
    linears = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if type(child) is kind and id(child) not in float32_modules
    ]
    with torch.inference_mode(False), torch.no_grad():
        for parent, name, linear in linears:
            setattr(parent, name, Int8Linear(linear))


def _int8_gemm(steps: Tensor, packed: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """(uint8 [T, in] - 128) @ int8 [in, out] * the scale of each output: float32 [T, out]."""
    return torch.ops.onednn.qlinear_pointwise(
        steps, 1.0, _ZERO_POINT, packed, scale, zero, None, 1.0, 0, torch.float32, "none", [], ""
    )


def _block_size(features: int) -> int:
    """Return the largest power of two up to 64 that divides a number of features."""
    return min(_BLOCK_SIZE, features & -features)


@cache
def _rotation(size: int) -> Tensor:
    """A rotation [size, size] with entries +-1/sqrt(size): Sylvester's Hadamard matrix with random signs per row.

    Without the signs, a constant offset of the channels, which gated activations have, would add up in one of them.
    """
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix * _signs(size)[:, None]


@cache
def _signs(size: int) -> Tensor:
    """Random signs of a block's numbers, divided by the root of its size: float32 [size]."""
    return (torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(0)) * 2 - 1) / size**0.5


@cache
def _weight_limit() -> int:
    """Return the largest magnitude of an 8-bit weight whose products are exact here: 127, 63, or 0 if there is none.

    CPUs without VNNI add pairs of products in 16 bits and saturate silently if both sides use all their bits.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (64, 256), generator=generator)
    for top in (127, 63):
        weight = torch.randint(-top, top + 1, (96, 256), generator=generator)
        weight[:32] = top  # the largest possible sums
        x[:8] = 255
        try:
            packed = torch.ops.onednn.qlinear_prepack(weight.to(torch.int8), list(x.shape))
            actual = _int8_gemm(x.to(torch.uint8), packed, torch.ones(96), torch.zeros(96, dtype=torch.int32))
        except (AttributeError, RuntimeError, NotImplementedError):
            return 0
        if torch.equal(actual, ((x - _ZERO_POINT) @ weight.T).float()):
            return top
    return 0
