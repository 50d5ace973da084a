"""Bulk encoding on a cluster: the executor of `unmask.bulk` whose pieces are computed by workers."""

import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

from unmask.bulk.chunks import Chunk, chunk_prompts
from unmask.bulk.encode_job import EncodeJob
from unmask.bulk.executor import EncodedChunk, Executor, ModelDescription, UnitFailure, encode_chunk, model_description
from unmask.bulk.files import label_of
from unmask.bulk.report import Activity
from unmask.bulk.storage import Store
from unmask.bulk.units import JOB_FILE, Manifest, Unit, UnitEncoder, package_versions, probe_texts
from unmask.cluster.agreement import require_equal_models, require_equal_versions
from unmask.cluster.connection import connected
from unmask.cluster.options import ClusterOptions
from unmask.cluster.pool import WorkerPool
from unmask.encoder.encoder import Encoder
from unmask.errors import ClusterError, InputError, MissingPackages, StorageError, UnmaskError, UsageError

# Chunks that may be encoded before an earlier one is, for each worker that there may be.
_AHEAD = 4


@dataclass(frozen=True)
class WorkerDescription:
    """A loaded worker.

    Attributes:
        place: host and process.
        model: its model.
        probe: see `Manifest.probe`.
        versions: see `package_versions`.
        characters_per_second: speed with the texts of the probe.
    """

    place: str
    model: ModelDescription
    probe: str
    versions: dict[str, str]
    characters_per_second: float


class BulkWorker:
    """An actor that encodes units and chunks. Errors are returned and not raised, for Ray would wrap them."""

    def __init__(self, job: EncodeJob, load_encoder: Callable[[], Encoder]) -> None:
        self._job, self._load_encoder = job, load_encoder

    def place(self) -> str:
        """Return host and process."""
        return f"{platform.node()}:{os.getpid()}"

    def load(self) -> tuple[float, WorkerDescription] | UnmaskError:
        """Load the model; return the seconds that it took, and a description."""
        began = time.perf_counter()
        try:
            self._encoder = self._load_encoder()
            self._store = Store(self._job.output) if self._job.output != "-" else Store(".")
            self._units = UnitEncoder(self._job, self._encoder, self._store)
            model = model_description(self._job, self._encoder)
            speed = _speed(self._encoder)
        except UnmaskError as error:
            return _portable(error, f"worker {self.place()}: ")
        description = WorkerDescription(self.place(), model, self._units.probe, package_versions(), speed)
        return time.perf_counter() - began, description

    def encode_unit(self, unit: Unit) -> Manifest | UnmaskError:
        """Encode a unit, and store its part and manifest."""
        try:
            if self._store.get(JOB_FILE) is None:
                return StorageError(
                    f"worker {self.place()} does not see {self._store.name}; name a folder that all machines share, "
                    "or a URL"
                )
            return self._units.encode(unit)
        except UnmaskError as error:
            return _portable(error)

    def encode_chunk(self, chunk: Chunk) -> EncodedChunk | UnmaskError:
        """Encode a chunk."""
        try:
            return encode_chunk(self._job, self._encoder, chunk, chunk_prompts(self._encoder, self._job, chunk))
        except UnmaskError as error:
            return _portable(error)


