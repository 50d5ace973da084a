"""Executors of a bulk job: this process, or workers of a cluster. Every executor gives the same bytes.

`job.py` and `parts.py` decide what is computed, in which pieces, under which name and when it counts as done. An
executor only computes pieces. The one here does it in this process; `unmask.cluster` has the other one.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from unmask.bulk.chunks import Chunk, chunk_prompts, chunk_vectors, model_options
from unmask.bulk.encode_job import EncodeJob
from unmask.bulk.report import Activity, Tally
from unmask.bulk.storage import Store
from unmask.bulk.units import Manifest, Unit, UnitEncoder
from unmask.encoder.encoder import Encoder
from unmask.encoder.prefetch import prefetch
from unmask.encoder.prompts import Prompt
from unmask.errors import InputError, UnmaskError


@dataclass(frozen=True)
class ModelDescription:
    """Everything that a job needs to know of the model that encodes it.

    Attributes:
        options: see `model_options`.
        dim: numbers of a vector.
        max_length: tokens of a text that the model reads.
        precision: in the words of `Encoder.precision`.
    """

    options: dict[str, Any]
    dim: int
    max_length: int
    precision: str


@dataclass(frozen=True)
class EncodedChunk:
    """A chunk with its vectors, float32 [n, dim], and its counts."""

    chunk: Chunk
    vectors: np.ndarray
    tally: Tally


@dataclass(frozen=True)
class UnitFailure:
    """A unit that could not be encoded: its name, and why."""

    unit: str
    error: UnmaskError


class Executor(Protocol):
    """Computes the pieces of a job."""

    @property
    def model(self) -> ModelDescription:
        """Return the description of the model."""
        ...

    @property
    def probe(self) -> str:
        """Return the digest of its first processor; see `Manifest.probe`."""
        ...

    @property
    def activity(self) -> Activity:
        """Return how many workers there are now."""
        ...

    def encode_chunks(self, chunks: Iterator[Chunk], ahead: bool) -> Iterator[EncodedChunk]:
        """Yield the chunks encoded, in their order.

        Args:
            ahead: the next chunk may be read before this one is encoded; false for a pipe that may have none yet.

        Raises:
            InputError, CheckpointError: as `chunk_prompts` and `chunk_vectors`, after the chunks before it.
        """
        ...

    def encode_units(self, units: Iterator[Unit]) -> Iterator[Manifest | UnitFailure]:
        """Encode units and store their parts and manifests; yield the outcomes in any order.

        Raises:
            CheckpointError, StorageError: as `UnitEncoder.encode`.
        """
        ...


OpenExecutor = Callable[[EncodeJob, Callable[[], Encoder]], AbstractContextManager[Executor]]


def local_executor(job: EncodeJob, load_encoder: Callable[[], Encoder]) -> AbstractContextManager[Executor]:
    """Load the model, to encode in this process."""
    began = time.monotonic()
    return nullcontext(LocalExecutor(job, load_encoder(), began))


def model_description(job: EncodeJob, encoder: Encoder) -> ModelDescription:
    """Return the description of a loaded model."""
    return ModelDescription(model_options(job, encoder), encoder.dim, encoder.max_length, encoder.precision)


def encode_chunk(job: EncodeJob, encoder: Encoder, chunk: Chunk, prompts: list[Prompt | None]) -> EncodedChunk:
    """Encode a chunk whose prompts are made."""
    return EncodedChunk(chunk, chunk_vectors(encoder, job, prompts, chunk), Tally().plus(prompts))


class LocalExecutor:
    """Encodes in this process.

    Args:
        began: time at which the model began to load.
    """

    def __init__(self, job: EncodeJob, encoder: Encoder, began: float) -> None:
        self._job, self._encoder, self._began = job, encoder, began
        self.model = model_description(job, encoder)

    @cached_property
    def _units(self) -> UnitEncoder:
        return UnitEncoder(self._job, self._encoder, Store(self._job.output))

    @property
    def activity(self) -> Activity:
        """Return the time since the model began to load."""
        return Activity(worker_seconds=time.monotonic() - self._began)

    @property
    def probe(self) -> str:
        """Return the digest of this processor."""
        return self._units.probe

    def encode_chunks(self, chunks: Iterator[Chunk], ahead: bool) -> Iterator[EncodedChunk]:
        """Yield the chunks encoded, in their order; see `Executor`."""
        tokenised = self._tokenised(chunks)
        # A GPU need not wait for the next chunk. On a CPU tokenising takes a core.
        for chunk, prompts in prefetch(tokenised) if self._encoder.prefetches and ahead else tokenised:
            yield encode_chunk(self._job, self._encoder, chunk, prompts)

    def _tokenised(self, chunks: Iterator[Chunk]) -> Iterator[tuple[Chunk, list[Prompt | None]]]:
        for chunk in chunks:
            yield chunk, chunk_prompts(self._encoder, self._job, chunk)

    def encode_units(self, units: Iterator[Unit]) -> Iterator[Manifest | UnitFailure]:
        """Encode one unit after the other; see `Executor`."""
        for unit in units:
            try:
                yield self._units.encode(unit)
            except InputError as error:
                yield UnitFailure(unit.name, error)
