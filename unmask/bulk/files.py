"""Files of bulk encoding: readers of texts (txt, jsonl, csv, tsv, parquet), writers of vectors (npy, parquet, jsonl).

A reader gives one text per row, in order, with a few rows in memory. It never skips a row: a row that cannot be read
is an error that names the file and the line. A null in a table is an empty text.

The formats are those of `unmask.tables`, which training and evaluation read too. A text file may be gzipped.
"""

import io
import json
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO

import numpy as np

from unmask.bulk.storage import STANDARD_STREAM, InputFile
from unmask.disk import storage_errors
from unmask.errors import StorageError, UsageError
from unmask.tables import Row, decompressed, list_names, open_parquet, open_table, table_format
from unmask.terminal import abandon_stdout

if TYPE_CHECKING:
    import pyarrow as pa

INPUT_FORMATS = ("txt", "jsonl", "csv", "tsv", "parquet")
OUTPUT_FORMATS = ("npy", "parquet", "jsonl")

# Bytes set aside at the start of an npy file, so that its header can be written when the rows are known.
NPY_HEADER_BYTES = 128


def format_of(name: str, chosen: str | None, formats: Sequence[str], standard: str, option: str) -> str:
    """Return the format of a file: `chosen`, else from the ending of its name.

    Args:
        name: a path, or `-`.
        chosen: the user's choice, if any.
        formats: all formats that exist.
        standard: the format for `-`.
        option: the option of `chosen`, for the message.

    Raises:
        UsageError: no such format, or the name has no known ending.
    """
    if chosen is not None:
        if chosen not in formats:
            raise UsageError(f"{option} {chosen}: choose one of {', '.join(formats)}")
        return chosen
    if name == STANDARD_STREAM:
        return standard
    # Inputs may be gzipped; an output named so would not be.
    ending = table_format(Path(name)) if formats is INPUT_FORMATS else Path(name).suffix.lower().removeprefix(".")
    if ending is None or ending not in formats:
        raise UsageError(f"the name {name} does not tell its format; add {option} with one of {', '.join(formats)}")
    return ending


def label_of(name: str) -> str:
    """Return an input's name as messages give it."""
    return "standard input" if name == STANDARD_STREAM else name


def row_count(file: InputFile, file_format: str) -> int | None:
    """Return the number of rows of a file, for display only: a quote inside an unquoted csv field makes it inexact.

    None where it cannot be known without using the input up, decompressing or downloading it: standard input, a pipe, a
    gzipped, remote or damaged file.
    """
    if not file.is_local or file.name.lower().endswith(".gz"):
        return None
    try:
        with file.open() as stream:
            if file_format == "parquet":
                return open_parquet(stream, file.name).metadata.num_rows
            return _count_records(stream, file_format == "csv") - (file_format in ("csv", "tsv"))
    except (UsageError, OSError):
        return None


def _count_records(stream: IO[bytes], quoted: bool) -> int:
    ended, inside, block = 0, 0, b"\n"
    while more := stream.read(2**20):
        block = more
        # Every second part between quotes is inside a field, where a newline ends nothing.
        parts = block.split(b'"') if quoted else [block]
        ended += sum(part.count(b"\n") for part in parts[inside::2])
        inside = (inside + len(parts) - 1) % 2
    return ended + (not block.endswith(b"\n"))


@contextmanager
def open_texts(file: InputFile, file_format: str, column: str = "text") -> Iterator[Iterator[str]]:
    """Yield an iterator over the texts of a file; the header and the column are checked at once.

    Args:
        file_format: one of INPUT_FORMATS.
        column: where the text is, in all formats but txt.

    Raises:
        UsageError: the file cannot be read, has no such column, or (while iterating) a row is not a text.
        StorageError: there is no space to set a piped parquet file aside.
    """
    label = label_of(file.name)
    with ExitStack() as stack:
        if file.name == STANDARD_STREAM:
            stream: IO[bytes] = sys.stdin.buffer
        else:
            stream = stack.enter_context(decompressed(file.open(), file.name))
        if file_format == "parquet" and not stream.seekable():
            stream = stack.enter_context(_set_aside(stream, label))
        yield _texts(stream, file_format, label, column)


def _set_aside(pipe: IO[bytes], label: str) -> IO[bytes]:
    """Return a temporary copy of a pipe: parquet keeps its index at the end."""
    copy = tempfile.TemporaryFile()  # noqa: SIM115 - the caller closes it
    try:
        shutil.copyfileobj(pipe, copy)
    except OSError as error:
        copy.close()
        folder = tempfile.gettempdir()
        raise StorageError(
            f"cannot copy {label} to {folder}: {error.strerror or error}; "
            "save it as a file and name that, or set TMPDIR to a larger disk"
        ) from error
    return copy


# Arrow types whose values are texts.
_STRING_TYPES = ("string", "large_string", "string_view")


def _texts(stream: IO[bytes], file_format: str, label: str, column: str) -> Iterator[str]:
    """Open the table and check its column at once; return an iterator over the texts of the column."""
    table = open_table(stream, file_format, label, text_column=column)
    if table.columns is not None and column not in table.columns:
        raise UsageError(
            f"{label} has no column {column!r}; it has the columns {list_names(table.columns)}: choose with --column"
        )
    rows = table.rows([column])
    if table.types and table.types[column] not in _STRING_TYPES:
        raise UsageError(f"{label}: column {column!r} holds {table.types[column]}, not strings; choose with --column")
    return (_text_of(row, column) for row in rows)


