"""Outputs in parts: a folder or a URL that several machines can write, and a later run can go on with.

    part-00000-00000042.parquet     the vectors of a unit: of input file 0, unit 42
    _unmask/job.json                options and inputs of the job
    _unmask/units/00000-00000042.json   the unit's manifest: rows, digests, counts, who made it
    _unmask/done.json               the job is complete: counts, and a digest over all parts

A unit is at most UNIT_CHUNKS whole chunks of one file, so its borders follow from the texts alone. Its manifest is the
commit: a part without one counts as nothing, and is written again with the same bytes. Whoever reads the output counts
only parts that a manifest names. So any number of processes may work on one output; the worst that can happen is that
a unit is computed twice.
"""

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from functools import cache, reduce
from importlib.metadata import version
from itertools import groupby, zip_longest
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from unmask import __version__
from unmask.bulk.chunks import Chunk, add_text, chunk_prompts, chunk_vectors, job_options
from unmask.bulk.encode_job import EncodeJob
from unmask.bulk.files import OUTPUT_FORMATS, format_of, jsonl_part, npy_part, parquet_part
from unmask.bulk.inputs import Inputs
from unmask.bulk.report import EncodeProgress, EncodeReport, Tally
from unmask.bulk.spool import require_same_options
from unmask.bulk.storage import Store, is_url
from unmask.conformance.canaries import fixed_texts
from unmask.disk import storage_errors, try_lock
from unmask.encoder.encoder import Encoder, postprocess
from unmask.errors import InputError, StorageError, UsageError

UNIT_CHUNKS = 8
_JOB, _DONE, _UNITS, _LOCK = "_unmask/job.json", "_unmask/done.json", "_unmask/units", "_unmask/lock"
_PROBE_TEXTS = 16
_READERS = 16


