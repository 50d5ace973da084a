"""Weights in: a name becomes tensors, a configuration and a tokenizer. No maths of the model happens here."""

from unmask.checkpoint.checkpoint import Checkpoint, open_checkpoint
from unmask.checkpoint.resolve import DEFAULT_MODEL, Location, resolve
from unmask.checkpoint.tensors import TensorSource

__all__ = ["DEFAULT_MODEL", "Checkpoint", "Location", "TensorSource", "open_checkpoint", "resolve"]
