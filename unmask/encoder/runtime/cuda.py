"""Packs on a GPU: what a forward costs there besides its products, kept small.

A forward is some hundred kernels, each called from Python. For few tokens the calls take longer than the kernels, so
the forward of each size that comes again is recorded once as a CUDA graph and then called whole. A graph computes one
number of tokens, of sequences and one longest length; packs are rounded up to the next size, and what is added belongs
to no sequence. Many tokens hide the calls by themselves, and rounding up would cost more than it saves.

Everything that a forward must know of a pack goes to the GPU in one transfer from pinned memory, and its vectors come
back in one. Neither makes the processor wait: with two packs under way, one is built, sent and fetched while the
other is computed.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from unmask.encoder.model import attention as packed
from unmask.encoder.model.decoder import Decoder, PackLayout, length_groups
from unmask.encoder.pooling import bags_of, pool_bags
from unmask.encoder.prompts import Prompt
from unmask.encoder.runtime.linear import num_parameters

log = logging.getLogger("unmask")

_Pack = TypeVar("_Pack")
_Result = TypeVar("_Result")

# Up to so many tokens times parameters, 1,100 tokens of a model of 135 million, calling the kernels takes longer than
# they do: half a millisecond of products on a GPU of 500 TFLOP/s. An estimate: no GPU was at hand to measure it.
_GRAPHED_WORK = 1.5e11
# Graphs that are kept. Each is some hundred kernels and their arguments; the memory between them is shared.
_GRAPHS = 64


class Size(NamedTuple):
    """What a graph is made for. A pack fits if it has no more of anything."""

    tokens: int
    sequences: int
    longest: int

    def rounded(self) -> "Size":
        """The size whose graph this one uses: four steps per doubling in tokens, whole doublings in the others.

        >>> Size(tokens=300, sequences=3, longest=200).rounded()
        Size(tokens=320, sequences=4, longest=256)
        """
        step = max(16, 1 << max(0, (self.tokens - 1).bit_length() - 3))
        return Size(-(-self.tokens // step) * step, _doubled(self.sequences, 4), _doubled(self.longest, 16))


class Inputs(NamedTuple):
    """Everything that a forward must know of a pack, each a part of one array of int32.

    Attributes:
        ids, positions: of each token, [T].
        rows: which states are pooled, [T]; those of one sequence together, the unused end is 0.
        weights: of those states in their sequence's vector, float32 [T].
        bounds: where each sequence begins, and where the last one ends, [N+1].
        bags: where each sequence begins in `rows`, and where the unused end does, [N+1].
    """

    ids: Tensor
    positions: Tensor
    rows: Tensor
    weights: Tensor
    bounds: Tensor
    bags: Tensor

    @classmethod
    def within(cls, numbers: Tensor, room: Size) -> "Inputs":
        """The parts of an array of `numbers_in(room)` int32."""
        ids, positions, rows, weights, bounds, bags = numbers.split([room.tokens] * 4 + [room.sequences + 1] * 2)
        return cls(ids, positions, rows, weights.view(torch.float32), bounds, bags)


class Recorded(NamedTuple):
    """A forward that can be repeated.

    Attributes:
        numbers: where its inputs are read from, as `Inputs.within` has them.
        again: computes it anew.
        vectors: what it leaves, float32 [N, W].
    """

    numbers: Tensor
    again: Callable[[], None]
    vectors: Tensor


class Gpu:
    """One decoder on one GPU: packs in, vectors out. May be called from several threads.

    Args:
        decoder: on the GPU, in evaluation mode. Its parameters may change in place, but not move, until `forget`.
        pooling: one of POOLINGS.
    """

    def __init__(self, decoder: nn.Module, pooling: str) -> None:
        self._decoder, self._pooling = decoder, pooling
        first = next(decoder.parameters())
        self._device = first.device
        graphable = isinstance(decoder, Decoder) and _one_kernel(decoder, first)
        self._graphed_tokens = int(_GRAPHED_WORK / num_parameters(decoder)) if graphable else 0
        self._graphs: dict[Size, Recorded] = {}
        self._came: set[Size] = set()
        self._launching = threading.Lock()  # what one pack puts in the GPU's line must not mix with another's

    @torch.inference_mode()
    def vectors(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """Raw vectors of a pack, float32 [n, dim], in its order."""
        with self._launching, device_of(self._device):
            lengths = [len(prompt.ids) for prompt in prompts]
            exact = Size(sum(lengths), len(prompts), max(lengths))
            recorded = self._graph(exact.rounded())
            if recorded is None:
                numbers = pinned(numbers_of(prompts, self._pooling, exact)).to(self._device, non_blocking=True)
                vectors = self._forward(numbers, exact, lengths)
            else:
                numbers = pinned(numbers_of(prompts, self._pooling, exact.rounded()))
                recorded.numbers.copy_(numbers, non_blocking=True)
                recorded.again()
                vectors = recorded.vectors[: len(prompts)]
            fetched = fetch(vectors)
        return fetched()

    def forget(self) -> None:
        """Use no graph from now on: the decoder may change in ways that a graph would not see."""
        with self._launching:
            self._graphed_tokens = 0
            self._graphs.clear()

    def _forward(self, numbers: Tensor, room: Size, lengths: list[int]) -> Tensor:
        """Inputs of a pack -> vectors [N, W]. `lengths` is empty for a graph, where they differ from call to call."""
        given = Inputs.within(numbers, room)
        if isinstance(self._decoder, Decoder):
            bounds = given.bounds if packed.on(self._device) else None
            spans = PackLayout(length_groups(lengths), bounds, room.longest)
            hidden = self._decoder.through(given.ids, given.positions, spans)  # [T, W]
        else:
            hidden = self._decoder(given.ids.long(), lengths)  # [T, W]
        return pool_bags(hidden, given.rows, given.weights, given.bags)

    def _graph(self, room: Size) -> Recorded | None:
        """The forward of this size, if recorded; recorded now, if the size has come before."""
        if room.tokens > self._graphed_tokens:
            return None
        if room not in self._graphs and room in self._came and len(self._graphs) < _GRAPHS:
            numbers = torch.zeros(numbers_in(room), dtype=torch.int32, device=self._device)
            # One sequence of all that fits, so that what is computed on the way is harmless.
            Inputs.within(numbers, room).bounds[1:] = min(room.tokens, room.longest)
            try:
                again, vectors = record(lambda: self._forward(numbers, room, []))
            except RuntimeError as error:  # out of memory among them
                log.warning("forwards of few tokens are not recorded: %s", str(error).splitlines()[0])
                self._graphed_tokens = 0
                return None
            self._graphs[room] = Recorded(numbers, again, vectors)
        self._came.add(room)
        return self._graphs.get(room)


def numbers_in(room: Size) -> int:
    """How many int32 `Inputs` of this size are."""
    return 4 * room.tokens + 2 * (room.sequences + 1)


def numbers_of(prompts: Sequence[Prompt], pooling: str, room: Size) -> np.ndarray:
    """The inputs of a pack in the order of `Inputs`: int32 [numbers_in(room)]. What is left of the room is zero."""
    numbers = np.zeros(numbers_in(room), dtype=np.int32)
    ids, positions, rows, weights = numbers[: 4 * room.tokens].reshape(4, room.tokens)
    bounds, bags = numbers[4 * room.tokens :].reshape(2, room.sequences + 1)
    lengths = np.array([len(prompt.ids) for prompt in prompts])
    ends = lengths.cumsum()
    tokens = int(ends[-1])
    ids[:tokens] = np.concatenate([prompt.ids for prompt in prompts])
    positions[:tokens] = np.arange(tokens) - np.repeat(ends - lengths, lengths)
    bounds[1 : len(prompts) + 1] = ends
    bounds[len(prompts) + 1 :] = tokens  # sequences of no token
    chosen = bags_of(prompts, pooling)
    pooled = len(chosen.rows)
    rows[:pooled] = chosen.rows
    weights.view(np.float32)[:pooled] = chosen.weights
    bags[: len(prompts)] = chosen.starts
    bags[len(prompts) :] = pooled
    return numbers


def _doubled(number: int, least: int) -> int:
    return max(least, 1 << (number - 1).bit_length())


def _one_kernel(decoder: Decoder, parameter: Tensor) -> bool:
    """Whether attention takes a pack by its bounds, which a graph can read anew, and not by its lengths."""
    return packed.on(parameter.device) and packed.takes(parameter.dtype, decoder.shape.softcap)


def pipelined_map(function: Callable[[_Pack], _Result], packs: Sequence[_Pack]) -> list[_Result]:
    """`function` of every pack, in order, with two of them under way."""
    return list(_two().map(function, packs)) if len(packs) > 1 else [function(pack) for pack in packs]


@cache
def _two() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(2, thread_name_prefix="unmask-gpu")


# From here on: all that needs CUDA.


@contextmanager
def device_of(device: torch.device) -> Iterator[None]:
    """Make a GPU the one that streams and events belong to."""
    with torch.cuda.device(device):
        yield


def pinned(numbers: np.ndarray) -> Tensor:
    """An array where a GPU can read it while the processor goes on."""
    return torch.from_numpy(numbers).pin_memory()


def fetch(vectors: Tensor) -> Callable[[], np.ndarray]:
    """Have vectors come home after all that was asked of the GPU so far; the call waits for them."""
    home = torch.empty(vectors.shape, dtype=vectors.dtype, pin_memory=True)
    home.copy_(vectors, non_blocking=True)
    arrived = torch.cuda.Event(blocking=True)
    arrived.record()

    def fetched() -> np.ndarray:
        arrived.synchronize()
        return home.numpy()

    return fetched


def record(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """What `run` does on the GPU, to be done again by one call; and its result, which each call overwrites.

    Raises:
        RuntimeError: it does something that cannot be recorded, or memory is short.
    """
    stream, pool = _for_recording(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # what libraries set up at their first call must not be recorded
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Other threads may ask other things of the GPU meanwhile.
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        vectors = run()
    return graph.replay, vectors


@cache
def _for_recording(device: int) -> tuple[torch.cuda.Stream, Any]:
    """Where graphs are recorded, and the memory that they share: no two of them are ever computed at once."""
    return torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
