"""A linear layer behind the pooling, beside the weights in a file of its own: `head.safetensors`.

It holds `weight` [dimensions, hidden_size] and `bias` [dimensions], float32. Here they are two more tensors of the
model, so that whatever copies, merges or averages tensors takes them along.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from unmask.checkpoint.tensors import SafetensorsFiles, TensorSource
from unmask.errors import CheckpointError

HEAD_FILE = "head.safetensors"
HEAD_WEIGHT, HEAD_BIAS = "head.weight", "head.bias"
_KEYS = {HEAD_WEIGHT: "weight", HEAD_BIAS: "bias"}


class HeadTensors:
    """A model's tensors and those of its head.

    Raises:
        CheckpointError: the file is damaged, or holds no linear layer.
    """

    def __init__(self, tensors: TensorSource, file: Path) -> None:
        self._tensors, self._head = tensors, SafetensorsFiles([file])
        shapes = {name: self._head.shape(key) for name, key in _KEYS.items() if key in self._head.names()}
        weight, bias = shapes.get(HEAD_WEIGHT, ()), shapes.get(HEAD_BIAS, ())
        if len(weight) != 2 or bias != weight[:1]:
            raise CheckpointError(
                f"{file} holds weight {list(weight)} and bias {list(bias)}; expected [dimensions, hidden_size] and "
                "[dimensions]"
            )

    def names(self) -> Sequence[str]:
        return [*(name for name in self._tensors.names() if name not in _KEYS), *_KEYS]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._head.shape(_KEYS[name]) if name in _KEYS else self._tensors.shape(name)

    def read(self, name: str) -> torch.Tensor:
        return self._head.read(_KEYS[name]).float() if name in _KEYS else self._tensors.read(name)
