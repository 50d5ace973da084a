"""The canary: a text whose vector is known. A model that gives another vector must not answer requests."""

import base64

import numpy as np

from unmask.catalogue.record import Canary

CANARY_TEXT = "The canary sings while the air is good."

# Half-precision storage of the expected vector and another machine's sums stay far above the first; weights of fewer
# bits move a vector by as much as the others leave.
CANARY_COSINE = {"float32": 0.9999, "float16": 0.9999, "bfloat16": 0.998, "int8": 0.99}


def make_canary(text: str, vector: np.ndarray) -> Canary:
    """Make the canary of a text and its raw vector [dim]."""
    scaled = (vector / np.linalg.norm(vector)).astype("<f2")
    return Canary(text=text, vector=base64.b64encode(scaled.tobytes()).decode())


def expected_vector(canary: Canary) -> np.ndarray:
    """Return the vector of a canary as float32 [dim]."""
    return np.frombuffer(base64.b64decode(canary.vector), dtype="<f2").astype(np.float32)


def check_vector(vector: np.ndarray, expected: np.ndarray, dtype: str = "float32") -> str:
    """Compare the vector of a canary text with the expected one. Returns "ok", or a description of the difference.

    Args:
        dtype: precision of the weights, which decides the tolerance.
    """
    if vector.shape != expected.shape or not np.isfinite(vector).all():
        return f"the canary text gave a vector of shape {list(vector.shape)} that is not the expected one"
    similarity = cosine(vector, expected)
    return (
        "ok"
        if similarity >= CANARY_COSINE[dtype]
        else f"the canary text's vector has cosine {similarity:.5f} to the right one"
    )


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Return the cosine similarity of two vectors [dim]."""
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
