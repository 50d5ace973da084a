"""Several processes as one: who encodes what, vectors of all to all, gradients summed.

Started by `torchrun` or `accelerate launch`, which set RANK and WORLD_SIZE. Every process draws the same batch, encodes
its share and computes the whole loss, so that the result is that of one process. The reference implementation called
the unwrapped model under DDP, which left gradients unsynchronised; here they are summed in plain sight.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from unmask.encoder.packing import balance

_Value = TypeVar("_Value")


class Processes:
    """The processes of a run. `Processes()` is one alone."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    def shares(self, lengths: Sequence[int]) -> list[list[int]]:
        """Indices for each process so that all have about as many tokens to do; longest first."""
        shares = balance(lengths, self.size)
        return shares + [[] for _ in range(self.size - len(shares))]

    def gather(self, own: Tensor, indices: Sequence[int], total: int) -> Tensor:
        """Everybody's rows in one order.

        Args:
            own: this process's rows, [n, W].
            indices: the place of each of them among all.
            total: number of all rows.

        Returns:
            [total, W], without gradients.
        """
        whole = own.new_zeros(total, own.shape[1])
        whole[torch.tensor(indices, dtype=torch.long, device=own.device)] = own.detach()
        if self.size > 1:
            dist.all_reduce(whole)  # the others have zeros in our rows
        return whole

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Every parameter's gradient becomes the sum over all processes, in one exchange."""
        trained = list(parameters)
        if self.size == 1 or not trained:
            return
        flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in trained])
        dist.all_reduce(flat)
        start = 0
        for parameter in trained:
            parameter.grad = flat[start : start + parameter.numel()].view_as(parameter).clone()
            start += parameter.numel()

    def sum(self, value: float) -> float:
        """The sum of a number over all processes."""
        if self.size == 1:
            return value
        total = torch.tensor([value], dtype=torch.float64)
        if dist.get_backend() == "nccl":
            total = total.cuda()
        dist.all_reduce(total)
        return float(total)

    def broadcast(self, value: _Value) -> _Value:
        """The first process's value, in all of them."""
        if self.size == 1:
            return value
        held: list[Any] = [value]
        dist.broadcast_object_list(held)
        return held[0]

    def wait(self) -> None:
        """Until all have come here."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def processes(device: torch.device) -> Iterator[Processes]:
    """The processes that the launcher started, or this one alone."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Processes()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(dist.get_rank(), size)
    finally:
        dist.destroy_process_group()
