"""The canary: a text whose vector is known. A server that gives another one must not answer."""

import base64

import msgspec
import numpy as np

CANARY_TEXT = "The canary sings while the air is good."

# Half-precision storage of the expected vector and another machine's sums stay far above the first; weights of fewer
# bits move a vector by as much as the others leave.
CANARY_COSINE = {"float32": 0.9999, "float16": 0.9999, "bfloat16": 0.998, "int8": 0.99}


class Canary(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A text and its vector: normalised, in the record's own mode, little-endian float16, base64."""

    text: str
    vector: str

    @classmethod
    def of(cls, text: str, vector: np.ndarray) -> "Canary":
        """Of a text and the raw vector [dim] that a model gives for it."""
        scaled = (vector / np.linalg.norm(vector)).astype("<f2")
        return cls(text=text, vector=base64.b64encode(scaled.tobytes()).decode())

    def expected(self) -> np.ndarray:
        """The vector as float32 [dim]."""
        return np.frombuffer(base64.b64decode(self.vector), dtype="<f2").astype(np.float32)


def check_vector(vector: np.ndarray, expected: np.ndarray, dtype: str = "float32") -> str:
    """ "ok", or what is wrong with the vector of a canary text, computed with weights of a precision."""
    if vector.shape != expected.shape or not np.isfinite(vector).all():
        return f"the canary text gave a vector of shape {list(vector.shape)} that is not the expected one"
    found = cosine(vector, expected)
    return (
        "ok" if found >= CANARY_COSINE[dtype] else f"the canary text's vector has cosine {found:.5f} to the right one"
    )


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Of two vectors [dim]."""
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
