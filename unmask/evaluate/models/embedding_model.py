"""The protocol of the models under test, and models with truncated vectors."""

from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np

from unmask.errors import UsageError

ModelKind = Literal["unmask", "sentence-transformers", "onnxruntime", "endpoint", "static"]


class EmbeddingModel(Protocol):
    """A model that turns texts into vectors; `models.open_model` makes one.

    Attributes:
        name: name in reports.
        kind: library or service that runs the model.
        revision: content address of everything that decides a vector; cache key of the vectors.
        dimensions: numbers per vector.
        parameters: of the whole model; None if unknown.
        takes_instructions: True if an instruction changes the vectors. If False, none is given and none is in the
            cache key.
    """

    name: str
    revision: str
    dimensions: int
    parameters: int | None
    takes_instructions: bool

    @property
    def kind(self) -> ModelKind: ...

    def encode(self, texts: Sequence[str], instruction: str = "") -> np.ndarray:
        """Return the vectors of texts in their order, float32 [n, dimensions], not necessarily of length 1."""
        ...

    def count_tokens(self, texts: Sequence[str], instruction: str = "") -> int | None:
        """Count tokens of the model's own tokenizer after truncation, without padding; None if it is out of reach."""
        ...


class TruncatedModel:
    """A model whose vectors are truncated to their first numbers (Matryoshka, arXiv 2205.13147).

    `CachedModel` keeps the vectors of the base, so all truncations of a model share them. `decoder_model` finds the
    decoder under a truncation. No other caller needs the base.

    Attributes:
        base: the model with vectors of full length.
    """

    def __init__(self, base: EmbeddingModel, dimensions: int) -> None:
        if not 1 <= dimensions <= base.dimensions:
            raise UsageError(f"{base.name}: dimensions={dimensions}; its vectors have 1 to {base.dimensions}")
        self.base, self.dimensions = base, dimensions
        self.name, self.parameters, self.takes_instructions = base.name, base.parameters, base.takes_instructions
        self.revision = f"{base.revision}-first{dimensions}"

    @property
    def kind(self) -> ModelKind:
        return self.base.kind

    def encode(self, texts: Sequence[str], instruction: str = "") -> np.ndarray:
        """Return float32 [n, dimensions]."""
        return truncated(self.base.encode(texts, instruction), self.dimensions)

    def count_tokens(self, texts: Sequence[str], instruction: str = "") -> int | None:
        """Count the tokens that the base reads."""
        return self.base.count_tokens(texts, instruction)


def truncated(vectors: np.ndarray, dimensions: int) -> np.ndarray:
    """Return the first numbers of each vector [n, size], scaled to the vector's own length.

    Vectors of length 1 stay so, as the API gives them. k-means would otherwise read the share of a vector that its
    first numbers hold.
    """
    if dimensions >= vectors.shape[1]:
        return vectors
    cut = vectors[:, :dimensions]
    length, left = (np.linalg.norm(each, axis=1, keepdims=True) for each in (vectors, cut))
    return cut * (length / np.maximum(left, np.finfo(np.float32).tiny))