class ClusterExecutor:
    """Encodes by the workers of a pool.

    Args:
        ray: the module, connected.

    Raises:
        ClusterError, UnmaskError: as `WorkerPool`; or a worker differs from this process or from the first one.
    """

    def __init__(self, ray: Any, job: EncodeJob, load_encoder: Callable[[], Encoder], options: ClusterOptions) -> None:
        self._same_bits = job.same_bits
        self._first: WorkerDescription | None = None
        plain = EncodeJob(**{field.name: getattr(job, field.name) for field in fields(EncodeJob)})
        self.pool: WorkerPool[Any] = WorkerPool(
            ray,
            BulkWorker,
            (plain, load_encoder),
            options,
            _name_of,
            self._size_of,
            self._require_equal,
            lambda worker: worker.characters_per_second,
        )

    @property
    def model(self) -> ModelDescription:
        """Return the description of the model."""
        return self._first_worker.model

    @property
    def probe(self) -> str:
        """Return the digest of the first worker's processor."""
        return self._first_worker.probe

    @property
    def activity(self) -> Activity:
        """Return how many workers there are now, and were."""
        return Activity(self.pool.size, self.pool.redone, self.pool.worker_seconds)

    @property
    def _first_worker(self) -> WorkerDescription:
        assert self._first is not None, "the pool waits for its first worker"
        return self._first

    def encode_units(self, units: Iterator[Unit]) -> Iterator[Manifest | UnitFailure]:
        """Yield the outcomes as they come; see `Executor`."""
        for unit, outcome in self.pool.outcomes(units, "encode_unit"):
            if isinstance(outcome, InputError | ClusterError):
                yield UnitFailure(unit.name, outcome)
            elif isinstance(outcome, UnmaskError):
                raise outcome
            else:
                yield outcome

    def encode_chunks(self, chunks: Iterator[Chunk], ahead: bool) -> Iterator[EncodedChunk]:
        """Yield the chunks in their order; see `Executor`."""
        begun, done = 0, 0
        order: dict[tuple[int, int], int] = {}
        waiting: dict[int, Any] = {}

        def numbered() -> Iterator[Chunk]:
            nonlocal begun
            for chunk in chunks:
                order[chunk.file, chunk.first] = begun
                begun += 1
                yield chunk

        outcomes = self.pool.outcomes(numbered(), "encode_chunk", lambda: begun - done < _AHEAD * (self.pool.size + 1))
        for chunk, outcome in outcomes:
            waiting[order.pop((chunk.file, chunk.first))] = outcome
            while done in waiting:
                earliest = waiting.pop(done)
                done += 1
                if isinstance(earliest, UnmaskError):
                    raise earliest
                yield earliest

    def _size_of(self, task: Unit | Chunk) -> float:
        """Return the characters of a piece that the model reads, and one for each text."""
        chunks = task.chunks if isinstance(task, Unit) else [task]
        return float(sum(chunk.characters + len(chunk.texts) for chunk in chunks))

    def _require_equal(self, worker: WorkerDescription) -> None:
        """Compare a worker with this process and with the first worker."""
        require_equal_versions(f"worker {worker.place}", worker.versions)
        first = self._first = self._first or worker
        advice = {"dtype": "name a precision with --dtype"}
        require_equal_models(f"worker {worker.place}", worker.model.options, first.place, first.model.options, advice)
        if self._same_bits and worker.probe != first.probe:
            raise ClusterError(
                f"worker {worker.place} is another kind of processor than {first.place}: its vectors differ in their "
                "last bits, and --same-bits is set; leave it out, or encode on machines of one kind"
            )


@contextmanager
def cluster_executor(
    options: ClusterOptions, job: EncodeJob, load_encoder: Callable[[], Encoder]
) -> Iterator[Executor]:
    """Connect to a cluster and start workers there, until the block ends.

    Args:
        load_encoder: called in each worker, so it must be picklable.

    Raises:
        UsageError, ClusterError: as `connected` and `ClusterExecutor`.
    """
    if options.cluster is None:
        raise UsageError("no cluster: add --cluster")
    with connected(options.cluster) as ray:
        executor = ClusterExecutor(ray, job, load_encoder, options)
        with executor.pool:
            yield executor


def _name_of(task: Unit | Chunk) -> str:
    chunks = task.chunks if isinstance(task, Unit) else [task]
    first, rows = chunks[0].first, sum(len(chunk.texts) for chunk in chunks)
    return f"{label_of(chunks[0].source)}: the piece of rows {first + 1:,} to {first + rows:,}"


def _speed(encoder: Encoder) -> float:
    """Return the characters per second with the texts of the probe, which is the second time that it reads them."""
    texts = probe_texts()
    began = time.perf_counter()
    encoder.encode(texts)
    return sum(map(len, texts)) / max(time.perf_counter() - began, 1e-6)


def _portable(error: UnmaskError, prefix: str = "") -> UnmaskError:
    """Return an error that can be pickled."""
    if isinstance(error, MissingPackages) or prefix:
        kind = UsageError if isinstance(error, MissingPackages) else type(error)
        return kind(f"{prefix}{error}")
    return error
