"""`Head`: the steps between the pooled state and a model's vector."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unmask.checkpoint.head import head_names
from unmask.checkpoint.tensors import TensorSource
from unmask.encoder.runtime.linear import Linear, prepack
from unmask.errors import CheckpointError

# Activations of a dense step, by the name of their class in torch.nn.
ACTIVATIONS = {
    "identity": lambda x: x,
    "tanh": torch.tanh,
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
}

# One linear layer, and the same with vectors of length 1, which models trained here have.
_LINEAR = ({"kind": "dense", "activation": "identity"},)
UNIT_LINEAR = (*_LINEAR, {"kind": "normalize"})


class Head(nn.Module):
    """Dense layers with activations, scaling to length 1, and truncation, in the order that the model's files give.

    Args:
        layers: linear layers of the dense steps, in order.
        steps: `{"kind": "dense", "activation": NAME}`, `{"kind": "normalize"}` or
            `{"kind": "truncate", "dimensions": N}` each.
        hidden_size: length of a pooled state.

    Raises:
        CheckpointError: the steps and the layers do not fit each other or the decoder.
    """

    def __init__(self, layers: Sequence[Linear], steps: Sequence[Mapping[str, Any]], hidden_size: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.steps = steps
        self.in_features = self.out_features = hidden_size
        if [step.get("kind") for step in steps].count("dense") != len(layers):
            raise CheckpointError(f"the files hold {len(layers)} layers behind the pooling, and describe {list(steps)}")
        remaining = iter(layers)
        for step in steps:
            if step.get("kind") == "dense":
                layer = next(remaining)
                if layer.in_features != self.out_features:
                    raise CheckpointError(
                        f"the head takes {layer.in_features} numbers and the decoder gives {self.out_features}; they "
                        "do not fit"
                    )
                if step.get("activation", "identity") not in ACTIVATIONS:
                    raise CheckpointError(f"a dense layer has activation {step['activation']!r}, which is not known")
                self.out_features = layer.out_features
            elif step.get("kind") == "truncate":
                self.out_features = min(self.out_features, int(step["dimensions"]))
            elif step.get("kind") != "normalize":
                raise CheckpointError(f"the head has a step {dict(step)!r}, which is not known")

    @property
    def linear(self) -> Linear | None:
        """The linear layer, if the head is nothing else that changes the direction of a vector."""
        return next(iter(self._linears())) if is_linear(self.steps) else None

    def trainable(self, device: torch.device) -> "Head":
        """Return a copy with ordinary weights on a device, through which gradients flow; its own weights take none."""
        layers = [_linear(layer.plain_weight(), layer.bias.detach()) for layer in self._linears()]
        return Head(layers, self.steps, self.in_features).to(device)

    def _linears(self) -> list[Linear]:
        return [layer for layer in self.layers if isinstance(layer, Linear)]

    def forward(self, x: Tensor) -> Tensor:
        """Pooled states [N, hidden_size] -> vectors [N, out_features]."""
        layers = iter(self.layers)
        for step in self.steps:
            if step["kind"] == "dense":
                x = ACTIVATIONS[step.get("activation", "identity")](next(layers)(x))
            elif step["kind"] == "normalize":
                x = F.normalize(x, dim=-1)
            else:
                x = x[:, : step["dimensions"]]
        return x.contiguous()


def is_linear(steps: Sequence[Mapping[str, Any]]) -> bool:
    """True for one linear layer, with or without scaling to length 1."""
    kinds = [step.get("kind") for step in steps]
    return kinds in (["dense"], ["dense", "normalize"]) and steps[0].get("activation", "identity") == "identity"


def head_steps(tensors: TensorSource, encoder_config: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """Describe a model's steps behind the pooling; none where a vector is the pooled state.

    Raises:
        CheckpointError: the encoder's configuration describes no steps.
    """
    steps = encoder_config.get("head") or (_LINEAR if head_names(tensors) else ())
    if not isinstance(steps, Sequence) or not all(isinstance(step, Mapping) for step in steps):
        raise CheckpointError(f"the encoder's configuration has head={steps!r}; expected a list of steps")
    return steps


def vector_length(tensors: TensorSource, hidden_size: int, encoder_config: Mapping[str, Any]) -> int:
    """Return the length of a model's vectors, without reading its weights."""
    length, layer = hidden_size, 0
    for step in head_steps(tensors, encoder_config):
        if step.get("kind") == "dense":
            length, layer = tensors.shape(f"head.{layer}.weight")[0], layer + 1
        elif step.get("kind") == "truncate":
            length = min(length, int(step["dimensions"]))
    return length


def load_head(tensors: TensorSource, hidden_size: int, encoder_config: Mapping[str, Any]) -> Head | None:
    """Return a model's head as it serves: float32 on the host, prepacked. None where it has none.

    Raises:
        CheckpointError: it was made for another hidden size, or its description is not one.
    """
    steps = head_steps(tensors, encoder_config)
    if not steps:
        return None
    depth = len(head_names(tensors)) // 2
    layers = [_linear(*(tensors.read(f"head.{i}.{part}") for part in ("weight", "bias"))) for i in range(depth)]
    head = Head(layers, steps, hidden_size)
    prepack(head)
    return head


def _linear(weight: Tensor, bias: Tensor) -> Linear:
    with torch.device("meta"):
        layer = Linear(weight.shape[1], weight.shape[0])
    layer.weight = nn.Parameter(weight.float(), requires_grad=False)
    layer.bias = nn.Parameter(bias.float(), requires_grad=False)
    return layer
