"""Quantised vectors: every vector on its own, all bits used, and signs that unpack again."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tests.api.live import LocalService
from unmask.api.quantisation import QUANTISED, quantise_vectors

ROWS = arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 40)), elements=st.floats(-1, 1, width=32))


@given(ROWS)
def test_a_vector_is_the_same_alone_and_beside_others(rows: np.ndarray):
    for kind in QUANTISED:
        together = quantise_vectors(rows, kind)
        assert str(together.dtype) == {"binary": "int8", "ubinary": "uint8"}.get(kind, kind)
        for index in range(len(rows)):
            np.testing.assert_array_equal(quantise_vectors(rows[index : index + 1], kind)[0], together[index])


@given(ROWS)
def test_eight_bits_are_within_half_a_step(rows: np.ndarray):
    steps = np.abs(rows).max(axis=1, keepdims=True).astype(np.float64) / 127
    restored = quantise_vectors(rows, "int8") * steps
    assert (np.abs(restored - rows) <= steps * 0.5001 + 1e-30).all()
    np.testing.assert_array_equal(
        quantise_vectors(rows, "uint8").astype(int), quantise_vectors(rows, "int8").astype(int) + 128
    )


@given(ROWS)
def test_signs_unpack(rows: np.ndarray):
    bits = np.unpackbits(quantise_vectors(rows, "ubinary"), axis=1)
    np.testing.assert_array_equal(bits[:, : rows.shape[1]], rows > 0)
    assert not bits[:, rows.shape[1] :].any()
    np.testing.assert_array_equal(
        quantise_vectors(rows, "binary").astype(int), quantise_vectors(rows, "ubinary").astype(int) - 128
    )


@pytest.mark.parametrize("kind", ["int8", "uint8"])
def test_a_vector_of_zeros_stays_one(kind: str):
    assert len(np.unique(quantise_vectors(np.zeros((1, 5), np.float32), kind))) == 1


@pytest.mark.parametrize("kind", QUANTISED)
def test_embeddings_in_a_quantised_format(service: LocalService, kind: str):
    texts = ["river stone", "bright lamp"]
    plain = service.embed(texts, dimensions=16)
    reply = service.embed(texts, dimensions=16, encoding_format=kind)
    assert reply.status == 200
    embeddings = [item["embedding"] for item in reply.json["data"]]
    assert embeddings == quantise_vectors(plain.vectors, kind).tolist()
    assert reply.json["usage"] == plain.json["usage"]
