"""Files of bulk encoding: readers of texts (txt, jsonl, csv, tsv, parquet), writers of vectors (npy, parquet, jsonl).

A reader gives one text per row, in order, with a few rows in memory. It never skips a row: a row that cannot be read
is an error that names the file and the line. A null in a table is an empty text.

The formats are those of `unmask.tables`, which training and evaluation read too. A text file may be gzipped.
"""

import io
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, BinaryIO

import numpy as np

from unmask.disk import storage_errors
from unmask.errors import StorageError, UsageError
from unmask.tables import Row, list_names, open_binary, open_parquet, open_table, table_format

INPUT_FORMATS = ("txt", "jsonl", "csv", "tsv", "parquet")
OUTPUT_FORMATS = ("npy", "parquet", "jsonl")
STANDARD_STREAM = "-"

# Bytes set aside at the start of an npy file, so that its header can be written when the rows are known.
NPY_HEADER_BYTES = 128


def format_of(name: str, chosen: str | None, formats: Sequence[str], standard: str, option: str) -> str:
    """The format of a file: `chosen`, else from the ending of its name.

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
    """An input's name as messages give it."""
    return "standard input" if name == STANDARD_STREAM else name


def row_count(name: str, file_format: str) -> int | None:
    """Rows of a file, for display only: a quote inside an unquoted csv field makes it inexact.

    None where it cannot be known without using the input up or decompressing it: standard input, a pipe, a gzipped or a
    damaged file.
    """
    if name == STANDARD_STREAM or not Path(name).is_file() or Path(name).suffix.lower() == ".gz":
        return None
    try:
        with Path(name).open("rb") as stream:
            if file_format == "parquet":
                return open_parquet(stream, name).metadata.num_rows
            return _count_records(stream, file_format == "csv") - (file_format in ("csv", "tsv"))
    except (UsageError, OSError):
        return None


def _count_records(stream: BinaryIO, quoted: bool) -> int:
    ended, inside, block = 0, 0, b"\n"
    while more := stream.read(2**20):
        block = more
        # Every second part between quotes is inside a field, where a newline ends nothing.
        parts = block.split(b'"') if quoted else [block]
        ended += sum(part.count(b"\n") for part in parts[inside::2])
        inside = (inside + len(parts) - 1) % 2
    return ended + (not block.endswith(b"\n"))


@contextmanager
def open_texts(name: str, file_format: str, column: str = "text") -> Iterator[Iterator[str]]:
    """Yield an iterator over the texts of a file; the header and the column are checked at once.

    Args:
        name: a path, or `-` for standard input.
        file_format: one of INPUT_FORMATS.
        column: where the text is, in all formats but txt.

    Raises:
        UsageError: the file cannot be read, has no such column, or (while iterating) a row is not a text.
        StorageError: there is no space to set a piped parquet file aside.
    """
    label = label_of(name)
    with ExitStack() as stack:
        if name == STANDARD_STREAM:
            stream: IO[bytes] = sys.stdin.buffer
        else:
            try:
                stream = stack.enter_context(open_binary(Path(name)))
            except OSError as error:
                raise UsageError(f"cannot read {name}: {error.strerror or error}") from error
        if file_format == "parquet" and not stream.seekable():
            stream = stack.enter_context(_set_aside(stream, label))
        yield _texts(stream, file_format, label, column)


def chunks(texts: Iterable[str], rows: int, characters: int, max_characters: int) -> Iterator[tuple[list[str], bool]]:
    """Texts in lists, each with True if the list is full; only the last may not be.

    Args:
        rows, characters: a chunk is full at the first of these.
        max_characters: characters of one text that count, however long it is.
    """
    chunk: list[str] = []
    counted = 0
    for text in texts:
        chunk.append(text)
        counted += min(len(text), max_characters)
        if len(chunk) == rows or counted >= characters:
            yield chunk, True
            chunk, counted = [], 0
    if chunk:
        yield chunk, False


def _set_aside(pipe: IO[bytes], label: str) -> IO[bytes]:
    """A temporary copy of a pipe: parquet keeps its index at the end."""
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
    """The first NPY_HEADER_BYTES of an npy file, version 1.0, that holds float32 [rows, dim] in C order."""
    shape = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {dim}), }}"
    length = NPY_HEADER_BYTES - 10
    return b"\x93NUMPY\x01\x00" + length.to_bytes(2, "little") + shape.ljust(length - 1).encode() + b"\n"


def jsonl_lines(vectors: np.ndarray, first: int) -> bytes:
    """One `{"index": i, "embedding": [...]}` per row of float32 [n, dim], counted from `first`.

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


def write_parquet(target: Path, blocks: Iterable[np.ndarray], dim: int) -> None:
    """Write blocks of vectors, each float32 [n, dim], as `index` (int64) and `embedding` (float32 list).

    A row of NaN is null; each block is a row group. Raises OSError.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        [
            pa.field("index", pa.int64(), nullable=False),
            pa.field("embedding", pa.list_(pa.field("item", pa.float32(), nullable=False), dim)),
        ]
    )
    first = 0
    # A dictionary of floats would only cost time and memory: hardly two are equal.
    with pq.ParquetWriter(target, schema, use_dictionary=False) as writer:
        for block in blocks:
            index = pa.array(np.arange(first, first + len(block)))
            numbers, empty = pa.array(block.reshape(-1)), pa.array(np.isnan(block[:, 0]))
            vectors = pa.FixedSizeListArray.from_arrays(numbers, type=schema.field("embedding").type, mask=empty)
            writer.write_table(pa.table([index, vectors], schema=schema))
            first += len(block)


def write_out(content: bytes | BinaryIO) -> None:
    """Write bytes, or all of a file, to standard output.

    Raises:
        StorageError: it was closed, or leads to a full disk.
    """
    with storage_errors("standard output"):
        if isinstance(content, bytes):
            sys.stdout.buffer.write(content)
        else:
            shutil.copyfileobj(content, sys.stdout.buffer)
        sys.stdout.buffer.flush()
