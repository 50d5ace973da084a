"""Linear layers behind the pooling: `head.safetensors` beside the weights, or Dense modules of sentence-transformers.

`head.safetensors` holds `weight` [dimensions, hidden_size] and `bias` [dimensions] of one layer, or `0.weight`,
`0.bias`, `1.weight`, ... of several, float32. Here they are further tensors of the model (`head.0.weight`), so that
whatever copies, merges or averages tensors takes them along.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path

import torch

from unmask.checkpoint.tensors import SafetensorsFiles, TensorSource, open_tensors
from unmask.errors import CheckpointError

HEAD_FILE = "head.safetensors"
HEAD_WEIGHT, HEAD_BIAS = "head.0.weight", "head.0.bias"
HEAD_PREFIX = "head."


@dataclass(frozen=True)
class HeadLayer:
    """One linear layer in a file.

    Attributes:
        source: the tensors of the file.
        weight, bias: names in it; a layer without a bias has one of zeros here.
    """

    source: TensorSource
    weight: str
    bias: str | None

    def shape(self) -> tuple[int, ...]:
        return self.source.shape(self.weight)


def read_head_file(file: Path) -> list[HeadLayer]:
    """Return the layers of a `head.safetensors`, first to last.

    Raises:
        CheckpointError: the file is damaged, or holds no linear layers.
    """
    source = SafetensorsFiles([file])
    names = set(source.names())
    prefixes = (
        [""] if "weight" in names else list(takewhile(lambda p: f"{p}weight" in names, map("{}.".format, count())))
    )
    layers = [HeadLayer(source, f"{prefix}weight", f"{prefix}bias") for prefix in prefixes or [""]]
    for layer in layers:
        shapes = [source.shape(name) if name in names else () for name in (layer.weight, layer.bias)]
        if len(shapes[0]) != 2 or shapes[1] != shapes[0][:1]:
            raise CheckpointError(
                f"{file} holds weight {list(shapes[0])} and bias {list(shapes[1])}; expected [dimensions, hidden_size] "
                "and [dimensions]"
            )
    return layers


def read_dense_module(folder: Path, inputs: int, outputs: int, bias: bool) -> HeadLayer:
    """Return the layer of a sentence-transformers Dense module, checked against its config.

    Raises:
        CheckpointError: the weights are missing, or are not what the config says.
    """
    source = open_tensors(folder)
    expected = {"linear.weight": (outputs, inputs)} | ({"linear.bias": (outputs,)} if bias else {})
    shapes = {name: source.shape(name) for name in source.names()}
    if shapes != expected:
        raise CheckpointError(f"{folder} holds tensors of shapes {shapes}; its config.json calls for {expected}")
    return HeadLayer(source, "linear.weight", "linear.bias" if bias else None)


class HeadTensors:
    """A model's tensors and those of the layers behind its pooling, which replace any that it had.

    Args:
        layers: first to last.
    """

    def __init__(self, tensors: TensorSource, layers: Sequence[HeadLayer]) -> None:
        self._tensors, self._layers = tensors, layers

    def names(self) -> Sequence[str]:
        own = [name for name in self._tensors.names() if not name.startswith(HEAD_PREFIX)]
        return own + [f"{HEAD_PREFIX}{i}.{part}" for i in range(len(self._layers)) for part in ("weight", "bias")]

    def shape(self, name: str) -> tuple[int, ...]:
        if not name.startswith(HEAD_PREFIX):
            return self._tensors.shape(name)
        layer, part = self._layer(name)
        return layer.shape() if part == "weight" else layer.shape()[:1]

    def read(self, name: str) -> torch.Tensor:
        if not name.startswith(HEAD_PREFIX):
            return self._tensors.read(name)
        layer, part = self._layer(name)
        if part == "weight":
            return layer.source.read(layer.weight).float()
        return torch.zeros(self.shape(name)) if layer.bias is None else layer.source.read(layer.bias).float()

    def _layer(self, name: str) -> tuple[HeadLayer, str]:
        number, _, part = name.removeprefix(HEAD_PREFIX).partition(".")
        return self._layers[int(number)], part


def head_names(tensors: TensorSource) -> list[str]:
    """Return the names of a model's tensors behind its pooling."""
    return [name for name in tensors.names() if name.startswith(HEAD_PREFIX)]
