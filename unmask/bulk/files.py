"""The files of bulk encoding: texts in (txt, jsonl, csv, tsv, parquet), vectors out (npy, parquet, jsonl).

A reader gives one text per row, in order, holding a few rows in memory. No row is ever skipped: what cannot be
read is an error that names the file and the line. A null in a table is an empty text.

In a txt file only `\\n` ends a line, with one `\\r` before it if there is one; every other character belongs to
the text, U+2028 and a lone `\\r` included. All text files are UTF-8, with or without a byte order mark.
"""

import csv
import io
import itertools
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, BinaryIO

import numpy as np

from unmask.disk import storage_errors
from unmask.errors import StorageError, UsageError

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

INPUT_FORMATS = ("txt", "jsonl", "csv", "tsv", "parquet")
OUTPUT_FORMATS = ("npy", "parquet", "jsonl")
STANDARD_STREAM = "-"

# A longer line is a binary file or an unclosed quote; without a limit it would be read into memory whole.
MAX_LINE_BYTES = 64 * 2**20
# Rows of a parquet file decoded at a time.
PARQUET_ROWS = 1024
# Bytes set aside at the start of an npy file, so that its header can be written when the rows are known.
NPY_HEADER_BYTES = 128


def format_of(name: str, chosen: str | None, formats: Sequence[str], standard: str, option: str) -> str:
    """The format of a file: as chosen, else by the ending of its name.

    Args:
        name: a path, or `-`.
        chosen: what the user said, if anything.
        formats: those that exist.
        standard: the one for `-`.
        option: how the user can say it, for the message.

    Raises:
        UsageError: no such format, or the name does not tell.
    """
    if chosen is not None:
        if chosen not in formats:
            raise UsageError(f"{option} {chosen}: choose one of {', '.join(formats)}")
        return chosen
    if name == STANDARD_STREAM:
        return standard
    ending = Path(name).suffix.lower().removeprefix(".")
    ending = "jsonl" if ending == "ndjson" else ending
    if ending not in formats:
        raise UsageError(f"the name {name} does not tell its format; add {option} with one of {', '.join(formats)}")
    return ending


def label_of(name: str) -> str:
    """An input's name as messages give it."""
    return "standard input" if name == STANDARD_STREAM else name


def row_count(name: str, file_format: str) -> int | None:
    """Rows of a file, for display only: a quote inside an unquoted csv field makes it inexact.

    None where it cannot be known without using the input up: standard input, a pipe, or a damaged file.
    """
    if name == STANDARD_STREAM or not Path(name).is_file():
        return None
    try:
        with Path(name).open("rb") as stream:
            if file_format == "parquet":
                return _parquet_file(stream, name).metadata.num_rows
            quoted = file_format in ("csv", "tsv")
            return _count_records(stream, quoted) - quoted
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
                stream = stack.enter_context(Path(name).open("rb"))
            except OSError as error:
                raise UsageError(f"cannot read {name}: {error.strerror or error}") from error
        if file_format == "parquet" and not stream.seekable():
            stream = stack.enter_context(_set_aside(stream, label))
        yield _READERS[file_format](stream, label, column)


def chunks(texts: Iterable[str], rows: int, characters: int, longest: int) -> Iterator[tuple[list[str], bool]]:
    """Texts in lists, each with whether it is full; only the last may not be.

    Args:
        rows, characters: a chunk is full at the first of these.
        longest: characters of one text that count, however long it is.
    """
    chunk: list[str] = []
    counted = 0
    for text in texts:
        chunk.append(text)
        counted += min(len(text), longest)
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


def _lines(stream: IO[bytes], label: str) -> Iterator[tuple[int, str]]:
    """Decoded lines with their `\\n`, numbered from 1."""
    for number in itertools.count(1):
        try:
            line = stream.readline(MAX_LINE_BYTES)
        except OSError as error:
            raise UsageError(f"{label}, line {number}: cannot be read: {error.strerror or error}") from error
        if not line:
            return
        if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
            raise UsageError(
                f"{label}, line {number}: longer than {MAX_LINE_BYTES // 2**20} MiB; "
                "check that this is the right file and --input-format"
            )
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(
                f"{label}, line {number}: byte {error.start + 1} of the line is not UTF-8; "
                "convert the file first, for example with iconv -f latin1 -t utf-8"
            ) from error
        if text:  # empty only where a file is nothing but its byte order mark
            yield number, text


def _read_txt(stream: IO[bytes], label: str, _column: str) -> Iterator[str]:
    for _, line in _lines(stream, label):
        yield line[:-1].removesuffix("\r") if line.endswith("\n") else line


