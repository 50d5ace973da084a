"""A decoder layer for full training in bfloat16 on a CPU: oneDNN's matrix products, and `training.c` between them.

As torch operations, what lies between two products took three quarters of a step on a processor with AMX: attention of
short sequences is a call for each length, every norm is read and written several times, and the gradient of a weight
needs a transposed copy. Here each part is one call, forward and backward.

Dimension letters as in `unmask.encoder.model.decoder`.
"""

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from unmask.encoder.model.architectures import Shape
from unmask.encoder.model.attention import PackLayout
from unmask.encoder.model.decoder import Layer, add_residual
from unmask.encoder.runtime import kernels

_Pointer, _Integer, _Float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
# Attention is computed in plain vector instructions: of longer sequences, products in tiles are faster.
LONGEST = 256


class _Attention(ctypes.Structure):
    """`TrainAttention` of training.c."""

    _fields_ = (
        *((name, _Integer) for name in ("sequences", "heads", "kv_heads", "head_dim", "max_seqlen")),
        ("scale", _Float),
        *((name, _Pointer) for name in ("cu_seqlens", "cosines", "sines", "qkv", "memory")),
    )


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels with the types of the training functions; None where they cannot run."""
    compiled = kernels.library()
    if compiled is None:
        return None
    for name, arguments in {
        "train_norm_forward": (_Integer, _Integer, _Pointer, _Pointer, _Float, _Pointer, _Pointer),
        "train_norm_backward": (_Integer, _Integer, *(_Pointer,) * 6),
        "train_gate_forward": (_Integer, _Integer, _Pointer, _Pointer),
        "train_gate_backward": (_Integer, _Integer, _Pointer, _Pointer, _Pointer),
        "train_transpose": (_Integer, _Integer, _Pointer, _Pointer),
        "train_attention_floats": (_Integer, _Integer),
        "train_attention_forward": (_Pointer, _Pointer),
        "train_attention_backward": (_Pointer, _Pointer, _Pointer),
    }.items():
        function = getattr(compiled, name)
        function.argtypes, function.restype = arguments, None
    compiled.train_attention_floats.restype = _Integer
    return compiled


def can_run(layer: Layer) -> bool:
    """True if the kernels compute this kind of layer, in bfloat16 on a CPU."""
    shape = layer.shape
    lane = 16  # the widest vector of any processor
    widths = (shape.hidden_size, shape.intermediate_size, shape.head_dim // 2)
    plain = layer.q_norm is None and layer.attention_out_norm is None and shape.softcap is None
    plain = plain and shape.activation == "silu" and not layer.causal and not shape.head_dim % (2 * lane)
    on_cpu = layer.attention_norm.weight.device.type == "cpu"
    return plain and on_cpu and not any(each % lane for each in widths) and library() is not None


def forward(layer: Layer, x: Tensor, cos: Tensor, sin: Tensor, layout: PackLayout) -> Tensor:
    """Run a layer for which `can_run` is true, with sequences of at most LONGEST tokens and within its window.

    x float32 [T, W]; cos, sin float32 [T, 1, D/2] -> float32 [T, W].
    """
    shape = layer.shape
    normed = _Norm.apply(x, layer.attention_norm.factor(), layer.attention_norm.eps)
    attended = _AttentionProduct.apply(layer.qkv(normed), cos, sin, layout, shape)
    x = add_residual(x, layer.out(attended))
    normed = _Norm.apply(x, layer.mlp_norm.factor(), layer.mlp_norm.eps)
    return add_residual(x, layer.down(_Gate.apply(layer.gate_up(normed))))


def transposed(x: Tensor) -> Tensor:
    """A contiguous copy of x^T, bfloat16 [rows, columns] -> [columns, rows]."""
    compiled = library()
    if compiled is None or x.dtype != torch.bfloat16 or x.device.type != "cpu":
        return x.T
    x = x.contiguous()
    y = x.new_empty(x.shape[1], x.shape[0])
    compiled.train_transpose(x.shape[0], x.shape[1], x.data_ptr(), y.data_ptr())
    return y


def _compiled() -> ctypes.CDLL:
    compiled = library()
    assert compiled is not None
    return compiled


class _Norm(torch.autograd.Function):
    """RMSNorm: float32 [T, W] -> bfloat16 [T, W]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor, eps: float) -> Tensor:
        x, factor = x.float().contiguous(), factor.contiguous()
        y, rstd = x.new_empty(x.shape, dtype=torch.bfloat16), x.new_empty(len(x))
        _compiled().train_norm_forward(*x.shape, x.data_ptr(), factor.data_ptr(), eps, y.data_ptr(), rstd.data_ptr())
        ctx.save_for_backward(x, factor, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, factor, rstd = ctx.saved_tensors
        dy = dy.to(torch.bfloat16).contiguous()
        dx, d_factor = torch.empty_like(x), torch.zeros_like(factor)
        inputs = (x.data_ptr(), factor.data_ptr(), rstd.data_ptr(), dy.data_ptr())
        _compiled().train_norm_backward(*x.shape, *inputs, dx.data_ptr(), d_factor.data_ptr())
        return dx, d_factor, None


class _Gate(torch.autograd.Function):
    """silu(gate) * up: bfloat16 [T, 2 I], gate first -> [T, I]."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
        y = gate_up.new_empty(tokens, size)
        _compiled().train_gate_forward(tokens, size, gate_up.data_ptr(), y.data_ptr())
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (gate_up,) = ctx.saved_tensors
        dy, gradient = dy.contiguous(), torch.empty_like(gate_up)
        pointers = (gate_up.data_ptr(), dy.data_ptr(), gradient.data_ptr())
        _compiled().train_gate_backward(dy.shape[0], dy.shape[1], *pointers)
        return gradient


class _AttentionProduct(torch.autograd.Function):
    """RoPE and attention: qkv bfloat16 [T, (H + 2 K) D] -> bfloat16 [T, H D]."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, layout: PackLayout, shape: Shape) -> Tensor:
        cu_seqlens = torch.tensor([0, *layout.lengths]).cumsum(0)
        tensors = (qkv, cos.float().contiguous(), sin.float().contiguous(), cu_seqlens)
        ctx.save_for_backward(*tensors)
        ctx.layout, ctx.shape = layout, shape
        y = qkv.new_empty(qkv.shape[0], shape.heads * shape.head_dim)
        arguments, memory = _arguments(tensors, layout, shape)
        _compiled().train_attention_forward(ctypes.byref(arguments), y.data_ptr())
        del memory
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        dy = dy.contiguous()
        gradient = torch.empty_like(ctx.saved_tensors[0])
        arguments, memory = _arguments(ctx.saved_tensors, ctx.layout, ctx.shape)
        _compiled().train_attention_backward(ctypes.byref(arguments), dy.data_ptr(), gradient.data_ptr())
        del memory
        return gradient, None, None, None, None


def _arguments(tensors: tuple[Tensor, ...], layout: PackLayout, shape: Shape) -> tuple[_Attention, Tensor]:
    """Arguments of both kernels, and the memory that must outlive the call."""
    qkv, cos, sin, cu_seqlens = tensors
    memory = torch.empty(_compiled().train_attention_floats(layout.max_seqlen, shape.head_dim))
    pointers = (each.data_ptr() for each in (cu_seqlens, cos, sin, qkv, memory))
    sizes = (len(cu_seqlens) - 1, shape.heads, shape.kv_heads, shape.head_dim, layout.max_seqlen)
    return _Attention(*sizes, shape.attention_scale, *pointers), memory
