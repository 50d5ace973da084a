"""Bulk encoding: a file of texts becomes a file of vectors, however often the run is killed on the way.

Rows are encoded in chunks whose borders depend on the texts alone, so that the packs, and with them the last bits
of every vector, are the same wherever a run was interrupted. After each chunk its vectors are on disk in a spool
beside the output, together with a hash of the texts they were made from. A later run reads those texts again,
compares, and goes on. On the same machine, with as many threads, the output is the same to the byte.
"""

import hashlib
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from unmask.bulk.encode_job import EncodeJob
from unmask.bulk.files import (
    INPUT_FORMATS,
    OUTPUT_FORMATS,
    STANDARD_STREAM,
    chunks,
    format_of,
    jsonl_lines,
    label_of,
    open_texts,
    row_count,
    write_out,
)
from unmask.bulk.spool import Spool, Tally
from unmask.encoder.encoder import Encoder, postprocess
from unmask.encoder.prefetch import prefetch
from unmask.encoder.prompts import Prompt
from unmask.errors import CheckpointError, EmptyText, InputError, TextTooLong, UsageError

# A chunk ends at the first of these: enough to fill packs well, little enough to lose when killed.
CHUNK_ROWS = 1024
CHUNK_CHARACTERS = 128 * 1024
# A longer text is cut to the model's length, so no more of it than this counts towards a chunk.
_CHARACTERS_PER_TOKEN = 4


@dataclass(frozen=True)
class EncodeProgress:
    """State of a running job.

    Attributes:
        rows: rows of the output that are done.
        total: rows of the input; None if it is a stream.
        tokens: tokens encoded by this run.
        seconds: time since the first text was read.
    """

    rows: int
    total: int | None
    tokens: int
    seconds: float


@dataclass(frozen=True)
class EncodeReport(Tally):
    """Result of a job. The counts cover the whole output, whichever run made its rows.

    Attributes:
        seconds: of this run alone, loading included.
        resumed_at: rows that an earlier run had already encoded.
    """

    seconds: float = 0.0
    resumed_at: int = 0


def run(
    job: EncodeJob, load_encoder: Callable[[], Encoder], progress: Callable[[EncodeProgress], None] | None = None
) -> EncodeReport:
    """Encode a file, continuing where an earlier run of the same job was interrupted.

    Args:
        load_encoder: called once, after everything that can be wrong without a model has been checked.
        progress: called before the first text and after every chunk.

    Raises:
        UsageError: the input cannot be read, the output exists or another run is writing it, or the input or the
            options are not those of the unfinished run.
        EmptyText, TextTooLong: with the row's index, where the job says that these are errors.
        CheckpointError: the model gives numbers that are not finite.
        StorageError: the output cannot be written. What is encoded so far is kept.
    """
    started = time.perf_counter()
    source = format_of(job.input, job.input_format, INPUT_FORMATS, "txt", "--input-format")
    target = format_of(job.output, job.output_format, OUTPUT_FORMATS, "jsonl", "--output-format")
    with ExitStack() as stack:
        texts = stack.enter_context(open_texts(job.input, source, job.column))
        spool = _open_spool(job, target, stack)
        encoder = load_encoder()
        postprocess(np.empty((0, encoder.dim), np.float32), normalize=job.normalize, dimensions=job.dimensions)
        done, digest = Tally(), hashlib.sha256()
        if spool is not None:
            done = spool.resume(_options(job, encoder, target), job.dimensions or encoder.dim)
            _require_same_texts(job, texts, done.rows, digest, spool)
        resumed_at = done.rows
        resumed_tokens, total = done.tokens, row_count(job.input, source) if progress is not None else None
        began = time.monotonic()
        if progress is not None:
            progress(EncodeProgress(done.rows, total, 0, 0.0))
        max_characters = _CHARACTERS_PER_TOKEN * encoder.max_length
        made = _tokenised(encoder, job, chunks(texts, CHUNK_ROWS, CHUNK_CHARACTERS, max_characters), done.rows)
        # A GPU need not wait for the next chunk. On a CPU tokenising takes a core, and a pipe may have none yet.
        at_hand = encoder.prefetches and Path(job.input).is_file()
        for chunk, full, prompts in prefetch(made) if at_hand else made:
            vectors = _vectors(encoder, job, prompts, done.rows)
            before, done = done, done.plus(prompts)
            for text in chunk:
                _add(digest, text)
            if spool is None:
                write_out(jsonl_lines(vectors, before.rows))
            else:
                spool.append(vectors)
                # A chunk that the end of the input cut short is not recorded: should the input have grown when the
                # job is resumed, its rows belong to a longer chunk.
                if full:
                    spool.record(done, digest.hexdigest())
            if progress is not None:
                progress(EncodeProgress(done.rows, total, done.tokens - resumed_tokens, time.monotonic() - began))
        if spool is not None:
            spool.deliver(target, done.rows)
    return EncodeReport(**asdict(done), seconds=time.perf_counter() - started, resumed_at=resumed_at)


