"""Outputs in parts: a folder or a URL that several machines can write, and a later run can go on with.

    part-00000-00000042.parquet     the vectors of a unit: of input file 0, unit 42
    _unmask/job.json                options and inputs of the job
    _unmask/units/00000-00000042.json   the unit's manifest: rows, digests, counts, who made it
    _unmask/done.json               the job is complete: counts, and a digest over all parts

The manifest of a unit (`units.py`) is the commit: a part without one counts as nothing, and is written again with the
same bytes. Whoever reads the output counts only parts that a manifest names. So any number of processes may work on
one output; the worst that can happen is that a unit is computed twice.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import asdict, dataclass
from functools import reduce
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import msgspec

from unmask.bulk.encode_job import EncodeJob
from unmask.bulk.executor import Executor, ModelDescription, UnitFailure
from unmask.bulk.inputs import Inputs
from unmask.bulk.report import EncodeProgress, EncodeReport, Tally
from unmask.bulk.spool import require_same_options
from unmask.bulk.storage import PART_PREFIX, Store, is_url
from unmask.bulk.units import (
    JOB_FILE,
    UNITS_FOLDER,
    Manifest,
    Unit,
    cut_units,
    options_digest,
    part_format,
    parts_options,
)
from unmask.disk import storage_errors, try_lock
from unmask.encoder.encoder import check_dimensions
from unmask.errors import InputError, StorageError, UnmaskError, UsageError

_DONE, _LOCK = "_unmask/done.json", "_unmask/lock"
_READERS = 16


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


def encode_to_parts(
    job: EncodeJob,
    inputs: Inputs,
    open_executor: Callable[[], AbstractContextManager[Executor]],
    progress: Callable[[EncodeProgress], None] | None = None,
) -> EncodeReport:
    """Encode what an output in parts lacks. A unit that fails leaves the others alone.

    Raises:
        UsageError: the output is complete already, belongs to another job or to nobody, or another process of this
            machine is writing it.
        InputError, ClusterError: of the first failed unit, with the number of all.
        StorageError: the store refuses. What is done is kept.
    """
    part_format(job)
    store = Store(job.output)
    with ExitStack() as stack:
        _prepare(job, store, stack)
        executor = stack.enter_context(open_executor())
        model = executor.model
        check_dimensions(job.dimensions, model.dim)
        _begin(job, inputs, model, store)
        earlier = read_manifests(store)
        _check_options(job, store, earlier, model)
        _check_processors(job, store, earlier, executor.probe)
        finished, names, failures = dict(earlier), [], []
        before = done = _sum(earlier.values())
        total = inputs.rows() if progress is not None else None
        began = time.monotonic()

        def report(seconds: float) -> None:
            if progress is not None:
                tokens = done.tokens - before.tokens
                progress(EncodeProgress(done.rows, total, tokens, seconds, executor.activity))

        report(0.0)
        for outcome in executor.encode_units(_missing_units(inputs, model, names, earlier, store)):
            if isinstance(outcome, UnitFailure):
                failures.append(outcome)
                continue
            finished[outcome.unit] = outcome
            done = done.plus_tally(outcome.tally)
            report(time.monotonic() - began)
        if failures:
            raise _failure_of_all(failures, len(names))
        _finish(store, names, finished)
        activity = executor.activity
    kinds = len({manifest.probe for manifest in finished.values()})
    return EncodeReport(
        **asdict(done),
        resumed_at=before.rows,
        precision=model.precision,
        processors=kinds,
        redone=activity.redone,
        worker_seconds=activity.worker_seconds,
    )


def _missing_units(
    inputs: Inputs, model: ModelDescription, names: list[str], finished: Mapping[str, Manifest], store: Store
) -> Iterator[Unit]:
    """Cut the inputs, add the name of every unit to `names`, and yield those that are not finished."""
    for unit in cut_units(inputs.chunks(model.max_length)):
        names.append(unit.name)
        if not _is_done(unit, finished, store):
            yield unit


def read_status(output: str) -> PartsStatus:
    """Read how far an output in parts is, from its manifests alone.

    Raises:
        UsageError: nothing was encoded there.
        StorageError: the store cannot be read, or a manifest is damaged.
    """
    store = Store(output)
    job = _read_json(store, JOB_FILE)
    if job is None:
        raise UsageError(f"{store.name} holds no parts: there is no {JOB_FILE}")
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
    names = store.names(UNITS_FOLDER)
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


def _prepare(job: EncodeJob, store: Store, stack: ExitStack) -> None:
    """Lock a local output, and refuse one that is complete or not ours; with `restart`, empty it first."""
    if store.folder is not None:
        _lock(store.folder, store.name, stack)
    names = store.names()  # behind the lock, so that no other run adds to them
    foreign = [name for name in names if not name.startswith((PART_PREFIX, "_unmask/"))]
    if foreign:
        raise UsageError(
            f"{store.name} holds other files, such as {foreign[0]}; choose an empty folder, or a new one, for the parts"
        )
    if job.restart:
        for name in sorted(names, key=_order_of_removal):
            if name != _LOCK:
                store.remove(name)
    elif _DONE in names:
        raise UsageError(
            f"{store.name} is complete already; choose another --output, or add --restart to encode it again"
        )


def _order_of_removal(name: str) -> tuple[int, str]:
    """Sort the objects of an output so that it is never wrong, should the removal be interrupted.

    A part without its manifest counts as nothing. `job.json` is the last: it says how the others were made.
    """
    if name == JOB_FILE:
        return 3, name
    return (0 if name == _DONE else 1 if name.startswith("_unmask/") else 2), name


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


def _begin(job: EncodeJob, inputs: Inputs, model: ModelDescription, store: Store) -> None:
    """Write the description of the job, or check that the one here is the same."""
    options = parts_options(job, model.options)
    files = [{"name": file.name, "size": file.size} for file in inputs.files]
    before = _read_json(store, JOB_FILE)
    if before is None:
        store.put(JOB_FILE, json.dumps({"options": options, "inputs": files}, indent=1).encode() + b"\n")
        return
    require_same_options(before["options"], options, store.name)
    changed = next((pair for pair in zip_longest(before["inputs"], files) if pair[0] != pair[1]), None)
    if changed is not None:
        old, new = (f"{file['name']} ({file['size']} bytes)" if file else "none" for file in changed)
        raise UsageError(
            f"the inputs have changed: the unfinished run in {store.name} had {old} where this one has {new}; "
            "restore it, or add --restart to begin again"
        )


def _check_options(job: EncodeJob, store: Store, finished: Mapping[str, Manifest], model: ModelDescription) -> None:
    """Refuse units of other options, which `job.json` does not show if it was removed or replaced."""
    digest = options_digest(parts_options(job, model.options))
    other = next((manifest for manifest in finished.values() if manifest.options_sha256 != digest), None)
    if other is not None:
        raise UsageError(
            f"{store.name}/{UNITS_FOLDER}/{other.unit}.json was written with other options, or by an earlier version "
            "of unmask: the vectors may differ from those of this run; add --restart to begin again"
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


def _failure_of_all(failures: Sequence[UnitFailure], units: int) -> UnmaskError:
    """Return the first failure in the order of the texts, with the number of units that failed."""
    first = min(failures, key=lambda failure: failure.unit).error
    if len(failures) == 1:
        message = f"{first}. All other units are done; run the same command again for the one that failed"
    else:
        message = (
            f"{first}. {len(failures):,} of {units:,} units failed; the others are done, and the same "
            "command does the rest"
        )
    return type(first)(message, first.index) if isinstance(first, InputError) else type(first)(message)


def _sum(manifests: Iterable[Manifest]) -> Tally:
    return reduce(Tally.plus_tally, (manifest.tally for manifest in manifests), Tally())


def _read_json(store: Store, name: str) -> Any:
    content = store.get(name)
    try:
        return None if content is None else json.loads(content)
    except ValueError as error:
        raise StorageError(f"{store.name}/{name} is damaged ({error}); add --restart to begin again") from error
