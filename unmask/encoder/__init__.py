"""Text to vectors: prompts, packs, one bidirectional forward, pooling."""

from unmask.encoder.architectures import ARCHITECTURES, Architecture, Shape
from unmask.encoder.decoder import Decoder
from unmask.encoder.encoder import Dtype, Encoder, require_device
from unmask.encoder.prompt import Prompt

__all__ = ["ARCHITECTURES", "Architecture", "Decoder", "Dtype", "Encoder", "Prompt", "Shape", "require_device"]
