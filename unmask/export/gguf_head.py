"""A linear layer behind the mean, written as one more layer of the decoder: GGUF has no place behind the pooling.

The queries of the new layer are zero, so every token attends to all tokens alike, and the layer's attention is a mean.
Its norm is the decoder's final one, and its values are the head's, W norm(x) + b. So its output is the model's vector,
the same for every token. The layer multiplies the output by GAIN and adds it to the residual, which is then too small
to count. The new final norm divides by the length, pooling averages equal states, and llama.cpp scales vectors to
length 1. What remains is the model's vector, to the precision of float32.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from unmask.checkpoint.gguf_families import FAMILIES, layout_of
from unmask.checkpoint.tensors import TensorSource
from unmask.encoder.model.architectures import Shape, shape_of
from unmask.export.capabilities import ExportedModel

# A power of two, so that no number is rounded. The square of a state, 1e24, is far from the end of float32.
GAIN = 2.0**40
_KEYS_AND_VALUES = tuple(f"self_attn.{part}_proj.{kind}" for part in "kv" for kind in ("weight", "bias"))


def with_head_layer(model: ExportedModel) -> ExportedModel:
    """Return the model with its head as its last layer. Every layer then has as many key heads as query heads."""
    shape, config = model.shape, dict(model.checkpoint.config)
    assert shape is not None  # `head_fits_a_layer` is true
    config |= {"num_hidden_layers": shape.layers + 1, "num_key_value_heads": shape.heads, "attention_bias": True}
    if config["model_type"] == "mistral":
        config["model_type"] = "llama"  # the same decoder, which may have a bias; a GGUF file calls both llama
    if "layer_types" in config:
        config["layer_types"] = [*config["layer_types"], "full_attention"]
    tensors = HeadLayerTensors(model.checkpoint.tensors, shape)
    return replace(model, checkpoint=replace(model.checkpoint, config=config, tensors=tensors), shape=shape_of(config))


def exact_names(model: ExportedModel) -> frozenset[str]:
    """Return the tensors of a head's layer that stay float32 in any precision: GAIN is beyond float16."""
    tensors = model.checkpoint.tensors
    return tensors.exact if isinstance(tensors, HeadLayerTensors) else frozenset()


class HeadLayerTensors:
    """Tensors of `with_head_layer`.

    Args:
        tensors: of the model, with its head.
        shape: of its decoder.

    Attributes:
        exact: those that hold the head.
    """

    def __init__(self, tensors: TensorSource, shape: Shape) -> None:
        self._tensors, self._shape = tensors, shape
        self._prefix = f"layers.{shape.layers}."
        self._present = set(tensors.names())
        sizes: Mapping[str, Any] = {
            "hidden_size": shape.hidden_size,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.heads,
            "head_dim": shape.head_dim,
            "intermediate_size": shape.intermediate_size,
            "num_hidden_layers": shape.layers + 1,
        }
        self._shapes = dict(layout_of(FAMILIES["llama"], sizes, shape.vocabulary).values())
        self.exact = frozenset(f"{self._prefix}self_attn.{part}.weight" for part in ("v_proj", "o_proj"))

    def names(self) -> Sequence[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str) -> torch.Tensor:
        if name == "norm.weight":
            return torch.ones(self._shape.hidden_size)
        if name.startswith(self._prefix):
            return self._head_tensor(name.removeprefix(self._prefix), name)
        if name not in self._present:
            return torch.zeros(self.shape(name))  # a bias that the model does not have
        tensor = self._tensors.read(name)
        if not name.endswith(_KEYS_AND_VALUES) or self._shape.kv_heads == self._shape.heads:
            return tensor
        parts = tensor.view(self._shape.kv_heads, -1, *tensor.shape[1:])  # [K, D, ...]
        return parts.repeat_interleave(self._shape.heads // self._shape.kv_heads, dim=0).flatten(0, 1)

    def _head_tensor(self, part: str, name: str) -> torch.Tensor:
        """Return a tensor of the new layer: zeros but for norms, values and output."""
        width = self._shape.hidden_size
        if part == "input_layernorm.weight":
            return self._tensors.read("norm.weight")
        tensor = torch.zeros(self.shape(name))
        if part == "post_attention_layernorm.weight":
            tensor += 1
        elif part == "self_attn.v_proj.weight":
            tensor[:width] = self._tensors.read("head.0.weight")
        elif part == "self_attn.v_proj.bias":
            tensor[:width] = self._tensors.read("head.0.bias")
        elif part == "self_attn.o_proj.weight":
            tensor[:, :width] = torch.eye(width) * GAIN
        return tensor
