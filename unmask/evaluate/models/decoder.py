"""Our own encoders: any decoder that `Encoder` loads, with its adapters, bidirectional or with its causal mask."""

import hashlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from unmask.checkpoint.modules import SENTENCE_TRANSFORMERS
from unmask.encoder import Encoder
from unmask.evaluate.models.embedding_model import EmbeddingModel, TruncatedModel
from unmask.evaluate.models.specification import ModelSpecification


class DecoderModel:
    """An `Encoder` as an `EmbeddingModel`.

    A model that was published with prompts (a sentence-transformers folder) gets these, as `SentenceTransformerModel`
    does: the query's wherever a task gives an instruction, the document's elsewhere.

    Attributes:
        encoder: the encoder itself; word-level tasks read its hidden states.
        causal: True if the causal mask was left on.
        takes_instructions: from the specification, else from the model's own files, else True.
    """

    kind: Literal["unmask"] = "unmask"

    def __init__(self, encoder: Encoder, name: str, *, takes_instructions: bool) -> None:
        self.encoder, self.name, self.causal = encoder, name, encoder.causal
        self.takes_instructions = takes_instructions
        self.dimensions = encoder.dim
        self.parameters: int | None = encoder.num_parameters
        # Weights aside, these decide a vector.
        settings = f"{encoder.pooling} {encoder.max_length} {encoder.compat} {encoder.precision} causal={self.causal}"
        self.revision = f"{encoder.checkpoint.revision}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}"

    def encode(self, texts: Sequence[str], instruction: str = "") -> np.ndarray:
        """Return float32 [n, dimensions], not normalised."""
        return self.encoder.encode(texts, instruction=self._prompt(instruction))

    def count_tokens(self, texts: Sequence[str], instruction: str = "") -> int | None:
        """Count the tokens that the model reads: template and instruction included, truncated texts as truncated."""
        lengths = self.encoder.count_tokens(texts, instruction=self._prompt(instruction))
        return int(np.minimum(lengths, self.encoder.max_length).sum())

    def _prompt(self, instruction: str) -> str:
        if not has_own_prompts(self.encoder):
            return instruction
        key = "query_instruction" if instruction else "document_instruction"
        return str(self.encoder.checkpoint.encoder_config.get(key) or "")


def has_own_prompts(encoder: Encoder) -> bool:
    """True for a model that was published with prompts, which a task's own instruction does not replace."""
    return encoder.checkpoint.encoder_config.get("prompt_style") == SENTENCE_TRANSFORMERS


def open_decoder(specification: ModelSpecification) -> DecoderModel:
    """Load a decoder by id, folder or `.gguf` file.

    Raises:
        UsageError, CheckpointError: as `Encoder.load`.
    """
    dtype: Any = specification.one("dtype", "auto")
    compat: Any = specification.one("compat", "default")
    encoder = Encoder.load(
        specification.target,
        adapters=specification.all("adapter"),
        compat=compat,
        pooling=specification.one("pooling"),
        max_length=specification.number("max_length"),
        dtype=dtype,
        device=specification.one("device") or "cpu",
        causal=specification.flag("causal") or None,
    )
    if specification.one("instructions") is not None:
        takes_instructions = specification.flag("instructions")
    else:
        settings = encoder.checkpoint.encoder_config
        own = bool(settings.get("query_instruction") or settings.get("document_instruction"))
        takes_instructions = own if has_own_prompts(encoder) else bool(settings.get("takes_instructions", True))
    return DecoderModel(encoder, specification.display_name, takes_instructions=takes_instructions)


def decoder_model(model: EmbeddingModel) -> DecoderModel | None:
    """Return the decoder that computes a model's vectors, under a truncation too; None for models of other kinds."""
    base = model.base if isinstance(model, TruncatedModel) else model
    return base if isinstance(base, DecoderModel) else None
