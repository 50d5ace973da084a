"""Full training in 16 bits: float32 master weights, and a 16-bit copy of each that is made once per step.

torch's autocast casts a weight in every forward, which costs a small decoder as much as some of its GEMMs: a step of
several packs casts it several times. Here the copy is refreshed after the optimiser's step. Gradients of the master
weights are added up in float32 over the packs of a step.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unmask.encoder.model.attention import PackLayout
from unmask.encoder.model.decoder import Decoder, Layer
from unmask.encoder.runtime import kernels
from unmask.encoder.runtime.linear import Linear
from unmask.training import compiled_layer


class MasterLinear(nn.Module):
    """A linear layer with float32 parameters that computes in 16 bits.

    Args:
        linear: the layer; its parameters become the master weights.
        dtype: precision of the GEMMs.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.dtype = dtype
        self.copy = linear.weight.detach().to(dtype)  # [out, in]

    @torch.no_grad()
    def refresh(self) -> None:
        """Round the master weight into the copy. Call it after every change of the weight."""
        self.copy.copy_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b in 16 bits: [T, in] -> [T, out]."""
        return _MasterProduct.apply(x, self.weight, self.copy, self.bias)  # pyright: ignore[reportReturnType]


class _MasterProduct(torch.autograd.Function):
    """The 16-bit GEMM, with float32 gradients for the master weight and bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, copy: Tensor, bias: Tensor | None) -> Tensor:
        narrow = x.to(copy.dtype)
        ctx.save_for_backward(narrow, copy)
        ctx.input_dtype = x.dtype
        return F.linear(narrow, copy, None if bias is None else bias.to(copy.dtype))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        narrow, copy = ctx.saved_tensors
        dx = (dy @ copy).to(ctx.input_dtype) if ctx.needs_input_grad[0] else None
        d_weight = _weight_gradient(dy, narrow) if ctx.needs_input_grad[1] else None
        d_bias = dy.sum(dim=0, dtype=torch.float32) if ctx.needs_input_grad[3] else None
        return dx, d_weight, None, d_bias


def _weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """dy^T x in float32: [T, out], [T, in] -> [out, in]."""
    # In tile registers oneDNN is two to five times as fast with a contiguous left side. Without them, the copy takes
    # more time than it saves.
    left = compiled_layer.transposed(dy) if kernels.has_amx() else dy.T
    return (left @ x).float()


def use_master_weights(decoder: Decoder, dtype: torch.dtype) -> list[MasterLinear]:
    """Replace the linear layers of a decoder's blocks by `MasterLinear`, in place. Parameters keep their names.

    Returns:
        The new layers, to be refreshed after each optimiser step.
    """
    layers: list[MasterLinear] = []
    for block in decoder.layers:
        assert isinstance(block, Layer)
        for name, module in list(block.named_children()):
            if isinstance(module, Linear):
                layers.append(MasterLinear(module, dtype))
                setattr(block, name, layers[-1])
        if dtype == torch.bfloat16 and compiled_layer.can_run(block):
            block.forward = partial(_forward, block)
    return layers


def _forward(block: Layer, x: Tensor, cos: Tensor, sin: Tensor, layout: PackLayout) -> Tensor:
    """Run the compiled layer, or the ordinary one for sequences that are too long and for attention dropout."""
    reach = layout.max_seqlen if block.reach is None else block.reach + 1
    dropout = block.training and block.attention_dropout
    if layout.max_seqlen > min(compiled_layer.LONGEST, reach) or dropout:
        return Layer.forward(block, x, cos, sin, layout)
    return compiled_layer.forward(block, x, cos, sin, layout)
