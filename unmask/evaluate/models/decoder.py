"""Our own encoders: any decoder that `Encoder` loads, with its adapters, as it ships or as an ablation of it."""

import hashlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from unmask.encoder import Encoder
from unmask.evaluate.models import Options, shown_name

Kind = Literal["unmask"]


class DecoderModel:
    """An `Encoder` as a contender. See `unmask.evaluate.models.embedding_model.EmbeddingModel`.

    Attributes:
        encoder: the model itself; word-level tasks read its hidden states.
        causal: whether the causal mask was left in place.
        takes_instructions: what the specification says, else the model's own `llm2vec_config.json`, else True.
    """

    kind: Kind = "unmask"

    def __init__(self, encoder: Encoder, name: str, *, causal: bool, takes_instructions: bool) -> None:
        self.encoder, self.name, self.causal = encoder, name, causal
        self.takes_instructions = takes_instructions
        self.dimensions = encoder.dim
        self.parameters: int | None = encoder.num_parameters
        self.revision = f"{encoder.checkpoint.revision}-{_digest(_deciding(encoder, causal))}"

    def encode(self, texts: Sequence[str], instruction: str = "") -> np.ndarray:
        """float32 [n, dimensions], raw."""
        return self.encoder.encode(texts, instruction=instruction)

    def count_tokens(self, texts: Sequence[str], instruction: str = "") -> int | None:
        """Tokens that the model reads for these texts: template and instruction counted, what is cut off not."""
        lengths = self.encoder.count_tokens(texts, instruction=instruction)
        return int(np.minimum(lengths, self.encoder.max_length).sum())


def open_decoder(options: Options) -> DecoderModel:
    """Load a decoder by id, folder or `.gguf` file.

    Raises:
        UsageError, CheckpointError: as `Encoder.load`.
    """
    dtype: Any = options.one("dtype", "float32")
    compat: Any = options.one("compat", "default")
    causal = options.flag("causal")
    encoder = Encoder.load(
        options.target,
        adapters=options.all("adapter"),
        compat=compat,
        pooling=options.one("pooling"),
        max_length=options.number("max_length"),
        dtype=dtype,
        device=options.one("device") or "cpu",
        causal=causal,
    )
    said = encoder.checkpoint.encoder_config.get("takes_instructions", True)
    takes = options.flag("instructions") if options.one("instructions") is not None else bool(said)
    return DecoderModel(encoder, shown_name(options), causal=causal, takes_instructions=takes)


def _deciding(encoder: Encoder, causal: bool) -> str:
    """Everything besides the weights that decides a vector, in words."""
    return f"{encoder.pooling} {encoder.max_length} {encoder.compat} {encoder.precision} causal={causal}"


def _digest(words: str) -> str:
    return hashlib.sha256(words.encode()).hexdigest()[:8]
