"""Make a decoder deeper without changing its vectors: further layers on top, whose contribution begins at zero.

A trained shallow encoder goes on learning as a deeper one from where it is. Zero output projections make a new layer
the identity at first (as in LLaMA Pro, arXiv 2401.02415, and Net2Net, arXiv 1511.05641); its other weights are a
pretrained decoder's.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from unmask.checkpoint.checkpoint import Checkpoint
from unmask.checkpoint.tensors import TensorSource
from unmask.encoder.model.architectures import Shape, shape_of
from unmask.encoder.shear import shear
from unmask.errors import UsageError

# The two linear layers that write to the residual stream.
_OUTPUT = re.compile(r"\.(self_attn\.o_proj|mlp\.down_proj)\.(weight|bias)$")
_LAYER = re.compile(r"^layers\.(\d+)\.")


def deepen(checkpoint: Checkpoint, donor: Checkpoint, layers: Sequence[int]) -> Checkpoint:
    """Return a checkpoint with layers of another one on top, which change no vector until they are trained.

    Args:
        layers: indices of the donor's layers from 0, in rising order.

    Raises:
        UsageError: the donor has no such layer, or its layers do not fit.
    """
    added = shear(donor, layers)
    own, other = checkpoint.config, added.config
    below = int(own["num_hidden_layers"])
    config = dict(own) | {"num_hidden_layers": below + int(other["num_hidden_layers"])}
    # A rule such as "every second layer has a window" counts from the first layer, and would give others windows.
    if own.get("sliding_window") or "layer_types" in own:
        config["layer_types"] = [kind for each in (own, other) for kind in _layer_types(each)]
    deeper, theirs = shape_of(config), shape_of(other)
    if deeper is None or theirs is None:
        raise UsageError(
            f"{checkpoint.name} is a {own.get('model_type')} and {donor.name} a {other.get('model_type')}; layers are "
            "added to architectures of unmask.encoder.model.architectures only"
        )
    of_layers = replace(deeper, windows=deeper.windows[below:], ropes=deeper.ropes[below:])
    differing = [
        f"{each.name} is {getattr(theirs, each.name)} and {getattr(of_layers, each.name)}"
        for each in fields(Shape)
        if each.name != "vocabulary" and getattr(theirs, each.name) != getattr(of_layers, each.name)
    ]
    if differing:
        raise UsageError(f"layers of {donor.name} do not fit {checkpoint.name}: {', '.join(differing)}")
    return replace(checkpoint, config=config, tensors=DeepenedTensors(checkpoint.tensors, added.tensors, below))


def _layer_types(config: Mapping[str, Any]) -> Sequence[str]:
    shape = shape_of(config)
    if shape is None:
        raise UsageError(f"layers of a {config.get('model_type')}: it has no row in unmask.encoder.model.architectures")
    return ["full_attention" if window is None else "sliding_attention" for window in shape.windows]


class DeepenedTensors:
    """Tensors of a model and of further layers, which are renumbered from `below` and have zero output projections."""

    def __init__(self, tensors: TensorSource, added: TensorSource, below: int) -> None:
        self._tensors, self._added = tensors, added
        self._sources = {
            _LAYER.sub(lambda match: f"layers.{below + int(match[1])}.", name): name
            for name in added.names()
            if _LAYER.match(name)
        }

    def names(self) -> Sequence[str]:
        return [*self._tensors.names(), *self._sources]

    def shape(self, name: str) -> tuple[int, ...]:
        source = self._sources.get(name)
        return self._tensors.shape(name) if source is None else self._added.shape(source)

    def read(self, name: str) -> Tensor:
        if name not in self._sources:
            return self._tensors.read(name)
        if _OUTPUT.search(name):
            return torch.zeros(self.shape(name))
        return self._added.read(self._sources[name])
