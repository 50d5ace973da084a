"""Forward and backward of a layer's element-wise parts, each in few passes over memory, for training.

A GEMM of a small decoder is so fast that what lies between two of them counts: with plain autograd, RMSNorm, gate and
RoPE took as long as all GEMMs together on a processor with AMX. Each function here saves only tensors that are alive
anyway, and writes the gradients of parts that were split into one buffer, where autograd would concatenate them.

Dimension letters as in `decoder`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class RmsNorm(torch.autograd.Function):
    """x [..., W] * rstd * weight, with rstd = 1 / sqrt(mean(x^2) + eps); computed in float32.

    x is [T, W] before attention and MLP, and [T, heads, D] for the norms of queries and keys.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        rstd = wide.square().mean(dim=-1, keepdim=True).add_(eps).rsqrt_()  # [..., 1]
        ctx.save_for_backward(x, weight, rstd)
        return (wide * rstd).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, rstd = ctx.saved_tensors
        wide, dy = x.float(), dy.float()
        product = dy * wide  # [..., W]
        d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = (rstd.flatten(0, -2).T @ product.flatten(0, -2)).squeeze(0)  # [W]
        along = (product @ weight).div_(x.shape[-1]).unsqueeze(-1).mul_(rstd.pow(3))  # [..., 1]
        dx = torch.mul(dy, weight, out=product).mul_(rstd).addcmul_(wide, along, value=-1)
        return dx.to(x.dtype), d_weight, None


class SwiGlu(torch.autograd.Function):
    """silu(gate) * up of a fused GEMM's output [T, 2 I], gate first; gives [T, I]."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        gradient = torch.empty_like(gate_up)
        d_gate, d_up = gradient.chunk(2, dim=-1)
        torch.mul(F.silu(gate), dy, out=d_up)
        torch.ops.aten.silu_backward.grad_input(dy * up, gate, grad_input=d_gate)
        return (gradient,)


class Rotate(torch.autograd.Function):
    """RoPE: each pair (x[i], x[i + D/2]) turned by its position's angle. x [T, heads, D]; cos, sin [T, 1, D/2]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        cos, sin = ctx.saved_tensors
        return _turned(dy, cos, -sin), None, None  # the inverse of a rotation is its transpose


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    first, second = x.chunk(2, dim=-1)  # [T, heads, D/2] twice
    turned = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    left, right = turned.chunk(2, dim=-1)
    torch.mul(first, cos, out=left).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=right).addcmul_(first, sin)
    return turned
