"""The compiled training layer: the gradients of plain torch operations, whatever the lengths of the sequences."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from tests.training.tiny import DECODER, write_decoder
from unmask.encoder import Encoder
from unmask.encoder.model.architectures import shape_of
from unmask.encoder.model.attention import PackLayout, grouped_query_attention, length_groups
from unmask.encoder.model.decoder import Decoder, Layer, rotate
from unmask.training import compiled_layer
from unmask.training.master_weights import use_master_weights

# In CI they have to be there: a missing compiler is a failure and not a skip.
pytestmark = pytest.mark.skipif(
    compiled_layer.library() is None and "CI" not in os.environ, reason="no C compiler, or a processor without a target"
)

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES["head_dim"] = 32
# A result rounded to bfloat16 has 8 bits; a sum of several may lose a bit more.
TOLERANCE = 2.0**-7


def error(ours: Tensor, expected: Tensor) -> float:
    return float((ours.float() - expected).norm() / expected.norm().clamp_min(1e-9))


def gradients_of(function: Any, *inputs: Tensor) -> list[Tensor]:
    leaves = [each.detach().clone().requires_grad_() for each in inputs]
    out = function(*leaves)
    weights = torch.cos(torch.arange(out.numel(), dtype=torch.float32)).view(out.shape)
    (out.float() * weights).sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def test_norm() -> None:
    torch.manual_seed(1)
    x, factor = torch.randn(13, 96) * 3, torch.rand(96) + 0.5
    ours = gradients_of(lambda x, factor: compiled_layer._Norm.apply(x, factor, 1e-5), x, factor)
    expected = gradients_of(lambda x, factor: F.rms_norm(x, (96,), factor, 1e-5), x, factor)
    assert all(error(a, b) < TOLERANCE for a, b in zip(ours, expected, strict=True))


def test_gate() -> None:
    torch.manual_seed(2)
    gate_up = (torch.randn(7, 64) * 4).bfloat16()
    ours = gradients_of(compiled_layer._Gate.apply, gate_up)
    expected = gradients_of(lambda x: F.silu(x[:, :32]) * x[:, 32:], gate_up.float())
    assert all(error(a, b) < TOLERANCE for a, b in zip(ours, expected, strict=True))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 70), min_size=1, max_size=6), st.sampled_from([(4, 2), (3, 1), (2, 2)]))
def test_attention_of_any_lengths(lengths: list[int], heads: tuple[int, int]) -> None:
    config = {**DECODER, **SIZES, "num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
    shape = shape_of(config)
    assert shape is not None
    torch.manual_seed(sum(lengths))
    angles = torch.rand(sum(lengths), 1, 16) * 6
    cos, sin = angles.cos(), angles.sin()
    layout = PackLayout(length_groups(lengths), None, max(lengths))
    qkv = torch.randn(sum(lengths), (heads[0] + 2 * heads[1]) * 32).bfloat16()

    def plain(qkv: Tensor) -> Tensor:
        q, k, v = qkv.view(len(qkv), -1, 32).split((heads[0], heads[1], heads[1]), dim=1)
        sequences = zip(*(x.split(lengths) for x in (rotate(q, cos, sin), rotate(k, cos, sin), v)), strict=True)
        parts: list[Tensor] = []
        for sequence in sequences:
            q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in sequence)
            parts.append(grouped_query_attention(q, k, v, shape.attention_scale).squeeze(0))
        return torch.cat([part.transpose(0, 1).flatten(1) for part in parts])

    ours = gradients_of(lambda x: compiled_layer._AttentionProduct.apply(x, cos, sin, layout, shape), qkv)
    expected = gradients_of(plain, qkv.float())
    assert all(error(a, b) < TOLERANCE for a, b in zip(ours, expected, strict=True))


@given(st.integers(1, 70), st.integers(1, 70))
def test_transposed_copy(rows: int, columns: int) -> None:
    x = torch.arange(rows * columns).view(rows, columns).bfloat16()
    copy = compiled_layer.transposed(x)
    assert copy.is_contiguous()
    assert torch.equal(copy, x.T)


def test_a_number_that_is_not_one_stays_so() -> None:
    gate_up = torch.full((1, 32), float("nan")).bfloat16()
    assert compiled_layer._Gate.apply(gate_up).isnan().all()  # pyright: ignore[reportAttributeAccessIssue]


def test_a_decoder_has_the_gradients_of_float32(tmp_path: Path) -> None:
    decoder = Encoder.load(write_decoder(tmp_path / "base", **SIZES)).trainable_decoder()
    assert isinstance(decoder, Decoder)
    ids, lengths = torch.arange(5, 40), [17, 9, 9]
    decoder(ids, lengths).square().mean().backward()
    expected = {name: p.grad.clone() for name, p in decoder.named_parameters() if p.grad is not None}
    decoder.zero_grad(set_to_none=True)
    use_master_weights(decoder, torch.bfloat16)
    assert all(isinstance(layer, Layer) and compiled_layer.can_run(layer) for layer in decoder.layers)
    decoder(ids, lengths).square().mean().backward()
    for name, parameter in decoder.named_parameters():
        if name in expected:
            assert parameter.grad is not None
            assert error(parameter.grad, expected[name]) < 0.05, name


@pytest.mark.parametrize("length", [compiled_layer.LONGEST, compiled_layer.LONGEST + 1])
def test_long_sequences_run_on_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    decoder = Encoder.load(write_decoder(tmp_path / "base", **SIZES)).trainable_decoder()
    assert isinstance(decoder, Decoder)
    use_master_weights(decoder, torch.bfloat16)
    calls: list[int] = []
    compiled = compiled_layer.forward
    monkeypatch.setattr(compiled_layer, "forward", lambda *a: (calls.append(1), compiled(*a))[1])
    states = decoder(torch.arange(length) % 50, [length])
    assert bool(states.isfinite().all())
    assert len(calls) == (len(decoder.layers) if length <= compiled_layer.LONGEST else 0)
