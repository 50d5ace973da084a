"""Vectors in 8 bits or in one bit a dimension, as vector databases take them."""

import numpy as np

QUANTISED = ("int8", "uint8", "binary", "ubinary")


def quantise_vectors(rows: np.ndarray, kind: str) -> np.ndarray:
    """Quantise float vectors [inputs, dimensions], each on its own, so that a vector is the same in any request.

    int8 divides each vector by its largest absolute value and multiplies by 127, so that all 8 bits are used: the
    components of a vector of length 1 are near 0. The scale is lost, so compare by cosine. uint8 is int8 + 128.
    ubinary packs the signs, the first dimension in the highest bit, filled up with zeros to whole bytes. binary is
    ubinary - 128, as Cohere and sentence-transformers write it.

    >>> quantise_vectors(np.array([[0.5, -0.25, 0.0]], dtype=np.float32), "int8").tolist()
    [[127, -64, 0]]
    >>> quantise_vectors(np.array([[0.5, -0.25, 0.0]], dtype=np.float32), "ubinary").tolist()
    [[128]]
    """
    if kind in ("binary", "ubinary"):
        packed = np.packbits(rows > 0, axis=1)
        return packed if kind == "ubinary" else (packed.astype(np.int16) - 128).astype(np.int8)
    largest = np.abs(rows).max(axis=1, keepdims=True)
    scaled = np.rint(rows / np.where(largest > 0, largest, 1) * 127).astype(np.int8)
    return scaled if kind == "int8" else (scaled.astype(np.int16) + 128).astype(np.uint8)
