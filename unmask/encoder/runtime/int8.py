"""Products of 8-bit weights and 8-bit activations on a CPU: almost twice the speed of float32.

One scale per token and one per row of a weight are all that such a product can carry at full speed. A decoder does not
fit them as it is: a few of its channels are a hundred times larger than the rest, and would leave the rest a handful of
steps. So the inputs of every product are turned first, in blocks of 64 by a Hadamard matrix, which spreads an outlier
evenly over its block (QuaRot, arXiv 2404.00456); the weights are turned alike, and turning changes no product. On
SmolLM2-135M that takes the worst cosine to float32 from 0.96 to above 0.99, and three layers in float32 to 0.997.

Sums of integers are exact, so a text has the same vector, to the bit, in any batch.
"""

from functools import cache

import torch
from torch import Tensor, nn

from unmask.encoder.runtime.linear import Linear, is_batch_invariant, prepacked_weight, product
from unmask.errors import UsageError

# To be changed with anything that changes a vector: finished vectors are kept and gone on with by these words.
METHOD = "int8, the first tenth of the layers in float32"
# Channels turned together: more would spread outliers further, and take longer to turn.
_BLOCK = 64
# Zero of the activations: oneDNN's fast product reads unsigned bytes.
_ZERO = 128
# From here on, float32 has whole numbers only.
_LAST_BYTE = 2.0**23
_EXPECTED_ROWS = 512
# One layer in so many stays in float32, the first ones: what is rounded there goes through all others.
_EXACT = 10


class Int8Linear(Linear):
    """A `Linear` that keeps 8-bit weights only. It serves; it has no gradient, and no plain weight to give back."""

    def __init__(self, linear: Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_parameter("weight", None)
        self.bias = linear.bias
        block = _block(linear.in_features)
        self.turn = prepacked_weight(_turn(block).T.contiguous()) if block > 1 else None
        self.block = block
        weight = linear.plain_weight().float()  # [out, in]
        if block > 1:
            weight = (weight.view(-1, block) @ _turn(block)).view_as(weight)
        top = _weight_steps()
        scale = weight.abs().amax(1).clamp_min_(torch.finfo(torch.float32).tiny).div_(top)  # [out]
        steps = (weight / scale[:, None]).round_().clamp_(-top, top).to(torch.int8)
        self.scale = scale
        self.zero = torch.zeros(self.out_features, dtype=torch.int32)
        self.packed = torch.ops.onednn.qlinear_prepack(steps, [_EXPECTED_ROWS, self.in_features])

    def prepack(self) -> None:
        """Nothing to do: the weight is in its serving form."""

    def unpack(self) -> None:
        """Nothing to do: the plain weight is gone."""

    def forward(self, input: Tensor) -> Tensor:
        """[T, in] -> [T, out], float32."""
        if self.turn is None:
            x = input.clone()
        else:
            x = product(input.reshape(-1, self.block), self.turn, None).view(-1, self.in_features)
        # Of all ways to the largest magnitude this reads fastest: `vector_norm` takes 26 times as long.
        largest = torch.maximum(x.amax(1, keepdim=True), x.amin(1, keepdim=True).neg_()).clamp_min_(1e-30)  # [T, 1]
        # The last byte of such a sum is its rounded value, at a quarter of the time of casting to bytes, or less.
        steps = x.mul_(127.0 / largest).add_(_LAST_BYTE + _ZERO).view(torch.int32).to(torch.uint8)  # [T, in]
        out = _product(steps, self.packed, self.scale, self.zero).mul_(largest.div_(127.0))  # [T, out]
        return out if self.bias is None else out.add_(self.bias.detach())


def quantise(module: nn.Module) -> None:
    """Replace the `Linear`s of a decoder by their 8-bit form, one at a time, so that memory never holds both.

    The first tenth of the layers keeps its products in float32.

    Raises:
        UsageError: the module has none, or this machine has no exact 8-bit product.
    """
    found = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if isinstance(child, Linear)
    ]
    layers: list[nn.Module] = list(getattr(module, "layers", []))
    exact = {id(part) for layer in layers[: len(layers) // _EXACT] for part in layer.modules()}
    if not found:
        raise UsageError("dtype='int8' needs an architecture of unmask's own table; choose float32 or bfloat16")
    if not is_batch_invariant() or not _weight_steps():
        raise UsageError("dtype='int8': torch has no exact 8-bit product on this machine; choose float32")
    with torch.inference_mode(False), torch.no_grad():
        for parent, name, linear in found:
            if id(linear) not in exact:
                setattr(parent, name, Int8Linear(linear))


def _product(steps: Tensor, packed: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """uint8 [T, in] less 128, times int8 [in, out], times the scale of each output: float32 [T, out]."""
    return torch.ops.onednn.qlinear_pointwise(
        steps, 1.0, _ZERO, packed, scale, zero, None, 1.0, 0, torch.float32, "none", [], ""
    )


def _block(width: int) -> int:
    """The largest power of two up to 64 that divides a width."""
    return min(_BLOCK, width & -width)


@cache
def _turn(size: int) -> Tensor:
    """A rotation [size, size] of entries +-1/sqrt(size): Sylvester's Hadamard matrix, its rows' signs shuffled.

    Without the signs, a constant offset of the channels, which gated activations have, would gather in one of them.
    """
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    signs = torch.randint(0, 2, (size, 1), generator=torch.Generator().manual_seed(0)) * 2 - 1
    return matrix * signs / size**0.5


@cache
def _weight_steps() -> int:
    """How far weights may reach: 127, or 63 where the processor adds pairs of products in 16 bits; 0: not at all.

    Processors without VNNI saturate in the middle of a sum, silently, if both sides use all their bits.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (64, 256), generator=generator)
    for top in (127, 63):
        weight = torch.randint(-top, top + 1, (96, 256), generator=generator)
        weight[:32] = top  # the largest sums there are
        x[:8] = 255
        try:
            packed = torch.ops.onednn.qlinear_prepack(weight.to(torch.int8), list(x.shape))
            found = _product(x.to(torch.uint8), packed, torch.ones(96), torch.zeros(96, dtype=torch.int32))
        except (AttributeError, RuntimeError, NotImplementedError):
            return 0
        if torch.equal(found, ((x - _ZERO) @ weight.T).float()):
            return top
    return 0
