"""What is measured: our own encoders and their peers, behind one small protocol."""

from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np

from unmask.errors import UsageError

Kind = Literal["unmask", "sentence-transformers", "endpoint", "static"]


class EmbeddingModel(Protocol):
    """A model that turns texts into vectors. `contenders.open_model` makes one.

    Attributes:
        name: how reports call it.
        kind: what runs it.
        revision: content address of everything that decides a vector; vectors are cached under it.
        dimensions: numbers per vector.
        parameters: of the whole model, where known.
        takes_instructions: whether an instruction changes its vectors. If not, none is given and none is in the
            cache's key.
    """

    name: str
    revision: str
    dimensions: int
    parameters: int | None
    takes_instructions: bool

    @property
    def kind(self) -> Kind: ...

    def encode(self, texts: Sequence[str], instruction: str = "") -> np.ndarray:
        """Vectors of texts in their order, float32 [n, dimensions], not necessarily of length 1."""
        ...

    def count_tokens(self, texts: Sequence[str], instruction: str = "") -> int | None:
        """Tokens of its own tokenizer after its own truncation, without padding; None where nobody can know."""
        ...


class TruncatedModel:
    """A contender whose vectors are shortened to their first numbers (Matryoshka, arXiv 2205.13147).

    Attributes:
        whole: the contender that computes them. Its vectors are what is cached, so that a cut costs nothing more.
    """

    def __init__(self, whole: EmbeddingModel, dimensions: int) -> None:
        if not 1 <= dimensions <= whole.dimensions:
            raise UsageError(f"{whole.name}: dimensions={dimensions}; its vectors have 1 to {whole.dimensions}")
        self.whole, self.dimensions = whole, dimensions
        self.name, self.parameters, self.takes_instructions = whole.name, whole.parameters, whole.takes_instructions
        self.revision = f"{whole.revision}-{dimensions}"

    @property
    def kind(self) -> Kind:
        return self.whole.kind

    def encode(self, texts: Sequence[str], instruction: str = "") -> np.ndarray:
        """float32 [n, dimensions]."""
        return self.whole.encode(texts, instruction)[:, : self.dimensions]

    def count_tokens(self, texts: Sequence[str], instruction: str = "") -> int | None:
        """As the whole one's."""
        return self.whole.count_tokens(texts, instruction)


def uncut(contender: EmbeddingModel) -> EmbeddingModel:
    """What computes a contender's vectors."""
    return contender.whole if isinstance(contender, TruncatedModel) else contender
