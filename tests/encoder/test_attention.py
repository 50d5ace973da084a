"""Attention over a pack in one kernel. The kernels need a GPU; a slow one with the same contract takes their place."""

import inspect
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from unmask import Encoder
from unmask.encoder.model import attention
from unmask.encoder.runtime import kernels

TEXTS = ["one", "two words", "three short words", "the river " * 9, "one", "a market in winter, and then " * 12]


def slow_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: tuple[int, int], scale: float, softcap: float
) -> Tensor:
    """The result of every variable-length kernel, computed one sequence and one head at a time."""
    out = torch.empty_like(q)
    group = q.shape[1] // k.shape[1]
    left, right = window
    for start, end in itertools.pairwise(cu_seqlens.tolist()):
        for head in range(q.shape[1]):
            scores = q[start:end, head].float() @ k[start:end, head // group].float().T * scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            places = torch.arange(end - start)
            ahead = places[None, :] - places[:, None]  # of the key, seen from the query
            hidden = (ahead < -left if left >= 0 else ahead < -end) | (ahead > right if right >= 0 else ahead > end)
            weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
            out[start:end, head] = (weights @ v[start:end, head // group].float()).to(q.dtype)
    return out


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict]]:
    """Make this CPU pass for a device with torch's kernel. Returns the arguments of its calls."""
    recorded_calls: list[dict] = []

    def stand_in(*positional: object, **named: object) -> Tensor:
        call = inspect.signature(varlen_attn).bind(*positional, **named).arguments  # as the real one would take it
        recorded_calls.append(call)
        q, k, v, cu_seqlens = (call[name] for name in ("query", "key", "value", "cu_seq_q"))
        assert cu_seqlens.dtype == torch.int32 and torch.equal(cu_seqlens, call["cu_seq_k"])
        assert int(cu_seqlens[-1]) == len(q) and call["max_q"] == call["max_k"] == int(cu_seqlens.diff().max())
        assert q.shape[1] == k.shape[1] or call["enable_gqa"]
        return slow_attention(q, k, v, cu_seqlens, call["window_size"], call["scale"], 0.0)

    stand_in.__signature__ = inspect.signature(varlen_attn)  # pyright: ignore[reportFunctionMemberAccess]
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", stand_in)
    monkeypatch.setattr(attention, "has_varlen_kernel", lambda device: True)
    monkeypatch.setattr(kernels, "library", lambda: None)  # those are for CPUs
    for cached in (attention.varlen_kernel, attention._torch_kernel, attention._flash_attn_kernel):
        cached.cache_clear()
    yield recorded_calls
    for cached in (attention.varlen_kernel, attention._torch_kernel, attention._flash_attn_kernel):
        cached.cache_clear()


def near(ours: np.ndarray, theirs: np.ndarray) -> bool:
    cosine = (ours * theirs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
    return bool((cosine > 0.9999).all())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gemma", "tiny_mistral_instruct"])
def test_one_kernel_equals_length_groups(
    name: str, causal: bool, golden_dir: Path, monkeypatch: pytest.MonkeyPatch, calls: list[dict]
) -> None:
    encoder = Encoder.load(str(golden_dir / name), dtype="bfloat16", causal=causal)
    with_kernel = encoder.encode(TEXTS)
    layers = len(encoder.trainable_decoder().layers)  # pyright: ignore[reportArgumentType]
    assert calls and len(calls) % layers == 0
    monkeypatch.setattr(attention, "has_varlen_kernel", lambda device: False)
    assert near(with_kernel, encoder.encode(TEXTS))


def test_windows_reach_as_far(golden_dir: Path, monkeypatch: pytest.MonkeyPatch, calls: list[dict]) -> None:
    for causal in (False, True):
        encoder = Encoder.load(str(golden_dir / "tiny_llama"), dtype="bfloat16", causal=causal)
        for layer in encoder.trainable_decoder().layers:  # pyright: ignore[reportGeneralTypeIssues]
            layer.window = 5
        monkeypatch.setattr(attention, "has_varlen_kernel", lambda device: True)
        narrow = encoder.encode(TEXTS)
        assert calls[-1]["window_size"] == ((4, 0) if causal else (5, 5))
        monkeypatch.setattr(attention, "has_varlen_kernel", lambda device: False)
        assert near(narrow, encoder.encode(TEXTS))


def test_unsupported_precision_goes_by_length_groups(golden_dir: Path, calls: list[dict]) -> None:
    encoder = Encoder.load(str(golden_dir / "tiny_llama"))
    encoder.encode(TEXTS)  # float32
    assert not calls
    assert not attention.kernel_supports(torch.bfloat16, 50.0)  # Gemma 2's scores, with torch's kernel


def test_flash_attn_is_preferred_and_caps(monkeypatch: pytest.MonkeyPatch, calls: list[dict]) -> None:
    used: list[float] = []

    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
    ) -> Tensor:
        used.append(softcap)
        assert softmax_scale is not None and dropout_p == 0.0 and not causal
        return slow_attention(q, k, v, cu_seqlens_q, window_size, softmax_scale, softcap)

    package = ModuleType("flash_attn")
    package.flash_attn_varlen_func = flash_attn_varlen_func  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    for cached in (attention.varlen_kernel, attention._torch_kernel, attention._flash_attn_kernel):
        cached.cache_clear()
    assert attention.kernel_supports(torch.bfloat16, 50.0)
    attend = attention.varlen_kernel()
    assert attend is not None
    heads = torch.randn(9, 2, 8, dtype=torch.bfloat16)
    cu_seqlens = attention.cu_seqlens_of([4, 5], torch.device("cpu"))
    attend(heads, heads, heads, cu_seqlens, 5, 0.35, (-1, -1), 50.0)
    assert used == [50.0] and not calls
