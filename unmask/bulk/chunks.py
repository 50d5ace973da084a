"""Chunks: rows that are encoded together. Their borders follow from the texts alone.

A vector's last bits may depend on the other texts of its pack. So whoever encodes a chunk, in whichever run, must have
the same texts in it; then the vectors are the same too.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from unmask.bulk.encode_job import EncodeJob
from unmask.bulk.files import label_of
from unmask.encoder.encoder import Encoder, postprocess
from unmask.encoder.prompts import Prompt
from unmask.errors import CheckpointError, EmptyText, InputError, TextTooLong

# A chunk ends at the first of these: enough to fill packs well, little enough to lose when killed.
CHUNK_ROWS = 1024
CHUNK_CHARACTERS = 128 * 1024
# A longer text is cut to the model's length, so no more of it than this counts towards a chunk.
CHARACTERS_PER_TOKEN = 4


@dataclass(frozen=True)
class Chunk:
    """Rows of one file that are encoded together.

    Attributes:
        file: number of the file among the inputs, from 0.
        source: name of the file.
        first: number of its first row in the file, from 0.
        texts: the texts of its rows.
        full: False for the last chunk of a file, unless it is as large as others.
        characters: number of characters that the model reads of them.
    """

    file: int
    source: str
    first: int
    texts: list[str]
    full: bool
    characters: int


def cut(texts: Iterable[str], file: int, source: str, max_length: int, first: int = 0) -> Iterator[Chunk]:
    """Cut the texts of a file into chunks.

    Args:
        file, source: number and name of the file.
        max_length: tokens of a text that the model reads; characters beyond them do not count.
        first: number of the first of these texts in the file.
    """
    longest = CHARACTERS_PER_TOKEN * max_length
    chunk: list[str] = []
    characters = 0
    for text in texts:
        chunk.append(text)
        characters += min(len(text), longest)
        if len(chunk) == CHUNK_ROWS or characters >= CHUNK_CHARACTERS:
            yield Chunk(file, source, first, chunk, True, characters)
            first += len(chunk)
            chunk, characters = [], 0
    if chunk:
        yield Chunk(file, source, first, chunk, False, characters)


def add_text(digest: "hashlib._Hash", text: str) -> None:
    """Add a text to a digest, with its length, so that a text's end cannot move unnoticed."""
    content = text.encode()
    digest.update(len(content).to_bytes(8, "little"))
    digest.update(content)


def chunk_prompts(encoder: Encoder, job: EncodeJob, chunk: Chunk) -> list[Prompt | None]:
    """Build one prompt per text; None for an empty one if the job allows it.

    Raises:
        EmptyText, TextTooLong: with the row's number in the file, where the job says that these are errors.
    """
    truncate = job.on_long == "truncate"
    try:
        return list(encoder.prompts.build(chunk.texts, job.instruction, truncate))
    except InputError as error:
        if error.index is None:
            raise  # not a text's fault but the instruction's
    prompts: list[Prompt | None] = []
    for index, text in enumerate(chunk.texts, chunk.first):
        place = f"{label_of(chunk.source)}: row {index + 1:,} (index {index})"
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


def chunk_vectors(encoder: Encoder, job: EncodeJob, prompts: list[Prompt | None], chunk: Chunk) -> np.ndarray:
    """Compute finished vectors, float32 [n, dim]; a row without prompt is NaN, and no other has one.

    Raises:
        CheckpointError: the model gives numbers that are not finite.
    """
    encoded_rows = [row for row, prompt in enumerate(prompts) if prompt is not None]
    raw = encoder.encode_prompts([prompt for prompt in prompts if prompt is not None])
    finite = np.isfinite(raw).all(axis=1)
    if not finite.all():
        row = chunk.first + encoded_rows[int(np.argmin(finite))]
        raise CheckpointError(
            f"{encoder.name} gives row {row + 1:,} of {label_of(chunk.source)} a vector with NaN or infinity; "
            "load the model in float32, or check its weights"
        )
    vectors = postprocess(raw, normalize=job.normalize, dimensions=job.dimensions)
    padded = np.full((len(prompts), vectors.shape[1]), np.nan, dtype=np.float32)
    padded[encoded_rows] = vectors
    return padded


def model_options(job: EncodeJob, encoder: Encoder) -> dict[str, object]:
    """Return everything of a model that decides a byte of the output, by the name a user knows it by."""
    # The prompt of a probe text represents the model's template, special tokens and pooled positions.
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
    }


def job_options(job: EncodeJob, of_model: Mapping[str, object], output_format: str) -> dict[str, object]:
    """Return everything but the texts that decides a byte of the output, with `model_options`."""
    return {
        **of_model,
        "normalize": job.normalize,
        "dimensions": job.dimensions,
        "on_empty": job.on_empty,
        "on_long": job.on_long,
        "output_format": output_format,
        "chunk": [CHUNK_ROWS, CHUNK_CHARACTERS],
    }
