"""Data-parallel training: split a batch over the processes, gather vectors, sum gradients.

`torchrun` or `accelerate launch` starts the processes and sets RANK and WORLD_SIZE. Every process draws the same batch,
encodes its share and computes the whole loss, so the result is that of one process. The reference implementation called
the unwrapped model under DDP, which left gradients unsynchronised. Here they are summed explicitly.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from unmask.encoder.packing import balance

_Value = TypeVar("_Value")


class Processes:
    """The processes of a run. `Processes()` is a single one."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def is_main(self) -> bool:
        """True for the process that writes files and prints."""
        return self.rank == 0

    def shares(self, lengths: Sequence[int]) -> list[list[int]]:
        """Split sequences over the processes, with about equally many tokens each.

        Returns:
            Indices for each process, longest sequence first.
        """
        shares = balance(lengths, self.size)
        return shares + [[] for _ in range(self.size - len(shares))]

    def gather(self, own: Tensor, indices: Sequence[int], total: int) -> Tensor:
        """Gather the rows of all processes.

        Args:
            own: this process's rows, [n, W].
            indices: the index of each of them among all rows.
            total: number of rows of all processes.

        Returns:
            [total, W], without gradients.
        """
        rows = own.new_zeros(total, own.shape[1])
        rows[torch.tensor(indices, dtype=torch.long, device=own.device)] = own.detach()
        if self.size > 1:
            dist.all_reduce(rows)  # the other processes have zeros in these rows
        return rows

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace every gradient by its sum over all processes, in one all-reduce."""
        trained = list(parameters)
        if self.size == 1 or not trained:
            return
        flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in trained])
        dist.all_reduce(flat)
        start = 0
        for parameter in trained:
            parameter.grad = flat[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()

    def sum(self, value: float) -> float:
        """Sum a number over all processes."""
        if self.size == 1:
            return value
        total = torch.tensor([value], dtype=torch.float64)
        if dist.get_backend() == "nccl":
            total = total.cuda()
        dist.all_reduce(total)
        return float(total)

    def broadcast(self, value: _Value) -> _Value:
        """Return the main process's value in every process."""
        if self.size == 1:
            return value
        values: list[Any] = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def wait(self) -> None:
        """Wait until all processes have called this."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def processes(device: torch.device) -> Iterator[Processes]:
    """Join the processes that the launcher started; without a launcher, a single process."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Processes()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # The main process may compute teachers' vectors for hours while the others wait for it.
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=1))
    try:
        yield Processes(dist.get_rank(), size)
    finally:
        dist.destroy_process_group()
