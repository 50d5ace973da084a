"""Batch-invariant linear layers: the bits of a row, and prepacked weights that become parameters again."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from unmask import Encoder
from unmask.encoder.runtime import kernels
from unmask.encoder.runtime import linear as linear_module
from unmask.encoder.runtime.linear import Linear

# [in, out] of every product of SmolLM2-135M, Gemma 3 270M, TinyLlama 1.1B and Qwen2.5 1.5B, and odd ones.
SHAPES = [
    *((576, 960), (576, 576), (576, 3072), (1536, 576)),
    *((640, 1536), (1024, 640), (640, 4096), (2048, 640)),
    *((2048, 2560), (2048, 2048), (2048, 11264), (5632, 2048)),
    *((1536, 2048), (1536, 1536), (1536, 17920), (8960, 1536)),
    *((64, 96), (48, 100), (7, 13)),
]
ROWS = [*range(1, 18), 31, 32, 33, 63, 64, 65, 100, 127, 128, 255, 256, 257, 511, 512, 513, 1024]


@pytest.fixture(params=["kernels", "oneDNN", pytest.param("OpenBLAS", marks=pytest.mark.slow)])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The GEMM in use."""
    if request.param == "kernels":
        if kernels.library() is None:
            pytest.skip("no compiled kernels here")
        return request.param
    monkeypatch.setattr(kernels, "library", lambda: None)
    if request.param == "oneDNN" and not linear_module.is_batch_invariant():
        pytest.skip("torch has no oneDNN here, or one that does not keep a row's bits")
    monkeypatch.setattr(linear_module, "is_batch_invariant", lambda: request.param == "oneDNN")
    return request.param


def run_linear(linear: Linear, x: torch.Tensor, threads: int) -> torch.Tensor:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            return linear(x)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("inner", "outer"), SHAPES)
def test_a_row_has_one_product(library: str, inner: int, outer: int) -> None:
    torch.manual_seed(0)
    # Of many outputs a few blocks will do: what could break a row is the sum over its inputs.
    linear = Linear(inner, min(outer, 192), bias=outer % 3 == 0)
    x = torch.randn(max(ROWS), inner)
    expected = F.linear(x, linear.weight, linear.bias).detach()
    plain = run_linear(linear, x, threads=1)
    torch.testing.assert_close(plain, expected, rtol=1e-4, atol=1e-4)
    linear.prepack()
    assert (linear.prepacked is not None) == (library != "OpenBLAS")
    for rows in ROWS:
        assert torch.equal(run_linear(linear, x[:rows], threads=1), plain[:rows])
        assert torch.equal(run_linear(linear, x[-rows:], threads=2), plain[-rows:])


def test_prepack_drops_the_parameter_and_unpack_restores_it() -> None:
    if kernels.library() is None and not linear_module.is_batch_invariant():
        pytest.skip("neither kernels nor oneDNN")
    module = nn.Sequential(Linear(48, 100), nn.Linear(100, 8))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    linear_module.prepack(module)
    assert "0.weight" not in dict(module.named_parameters())
    assert linear_module.num_parameters(module) == sum(value.numel() for value in before.values())
    linear_module.unpack(module)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])
    module(torch.randn(3, 48)).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_a_weight_changed_behind_our_back_counts(golden_dir: Path) -> None:
    encoder = Encoder.load(golden_dir / "tiny_llama")
    prepacked = encoder.encode("a text")
    weight = encoder.trainable_decoder().get_parameter("layers.0.qkv.weight")
    np.testing.assert_array_equal(encoder.encode("a text"), prepacked)  # the same bits from plain weights
    weight.data.mul_(1.5)  # leaves no trace in the tensor's version
    assert np.abs(encoder.encode("a text") - prepacked).max() > 1e-4


def test_gradients_flow_and_agree_with_serving(golden_dir: Path) -> None:
    encoder = Encoder.load(golden_dir / "tiny_llama")
    ids, lengths = torch.arange(3, 40), [20, 17]
    with torch.inference_mode():
        served = encoder._decoder(ids, lengths)
    trained = encoder.trainable_decoder()(ids, lengths)
    torch.testing.assert_close(trained, served, rtol=1e-4, atol=1e-4)
    trained.sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.trainable_decoder().parameters())
