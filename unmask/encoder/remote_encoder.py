"""`RemoteEncoder`: description of a model whose weights are in other processes."""

from dataclasses import dataclass

from unmask.checkpoint import Checkpoint
from unmask.encoder.options import Compat
from unmask.encoder.precision_choices import PrecisionChoice
from unmask.encoder.prompts import PromptBuilder


@dataclass(frozen=True, eq=False)
class RemoteEncoder:
    """A model without weights: it reads texts, and others compute.

    Attributes:
        checkpoint: opened without weights.
        revision: content address of the weights elsewhere.
        prompts, pooling, max_length, compat, dim, dtype_choice, num_parameters: as those of `Encoder`.
    """

    checkpoint: Checkpoint
    revision: str
    prompts: PromptBuilder
    pooling: str
    max_length: int
    compat: Compat
    dim: int
    dtype_choice: PrecisionChoice
    num_parameters: int

    @property
    def name(self) -> str:
        """Return the id or path that it was opened by."""
        return self.checkpoint.name
