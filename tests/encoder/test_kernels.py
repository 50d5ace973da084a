"""The compiled forward: near the torch operations for every architecture, the same bits however it is divided."""

import ctypes
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tests.encoder.test_architectures import SMALL, VARIANTS, ours, transformers_model
from unmask import Encoder
from unmask.encoder.model.decoder import Decoder
from unmask.encoder.runtime import kernels
from unmask.encoder.runtime.kernels import build
from unmask.encoder.runtime.linear import Linear, prepack

# In CI they have to be there: a missing compiler is a failure and not a skip.
pytestmark = pytest.mark.skipif(
    kernels.library() is None and "CI" not in os.environ, reason="no C compiler, or a processor without a target"
)

LENGTHS = [37, 11, 11, 1, 75]


@cache
def prepacked_decoder(variant: str) -> Decoder:
    decoder = decoder_of(variant)
    prepack(decoder)
    return decoder


def decoder_of(variant: str, causal: bool = False, **sizes: int) -> Decoder:
    config = {**VARIANTS[variant], **sizes}
    return ours(config, transformers_model(config, causal), causal)


def compiled_states(decoder: Decoder, ids: torch.Tensor, lengths: list[int], threads: int = 1) -> torch.Tensor:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        compiled = decoder.compiled_forward()
        assert compiled is not None
        with torch.inference_mode():
            return compiled(ids, lengths)
    finally:
        torch.set_num_threads(before)


def assert_near(states: torch.Tensor, expected: torch.Tensor) -> None:
    assert ((states - expected).norm(dim=1) <= 1e-5 * expected.norm(dim=1)).all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("variant", [name for name in VARIANTS if "bidirectional" not in name])
def test_every_architecture_has_the_states_of_the_torch_operations(variant: str, causal: bool) -> None:
    decoder = decoder_of(variant, causal)
    ids = torch.randint(1, 120, (sum(LENGTHS),))
    with torch.enable_grad():
        expected = decoder(ids, LENGTHS).detach()  # with gradients, nothing is compiled
    assert_near(compiled_states(decoder, ids, LENGTHS), expected)
    prepack(decoder)
    assert_near(compiled_states(decoder, ids, LENGTHS), expected)


# Sizes that are no multiple of a panel or a vector, one key head, and one head for each query.
@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden_size": 52, "intermediate_size": 75},
        {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 6, "hidden_size": 57},
        {"num_key_value_heads": 4, "head_dim": 40, "intermediate_size": 160},
    ],
)
def test_odd_sizes_and_any_number_of_threads(sizes: dict[str, int]) -> None:
    for variant in ("llama with biases", "gemma3"):
        decoder = decoder_of(variant, False, **sizes)
        prepack(decoder)
        ids = torch.randint(1, 120, (sum(LENGTHS),))
        with torch.inference_mode():
            expected = decoder(ids, LENGTHS)  # per layer
        alone = compiled_states(decoder, ids, LENGTHS)
        assert_near(alone, expected)
        for threads in (2, 3, 5):
            assert torch.equal(compiled_states(decoder, ids, LENGTHS, threads), alone)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=9), st.randoms(use_true_random=False))
@settings(max_examples=25, deadline=None)
def test_a_sequence_has_the_same_bits_in_any_pack(lengths: list[int], random: Random) -> None:
    decoder = prepacked_decoder("gemma3")
    sequences = [torch.tensor([random.randint(1, 119) for _ in range(length)]) for length in lengths]
    together = compiled_states(decoder, torch.cat(sequences), lengths)
    for sequence, states in zip(sequences, together.split(lengths), strict=True):
        assert torch.equal(compiled_states(decoder, sequence, [len(sequence)]), states)


