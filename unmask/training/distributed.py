"""Data-parallel training: split a batch over the processes, gather vectors, sum gradients.

`torchrun` or `accelerate launch` starts the processes and sets RANK and WORLD_SIZE. Every process draws the same batch,
encodes its share and computes the whole loss, so the result is that of one process. The reference implementation called
the unwrapped model under DDP, which left gradients unsynchronised. Here they are summed explicitly.
"""

import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from unmask.encoder.packing import balance
from unmask.errors import UsageError

_Value = TypeVar("_Value")
# Gradients are summed in pieces of this size: one piece of all would double their memory.
BUCKET_BYTES = 64 * 2**20


class Processes:
    """The processes of a run. `Processes()` is a single one.

    Attributes:
        rank, size: number of this process, and of all.
        per_machine: number of processes on each machine.
    """

    def __init__(self, rank: int = 0, size: int = 1, per_machine: int | None = None) -> None:
        self.rank, self.size = rank, size
        self.per_machine = per_machine or size

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
        """Replace every gradient by its sum over all processes, in buckets of BUCKET_BYTES."""
        if self.size == 1:
            return
        bucket: list[Tensor] = []
        for parameter in parameters:
            full = sum(p.nbytes for p in bucket) + parameter.nbytes > BUCKET_BYTES
            if bucket and (full or parameter.dtype != bucket[0].dtype):
                _sum_bucket(bucket)
                bucket = []
            bucket.append(parameter)
        if bucket:
            _sum_bucket(bucket)

    def send(self, tensor: Tensor, rank: int) -> None:
        """Overwrite a tensor with that of process `rank`. All processes must call it with tensors of one kind."""
        if self.size > 1:
            # As bytes, which every backend sends.
            dist.broadcast(tensor.view(torch.uint8), src=rank)

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

    def broadcast_state(self, state: Any, place: Callable[[tuple[Any, ...], Tensor], Any]) -> Any:
        """Return the main process's nested dicts and lists in every process, with each tensor replaced.

        Tensors are sent one by one, so no other process has more than one of them whole.

        Args:
            state: of the main process; ignored in the others.
            place: gets the keys that lead to a tensor, and the tensor on the CPU; returns what takes its place.
        """
        outline = self.broadcast(_outline(state) if self.is_main else None)

        def inside(value: Any, key: Any) -> Any:
            return value[key] if self.is_main else None

        def walk(part: Any, value: Any, path: tuple[Any, ...]) -> Any:
            if isinstance(part, dict):
                return {key: walk(each, inside(value, key), (*path, key)) for key, each in part.items()}
            if isinstance(part, list):
                return [walk(each, inside(value, at), (*path, at)) for at, each in enumerate(part)]
            if isinstance(part, _TensorOutline):
                return place(path, self._broadcast_tensor(part, value))
            return part

        return walk(outline, state if self.is_main else None, ())

    def _broadcast_tensor(self, outline: "_TensorOutline", value: Tensor | None) -> Tensor:
        if self.size == 1 and value is not None:
            return value
        sent = torch.empty(outline.shape, dtype=outline.dtype) if value is None else value.contiguous()
        if dist.get_backend() == "nccl":
            sent = sent.cuda()
        dist.broadcast(sent, 0)
        return sent.cpu()

    def require_equal(self, values: Mapping[str, str], message: str) -> None:
        """Check that all processes have the same values.

        Args:
            message: of the error, with {name} for the first that differs and {places} for the machines and values.

        Raises:
            UsageError: in every process, so that none waits for the others.
        """
        if self.size == 1:
            return
        everywhere: list[Any] = [None] * self.size
        dist.all_gather_object(everywhere, (platform.node(), dict(values)))
        main_place, own = everywhere[0]
        for place, each in everywhere:
            for name in sorted(own.keys() | each.keys()):
                if own.get(name) != each.get(name):
                    places = f"{own.get(name)} on {main_place}, {each.get(name)} on {place}"
                    raise UsageError(message.format(name=name, places=places))

    def wait(self) -> None:
        """Wait until all processes have called this."""
        if self.size > 1:
            dist.barrier()


@dataclass(frozen=True)
class _TensorOutline:
    """Shape and type of a tensor that is sent apart."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def _outline(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _outline(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_outline(each) for each in value]
    return _TensorOutline(tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value


def _sum_bucket(parameters: Sequence[Tensor]) -> None:
    flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in parameters])
    dist.all_reduce(flat)
    start = 0
    for parameter in parameters:
        parameter.grad = flat[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()


def restarted() -> bool:
    """True if torchrun has started this process again, after one of the group was lost."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


@contextmanager
def processes(device: torch.device) -> Iterator[Processes]:
    """Join the processes that the launcher started; without a launcher, a single process.

    A launcher that has joined them itself, as Ray Train does, also ends the group.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Processes()
        return
    per_machine = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if dist.is_initialized():
        yield Processes(dist.get_rank(), size, per_machine)
        return
    _require_store_per_start()
    # The main process may compute teachers' vectors for hours while the others wait for it.
    timeout = timedelta(days=1)
    if device.type == "cuda":
        dist.init_process_group("nccl", timeout=timeout, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=timeout)
    try:
        yield Processes(dist.get_rank(), size, per_machine)
    finally:
        dist.destroy_process_group()


def _require_store_per_start() -> None:
    """Refuse a launcher that starts processes again with the store of the first start.

    torchrun shares the store of its rendezvous with the processes unless it is told not to. After a restart it still
    holds the addresses of the processes that are gone, and those that look for one another there may wait for ever.
    """
    shares_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
    if shares_store and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0:
        raise UsageError(
            "torchrun would start these processes again with addresses of the first start, and they may wait for ever; "
            "start torchrun with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment, or with --max-restarts 0"
        )
