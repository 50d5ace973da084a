"""Shard weights, gradients and optimiser state over the processes: FSDP, by torch's own `fully_shard`.

A layer's weights are gathered when its forward or backward needs them, and freed after it. So all processes must run
equally many forwards, in the same order. A process without work runs one on a text that does not count.

Checkpoints are written unsharded: they do not depend on the number of processes, and a run may resume with another.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from unmask.encoder.model.decoder import Decoder
from unmask.errors import UsageError
from unmask.training.distributed import Processes


def shard(decoder: Decoder, device: torch.device, processes: Processes, within_machines: bool = False) -> None:
    """Shard every parameter of a decoder in place. Each layer is one unit; embedding and final norm are another.

    Args:
        within_machines: each machine has all of it, sharded over its own processes (hybrid sharding). Layers are then
            gathered inside a machine, and only gradients cross the network between machines.

    Raises:
        UsageError: the machines have not equally many processes.
    """
    if within_machines and processes.per_machine < processes.size:
        machines, rest = divmod(processes.size, processes.per_machine)
        if rest:
            raise UsageError(
                f'shard = "machine": {processes.size} processes are not {processes.per_machine} on each machine; start '
                "equally many on each, or set shard = true"
            )
        names = ("replicate", "shard")
        mesh = init_device_mesh(device.type, (machines, processes.per_machine), mesh_dim_names=names)
    else:
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


def unshard(state: Any, keep: bool = True) -> Any:
    """Gather the sharded tensors in a tensor, dict or list. All processes must call it.

    Args:
        keep: return the tensors. False, in a process that does not need them, returns None in their places.
    """
    if isinstance(state, dict):
        return {key: unshard(value, keep) for key, value in state.items()}
    if isinstance(state, list):
        return [unshard(value, keep) for value in state]
    if isinstance(state, DTensor):
        gathered = state.full_tensor()
        return gathered.detach().cpu() if keep else None
    if isinstance(state, Tensor):
        return state.detach() if keep else None
    return state


def group_by_kind(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """Group the names of tensors into sharded and whole ones: torch's kernels over lists take no mixture of them."""
    sharded = {name: isinstance(tensor, DTensor) for name, tensor in tensors.items()}
    groups = [[name for name in tensors if sharded[name] == kind] for kind in (True, False)]
    return [names for names in groups if names]


def copy_unsharded(target: Tensor, value: Tensor) -> None:
    """Copy an unsharded tensor into a parameter. Each process takes its own shard."""
    with torch.no_grad():
        target.copy_(shard_like(value, target))


def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """Shard a tensor like another one. Returns it unchanged if the other one is not sharded."""
    if isinstance(like, DTensor) and value.shape == like.shape:
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
    return value


def place_like(value: Tensor, like: Tensor) -> Tensor:
    """Return a tensor where another one is: on its device, and sharded like it."""
    return shard_like(value, like).to(like.device)
