"""Text to vectors: prompts, packs, one bidirectional forward, pooling."""

from typing import TYPE_CHECKING

from unmask.exports import lazy_exports

if TYPE_CHECKING:
    from unmask.encoder.encoder import Encoder
    from unmask.encoder.loading import LoadOptions, require_device
    from unmask.encoder.model.architectures import ARCHITECTURES, Architecture, Shape
    from unmask.encoder.model.decoder import Decoder
    from unmask.encoder.options import Dtype, DtypeChoice
    from unmask.encoder.prompts import Prompt

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Decoder",
    "Dtype",
    "DtypeChoice",
    "Encoder",
    "LoadOptions",
    "Prompt",
    "Shape",
    "require_device",
]

__getattr__ = lazy_exports(
    __name__,
    {
        "encoder": ("Encoder",),
        "loading": ("LoadOptions", "require_device"),
        "model.architectures": ("ARCHITECTURES", "Architecture", "Shape"),
        "model.decoder": ("Decoder",),
        "options": ("Dtype", "DtypeChoice"),
        "prompts": ("Prompt",),
    },
)