def test_bfloat16_rounds_the_weights_and_nothing_else(golden_dir: Path) -> None:
    texts = ["one text", "another one, which is longer", "a " * 90]
    exact, rounded = (Encoder.load(golden_dir / "tiny_llama", dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert rounded.num_parameters == exact.num_parameters
    vectors = rounded.encode(texts, normalize=True)
    off = 1 - (vectors * exact.encode(texts, normalize=True)).sum(axis=1)
    assert 1e-9 < off.max() <= 1e-4
    for text, vector in zip(texts, vectors, strict=True):
        assert np.array_equal(rounded.encode(text, normalize=True)[0], vector)
    weight = exact.trainable_decoder().get_parameter("layers.0.qkv.weight")
    assert torch.equal(
        rounded.trainable_decoder().get_parameter("layers.0.qkv.weight"), weight.to(torch.bfloat16).float()
    )
    assert np.array_equal(rounded.encode(texts, normalize=True), vectors)  # from plain, rounded weights


def test_bfloat16_on_torch_keeps_the_residual_stream_in_float32(
    golden_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["one text", "another one, which is longer", "a " * 90]
    exact = Encoder.load(golden_dir / "tiny_llama").encode(texts, normalize=True)
    monkeypatch.setattr(kernels, "library", lambda: None)
    rounded = Encoder.load(golden_dir / "tiny_llama", dtype="bfloat16")
    assert rounded.dtype == torch.bfloat16 and rounded.precision == "bfloat16"
    inputs: list[torch.dtype] = []
    layers = rounded.trainable_decoder().get_submodule("layers")
    for layer in layers.children():
        layer.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0].dtype))
    off = 1 - (rounded.encode(texts, normalize=True) * exact).sum(axis=1)
    assert 1e-9 < off.max() <= 2e-4
    assert set(inputs) == {torch.float32}


@pytest.mark.parametrize("prepacked", [False, True])
def test_a_linear_layer_of_few_and_many_rows(prepacked: bool) -> None:
    weight, bias = torch.randn(75, 200), torch.randn(75)
    x = torch.randn(300, 200)
    stored = kernels.panels_of(weight) if prepacked else weight
    whole = kernels.linear(x, stored, 75, bias)
    torch.testing.assert_close(whole, F.linear(x, weight, bias), rtol=1e-4, atol=1e-4)
    for rows in (*range(1, 30), 113):
        assert torch.equal(kernels.linear(x[-rows:], stored, 75, bias), whole[-rows:])


def test_panels_keep_every_weight() -> None:
    weight = torch.randn(75, 20)
    assert torch.equal(kernels.weight_of(kernels.panels_of(weight), 75), weight)
    rounded = weight.to(torch.bfloat16)
    assert torch.equal(kernels.weight_of(kernels.panels_of(rounded), 75), rounded)


@pytest.mark.parametrize("bits", [16, 8])
def test_16_and_8_bits_give_the_bits_of_float32(bits: int) -> None:
    if bits == 16:
        weight = torch.randn(75, 200).bfloat16()
        panels = kernels.panels_of(weight)
    else:
        weight = eight_bit_rows(75, 200)
        panels = kernels.int8_panels_of(weight)
        assert panels is not None and panels.dtype == torch.int8
        assert torch.equal(kernels.weight_of(panels, 75), weight)
    x, bias = torch.randn(300, 200), torch.randn(75)
    whole = kernels.linear(x, weight.float(), 75, bias)
    for rows in (*range(1, 30), 113, 300):
        assert torch.equal(kernels.linear(x[-rows:], panels, 75, bias), whole[-rows:])


def eight_bit_rows(n: int, k: int, smallest: int = 1) -> torch.Tensor:
    """Rows of whole steps of one size, as files in 8 bits have them; no number but 0 is below the smallest step."""
    steps = torch.randint(-127, 128, (n, k))
    steps[steps.abs() < smallest] = 0
    steps[:, -1] = smallest
    steps[0] = 0
    sizes = torch.rand(n, 1).add(0.1).bfloat16().float()  # few digits: thirds of a number are exact
    return steps * sizes


@pytest.mark.parametrize("smallest", [1, 2, 3])
def test_8_bit_rows_are_found(smallest: int) -> None:
    weight = eight_bit_rows(40, 100, smallest)
    panels = kernels.int8_panels_of(weight)
    assert panels is not None and torch.equal(kernels.weight_of(panels, 40), weight)


