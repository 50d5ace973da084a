"""Tests of scaling vectors to length 1: precision, shape, zeros."""

import numpy as np
import pytest

from unmask.encoder.unit_length import unit_length


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(3, 8), (8,), (0, 8), (2, 3, 8)])
def test_dtype_and_shape_stay_and_lengths_are_one(dtype: type, shape: tuple[int, ...]) -> None:
    vectors = np.random.default_rng(0).normal(size=shape).astype(dtype)
    scaled = unit_length(vectors)
    assert (scaled.dtype, scaled.shape) == (vectors.dtype, shape)
    np.testing.assert_allclose(np.linalg.norm(scaled, axis=-1), 1, rtol=1e-6)


def test_zeros_stay_zeros() -> None:
    vectors = np.zeros((2, 4), np.float32)
    vectors[1, 2] = -3
    with np.errstate(all="raise"):
        assert unit_length(vectors).tolist() == [[0, 0, 0, 0], [0, 0, -1, 0]]


def test_float64_rounds_only_the_result() -> None:
    vectors = np.random.default_rng(0).normal(size=(64, 576)).astype(np.float32)
    exact = unit_length(vectors.astype(np.float64)).astype(np.float32)
    rounded = unit_length(vectors, in_float64=True)
    assert rounded.dtype == np.float32
    np.testing.assert_array_equal(rounded, exact)
    assert (rounded != unit_length(vectors)).any()
