"""Units: the pieces of work of an output in parts, each with its part and its manifest.

A unit is at most UNIT_CHUNKS whole chunks of one file, so its borders follow from the texts alone.
"""

import hashlib
import json
import os
import platform
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from itertools import groupby

import msgspec
import numpy as np

from unmask import __version__
from unmask.bulk.chunks import Chunk, add_text, chunk_prompts, chunk_vectors, job_options, model_options
from unmask.bulk.encode_job import EncodeJob
from unmask.bulk.files import OUTPUT_FORMATS, format_of, jsonl_part, npy_part, parquet_part
from unmask.bulk.report import Tally
from unmask.bulk.storage import PART_PREFIX, Store
from unmask.conformance.canaries import fixed_texts
from unmask.encoder.encoder import Encoder

UNIT_CHUNKS = 8
JOB_FILE, UNITS_FOLDER = "_unmask/job.json", "_unmask/units"
_PROBE_TEXTS = 16


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
        options_sha256: see `options_digest`; empty in an output of an earlier version.
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
    options_sha256: str = ""

    @property
    def tally(self) -> Tally:
        """Return the counts of the unit."""
        return Tally(self.rows, self.tokens, self.truncated, self.empty)


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
        self._options_sha256 = options_digest(parts_options(job, model_options(job, encoder)))
        self.probe = probe_digest(encoder)

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
        part = f"{PART_PREFIX}{unit.name}.{self._format}"
        self._store.put(part, content)
        manifest = Manifest(
            unit=unit.name,
            file=source,
            first=first,
            texts_sha256=unit.texts_sha256(),
            options_sha256=self._options_sha256,
            part=part,
            bytes=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
            probe=self.probe,
            seconds=round(time.perf_counter() - began, 3),
            worker=f"{platform.node()}:{os.getpid()}",
            versions=package_versions(),
            **asdict(tally),
        )
        self._store.put(f"{UNITS_FOLDER}/{unit.name}.json", msgspec.json.format(msgspec.json.encode(manifest)) + b"\n")
        return manifest


def probe_digest(encoder: Encoder) -> str:
    """Return a digest of the vectors of a few fixed texts: equal for processors of one kind."""
    return hashlib.sha256(encoder.encode(probe_texts()).tobytes()).hexdigest()[:16]


def probe_texts() -> list[str]:
    """Return the fixed texts of the probe."""
    return [canary.text for canary in fixed_texts()[:_PROBE_TEXTS]]


def part_format(job: EncodeJob) -> str:
    """Return the format of a job's parts.

    Raises:
        UsageError: there is no such format.
    """
    return format_of("parts.parquet", job.output_format, OUTPUT_FORMATS, "parquet", "--output-format")


def parts_options(job: EncodeJob, of_model: Mapping[str, object]) -> dict[str, object]:
    """Return everything but the texts that decides a byte of the parts, with `model_options`."""
    return job_options(job, of_model, part_format(job)) | {"unit_chunks": UNIT_CHUNKS}


def options_digest(options: Mapping[str, object]) -> str:
    """Return a digest of the options that decide a vector. The others decide which texts are errors."""
    deciding = {name: value for name, value in options.items() if name not in ("on_empty", "on_long")}
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()


def _part(file_format: str, vectors: np.ndarray, source: str, first: int) -> bytes:
    if file_format == "npy":
        return npy_part(vectors)
    return (parquet_part if file_format == "parquet" else jsonl_part)(vectors, source, first)


@cache
def package_versions() -> dict[str, str]:
    """Return the versions of what decides the last bits of a vector."""
    return {
        "unmask": __version__,
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "tokenizers", "numpy")},
    }
