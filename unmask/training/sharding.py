"""Shard weights, gradients and optimiser state over the processes: FSDP, by torch's own `fully_shard`.

A layer's weights are gathered when its forward or backward needs them, and freed after it. So all processes must run
equally many forwards, in the same order. A process without work runs one on a text that does not count.

Checkpoints are written unsharded: they do not depend on the number of processes, and a run may resume with another.
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
    """Shard every parameter of a decoder in place. Each layer is one unit; embedding and final norm are another."""
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
    """Gather the sharded tensors in a tensor, dict or list. All processes must call it."""
    if isinstance(state, dict):
        return {key: unshard(value) for key, value in state.items()}
    if isinstance(state, list):
        return [unshard(value) for value in state]
    if isinstance(state, DTensor):
        return state.full_tensor().detach().cpu()
    return state.detach() if isinstance(state, Tensor) else state


def copy_unsharded(target: Tensor, value: Tensor) -> None:
    """Copy an unsharded tensor into a parameter. Each process takes its own shard."""
    with torch.no_grad():
        target.copy_(shard_like(value, target))


def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """Shard a tensor like another one. Returns it unchanged if the other one is not sharded."""
    if isinstance(like, DTensor) and value.shape == like.shape:
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
    return value
