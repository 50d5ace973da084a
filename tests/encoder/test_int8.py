"""8-bit products: near float32 on real weights, the same bits in any batch, refused where they cannot be."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from unmask import Encoder
from unmask.encoder.runtime import int8, kernels
from unmask.encoder.runtime.int8 import Int8Linear, quantise
from unmask.encoder.runtime.linear import Linear
from unmask.errors import UsageError

# Of 30 layers in float32; a model of few layers in 8-bit rows has other places to round.
ADAPTED = "unmask/smollm2-135m-embed"

# Very short texts are the worst ones: no other token evens out what rounding did to one.
TEXTS = [
    *("7", "?", "hi", "Yes.", "a", "What is it?", "http://x.com/a?b=c", "\N{GRINNING FACE}", "1 2 3 4 5"),
    "   spaced   out   ",
    "The ballerina is dancing.",
    "How do I open a bank account?",
    "Graph neural networks for molecules",
    "Two men in hard hats are repairing the roof of a warehouse while a third one watches from the street.",
    "The committee will publish its findings on Thursday, after the ministers have met. " * 6,
    "def f(x):\n    return [y for y in x if y % 2]\n",
]


SENTENCES = slice(10, None)


def least_cosine() -> float:
    """Return the bound of a single text: a processor without VNNI has 7 bits of a weight."""
    return 0.995 if int8._weight_limit() == 127 else 0.99


@pytest.fixture(scope="module")
def exact() -> Encoder:
    return Encoder.load(ADAPTED)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder.load(ADAPTED, dtype="int8")


def test_vectors_are_near_those_of_float32(exact: Encoder, encoder: Encoder) -> None:
    a, b = exact.encode(TEXTS, normalize=True), encoder.encode(TEXTS, normalize=True)
    cosines = (a * b).sum(axis=1)
    assert cosines.min() >= least_cosine()
    assert cosines[SENTENCES].mean() >= (0.999 if int8._weight_limit() == 127 else 0.997)
    assert cosines.max() < 0.999999  # it is not float32 by another name


def test_a_text_has_the_same_bits_in_any_batch(encoder: Encoder) -> None:
    together = encoder.encode(TEXTS)
    for text, vector in zip(TEXTS, together, strict=True):
        assert np.array_equal(encoder.encode(text)[0], vector)


def test_single_words_are_near_as_well(exact: Encoder, encoder: Encoder) -> None:
    words = ["radiosity", "Contracts", "s", "rating", "mail", "E-MAIL", "Sin", "Doug Pederson", "Leafs vs Wings"]
    a, b = exact.encode(words, normalize=True), encoder.encode(words, normalize=True)
    assert (a * b).sum(axis=1).min() >= least_cosine()


def test_it_keeps_a_byte_per_weight_but_in_the_first_layers(exact: Encoder, encoder: Encoder) -> None:
    assert encoder.num_parameters == exact.num_parameters
    layers: Any = encoder.trainable_decoder().get_submodule("layers")
    for place, layer in enumerate(layers):
        products = [part for part in layer.modules() if isinstance(part, Linear)]
        assert products and all((part.weight is None) == (place >= 3) for part in products)


def test_the_input_of_a_product_stays_as_it_is() -> None:
    for width in (64, 1):  # turned, and with nothing to turn
        x = torch.randn(9, width)
        before = x.clone()
        with torch.inference_mode():
            Int8Linear(Linear(width, 16))(x)
        assert torch.equal(x, before)


@given(rows=st.integers(1, 70), seed=st.integers(0, 2**31))
def test_a_product_is_within_its_rounding(rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    linear = Linear(192, 40)
    x = torch.randn(rows, 192, generator=generator) * torch.rand(rows, 1, generator=generator).mul(20).exp()
    with torch.inference_mode():
        expected, product = linear(x), Int8Linear(linear)(x)
        # Half a step of each factor, added up over the inputs as independent errors; six deviations.
        step = x.norm(dim=1, keepdim=True) * linear.weight.norm(dim=1) / 192**0.5
    assert ((product - expected).abs() <= 0.15 * step + 1e-6).all()


@pytest.mark.skipif(
    kernels.library() is None and "CI" not in os.environ, reason="no C compiler, or a processor without a target"
)
@given(rows=st.integers(0, 20), blocks=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_compiled_kernels_quantise_as_torch_does(rows: int, blocks: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    width = 64 * blocks
    x = torch.randn(rows, width, generator=generator) * torch.randn(width, generator=generator).exp()
    steps, sizes = kernels.quantise_rows(x, int8._signs(64))
    with torch.inference_mode():
        expected_steps, expected_sizes = Int8Linear(Linear(width, 8))._quantise_rows(x)
    torch.testing.assert_close(sizes, expected_sizes, rtol=1e-5, atol=0)
    # Sums in another order: a number halfway between two steps may fall on either.
    assert ((steps.int() - expected_steps.int()).abs() <= 1).all()
    assert (steps != expected_steps).float().mean().nan_to_num() < 0.01


@pytest.mark.skipif(
    kernels.library() is None and "CI" not in os.environ, reason="no C compiler, or a processor without a target"
)
@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_none_is_not_hidden(number: float) -> None:
    x = torch.randn(2, 128)
    x[0, 3] = number
    with torch.inference_mode():
        product = Int8Linear(Linear(128, 8))(x)
    assert not product[0].isfinite().any()
    assert product[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_inputs_of_another_precision_give_the_product_of_their_values(dtype: torch.dtype) -> None:
    layer, x = Int8Linear(nn.Linear(128, 8).to(dtype)), torch.randn(3, 128).to(dtype)
    with torch.inference_mode():
        assert torch.equal(layer(x), layer(x.float()))


def test_a_module_that_reads_the_weight_of_a_layer_keeps_it() -> None:
    attention = nn.Sequential(nn.MultiheadAttention(64, 2), nn.Linear(64, 64))
    int8.quantise_torch(attention)
    assert isinstance(attention[1], Int8Linear)
    with torch.inference_mode():
        attention[0](*[torch.randn(5, 64)] * 3)
    with pytest.raises(UsageError, match="has no linear layers"):
        int8.quantise_torch(nn.Embedding(4, 4))


@pytest.mark.parametrize("bias", [True, False])
def test_layers_without_compiled_kernels_give_the_same_product(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    linear, x = Linear(128, 24, bias=bias), torch.randn(2, 5, 128)  # any leading dimensions, as other libraries have
    with torch.inference_mode():
        product = Int8Linear(linear)(x)
        monkeypatch.setattr(kernels, "library", lambda: None)  # as without a C compiler
        torch.testing.assert_close(product, Int8Linear(linear)(x), atol=0.02, rtol=0.02)
    assert product.shape == (2, 5, 24)


def test_zeros_stay_zeros() -> None:
    with torch.inference_mode():
        assert torch.equal(Int8Linear(Linear(64, 8, bias=False))(torch.zeros(3, 64)), torch.zeros(3, 8))


@pytest.mark.parametrize("width", [1, 6, 24, 64, 576, 1536])
def test_turning_changes_no_product(width: int) -> None:
    block = int8._block_size(width)
    assert width % block == 0
    turn = int8._rotation(block)
    torch.testing.assert_close(turn @ turn.T, torch.eye(block), atol=1e-6, rtol=0)
    linear = Linear(width, 16)
    x = torch.randn(9, width)
    with torch.inference_mode():
        torch.testing.assert_close(Int8Linear(linear)(x), linear(x), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_gemma"])
def test_other_architectures(golden_dir: Path, model: str) -> None:
    a = Encoder.load(golden_dir / model).encode(TEXTS[8:], normalize=True)
    b = Encoder.load(golden_dir / model, dtype="int8").encode(TEXTS[8:], normalize=True)
    assert (a * b).sum(axis=1).min() > 0.99


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UsageError, match=r"int8.*cuda.*bfloat16"):
        Encoder.load(ADAPTED, dtype="int8", device="cuda")
    with pytest.raises(UsageError, match="table"):
        quantise(nn.Sequential(nn.Linear(4, 4)))


def test_without_an_exact_product_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "_weight_limit", lambda: 0)
    with pytest.raises(UsageError, match="no exact 8-bit product"):
        quantise(nn.Sequential(Linear(4, 4)))
