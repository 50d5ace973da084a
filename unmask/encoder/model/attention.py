"""Attention over all sequences of a pack in one kernel, on the accelerators that have one.

On a CPU, sequences of one length share a call and that is the quickest way. On a GPU each call costs more than a short
sequence's attention, and a pack has as many lengths as texts. FlashAttention-2 (arXiv 2307.08691) takes them all at
once, by the places where they begin: through the package flash-attn where it is installed, else through torch's own.

Dimension letters as in `decoder`, and N sequences.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

# (q [T, H, D], k [T, K, D], v [T, K, D], bounds [N+1], longest, scale, window, cap) -> [T, H, D]
Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, int, float, tuple[int, int], float], Tensor]


def on(device: torch.device) -> bool:
    """Whether there is a kernel for this device."""
    return device.type == "cuda" and kernel() is not None


def takes(dtype: torch.dtype, cap: float | None) -> bool:
    """Whether the kernel computes in this precision, and squashes scores as Gemma 2 does, where `cap` asks for it."""
    return dtype in (torch.float16, torch.bfloat16) and (cap is None or _flash_attn() is not None)


def bounds_of(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Where each sequence begins, and where the last one ends: int32 [N+1].

    >>> bounds_of([4, 4, 7], torch.device("cpu")).tolist()
    [0, 4, 8, 15]
    """
    return torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)


@cache
def kernel() -> Kernel | None:
    """The quickest one that is installed, or None."""
    return _flash_attn() or _torch()


@cache
def _flash_attn() -> Kernel | None:
    try:
        from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None

    def attend(
        q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, scale: float, window: tuple[int, int], cap: float
    ) -> Tensor:
        # -1 as the left reach with 0 as the right one is what it calls causal.
        return flash_attn_varlen_func(
            q, k, v, bounds, bounds, longest, longest, softmax_scale=scale, window_size=window, softcap=cap
        )

    return attend


@cache
def _torch() -> Kernel | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    if not {"scale", "window_size"} <= known.keys():
        return None  # torch 2.10 had neither
    grouped: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in known else {}

    def attend(
        q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, scale: float, window: tuple[int, int], cap: float
    ) -> Tensor:
        if not grouped and q.shape[1] != k.shape[1]:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        out = varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scale, window_size=window, **grouped)
        assert isinstance(out, Tensor)
        return out

    return attend
