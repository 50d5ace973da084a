"""What is measured: our own encoders and their peers, behind one small protocol."""

from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np

Kind = Literal["unmask", "sentence-transformers", "endpoint", "static"]


class Contender(Protocol):
    """A model that turns texts into vectors. `contenders.open_contender` makes one.

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
