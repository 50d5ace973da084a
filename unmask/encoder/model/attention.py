"""Attention over a pack: by groups of equal length, or over all sequences in one variable-length kernel.

On a CPU, sequences of equal length share one attention call, and that is fastest. On a GPU each call costs more than
the attention of a short sequence, and a pack has many lengths. FlashAttention-2 (arXiv 2307.08691) takes all sequences
in one call, given `cu_seqlens`: from the package flash-attn where it is installed, else from torch.

Dimension letters as in `decoder`.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

LengthGroup = tuple[int, int, int]  # first token, number of sequences, their length

# (q [T, H, D], k [T, K, D], v [T, K, D], cu_seqlens [N+1], max_seqlen, scale, window, softcap) -> [T, H, D]
VarlenKernel = Callable[[Tensor, Tensor, Tensor, Tensor, int, float, tuple[int, int], float], Tensor]


@dataclass(frozen=True)
class PackLayout:
    """Positions of the sequences in a pack.

    Attributes:
        groups: neighbouring sequences of equal length.
        cu_seqlens: first token of each sequence and the end of the last one, int32 [N+1] on the device; None where no
            kernel takes a whole pack.
        max_seqlen: tokens of the longest sequence.
    """

    groups: list[LengthGroup]
    cu_seqlens: Tensor | None
    max_seqlen: int

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        return [length for _, count, length in self.groups for _ in range(count)]


def length_groups(lengths: Sequence[int]) -> list[LengthGroup]:
    """Return the groups of neighbouring sequences of equal length; each group is one attention call.

    >>> length_groups([4, 4, 7])
    [(0, 2, 4), (8, 1, 7)]
    """
    groups: list[LengthGroup] = []
    start = 0
    for length in lengths:
        if groups and groups[-1][2] == length:
            first, count, _ = groups[-1]
            groups[-1] = (first, count + 1, length)
        else:
            groups.append((start, 1, length))
        start += length
    return groups


def cu_seqlens_of(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Return the first token of each sequence and the end of the last one: int32 [N+1].

    >>> cu_seqlens_of([4, 4, 7], torch.device("cpu")).tolist()
    [0, 4, 8, 15]
    """
    return torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)


def has_varlen_kernel(device: torch.device) -> bool:
    """True if a variable-length kernel is installed for this device."""
    return device.type == "cuda" and varlen_kernel() is not None


def kernel_supports(dtype: torch.dtype, softcap: float | None) -> bool:
    """True if the kernel computes in this precision and supports logit soft-capping if `softcap` is set."""
    return dtype in (torch.float16, torch.bfloat16) and (softcap is None or _flash_attn_kernel() is not None)


@cache
def varlen_kernel() -> VarlenKernel | None:
    """Return the fastest installed variable-length kernel, or None."""
    return _flash_attn_kernel() or _torch_kernel()


@cache
def _flash_attn_kernel() -> VarlenKernel | None:
    try:
        from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None

    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        scale: float,
        window: tuple[int, int],
        softcap: float,
    ) -> Tensor:
        # flash-attn has no separate causal mask here: a right window of 0 is causal, a left one of -1 unlimited.
        return flash_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens,
            cu_seqlens,
            max_seqlen,
            max_seqlen,
            softmax_scale=scale,
            window_size=window,
            softcap=softcap,
        )

    return attend


@cache
def _torch_kernel() -> VarlenKernel | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    parameters = inspect.signature(varlen_attn).parameters
    if not {"scale", "window_size"} <= parameters.keys():
        return None  # torch 2.10 had neither
    grouped: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in parameters else {}

    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        scale: float,
        window: tuple[int, int],
        softcap: float,
    ) -> Tensor:
        if not grouped and q.shape[1] != k.shape[1]:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        out = varlen_attn(
            q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale=scale, window_size=window, **grouped
        )
        assert isinstance(out, Tensor)
        return out

    return attend


def grouped_query_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention by plain matrix products, the query heads of one key head side by side.

    For training on a CPU, where the backward of torch's fused kernel takes five times as long for short sequences.

    q [N, H, L, D]; k, v [N, K, L, D] -> [N, H, L, D].
    """
    kv_heads, length = k.shape[1], q.shape[2]
    q = q.unflatten(1, (kv_heads, -1)).flatten(2, 3).flatten(0, 1)  # [N*K, H/K*L, D]
    k, v = k.flatten(0, 1), v.flatten(0, 1)  # [N*K, L, D]
    weights = (q @ k.transpose(1, 2) * scale).softmax(dim=-1, dtype=torch.float32).to(v.dtype)  # [N*K, H/K*L, L]
    return (weights @ v).unflatten(1, (-1, length)).unflatten(0, (-1, kv_heads)).flatten(1, 2)


def softcapped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float) -> Tensor:
    """Attention with scores squashed into (-softcap, softcap), as in Gemma 2 (arXiv 2408.00118).

    q [N, H, L, D]; k, v [N, K, L, D]; mask [L, L] -> [N, H, L, D].
    """
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
    scores = softcap * torch.tanh(q @ k.transpose(-1, -2) * (scale / softcap))  # [N, H, L, L]
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(dim=-1, dtype=torch.float32).to(v.dtype) @ v
