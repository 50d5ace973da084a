"""The verbs of `Encoder` that people know from sentence-transformers, and its options."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unmask import Encoder
from unmask.encoder import LoadOptions
from unmask.errors import CheckpointError, UsageError

QUERY = "Find the passage that answers:"


def with_config(folder: Path, **config: object) -> Path:
    (folder / "llm2vec_config.json").write_text(json.dumps(config))
    return folder


def test_encode_query_reads_the_instruction_of_the_model(copied) -> None:
    encoder = Encoder.load(with_config(copied("tiny_llama"), query_instruction=QUERY))
    texts = ["where is the river", "a market"]
    np.testing.assert_array_equal(encoder.encode_query(texts), encoder.encode(texts, instruction=QUERY))
    np.testing.assert_array_equal(
        encoder.encode_query(texts, instruction="Other:"), encoder.encode(texts, instruction="Other:")
    )
    np.testing.assert_array_equal(encoder.encode_query(texts, instruction=""), encoder.encode(texts))
    np.testing.assert_array_equal(encoder.encode_document(texts), encoder.encode(texts))


def test_a_model_without_instructions_encodes_queries_as_texts(golden_dir: Path) -> None:
    encoder = Encoder.load(golden_dir / "tiny_llama")
    options: Any = {"normalize": True, "dimensions": 5}
    np.testing.assert_array_equal(encoder.encode_query("a text", **options), encoder.encode("a text", **options))


def test_an_instruction_that_is_no_text_is_named(copied) -> None:
    encoder = Encoder.load(with_config(copied("tiny_llama"), query_instruction=3))
    with pytest.raises(CheckpointError, match="query_instruction=3"):
        encoder.encode_query("a text")


def test_similarity_is_the_cosine(golden_dir: Path) -> None:
    encoder = Encoder.load(golden_dir / "tiny_llama")
    vectors = encoder.encode(["a river", "a market", "a letter"])
    unit = encoder.encode(["a river", "a market", "a letter"], normalize=True)
    cosines = encoder.similarity(vectors[:2], vectors)
    assert cosines.shape == (2, 3) and cosines.dtype == np.float32
    np.testing.assert_allclose(cosines, unit[:2] @ unit.T, atol=1e-6)
    assert encoder.similarity(vectors[0], vectors[1]).shape == (1, 1)


def test_load_options_are_checked_before_anything_is_read(golden_dir: Path) -> None:
    refused: list[tuple[Any, str]] = [
        ({"compat": "exact"}, "compat='exact': choose 'default' or 'reference'"),
        ({"dtype": "float8"}, "dtype='float8': choose one of float32"),
        ({"device": "toaster"}, "device='toaster'"),
    ]
    for options, message in refused:
        with pytest.raises(UsageError, match=message):
            LoadOptions(**options)
        with pytest.raises(UsageError, match=message):
            Encoder.load("no model of this name", **options)
    loaded = Encoder.load_with(golden_dir / "tiny_llama", LoadOptions(pooling="last_token", max_length=7))
    assert (loaded.pooling, loaded.max_length, loaded.prompts.skip_instruction) == ("last_token", 7, True)


def test_num_parameters_counts_every_weight_of_the_decoder(golden_dir: Path) -> None:
    encoder = Encoder.load(golden_dir / "tiny_llama")
    assert encoder.num_parameters == sum(p.numel() for p in encoder.trainable_decoder().parameters())
