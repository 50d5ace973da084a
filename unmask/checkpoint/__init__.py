"""Weights in: a name becomes tensors, a configuration and a tokenizer. No maths of the model happens here."""

from typing import TYPE_CHECKING

from unmask.exports import lazy_exports

if TYPE_CHECKING:
    from unmask.checkpoint.checkpoint import Checkpoint, open_checkpoint
    from unmask.checkpoint.shipped import DEFAULT_MODEL
    from unmask.checkpoint.tensors import TensorSource

__all__ = ["DEFAULT_MODEL", "Checkpoint", "TensorSource", "open_checkpoint"]

__getattr__ = lazy_exports(
    __name__,
    {
        "checkpoint": ("Checkpoint", "open_checkpoint"),
        "shipped": ("DEFAULT_MODEL",),
        "tensors": ("TensorSource",),
    },
)
