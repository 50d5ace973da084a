"""Embedding GGUF files end to end: the vectors of llama.cpp, on which they are made to run."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xllamacpp
from gguf.quants import quantize

from tests.checkpoint.test_gguf import HEAD, HIDDEN, LAYERS, Tensors, gemma3_tensors, llama_tensors, write
from unmask import Encoder
from unmask.encoder.model.decoder import Decoder

llama_cpp: Any = xllamacpp  # a compiled module without types

TEXTS = ["a b ab", "ab", "a" * 30 + " b", "hello, wörld!", "  two spaces\nand a line"]
POOLINGS = {"mean": 1, "cls": 2, "last": 3}


def small(tensors: Tensors, gain: float = 0.2) -> Tensors:
    """Random tensors of the size that trained ones have: attention over them is not one-hot."""
    return {
        name: (1 + 0.1 * tensor if name.endswith("norm.weight") else gain * tensor).astype(np.float32)
        for name, tensor in tensors.items()
    }


def qwen2_tensors(generator: np.random.Generator) -> Tensors:
    """With biases, and as many columns of heads as the hidden size, which llama.cpp demands of this family."""
    tensors = llama_tensors(generator)
    for layer in range(LAYERS):
        for part in "qkv":
            tensors[f"blk.{layer}.attn_{part}.weight"] = generator.standard_normal((HIDDEN, HIDDEN), np.float32)
            tensors[f"blk.{layer}.attn_{part}.bias"] = generator.standard_normal(HIDDEN, np.float32)
        tensors[f"blk.{layer}.attn_output.weight"] = generator.standard_normal((HIDDEN, HIDDEN), np.float32)
    return tensors


def qwen3_tensors(generator: np.random.Generator) -> Tensors:
    norms = [f"blk.{layer}.attn_{part}_norm.weight" for layer in range(LAYERS) for part in "qk"]
    return llama_tensors(generator) | {name: generator.standard_normal(HEAD, np.float32) for name in norms}


def gemma2_tensors(generator: np.random.Generator) -> Tensors:
    return {
        name: tensor
        for name, tensor in gemma3_tensors(generator).items()
        if "attn_q_norm" not in name and "attn_k_norm" not in name
    }


FAMILIES: dict[str, Callable[[np.random.Generator], Tensors]] = {
    "llama": llama_tensors,
    "llama-embed": llama_tensors,
    "qwen2": qwen2_tensors,
    "qwen3": qwen3_tensors,
    "gemma": llama_tensors,
    "gemma2": gemma2_tensors,
    "gemma3": gemma3_tensors,
}


def embedder(path: Path, architecture: str, tensors: Tensors, formats: Any = None, **fields: Any) -> Path:
    """A GGUF file as llama.cpp's converter writes that of an embedding model."""
    sizes = {
        f"{architecture}.attention.value_length": HEAD,
        f"{architecture}.rope.dimension_count": HEAD,
        f"{architecture}.attention.sliding_window": 512,
        "tokenizer.ggml.pre": "default",
    }
    heads = {"heads": (HIDDEN // HEAD, HIDDEN // HEAD)} if architecture == "qwen2" else {}
    return write(path, tensors, architecture, sizes | fields, formats, **heads)


def by_llama_cpp(path: Path, texts: list[str] = TEXTS) -> np.ndarray:
    """Vectors of llama.cpp's server, with attention in 32 bits."""
    params = llama_cpp.CommonParams()
    params.model.path = str(path)
    params.embedding, params.warmup, params.verbosity = True, False, -1
    params.n_ctx = params.n_batch = params.n_ubatch = 512
    # One thread: several wait for each other by spinning, which takes seconds on a busy machine.
    params.n_parallel = params.n_threads_http = params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.flash_attn_type = llama_cpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = llama_cpp.ggml_type.GGML_TYPE_F32
    answer = llama_cpp.Server(params).handle_embeddings({"input": texts, "model": "any"})
    return np.array([row["embedding"] for row in answer["data"]], np.float32)


def agree(ours: np.ndarray, theirs: np.ndarray, difference: float) -> None:
    np.testing.assert_allclose(np.linalg.norm(theirs, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=difference)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("causal", [True, False, None], ids=["causal", "bidirectional", "mask not stated"])
@pytest.mark.parametrize("add_eos", [True, False, None], ids=["EOS", "no EOS", "EOS not stated"])
def test_pooling_mask_and_eos_are_those_of_llama_cpp(
    tmp_path: Path, pooling: str, causal: bool | None, add_eos: bool | None
) -> None:
    keys = {"llama.attention.causal": causal, "tokenizer.ggml.add_eos_token": add_eos}
    path = embedder(
        tmp_path / "m.gguf",
        "llama",
        small(llama_tensors(np.random.default_rng(0))),
        **{"llama.pooling_type": POOLINGS[pooling]} | {key: value for key, value in keys.items() if value is not None},
    )
    agree(Encoder.load(path).encode(TEXTS), by_llama_cpp(path), 1e-5)


def test_a_file_without_bos_has_none(tmp_path: Path) -> None:
    keys = {"llama.pooling_type": 2, "llama.attention.causal": False, "tokenizer.ggml.add_bos_token": False}
    path = embedder(tmp_path / "m.gguf", "llama", small(llama_tensors(np.random.default_rng(3))), **keys)
    encoder = Encoder.load(path)
    assert encoder.checkpoint.tokenizer.prefix == ()
    agree(encoder.encode(TEXTS), by_llama_cpp(path), 1e-5)


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize(("pooling", "causal"), [("last", True), ("mean", False)])
def test_every_family_gives_the_vectors_of_llama_cpp(
    tmp_path: Path, architecture: str, pooling: str, causal: bool
) -> None:
    path = embedder(
        tmp_path / "m.gguf",
        architecture,
        small(FAMILIES[architecture](np.random.default_rng(1))),
        **{f"{architecture}.pooling_type": POOLINGS[pooling], f"{architecture}.attention.causal": causal},
    )
    # ggml reads GELU, which Gemma has, from a table of float16; see the next test.
    agree(Encoder.load(path).encode(TEXTS), by_llama_cpp(path), 2e-4 if "gemma" in architecture else 1e-5)


def gelu_of_ggml(gate: torch.Tensor, approximate: str = "tanh") -> torch.Tensor:
    """GELU as ggml's CPU backend computes it: input and result rounded to float16 (ggml_vec_geglu_f32 in vec.h)."""
    rounded = F.gelu(gate.half().float(), approximate=approximate).half().float()
    return torch.where(gate <= -10, torch.zeros_like(gate), torch.where(gate >= 10, gate, rounded))


@pytest.mark.parametrize("architecture", ["gemma", "gemma2", "gemma3"])
@pytest.mark.parametrize(("pooling", "causal"), [("last", True), ("mean", False)])
def test_the_float16_table_of_gelu_is_the_difference_to_llama_cpp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, pooling: str, causal: bool
) -> None:
    """With ggml's GELU in the place of ours, at most a quarter is left: sums whose last bits round another way."""
    path = embedder(
        tmp_path / "m.gguf",
        architecture,
        small(FAMILIES[architecture](np.random.default_rng(1))),
        **{f"{architecture}.pooling_type": POOLINGS[pooling], f"{architecture}.attention.causal": causal},
    )
    theirs = by_llama_cpp(path)
    exact = np.abs(Encoder.load(path, dtype="float32").encode(TEXTS) - theirs).max()
    monkeypatch.setattr(Decoder, "compiled_forward", lambda self: None)  # torch's operations, which can be replaced
    monkeypatch.setattr("unmask.encoder.model.decoder.F", SimpleNamespace(**vars(F) | {"gelu": gelu_of_ggml}))
    rounded = np.abs(Encoder.load(path, dtype="float32").encode(TEXTS) - theirs).max()
    assert rounded <= 3e-5
    assert rounded <= exact / 4


@pytest.mark.parametrize(("kind", "difference"), [("F16", 1e-3), ("Q8_0", 0.03), ("Q4_0", 0.03)])
def test_quantised_weights_differ_by_the_rounding_of_their_inputs(tmp_path: Path, kind: str, difference: float) -> None:
    """llama.cpp rounds the inputs of a quantised matrix too, to float16 or 8 bits; unmask dequantises the weights."""
    tensors, formats = small(llama_tensors(np.random.default_rng(2))), {}
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and name.startswith("blk."):
            formats[name] = gguf.GGMLQuantizationType[kind]
            tensors[name] = quantize(tensor, formats[name])
    keys = {"llama.pooling_type": 3, "llama.attention.causal": True}
    path = embedder(tmp_path / "m.gguf", "llama", tensors, formats, **keys)
    agree(Encoder.load(path).encode(TEXTS), by_llama_cpp(path), difference)
