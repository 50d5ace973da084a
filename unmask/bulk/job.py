"""Bulk encoding: files of texts become vectors, however often the run is killed on the way.

Rows are encoded in chunks whose borders depend on the texts alone, so that the packs, and with them the last bits
of every vector, are the same wherever a run was interrupted. An output that is one file grows in a spool beside it,
with a hash of the texts that its vectors were made from; one that is a folder or a URL grows by parts (`parts.py`).
A later run reads the texts again, compares, and goes on. On the same machine, with as many threads, the output is the
same to the byte.
"""

import hashlib
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import asdict, replace
from pathlib import Path

from unmask.bulk.chunks import add_text, job_options
from unmask.bulk.encode_job import EncodeJob
from unmask.bulk.executor import Executor, OpenExecutor, local_executor
from unmask.bulk.files import OUTPUT_FORMATS, format_of, jsonl_lines, write_out
from unmask.bulk.inputs import Inputs
from unmask.bulk.parts import encode_to_parts, is_parts_folder
from unmask.bulk.report import EncodeProgress, EncodeReport, Tally
from unmask.bulk.spool import Spool
from unmask.bulk.storage import STANDARD_STREAM
from unmask.disk import link_target
from unmask.encoder.encoder import Encoder, check_dimensions
from unmask.errors import UsageError
from unmask.tables import first_surrogate


def run(
    job: EncodeJob,
    load_encoder: Callable[[], Encoder],
    progress: Callable[[EncodeProgress], None] | None = None,
    open_executor: OpenExecutor = local_executor,
) -> EncodeReport:
    """Encode files, continuing where an earlier run of the same job was interrupted.

    Args:
        load_encoder: called once, after everything that can be wrong without a model has been checked.
        progress: called before the first text and after every chunk or unit.
        open_executor: opens what encodes the pieces; by default it is this process.

    Raises:
        UsageError: an input cannot be read, the output exists or another run is writing it, or the inputs or the
            options are not those of the unfinished run.
        EmptyText, TextTooLong: with the row's index, where the job says that these are errors.
        CheckpointError: the model gives numbers that are not finite.
        StorageError: the output cannot be written. What is encoded so far is kept.
    """
    started = time.perf_counter()
    if first_surrogate(job.instruction) is not None:
        raise UsageError(f"--instruction {job.instruction!a} is not UTF-8; write it in UTF-8")
    with Inputs(job) as inputs:
        encode = encode_to_parts if is_parts_folder(job.output) else _encode_to_file
        report = encode(job, inputs, lambda: open_executor(job, load_encoder), progress)
        return replace(report, seconds=time.perf_counter() - started, left_out=inputs.left_out)


def _encode_to_file(
    job: EncodeJob,
    inputs: Inputs,
    open_executor: Callable[[], AbstractContextManager[Executor]],
    progress: Callable[[EncodeProgress], None] | None,
) -> EncodeReport:
    target = format_of(job.output, job.output_format, OUTPUT_FORMATS, "jsonl", "--output-format")
    with ExitStack() as stack:
        spool = _open_spool(job, inputs, target, stack)
        executor = stack.enter_context(open_executor())
        check_dimensions(job.dimensions, executor.model.dim)
        return _encode_rows(job, inputs, executor, target, spool, progress)


def _encode_rows(
    job: EncodeJob,
    inputs: Inputs,
    executor: Executor,
    target: str,
    spool: Spool | None,
    progress: Callable[[EncodeProgress], None] | None,
) -> EncodeReport:
    done, digest, model = Tally(), hashlib.sha256(), executor.model
    if spool is not None:
        options = job_options(job, model.options, target) | inputs.identity()
        done = spool.resume(options, job.dimensions or model.dim)
        _require_same_texts(inputs, done.rows, digest, spool)
    resumed_at, resumed_tokens = done.rows, done.tokens
    total = inputs.rows() if progress is not None else None
    began = time.monotonic()
    if progress is not None:
        progress(EncodeProgress(done.rows, total, 0, 0.0, executor.activity))
    for encoded in executor.encode_chunks(inputs.chunks(model.max_length), inputs.at_hand):
        before, done = done, done.plus_tally(encoded.tally)
        for text in encoded.chunk.texts:
            add_text(digest, text)
        if spool is None:
            write_out(jsonl_lines(encoded.vectors, before.rows))
        else:
            spool.append(encoded.vectors)
            # A chunk that the end of the input cut short is not recorded: should the input have grown when the
            # job is resumed, its rows belong to a longer chunk. Several inputs may not change at all.
            if encoded.chunk.full or len(inputs.files) > 1:
                spool.record(done, digest.hexdigest())
        if progress is not None:
            tokens, seconds = done.tokens - resumed_tokens, time.monotonic() - began
            progress(EncodeProgress(done.rows, total, tokens, seconds, executor.activity))
    if spool is not None:
        spool.deliver(target, done.rows)
    activity = executor.activity
    return EncodeReport(
        **asdict(done),
        resumed_at=resumed_at,
        precision=model.precision,
        redone=activity.redone,
        worker_seconds=activity.worker_seconds,
    )


def _open_spool(job: EncodeJob, inputs: Inputs, target: str, stack: ExitStack) -> Spool | None:
    """Open the spool beside the output, or a temporary one for standard output; None if rows go straight there."""
    if job.output == STANDARD_STREAM:
        if sys.stdout is None:
            raise UsageError("standard output is closed; name a file with --output")
        if target == "jsonl":
            return None
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="unmask-encode-")))
        return stack.enter_context(closing(Spool(folder / "spool", None)))
    output = Path(job.output)
    if output.exists() and not output.is_file():
        raise UsageError(f"{output} is a device or a pipe, not a file; name a file, or use - for standard output")
    output = link_target(output)  # the spool and the output must be on one disk
    if output.exists() and any(file.is_local and output.samefile(file.name) for file in inputs.files):
        raise UsageError(f"{output} is the input as well; choose another --output")
    spool = stack.enter_context(closing(Spool(output.with_name(f".{output.name}.partial"), output)))
    spool.prepare(output, job.restart)
    return spool


def _require_same_texts(inputs: Inputs, rows: int, digest: "hashlib._Hash", spool: Spool) -> None:
    """Read the rows that are already encoded again, into `digest`."""
    for text in inputs.skip(rows):
        add_text(digest, text)
    if digest.hexdigest() != spool.texts_sha256:
        raise UsageError(
            f"{inputs.label} has changed: its first {rows:,} rows are not those that the unfinished run in "
            f"{spool.folder} encoded; restore it, or add --restart to begin again"
        )
