"""Our own encoders: any decoder that `Encoder` loads, with its adapters, bidirectional or with its causal mask."""

import hashlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from unmask.encoder import Encoder
from unmask.evaluate.models.embedding_model import EmbeddingModel, TruncatedModel
from unmask.evaluate.models.specification import ModelSpecification


class DecoderModel:
    """An `Encoder` as an `EmbeddingModel`.

    Attributes:
        encoder: the encoder itself; word-level tasks read its hidden states.
        causal: True if the causal mask was left on.
        takes_instructions: from the specification, else from the model's own `llm2vec_config.json`, else True.
    """

    kind: Literal["unmask"] = "unmask"

    def __init__(self, encoder: Encoder, name: str, *, causal: bool, takes_instructions: bool) -> None:
        self.encoder, self.name, self.causal = encoder, name, causal
        self.takes_instructions = takes_instructions
        self.dimensions = encoder.dim
        self.parameters: int | None = encoder.num_parameters
        # Weights aside, these decide a vector.
        settings = f"{encoder.pooling} {encoder.max_length} {encoder.compat} {encoder.precision} causal={causal}"
        self.revision = f"{encoder.checkpoint.revision}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}"

    def encode(self, texts: Sequence[str], instruction: str = "") -> np.ndarray:
        """Return float32 [n, dimensions], not normalised."""
        return self.encoder.encode(texts, instruction=instruction)

    def count_tokens(self, texts: Sequence[str], instruction: str = "") -> int | None:
        """Count the tokens that the model reads: template and instruction included, truncated texts as truncated."""
        lengths = self.encoder.count_tokens(texts, instruction=instruction)
        return int(np.minimum(lengths, self.encoder.max_length).sum())


def open_decoder(specification: ModelSpecification) -> DecoderModel:
    """Load a decoder by id, folder or `.gguf` file.

    Raises:
        UsageError, CheckpointError: as `Encoder.load`.
    """
    dtype: Any = specification.one("dtype", "float32")
    compat: Any = specification.one("compat", "default")
    causal = specification.flag("causal")
    encoder = Encoder.load(
        specification.target,
        adapters=specification.all("adapter"),
        compat=compat,
        pooling=specification.one("pooling"),
        max_length=specification.number("max_length"),
        dtype=dtype,
        device=specification.one("device") or "cpu",
        causal=causal,
    )
    if specification.one("instructions") is not None:
        takes_instructions = specification.flag("instructions")
    else:
        takes_instructions = bool(encoder.checkpoint.encoder_config.get("takes_instructions", True))
    return DecoderModel(encoder, specification.display_name, causal=causal, takes_instructions=takes_instructions)


def decoder_model(model: EmbeddingModel) -> DecoderModel | None:
    """Return the decoder that computes a model's vectors, under a truncation too; None for models of other kinds."""
    base = model.base if isinstance(model, TruncatedModel) else model
    return base if isinstance(base, DecoderModel) else None