def _text_of(row: Row, column: str) -> str:
    try:
        return row.text(column)
    except ValueError as error:
        raise UsageError(f"{row.source}, line {row.number}: {error}; choose with --column") from error


def npy_header(rows: int, dim: int) -> bytes:
    """Return the first NPY_HEADER_BYTES of an npy file, version 1.0, that holds float32 [rows, dim] in C order."""
    shape = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {dim}), }}"
    length = NPY_HEADER_BYTES - 10
    return b"\x93NUMPY\x01\x00" + length.to_bytes(2, "little") + shape.ljust(length - 1).encode() + b"\n"


def jsonl_lines(vectors: np.ndarray, first: int) -> bytes:
    """Return one `{"index": i, "embedding": [...]}` per row of float32 [n, dim], counted from `first`.

    A row of NaN is null. The numbers are the shortest that read back as the same float32.
    """
    import orjson

    lines = io.BytesIO()
    for index, vector in enumerate(np.ascontiguousarray(vectors), first):
        row = {"index": index, "embedding": None if np.isnan(vector[0]) else vector}
        lines.write(orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE))
    return lines.getvalue()


def write_jsonl(target: Path, blocks: Iterable[np.ndarray]) -> None:
    """Write blocks of vectors, each float32 [n, dim], as `jsonl_lines` does. Raises OSError."""
    first = 0
    with target.open("wb") as out:
        for block in blocks:
            out.write(jsonl_lines(block, first))
            first += len(block)


def write_parquet(target: Path, blocks: Iterable[np.ndarray], dim: int, made_with: Mapping[str, Any]) -> None:
    """Write blocks of vectors, each float32 [n, dim], as `index` (int64) and `embedding` (float32 list).

    A row of NaN is null; each block is a row group. `made_with` is JSON in the file's metadata, under "unmask". Raises
    OSError.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    fields = [pa.field("index", pa.int64(), nullable=False), _embedding_field(dim)]
    schema = pa.schema(fields, metadata={"unmask": json.dumps(made_with)})
    first = 0
    # A dictionary of floats would only cost time and memory: hardly two are equal.
    with pq.ParquetWriter(target, schema, use_dictionary=False) as writer:
        for block in blocks:
            index = pa.array(np.arange(first, first + len(block)))
            writer.write_table(pa.table([index, _embeddings(block)], schema=schema))
            first += len(block)


def _embedding_field(dim: int) -> "pa.Field":
    import pyarrow as pa

    return pa.field("embedding", pa.list_(pa.field("item", pa.float32(), nullable=False), dim))


def _embeddings(block: np.ndarray) -> "pa.Array":
    """Return float32 [n, dim] as fixed-size lists; a row of NaN is null."""
    import pyarrow as pa

    numbers, empty = pa.array(block.reshape(-1)), pa.array(np.isnan(block[:, 0]))
    return pa.FixedSizeListArray.from_arrays(numbers, type=_embedding_field(block.shape[1]).type, mask=empty)


def npy_part(vectors: np.ndarray) -> bytes:
    """Return float32 [n, dim] as an npy file."""
    return npy_header(*vectors.shape) + vectors.astype("<f4", copy=False).tobytes()


def jsonl_part(vectors: np.ndarray, source: str, first: int) -> bytes:
    """Return one `{"file": ..., "index": ..., "embedding": [...]}` per row of float32 [n, dim]; a row of NaN is null.

    Args:
        source: name of the input file.
        first: number of the first row in it.
    """
    import orjson

    lines = io.BytesIO()
    for index, vector in enumerate(np.ascontiguousarray(vectors), first):
        row = {"file": source, "index": index, "embedding": None if np.isnan(vector[0]) else vector}
        lines.write(orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE))
    return lines.getvalue()


def parquet_part(vectors: np.ndarray, source: str, first: int) -> bytes:
    """Return float32 [n, dim] as `file` (string), `index` (int64) and `embedding`; arguments as in `jsonl_part`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        [
            pa.field("file", pa.string(), nullable=False),
            pa.field("index", pa.int64(), nullable=False),
            _embedding_field(vectors.shape[1]),
        ]
    )
    index = pa.array(np.arange(first, first + len(vectors)))
    columns = [pa.array([source] * len(vectors), pa.string()), index, _embeddings(vectors)]
    part = io.BytesIO()
    pq.write_table(pa.table(columns, schema=schema), part, use_dictionary=False)
    return part.getvalue()


def write_out(content: bytes | BinaryIO) -> None:
    """Write bytes, or all of a file, to standard output.

    Raises:
        StorageError: it leads to a full disk.
        BrokenPipeError: it is a pipe whose reader has ended.
    """
    try:
        with storage_errors("standard output"):
            if isinstance(content, bytes):
                sys.stdout.buffer.write(content)
            else:
                shutil.copyfileobj(content, sys.stdout.buffer)
            sys.stdout.buffer.flush()
    except (StorageError, BrokenPipeError):
        abandon_stdout()
        raise
