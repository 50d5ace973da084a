"""The runtime for CUDA: packed inputs, CUDA graphs for few tokens, and two packs in flight.

A forward is some hundred kernels, each launched from Python. For few tokens the launches take longer than the kernels,
so the forward of each size that comes again is captured as a CUDA graph and then replayed. A graph computes one number
of tokens and sequences and one max_seqlen; packs are padded up to the next size, and the padding belongs to no
sequence. With many tokens the kernels hide the launches, and padding would cost more than it saves.

All inputs of a forward go to the GPU in one transfer from pinned memory, and its vectors come back in one. Neither
blocks the host: with two packs in flight, one is built, sent and fetched while the other is computed.

The tests run this code with a tape of torch's operations in the place of CUDA graphs. It has not run on a GPU yet.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from unmask.encoder.model import attention
from unmask.encoder.model.attention import PackLayout, length_groups
from unmask.encoder.pooling import pool_bags, pooling_bags
from unmask.encoder.prompts import Prompt
from unmask.encoder.runtime.linear import num_parameters
from unmask.encoder.runtime.protocols import DecoderLike

log = logging.getLogger("unmask")

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

# Tokens times parameters up to which launching the kernels takes longer than running them, 1,100 tokens of a model of
# 135 million: half a millisecond of products on a GPU of 500 TFLOP/s. An estimate: no GPU was at hand to measure it.
_GRAPH_WORK = 1.5e11
# Most graphs that are kept. Each is some hundred kernels and their arguments; the memory between them is shared.
_MAX_GRAPHS = 64


class GraphSize(NamedTuple):
    """Capacity of a CUDA graph. A pack fits if it has no more of anything."""

    tokens: int
    sequences: int
    max_seqlen: int

    def padded(self) -> "GraphSize":
        """Return the next size that has a graph: four steps per doubling in tokens, whole doublings in the others.

        >>> GraphSize(tokens=300, sequences=3, max_seqlen=200).padded()
        GraphSize(tokens=320, sequences=4, max_seqlen=256)
        """
        step = max(16, 1 << max(0, (self.tokens - 1).bit_length() - 3))
        tokens = -(-self.tokens // step) * step
        return GraphSize(tokens, _next_power_of_two(self.sequences, 4), _next_power_of_two(self.max_seqlen, 16))

    @property
    def buffer_length(self) -> int:
        """Number of int32 in the buffer that holds the `PackInputs` of this size."""
        return 4 * self.tokens + 2 * (self.sequences + 1)


class PackInputs(NamedTuple):
    """All inputs of a forward, as views of one int32 buffer.

    Attributes:
        ids, positions: of each token, [T].
        rows: indices of the pooled states, [T]; those of one sequence together, the unused end is 0.
        weights: weight of each of those states in the vector of its sequence, float32 [T].
        cu_seqlens: first token of each sequence, and the end of the last one, [N+1].
        bags: first entry in `rows` of each sequence, and the start of the unused end, [N+1].
    """

    ids: Tensor
    positions: Tensor
    rows: Tensor
    weights: Tensor
    cu_seqlens: Tensor
    bags: Tensor

    @classmethod
    def view(cls, buffer: Tensor, size: GraphSize) -> "PackInputs":
        """Return views of a buffer of `size.buffer_length` int32."""
        ids, positions, rows, weights, cu_seqlens, bags = buffer.split([size.tokens] * 4 + [size.sequences + 1] * 2)
        return cls(ids, positions, rows, weights.view(torch.float32), cu_seqlens, bags)


class CapturedForward(NamedTuple):
    """A forward captured as a CUDA graph.

    Attributes:
        buffer: memory that the graph reads its `PackInputs` from.
        replay: computes the forward again.
        pooled: memory that each replay overwrites, float32 [N, W].
    """

    buffer: Tensor
    replay: Callable[[], None]
    pooled: Tensor


class CudaRuntime:
    """One decoder on one GPU.

    Args:
        decoder: on the GPU, in evaluation mode. Until `allow_weight_changes`, its parameters may change in place, but
            not move.
        pooling: one of POOLINGS.
        device: of the decoder's weights.
    """

    prefetches = True

    def __init__(self, decoder: nn.Module, pooling: str, device: torch.device) -> None:
        self._decoder, self._pooling, self._device = cast(DecoderLike, decoder), pooling, device
        self._max_graph_tokens = int(_GRAPH_WORK / num_parameters(decoder)) if self._decoder.can_capture() else 0
        self._graphs: dict[GraphSize, CapturedForward] = {}
        self._seen_sizes: set[GraphSize] = set()
        self._launch_lock = threading.Lock()  # the kernels of two packs must not mix in the GPU's stream

    @torch.inference_mode()
    def pooled_states(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """Pooled hidden states of a pack, float32 [N, W], in its order."""
        with self._launch_lock, current_device(self._device):
            lengths = [len(prompt.ids) for prompt in prompts]
            size = GraphSize(sum(lengths), len(prompts), max(lengths))
            graph = self._graph(size.padded())
            if graph is None:
                buffer = pinned(pack_buffer(prompts, self._pooling, size)).to(self._device, non_blocking=True)
                pooled = self._forward(buffer, size, lengths)
            else:
                buffer = pinned(pack_buffer(prompts, self._pooling, size.padded()))
                graph.buffer.copy_(buffer, non_blocking=True)
                graph.replay()
                pooled = graph.pooled[: len(prompts)]
            fetch = copy_to_host(pooled)
        return fetch()

    def map_packs(self, function: Callable[[_Item], _Result], packs: Sequence[_Item]) -> list[_Result]:
        """Return `function` of every pack, in order, with two of them in flight."""
        return pipelined_map(function, packs)

    def allow_weight_changes(self) -> None:
        """Use no CUDA graph from now on: a graph would not see weights that moved."""
        with self._launch_lock:
            self._max_graph_tokens = 0
            self._graphs.clear()

    def _forward(self, buffer: Tensor, size: GraphSize, lengths: list[int]) -> Tensor:
        """Inputs of a pack -> pooled states [N, W]. `lengths` is empty for a graph, which serves any."""
        inputs = PackInputs.view(buffer, size)
        cu_seqlens = inputs.cu_seqlens if attention.has_varlen_kernel(self._device) else None
        layout = PackLayout(length_groups(lengths), cu_seqlens, size.max_seqlen)
        hidden = self._decoder.forward_pack(inputs.ids, inputs.positions, layout)  # [T, W]
        return pool_bags(hidden, inputs.rows, inputs.weights, inputs.bags)

    def _graph(self, size: GraphSize) -> CapturedForward | None:
        """Return the graph of this size; captured now if the size comes for the second time, None if there is none."""
        if size.tokens > self._max_graph_tokens:
            return None
        if size not in self._graphs and size in self._seen_sizes and len(self._graphs) < _MAX_GRAPHS:
            buffer = torch.zeros(size.buffer_length, dtype=torch.int32, device=self._device)
            # One sequence of all that fits, so that the forward during the capture is valid.
            PackInputs.view(buffer, size).cu_seqlens[1:] = min(size.tokens, size.max_seqlen)
            try:
                replay, pooled = capture(lambda: self._forward(buffer, size, []))
            except RuntimeError as error:  # out of memory among them
                log.warning("forwards of few tokens are not recorded: %s", str(error).splitlines()[0])
                self._max_graph_tokens = 0
                return None
            self._graphs[size] = CapturedForward(buffer, replay, pooled)
        self._seen_sizes.add(size)
        return self._graphs.get(size)


def pack_buffer(prompts: Sequence[Prompt], pooling: str, size: GraphSize) -> np.ndarray:
    """Return the `PackInputs` of a pack as one array, int32 [size.buffer_length]. The padding is zero."""
    buffer = np.zeros(size.buffer_length, dtype=np.int32)
    ids, positions, rows, weights = buffer[: 4 * size.tokens].reshape(4, size.tokens)
    cu_seqlens, bags = buffer[4 * size.tokens :].reshape(2, size.sequences + 1)
    lengths = np.array([len(prompt.ids) for prompt in prompts])
    ends = lengths.cumsum()
    tokens = int(ends[-1])
    ids[:tokens] = np.concatenate([prompt.ids for prompt in prompts])
    positions[:tokens] = np.arange(tokens) - np.repeat(ends - lengths, lengths)
    cu_seqlens[1 : len(prompts) + 1] = ends
    cu_seqlens[len(prompts) + 1 :] = tokens  # padding sequences have no token
    pooled = pooling_bags(prompts, pooling)
    count = len(pooled.rows)
    rows[:count] = pooled.rows
    weights.view(np.float32)[:count] = pooled.weights
    bags[: len(prompts)] = pooled.starts
    bags[len(prompts) :] = count
    return buffer


def _next_power_of_two(number: int, minimum: int) -> int:
    return max(minimum, 1 << (number - 1).bit_length())


def pipelined_map(function: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
    """Return `function` of every item, in order, with two of them in flight."""
    return list(_two_threads().map(function, items)) if len(items) > 1 else [function(item) for item in items]


@cache
def _two_threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(2, thread_name_prefix="unmask-gpu")


# The functions below are all that needs CUDA. The tests replace them.


@contextmanager
def current_device(device: torch.device) -> Iterator[None]:
    """Make a GPU the current one during the block: streams and events belong to it."""
    with torch.cuda.device(device):
        yield


def pinned(buffer: np.ndarray) -> Tensor:
    """Return a copy in pinned memory, which the GPU can read while the host goes on."""
    return torch.from_numpy(buffer).pin_memory()


def copy_to_host(tensor: Tensor) -> Callable[[], np.ndarray]:
    """Start copying to the host, after all work launched so far. The returned call waits for the copy."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event(blocking=True)
    copied.record()

    def fetch() -> np.ndarray:
        copied.synchronize()
        return host.numpy()

    return fetch


def capture(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Capture `run` as a CUDA graph. Returns (replay, output); each replay overwrites `output` in place.

    Raises:
        RuntimeError: an operation cannot be captured, or memory is short.
    """
    stream, pool = _capture_stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # libraries initialise themselves at their first call, which must not be captured
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Other threads may use the GPU in other ways meanwhile.
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        output = run()
    return graph.replay, output


@cache
def _capture_stream(device: int) -> tuple[torch.cuda.Stream, Any]:
    """Stream and memory pool for capturing. All graphs share the memory: no two of them run at the same time."""
    return torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