def test_other_rows_are_not_taken_for_8_bits() -> None:
    weight = eight_bit_rows(40, 100)
    for other_rows in (
        torch.randn(40, 100),
        weight + 1e-6,
        weight * torch.linspace(1, 2, 100),
        weight.bfloat16().float(),
    ):
        assert kernels.int8_panels_of(other_rows) is None
    weight[7, 3] = float("nan")
    assert kernels.int8_panels_of(weight) is None


def test_a_weight_is_stored_in_the_fewest_bits_that_keep_it() -> None:
    cases = {torch.int8: eight_bit_rows(70, 40), torch.bfloat16: torch.randn(70, 40).bfloat16().float()}
    for dtype, weight in {**cases, torch.float32: torch.randn(70, 40)}.items():
        for precision in (torch.float32, torch.bfloat16):
            layer = Linear(40, 70)
            layer.weight.data.copy_(weight)
            layer.prepack(precision)
            assert layer.prepacked is not None
            assert layer.prepacked.dtype == (precision if dtype == torch.float32 else dtype)
            assert torch.equal(layer.plain_weight(), weight if dtype != torch.float32 else weight.to(precision).float())


def test_a_token_that_does_not_exist_is_refused() -> None:
    decoder = decoder_of("llama")
    with pytest.raises(IndexError, match=f"0 to {SMALL['vocab_size'] - 1}"):
        compiled_states(decoder, torch.tensor([1, SMALL["vocab_size"]]), [2])


def test_hooks_are_heeded() -> None:
    decoder = decoder_of("llama")
    decoder.layers[0].register_forward_hook(lambda *call: call[2] * 2)
    assert decoder.compiled_forward() is None


def test_without_kernels_the_vectors_are_the_same(golden_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["one text", "another one, which is longer", "a " * 90]
    compiled = Encoder.load(golden_dir / "tiny_gemma").encode(texts)
    monkeypatch.setattr(kernels, "library", lambda: None)
    plain = Encoder.load(golden_dir / "tiny_gemma").encode(texts)
    assert not np.array_equal(plain, compiled)  # it is another way
    np.testing.assert_allclose(plain, compiled, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target", build.targets())
def test_each_target_compiles_without_a_warning_and_old_libraries_go(target: str, tmp_path: Path) -> None:
    (tmp_path / f"{target}-0123.so").write_bytes(b"old")
    path = build.compile_library(target, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [build.file_name(target)]
    ctypes.CDLL(str(path))  # loading runs nothing
    command = ["cc", "-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", *build.TARGETS[target], "-fsyntax-only"]
    subprocess.run([*command, str(build.SOURCE)], check=True)


def test_a_machine_without_a_compiler_encodes_on_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_folders", lambda: [tmp_path])
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert kernels.library.__wrapped__() is None
    monkeypatch.undo()
    monkeypatch.setattr(kernels, "_folders", lambda: [tmp_path])
    monkeypatch.setattr(build, "compiler", lambda: shutil.which("false"))
    assert kernels.library.__wrapped__() is None
    assert not list(tmp_path.iterdir())


def test_a_damaged_library_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_folders", lambda: [tmp_path])
    target = kernels._target()
    assert target is not None
    (tmp_path / build.file_name(target)).write_bytes(b"no library")
    assert kernels.library.__wrapped__() is None


@pytest.mark.processor("avx512")
def test_the_other_targets_give_the_same_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor with AVX-512 runs the code for AVX2 as well."""
    expected = compiled_states(decoder_of("gemma3"), ids := torch.randint(1, 120, (sum(LENGTHS),)), LENGTHS)
    monkeypatch.setattr(kernels, "_target", lambda: "avx2")
    monkeypatch.setattr(kernels, "_folders", lambda: [tmp_path])
    library = kernels.library.__wrapped__()
    assert library is not None and library.panel_columns() == 16
    monkeypatch.setattr(kernels, "library", lambda: library)
    monkeypatch.setattr(kernels, "panel_columns", lambda: 16)
    decoder = decoder_of("gemma3")
    prepack(decoder)
    assert_near(compiled_states(decoder, ids, LENGTHS), expected)
