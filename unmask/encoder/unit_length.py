"""Scaling of vectors to length 1."""

import numpy as np


def unit_length(vectors: np.ndarray, *, in_float64: bool = False) -> np.ndarray:
    """Scale vectors to length 1. A vector of zeros stays zero, with no division by zero.

    Args:
        vectors: float32 or float64 [..., dim].
        in_float64: compute in float64, and round only the result.

    Returns:
        The dtype and shape of `vectors`.
    """
    numbers = vectors.astype(np.float64) if in_float64 else vectors
    lengths = np.linalg.norm(numbers, axis=-1, keepdims=True)
    return (numbers / np.maximum(lengths, np.finfo(numbers.dtype).tiny)).astype(vectors.dtype, copy=False)
