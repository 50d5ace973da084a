"""Products in bfloat16 on tile registers (AMX): the bits of an emulation, in registers and without them."""

import os
from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tests.encoder.test_architectures import VARIANTS
from tests.encoder.test_kernels import LENGTHS, assert_near, compiled_states, decoder_of, eight_bit_rows
from unmask import Encoder
from unmask.encoder import loading, prepacked
from unmask.encoder.runtime import kernels
from unmask.encoder.runtime.linear import Linear, prepack

pytestmark = pytest.mark.skipif(
    kernels.library() is None and "CI" not in os.environ, reason="no C compiler, or a processor without a target"
)
TEXTS = ["one text", "another one, which is longer", "a " * 90]


@pytest.fixture(
    params=[
        pytest.param("plain", marks=pytest.mark.processor("avx512")),
        pytest.param("registers", marks=pytest.mark.processor("amx")),
    ]
)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Choose how tiles are multiplied: by vector instructions that any AVX-512 has, or in the tile registers."""
    library = kernels.library()
    assert library is not None
    assert library.use_tiles(request.param == "registers") or request.param == "plain"
    monkeypatch.setattr(kernels, "has_amx", lambda: True)
    yield request.param
    library.use_tiles(1)


def rounded(x: np.ndarray) -> np.ndarray:
    """Round to the nearest bfloat16 numbers, as float32."""
    return torch.from_numpy(x).bfloat16().float().numpy()


def emulated(x: np.ndarray, weight: np.ndarray, terms: int) -> np.ndarray:
    """Multiply x [T, k] @ weight.T in the order of the tile instruction, with exact products and float32 sums.

    For each 32 inputs and each term, the even and the odd inputs are summed one after the other, then both together.
    """
    (rows, k), n = x.shape, len(weight)
    depth = -(-k // 32) * 32
    left, right = np.zeros((rows, depth), np.float32), np.zeros((n, depth), np.float32)
    left[:, :k], right[:, :k] = x, weight
    parts = []
    for _ in range(terms):
        parts.append(rounded(left))
        left = left - parts[-1]
    total = np.zeros((rows, n), np.float32)
    for start in range(0, depth, 32):
        for part in parts:
            sums = np.zeros((2, rows, n), np.float32)
            for i in range(32):
                sums[i % 2] += part[:, None, start + i] * right[None, :, start + i]
            total += sums[0] + sums[1]
    return total


@pytest.mark.parametrize("terms", [1, 2])
@pytest.mark.parametrize(("n", "k"), [(75, 200), (64, 96), (33, 7), (96, 576)])
def test_a_product_has_the_bits_of_the_emulation(n: int, k: int, terms: int, way: str) -> None:
    weight, x, bias = torch.randn(n, k), torch.randn(150, k), torch.randn(n)
    tiles = kernels.tiles_of(weight)
    assert torch.equal(kernels.weight_of_tiles(tiles, n, k), weight.bfloat16())
    whole = kernels.linear(x, tiles, n, bias, terms)
    expected = emulated(x.numpy(), rounded(weight.numpy()), terms) + bias.numpy()
    np.testing.assert_array_equal(whole.numpy(), expected)
    assert torch.equal(kernels.linear(x, weight, n, bias, terms), whole)  # a row-major weight is rounded on the way
    for rows in (*range(1, 35), 64, 113, 129):
        assert torch.equal(kernels.linear(x[-rows:], tiles, n, bias, terms), whole[-rows:])


@pytest.mark.parametrize("k", [200, 31])
def test_8_bit_rows_lose_nothing(k: int, way: str) -> None:
    weight, x = eight_bit_rows(75, k), torch.randn(150, k)
    panels = kernels.int8_panels_of(weight)
    assert panels is not None
    whole = kernels.linear(x, panels, 75, None, 2)
    sizes = panels[:, :4].contiguous().view(len(panels), -1).view(torch.float32).flatten()[:75]
    steps = (weight / sizes[:, None]).round()
    np.testing.assert_array_equal(whole.numpy(), emulated(x.numpy(), steps.numpy(), 2) * sizes.numpy())
    assert_near(whole, F.linear(x, weight))
    for rows in (1, 16, 17, 32, 33, 100):
        assert torch.equal(kernels.linear(x[-rows:], panels, 75, None, 2), whole[-rows:])


def test_two_terms_keep_16_bits_of_an_input(way: str) -> None:
    x, weight = torch.randn(64, 576), torch.randn(96, 576).bfloat16()
    exact = x.double() @ weight.double().T
    off = [
        (kernels.linear(x, kernels.tiles_of(weight), 96, None, terms).double() - exact).norm() / exact.norm()
        for terms in (1, 2)
    ]
    assert 1e-3 < off[0] < 3e-3 and off[1] < 1e-5


@pytest.mark.parametrize("variant", [name for name in VARIANTS if "bidirectional" not in name])
def test_every_architecture_is_near_float32(variant: str, way: str) -> None:
    decoder = decoder_of(variant)
    with torch.no_grad():  # weights that lose nothing: what is left are the roundings of inputs
        for layer in decoder.modules():
            if isinstance(layer, Linear):
                layer.weight.copy_(layer.weight.bfloat16())
    ids = torch.randint(1, 120, (sum(LENGTHS),))
    with torch.enable_grad():
        expected = decoder(ids, LENGTHS).detach()
    prepack(decoder, torch.bfloat16)
    states = compiled_states(decoder, ids, LENGTHS)
    assert ((states - expected).norm(dim=1) <= 2e-4 * expected.norm(dim=1)).all()
    assert not torch.equal(states, expected)


def test_gates_of_any_size(way: str) -> None:
    decoder = decoder_of("llama")
    with torch.no_grad():  # gates far below and above the range of the exponential
        for name, weight in decoder.named_parameters():
            weight.copy_((weight * (3000 if "gate_up" in name else 1)).bfloat16())
    ids = torch.randint(1, 120, (sum(LENGTHS),))
    with torch.enable_grad():
        expected = decoder(ids, LENGTHS).detach()
    prepack(decoder, torch.bfloat16)
    states = compiled_states(decoder, ids, LENGTHS)
    assert ((states - expected).norm(dim=1) <= 1e-2 * expected.norm(dim=1)).all()


@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden_size": 52, "intermediate_size": 75},
        {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 6, "hidden_size": 57},
        {"num_key_value_heads": 4, "head_dim": 40, "intermediate_size": 160},
    ],
)
def test_odd_sizes_and_any_number_of_threads(sizes: dict[str, int], way: str) -> None:
    for variant in ("llama with biases", "gemma3"):
        decoder = decoder_of(variant, False, **sizes)
        prepack(decoder, torch.bfloat16)
        ids = torch.randint(1, 120, (sum(LENGTHS),))
        with torch.inference_mode():
            expected = decoder(ids, LENGTHS)  # per layer
        alone = compiled_states(decoder, ids, LENGTHS)
        assert ((alone - expected).norm(dim=1) <= 2e-4 * expected.norm(dim=1)).all()
        for threads in (2, 3, 5):
            assert torch.equal(compiled_states(decoder, ids, LENGTHS, threads), alone)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=9), st.randoms(use_true_random=False))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_sequence_has_the_same_bits_in_any_pack(way: str, lengths: list[int], random: Random) -> None:
    decoder = decoder_of("gemma3")
    prepack(decoder, torch.bfloat16)
    sequences = [torch.tensor([random.randint(1, 119) for _ in range(length)]) for length in lengths]
    together = compiled_states(decoder, torch.cat(sequences), lengths)
    for sequence, states in zip(sequences, together.split(lengths), strict=True):
        assert torch.equal(compiled_states(decoder, sequence, [len(sequence)]), states)


@pytest.mark.processor("amx")
def test_registers_and_vectors_give_the_same_bits() -> None:
    library = kernels.library()
    assert library is not None
    decoder = decoder_of("llama with biases")
    prepack(decoder, torch.bfloat16)
    ids = torch.randint(1, 120, (sum(LENGTHS),))
    states = []
    for use in (0, 1):
        library.use_tiles(use)
        states.append(compiled_states(decoder, ids, LENGTHS))
    assert torch.equal(*states)


def test_an_encoder_in_bfloat16(golden_dir: Path, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepacked, "home", lambda: tmp_path)
    monkeypatch.setattr(prepacked, "_FEW_WEIGHTS", 0)
    exact = Encoder.load(golden_dir / "tiny_llama", dtype="float32").encode(TEXTS, normalize=True)
    first, second = (Encoder.load(golden_dir / "tiny_llama", dtype="bfloat16") for _ in range(2))
    assert first.precision == second.precision == loading.SPLIT_PRECISION
    vectors = first.encode(TEXTS, normalize=True)
    assert 1e-9 < (1 - (vectors * exact).sum(axis=1)).max() <= 1e-4
    assert np.array_equal(second.encode(TEXTS, normalize=True), vectors)  # from the file of prepacked weights
    for text, vector in zip(TEXTS, vectors, strict=True):
        assert np.array_equal(first.encode(text, normalize=True)[0], vector)
    first.trainable_decoder()
    assert np.array_equal(first.encode(TEXTS, normalize=True), vectors)  # from ordinary, rounded weights


def test_without_tiles_bfloat16_is_a_storage_of_weights(
    golden_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepacked, "home", lambda: tmp_path)
    monkeypatch.setattr(prepacked, "_FEW_WEIGHTS", 0)
    monkeypatch.setattr(kernels, "has_amx", lambda: False)
    encoder = Encoder.load(golden_dir / "tiny_llama", dtype="bfloat16")
    assert encoder.precision == loading.ROUNDED_PRECISION
    decoder = Encoder.load(golden_dir / "tiny_llama", dtype="float32").trainable_decoder()
    with torch.no_grad():
        for layer in decoder.modules():
            if isinstance(layer, Linear):
                layer.weight.copy_(layer.weight.bfloat16())
    ids = torch.arange(3, 40)
    rounded_decoder = encoder.trainable_decoder()
    with torch.inference_mode():
        assert torch.equal(rounded_decoder(ids, [20, 17]), decoder(ids, [20, 17]))
