"""Text to vectors: prompts, packs, one bidirectional forward, pooling."""

from unmask.encoder.encoder import Dtype, Encoder, LoadOptions, require_device
from unmask.encoder.model.architectures import ARCHITECTURES, Architecture, Shape
from unmask.encoder.model.decoder import Decoder
from unmask.encoder.prompts import Prompt

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Decoder",
    "Dtype",
    "Encoder",
    "LoadOptions",
    "Prompt",
    "Shape",
    "require_device",
]