def _open_spool(job: EncodeJob, target: str, stack: ExitStack) -> "Spool | None":
    """The spool beside the output, or a temporary one for standard output; None if rows go straight there."""
    if job.output == STANDARD_STREAM:
        if target == "jsonl":
            return None
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="unmask-encode-")))
        return stack.enter_context(closing(Spool(folder / "spool", None)))
    output = Path(job.output)
    if output.is_dir():
        raise UsageError(f"{output} is a folder; name a file in it")
    if job.input != STANDARD_STREAM and output.exists() and output.samefile(job.input):
        raise UsageError(f"{output} is the input as well; choose another --output")
    spool = stack.enter_context(closing(Spool(output.with_name(f".{output.name}.partial"), output)))
    spool.prepare(output, job.restart)
    return spool


def _options(job: EncodeJob, encoder: Encoder, target: str) -> dict[str, Any]:
    """Everything but the texts that decides a byte of the output, by the name a user knows it by."""
    # What the model makes of a probe stands for its template, special tokens and pooled positions.
    probe = encoder.prompts.build(["probe"], job.instruction)[0]
    return {
        "model": encoder.checkpoint.revision,
        "compat": encoder.compat,
        "pooling": encoder.pooling,
        "max_length": encoder.max_length,
        "dtype": encoder.precision,
        "device": encoder.device.type,
        "instruction": job.instruction,
        "prompt": hashlib.sha256(repr((probe.pooled, probe.ids.tolist())).encode()).hexdigest()[:16],
        "normalize": job.normalize,
        "dimensions": job.dimensions,
        "on_empty": job.on_empty,
        "on_long": job.on_long,
        "output_format": target,
        "chunk": [CHUNK_ROWS, CHUNK_CHARACTERS],
    }


def _require_same_texts(
    job: EncodeJob, texts: Iterator[str], rows: int, digest: "hashlib._Hash", spool: "Spool"
) -> None:
    """Read the rows that are already encoded again, into `digest`."""
    for text in islice(texts, rows):
        _add(digest, text)
    if digest.hexdigest() != spool.texts_sha256:
        raise UsageError(
            f"{label_of(job.input)} has changed: its first {rows:,} rows are not those that the unfinished run in "
            f"{spool.folder} encoded; restore it, or add --restart to begin again"
        )


def _add(digest: "hashlib._Hash", text: str) -> None:
    content = text.encode()
    digest.update(len(content).to_bytes(8, "little"))  # so that a text's end cannot move unnoticed
    digest.update(content)


def _tokenised(
    encoder: Encoder, job: EncodeJob, chunks: Iterator[tuple[list[str], bool]], first: int
) -> Iterator[tuple[list[str], bool, list[Prompt | None]]]:
    """Each chunk, whether it is full, and its prompts. `first` is the first text's index."""
    for chunk, full in chunks:
        yield chunk, full, _prompts(encoder, job, chunk, first)
        first += len(chunk)


def _prompts(encoder: Encoder, job: EncodeJob, texts: list[str], first: int) -> list[Prompt | None]:
    """One prompt per text, None for an empty one if the job allows it. `first` is the first text's index."""
    truncate = job.on_long == "truncate"
    try:
        return list(encoder.prompts.build(texts, job.instruction, truncate))
    except InputError as error:
        if error.index is None:
            raise  # not a text's fault but the instruction's
    prompts: list[Prompt | None] = []
    for index, text in enumerate(texts, first):
        place = f"{label_of(job.input)}: row {index + 1:,} (index {index} in the output)"
        try:
            prompts += encoder.prompts.build([text], job.instruction, truncate)
        except EmptyText as error:
            if job.on_empty == "error":
                raise EmptyText(f"{place} is empty; remove it, or add --on-empty null", index) from error
            prompts.append(None)
        except TextTooLong as error:
            tokens = int(encoder.count_tokens([text], instruction=job.instruction)[0])
            raise TextTooLong(
                f"{place} has {tokens:,} tokens, too many for the model's {encoder.max_length:,}; "
                "shorten it, or add --on-long truncate",
                index,
            ) from error
    return prompts


def _vectors(encoder: Encoder, job: EncodeJob, prompts: list[Prompt | None], first: int) -> np.ndarray:
    """Finished vectors, float32 [n, dim]; a row without prompt is NaN, and no other has one."""
    encoded_rows = [row for row, prompt in enumerate(prompts) if prompt is not None]
    raw = encoder.encode_prompts([prompt for prompt in prompts if prompt is not None])
    finite = np.isfinite(raw).all(axis=1)
    if not finite.all():
        index = first + encoded_rows[int(np.argmin(finite))]
        raise CheckpointError(
            f"{encoder.name} gives row {index + 1:,} of {label_of(job.input)} a vector with NaN or infinity; "
            "load the model in float32, or check its weights"
        )
    vectors = postprocess(raw, normalize=job.normalize, dimensions=job.dimensions)
    padded = np.full((len(prompts), vectors.shape[1]), np.nan, dtype=np.float32)
    padded[encoded_rows] = vectors
    return padded
