"""Weights, gradients and optimiser state split over the processes: FSDP, by torch's own `fully_shard`.

A layer's weights are collected when its forward or backward needs them, and let go after it. All processes must
therefore do as many forwards, in the same order; who has nothing to do computes on a text that does not count.

What is saved is whole: a checkpoint does not tell how many processes wrote it, and any number may go on from it.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from unmask.encoder.model.decoder import Decoder
from unmask.training.distributed import Processes


def shard(decoder: Decoder, device: torch.device, processes: Processes) -> None:
    """Split every parameter of a decoder, in place; each layer is collected by itself, embedding and norm together."""
    mesh = init_device_mesh(device.type, (processes.size,))
    for layer in decoder.layers:
        fully_shard(layer, mesh=mesh)
    # The embedding stays after the forward: a tied language-model head needs it before the backward.
    fully_shard(decoder, mesh=mesh, reshard_after_forward=False)
    for module in decoder.modules():
        if isinstance(module, FSDPModule):
            # Every process computes its part of one loss, so gradients add up; the usual mean would shrink them.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def unshard(state: Any) -> Any:
    """A tensor, or a dict or list with tensors in it, with the split ones collected. All processes must call it."""
    if isinstance(state, dict):
        return {key: unshard(value) for key, value in state.items()}
    if isinstance(state, list):
        return [unshard(value) for value in state]
    if isinstance(state, DTensor):
        return state.full_tensor().detach().cpu()
    return state.detach() if isinstance(state, Tensor) else state


def copy_unsharded(target: Tensor, value: Tensor) -> None:
    """Set a parameter from a whole tensor; each process takes its part of it."""
    with torch.no_grad():
        target.copy_(shard_like(value, target))


def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor split as another one is, or as it is if that is not split."""
    if isinstance(like, DTensor) and value.shape == like.shape:
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
    return value
