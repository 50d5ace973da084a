"""The linear layer that some models have between the pooled state and their vector."""

import torch
from torch import nn

from unmask.checkpoint.head import HEAD_BIAS, HEAD_WEIGHT
from unmask.checkpoint.tensors import TensorSource
from unmask.encoder.runtime.linear import Linear
from unmask.errors import CheckpointError


def load_head(tensors: TensorSource, hidden_size: int) -> Linear | None:
    """A model's head as it serves: float32 on the host, prepacked. None where it has none.

    Raises:
        CheckpointError: it was made for another hidden size.
    """
    if HEAD_WEIGHT not in tensors.names():
        return None
    dimensions, inputs = tensors.shape(HEAD_WEIGHT)
    if inputs != hidden_size:
        raise CheckpointError(f"the head takes {inputs} numbers and the decoder gives {hidden_size}; they do not fit")
    with torch.device("meta"):
        head = Linear(inputs, dimensions)
    head.weight = nn.Parameter(tensors.read(HEAD_WEIGHT).float(), requires_grad=False)
    head.bias = nn.Parameter(tensors.read(HEAD_BIAS).float(), requires_grad=False)
    head.prepack()
    return head