@dataclass(frozen=True)
class Unit:
    """Work for one call: whole chunks of one input file, with their texts.

    Attributes:
        number: of the unit in its file, from 0.
    """

    number: int
    chunks: Sequence[Chunk]

    @property
    def name(self) -> str:
        """Return the name of its part and manifest."""
        return f"{self.chunks[0].file:05d}-{self.number:08d}"

    def texts_sha256(self) -> str:
        """Return a digest of its texts."""
        digest = hashlib.sha256()
        for chunk in self.chunks:
            for text in chunk.texts:
                add_text(digest, text)
        return digest.hexdigest()


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A finished unit.

    Attributes:
        unit: its name.
        file: name of the input file.
        first, rows: its rows in the input file, from 0.
        texts_sha256: digest of their texts.
        part: name of the part.
        bytes, sha256: size and digest of the part.
        tokens, truncated, empty: as in `Tally`.
        probe: digest of the vectors that the process gave a few fixed texts: equal for processors of one kind.
        seconds: time that the unit took.
        worker: host and process.
        versions: of what decides the last bits.
    """

    unit: str
    file: str
    first: int
    rows: int
    texts_sha256: str
    part: str
    bytes: int
    sha256: str
    tokens: int
    truncated: int
    empty: int
    probe: str
    seconds: float
    worker: str
    versions: dict[str, str]

    @property
    def tally(self) -> Tally:
        """Return the counts of the unit."""
        return Tally(self.rows, self.tokens, self.truncated, self.empty)


@dataclass(frozen=True)
class PartsStatus:
    """State of an output in parts, read from its manifests.

    Attributes:
        tally: counts of the finished units.
        units: number of finished units.
        inputs: names of the input files.
        options: how the vectors are made.
        state: "complete", or "unfinished".
        processors: kinds of processors, told apart by the vectors of a few texts.
        sha256: digest over all parts, of a complete output.
    """

    tally: Tally
    units: int
    inputs: tuple[str, ...]
    options: dict[str, Any]
    state: Literal["complete", "unfinished"]
    processors: int
    sha256: str | None


def is_parts_folder(output: str) -> bool:
    """True if an output is a folder or URL of parts: a name that ends in a slash, an existing folder, a URL."""
    return is_url(output) or output.endswith(("/", os.sep)) or Path(output).is_dir()


def cut_units(chunks: Iterable[Chunk]) -> Iterator[Unit]:
    """Group the chunks of each file into units."""
    for _, of_file in groupby(chunks, key=lambda chunk: chunk.file):
        for number, group in groupby(enumerate(of_file), key=lambda item: item[0] // UNIT_CHUNKS):
            yield Unit(number, [chunk for _, chunk in group])


class UnitEncoder:
    """Encodes units and stores their parts. It is the same code in one process and in a worker of a cluster."""

    def __init__(self, job: EncodeJob, encoder: Encoder, store: Store) -> None:
        self._job, self._encoder, self._store = job, encoder, store
        self._format = part_format(job)
        texts = [canary.text for canary in fixed_texts()[:_PROBE_TEXTS]]
        self.probe = hashlib.sha256(encoder.encode(texts).tobytes()).hexdigest()[:16]

    def encode(self, unit: Unit) -> Manifest:
        """Encode a unit, write its part, and then its manifest.

        Raises:
            EmptyText, TextTooLong: a text is an error by the job's options.
            CheckpointError: the model gives numbers that are not finite.
            StorageError: the store refuses.
        """
        began = time.perf_counter()
        tally, blocks = Tally(), []
        for chunk in unit.chunks:
            prompts = chunk_prompts(self._encoder, self._job, chunk)
            blocks.append(chunk_vectors(self._encoder, self._job, prompts, chunk))
            tally = tally.plus(prompts)
        first, source = unit.chunks[0].first, unit.chunks[0].source
        content = _part(self._format, np.concatenate(blocks), source, first)
        part = f"part-{unit.name}.{self._format}"
        self._store.put(part, content)
        manifest = Manifest(
            unit=unit.name,
            file=source,
            first=first,
            texts_sha256=unit.texts_sha256(),
            part=part,
            bytes=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
            probe=self.probe,
            seconds=round(time.perf_counter() - began, 3),
            worker=f"{platform.node()}:{os.getpid()}",
            versions=_versions(),
            **asdict(tally),
        )
        self._store.put(f"{_UNITS}/{unit.name}.json", msgspec.json.format(msgspec.json.encode(manifest)) + b"\n")
        return manifest


def encode_to_parts(
    job: EncodeJob,
    inputs: Inputs,
    load_encoder: Callable[[], Encoder],
    progress: Callable[[EncodeProgress], None] | None = None,
) -> EncodeReport:
    """Encode what an output in parts lacks. A text that is an error fails its unit; the other units are done.

    Raises:
        UsageError: the output is complete already, belongs to another job or to nobody, or another process of this
            machine is writing it.
        InputError: of the first failed unit, with the number of all.
        StorageError: the store refuses. What is done is kept.
    """
    part_format(job)
    store = Store(job.output)
    with ExitStack() as stack:
        _prepare(job, store, stack)
        encoder = load_encoder()
        postprocess(np.empty((0, encoder.dim), np.float32), normalize=job.normalize, dimensions=job.dimensions)
        _begin(job, inputs, encoder, store)
        finished = dict(read_manifests(store))
        worker = UnitEncoder(job, encoder, store)
        _check_processors(job, store, finished, worker.probe)
        before = _sum(finished.values())
        failures: list[InputError] = []
        done, total = before, inputs.rows() if progress is not None else None
        began = time.monotonic()
        if progress is not None:
            progress(EncodeProgress(done.rows, total, 0, 0.0))
        names: list[str] = []
        for unit in cut_units(inputs.chunks(encoder.max_length)):
            names.append(unit.name)
            if _is_done(unit, finished, store):
                continue
            try:
                finished[unit.name] = worker.encode(unit)
            except InputError as error:
                failures.append(error)
                continue
            done = done.plus_tally(finished[unit.name].tally)
            if progress is not None:
                progress(EncodeProgress(done.rows, total, done.tokens - before.tokens, time.monotonic() - began))
        if failures:
            raise _failure_of_all(failures, len(names))
        _finish(store, names, finished)
    kinds = len({manifest.probe for manifest in finished.values()})
    return EncodeReport(**asdict(done), resumed_at=before.rows, precision=encoder.precision, processors=kinds)


def read_status(output: str) -> PartsStatus:
    """Read how far an output in parts is, from its manifests alone.

    Raises:
        UsageError: nothing was encoded there.
        StorageError: the store cannot be read, or a manifest is damaged.
    """
    store = Store(output)
    job = _read_json(store, _JOB)
    if job is None:
        raise UsageError(f"{store.name} holds no parts: there is no {_JOB}")
    manifests, done = read_manifests(store), _read_json(store, _DONE)
    return PartsStatus(
        tally=_sum(manifests.values()),
        units=len(manifests),
        inputs=tuple(file["name"] for file in job["inputs"]),
        options=job["options"],
        state="unfinished" if done is None else "complete",
        processors=len({manifest.probe for manifest in manifests.values()}),
        sha256=None if done is None else done["sha256"],
    )


def read_manifests(store: Store) -> dict[str, Manifest]:
    """Read the manifests of all finished units, by unit.

    Raises:
        StorageError: one is damaged.
    """
    names = store.names(_UNITS)
    with ThreadPoolExecutor(_READERS) as readers:  # an object store answers each request late, and many at once
        manifests = list(readers.map(lambda name: _manifest(store, name), names))
    return {manifest.unit: manifest for manifest in manifests}


def _manifest(store: Store, name: str) -> Manifest:
    try:
        return msgspec.json.decode(store.get(name) or b"", type=Manifest)
    except msgspec.MsgspecError as error:
        raise StorageError(
            f"{store.name}/{name} is damaged ({error}); remove it, and its unit is encoded again"
        ) from error


def part_format(job: EncodeJob) -> str:
    """Return the format of a job's parts.

    Raises:
        UsageError: there is no such format.
    """
    return format_of("parts.parquet", job.output_format, OUTPUT_FORMATS, "parquet", "--output-format")


def _prepare(job: EncodeJob, store: Store, stack: ExitStack) -> None:
    """Refuse an output that is complete or not ours, and lock a local one; with `restart`, empty it first."""
    names = store.names()
    foreign = [name for name in names if not name.startswith(("part-", "_unmask/"))]
    if foreign:
        raise UsageError(
            f"{store.name} holds other files, such as {foreign[0]}; choose an empty folder, or a new one, for the parts"
        )
    if store.folder is not None:
        _lock(store.folder, store.name, stack)
    if job.restart:
        # The manifests first: a part without one counts as nothing, should this be interrupted.
        for name in sorted(names, key=lambda name: (not name.startswith("_unmask/"), name)):
            if name != _LOCK:
                store.remove(name)
    elif _DONE in names:
        raise UsageError(
            f"{store.name} is complete already; choose another --output, or add --restart to encode it again"
        )


def _lock(folder: Path, name: str, stack: ExitStack) -> None:
    """Hold the lock of an output until the stack ends; then remove it, and what it made if nothing was encoded."""
    lock = folder / _LOCK

    def remove() -> None:
        lock.unlink(missing_ok=True)
        with suppress(OSError):  # they are not empty
            lock.parent.rmdir()
            folder.rmdir()

    with storage_errors(name):
        lock.parent.mkdir(parents=True, exist_ok=True)
        opened = stack.enter_context(lock.open("wb"))
    if not try_lock(opened):
        raise UsageError(f"another run is writing {name}; wait for it, or choose another --output")
    stack.callback(remove)


def _begin(job: EncodeJob, inputs: Inputs, encoder: Encoder, store: Store) -> None:
    """Write the description of the job, or check that the one here is the same."""
    options = job_options(job, encoder, part_format(job)) | {"unit_chunks": UNIT_CHUNKS}
    files = [{"name": file.name, "size": file.size} for file in inputs.files]
    before = _read_json(store, _JOB)
    if before is None:
        store.put(_JOB, json.dumps({"options": options, "inputs": files}, indent=1).encode() + b"\n")
        return
    require_same_options(before["options"], options, store.name)
    changed = next((pair for pair in zip_longest(before["inputs"], files) if pair[0] != pair[1]), None)
    if changed is not None:
        old, new = (f"{file['name']} ({file['size']} bytes)" if file else "none" for file in changed)
        raise UsageError(
            f"the inputs have changed: the unfinished run in {store.name} had {old} where this one has {new}; "
            "restore it, or add --restart to begin again"
        )


def _check_processors(job: EncodeJob, store: Store, finished: Mapping[str, Manifest], probe: str) -> None:
    other = next((manifest for manifest in finished.values() if manifest.probe != probe), None)
    if job.same_bits and other is not None:
        raise UsageError(
            f"the vectors in {store.name} were made by another kind of processor, on {other.worker}, and --same-bits "
            "is set; go on there, leave the option out, or add --restart to begin again"
        )


def _is_done(unit: Unit, finished: Mapping[str, Manifest], store: Store) -> bool:
    """True if a unit has a manifest; refuse one of other texts."""
    manifest = finished.get(unit.name)
    if manifest is None:
        return False
    if manifest.texts_sha256 != unit.texts_sha256():
        first, rows = unit.chunks[0].first, sum(len(chunk.texts) for chunk in unit.chunks)
        raise UsageError(
            f"{unit.chunks[0].source} has changed: its rows {first + 1:,} to {first + rows:,} are not those that the "
            f"unfinished run in {store.name} encoded; restore it, or add --restart to begin again"
        )
    return True


def _finish(store: Store, names: Sequence[str], finished: Mapping[str, Manifest]) -> None:
    """Check that every unit has a manifest and no other has one, and write that the output is complete.

    Raises:
        UsageError: there are manifests of units that the inputs no longer have.
    """
    extra = sorted(set(finished) - set(names))
    if extra:
        raise UsageError(
            f"{finished[extra[0]].file} has become shorter: {store.name} holds vectors of its row "
            f"{finished[extra[0]].first + 1:,}; restore it, or add --restart to begin again"
        )
    digest = hashlib.sha256()
    for name in names:
        digest.update(f"{finished[name].part} {finished[name].sha256}\n".encode())
    counts = asdict(_sum(finished[name] for name in names))
    content = {**counts, "parts": len(names), "sha256": digest.hexdigest()}
    store.put(_DONE, json.dumps(content, indent=1).encode() + b"\n")


def _failure_of_all(failures: Sequence[InputError], units: int) -> InputError:
    """Return the first failure, with the number of units that failed."""
    if len(failures) == 1:
        message = f"{failures[0]}. All other units are done; run the same command again for the one that failed"
    else:
        message = (
            f"{failures[0]}. {len(failures):,} of {units:,} units failed, each at a text of its own; the others are "
            "done, and the same command does the rest"
        )
    return type(failures[0])(message, failures[0].index)


def _part(file_format: str, vectors: np.ndarray, source: str, first: int) -> bytes:
    if file_format == "npy":
        return npy_part(vectors)
    return (parquet_part if file_format == "parquet" else jsonl_part)(vectors, source, first)


def _sum(manifests: Iterable[Manifest]) -> Tally:
    return reduce(Tally.plus_tally, (manifest.tally for manifest in manifests), Tally())


def _read_json(store: Store, name: str) -> Any:
    content = store.get(name)
    try:
        return None if content is None else json.loads(content)
    except ValueError as error:
        raise StorageError(f"{store.name}/{name} is damaged ({error}); add --restart to begin again") from error


@cache
def _versions() -> dict[str, str]:
    return {
        "unmask": __version__,
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "tokenizers", "numpy")},
    }
