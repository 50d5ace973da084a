"""llama.cpp's own HTTP server as a provider: float32 weights are exact, and Q8_0 is int8 where that is allowed."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import xllamacpp
from gguf.quants import quantize

from tests.checkpoint.test_gguf import llama_tensors
from tests.checkpoint.test_gguf_embedders import embedder, small
from tests.router.test_sentence_transformers_peer import finding_of
from unmask.conformance import References, build_references

llama_cpp: Any = xllamacpp  # a compiled module without types
KEYS = {"llama.pooling_type": 1, "llama.attention.causal": False}
CONTEXT = 512
GAIN = 0.4  # of random weights: two layers of smaller ones would hardly show eight bits


@contextmanager
def llama_server(file: Path) -> Iterator[str]:
    """Run llama.cpp's server in threads of this process. Yields its URL."""
    params = llama_cpp.CommonParams()
    params.model.path = str(file)
    params.embedding, params.warmup, params.verbosity = True, False, -1
    params.hostnames, params.port = ["127.0.0.1"], 0
    params.n_ctx = params.n_batch = params.n_ubatch = CONTEXT
    params.n_parallel = params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.n_threads_http = 2
    params.flash_attn_type = llama_cpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = llama_cpp.ggml_type.GGML_TYPE_F32
    server = llama_cpp.Server(params)
    yield f"{server.listening_address}/v1"
    del server


@pytest.fixture(scope="module")
def float32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = small(llama_tensors(np.random.default_rng(4)), GAIN)
    return embedder(tmp_path_factory.mktemp("llama.cpp") / "f32.gguf", "llama", tensors, **KEYS)


@pytest.fixture(scope="module")
def references(float32: Path) -> References:
    return build_references(str(float32), model="m", draw=random.Random(5))


def test_float32_is_exact_on_all_texts_that_look_like_no_control_token(float32: Path, references: References) -> None:
    with llama_server(float32) as url:
        assert finding_of(url, references).fault == "reads control tokens in a user's text"
        finding = finding_of(url, references, reads_control_tokens=True)
    assert finding.passed and finding.precision == "exact" and finding.worst < 1e-8, finding


def test_eight_bits_are_admitted_only_where_they_are_allowed(tmp_path: Path, references: References) -> None:
    tensors, formats = small(llama_tensors(np.random.default_rng(4)), GAIN), {}
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and name.startswith("blk."):
            formats[name] = gguf.GGMLQuantizationType.Q8_0
            tensors[name] = quantize(tensor, formats[name])
    with llama_server(embedder(tmp_path / "q8.gguf", "llama", tensors, formats, **KEYS)) as url:
        refused = finding_of(url, references, reads_control_tokens=True)
        assert refused.fault == "has a lower precision than declared (exact): like int8"
        allowed = finding_of(url, references, precision="int8", reads_control_tokens=True)
        assert allowed.passed and allowed.precision == "int8", allowed