def _read_jsonl(stream: IO[bytes], label: str, column: str) -> Iterator[str]:
    for number, line in _lines(stream, label):
        place = f"{label}, line {number}"
        if not line.strip():
            raise UsageError(f"{place}: blank, so it is no JSON; remove the line")
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{place}: not JSON ({error}); each line is one object or string") from error
        if isinstance(value, dict):
            if column not in value:
                raise UsageError(f"{place}: no field {column!r}; {_choice('fields', list(value))}")
            value = "" if value[column] is None else value[column]
            place = f"{place}, field {column!r}"
        if not isinstance(value, str):
            kind = _JSON_NAMES.get(type(value), "object")
            raise UsageError(f"{place}: {kind} found where a string is needed; only strings are encoded")
        if not value.isascii():
            _require_characters(value, place)
        yield value


_JSON_NAMES = {type(None): "null", bool: "boolean", int: "number", float: "number", list: "list"}


def _require_characters(text: str, place: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = f"\\u{ord(text[error.start]):04x}"
        raise UsageError(f"{place}: {code} is half a surrogate pair, not a character; repair it") from error


def _read_csv(stream: IO[bytes], label: str, column: str) -> Iterator[str]:
    return _read_table(stream, label, column, ",")


def _read_tsv(stream: IO[bytes], label: str, column: str) -> Iterator[str]:
    return _read_table(stream, label, column, "\t")


def _read_table(stream: IO[bytes], label: str, column: str, delimiter: str) -> Iterator[str]:
    rows = _records(stream, label, delimiter)
    try:
        _, header = next(rows)
    except StopIteration:
        raise UsageError(f"{label} is empty; its first line must name the columns") from None
    _require_column(column, header, label)
    place = header.index(column)

    def texts() -> Iterator[str]:
        for number, fields in rows:
            if len(fields) != len(header):
                raise UsageError(
                    f"{label}, line {number}: {len(fields)} fields where the header has {len(header)}; "
                    "quote fields that hold the separator, and remove blank lines"
                )
            yield fields[place]

    return texts()


def _records(stream: IO[bytes], label: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Fields of each record, with the number of its last line."""
    # The module's own limit of 131,072 characters would refuse long texts.
    csv.field_size_limit(MAX_LINE_BYTES)
    # `strict`, because otherwise an unclosed quote silently makes one row of many.
    reader = csv.reader((line for _, line in _lines(stream, label)), delimiter=delimiter, strict=True)
    started = 1
    try:
        for fields in reader:
            yield reader.line_num, fields
            started = reader.line_num + 1
    except csv.Error as error:
        raise UsageError(
            f"{label}, line {started}: {error}; check its quotes (a quote in a quoted field is doubled)"
        ) from error


def _read_parquet(stream: IO[bytes], label: str, column: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.types as kinds

    file = _parquet_file(stream, label)
    schema = file.schema_arrow
    _require_column(column, schema.names, label)
    kind = schema.field(column).type
    kind = kind.value_type if kinds.is_dictionary(kind) else kind
    if not (kinds.is_string(kind) or kinds.is_large_string(kind) or kinds.is_string_view(kind)):
        raise UsageError(f"{label}: column {column!r} holds {kind}, not strings; choose with --column")

    def texts() -> Iterator[str]:
        row = 0
        try:
            for batch in file.iter_batches(PARQUET_ROWS, columns=[column]):
                for value in batch.column(0):
                    row += 1
                    text = value.as_py()
                    yield "" if text is None else text
        except UnicodeDecodeError as error:
            raise UsageError(f"{label}, row {row}: {column!r} is not UTF-8; repair the text") from error
        except (pa.ArrowException, OSError) as error:
            raise UsageError(f"{label}: damaged after row {row}: {_one_line(error)}") from error

    return texts()


def _parquet_file(stream: IO[bytes], label: str) -> "ParquetFile":
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # By pieces: left to itself, it reads the column of a row group, which may be the file, into memory whole.
        return pq.ParquetFile(stream, buffer_size=2**20, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise UsageError(f"{label} is not a parquet file: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _require_column(column: str, names: Sequence[str], label: str) -> None:
    found = list(names).count(column)
    if found == 0:
        raise UsageError(f"{label} has no column {column!r}; {_choice('columns', names)}")
    if found > 1:
        raise UsageError(f"{label} has {found} columns named {column!r}; rename all but one")


def _choice(what: str, names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:10]) + (", ..." if len(names) > 10 else "")
    return f"it has the {what} {shown or '(none)'}: choose with --column"


_READERS: dict[str, Callable[[IO[bytes], str, str], Iterator[str]]] = {
    "txt": _read_txt,
    "jsonl": _read_jsonl,
    "csv": _read_csv,
    "tsv": _read_tsv,
    "parquet": _read_parquet,
}


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
