"""Tables in files: txt, jsonl, csv, tsv and parquet, read row by row. Text formats may be gzipped.

Bulk encoding, training and evaluation read their files here, and a file has the same rows for all of them. No row is
dropped in silence. A row that cannot be read stops the reader with an error that names its line, or, if the caller
passes `on_bad_row`, is reported and skipped. Callers choose between the two; they do not choose which rows are bad.

All text files are UTF-8, with or without a byte order mark. Only `\\n` ends a line, with one `\\r` before it if there
is one; U+2028 and a lone `\\r` belong to the text. Tsv has no quoting: a quote is a character, and a text with a tab or
a line break needs csv or jsonl. (IANA's text/tab-separated-values; natural text is full of quotes that close nothing.)
A quote in csv that breaks RFC 4180 stops every caller, since the rows after it are not known.
"""

import csv
import gzip
import itertools
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn, cast

from unmask.errors import TableError, UsageError

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

FORMATS = ("tsv", "csv", "jsonl", "parquet", "txt")
_ALIASES = {"ndjson": "jsonl"}

# A longer line is a binary file or an unclosed quote; without a limit it would be read into memory whole.
MAX_LINE_BYTES = 64 * 2**20
# Rows of a parquet file that are decoded at a time.
PARQUET_ROWS = 1024

OnBadRow = Callable[[str, str], None]
"""Receives the place (`pairs.tsv:17`) and the reason of each row that cannot be read."""

# A surrogate stands for a byte that is not UTF-8 (PEP 383) or comes from a JSON escape. No tokenizer takes it.
_SURROGATE = re.compile("[\ud800-\udfff]")
_JSON_NAMES = {type(None): "null", bool: "boolean", int: "number", float: "number", list: "list", str: "string"}


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a table.

    Attributes:
        fields: values by column name.
        source: name of the file or data set, as messages give it.
        number: line of a text file (the last one of a row over several lines), row of a parquet file; from 1.
    """

    fields: dict[str, Any]
    source: str
    number: int

    @property
    def place(self) -> str:
        """Return the place of the row as in `triplets.tsv.gz:17`."""
        return f"{self.source}:{self.number}"

    def text(self, column: str) -> str:
        """Return the text of a column; "" for null.

        Raises:
            ValueError: the row has no such field, or the field is not a text.
        """
        if column not in self.fields:
            raise ValueError(f"no field {column!r}; it has the fields {list_names(list(self.fields))}")
        value = self.fields[column]
        if value is None:
            return ""
        if not isinstance(value, str):
            raise ValueError(f"field {column!r}: {json_name(value)} found where a string is needed")
        if (half := first_surrogate(value)) is not None:
            raise ValueError(
                f"field {column!r}: \\u{ord(half):04x} is half a surrogate pair, not a character; repair it"
            )
        return value


@dataclass(frozen=True)
class Table:
    """An open table.

    Attributes:
        source: its name, as messages give it.
        columns: names of the columns in order; None for txt and jsonl, where only the rows can tell.
        types: column -> Arrow type of its values (`string`, `int64`), for parquet only.
    """

    source: str
    columns: tuple[str, ...] | None
    _read: Callable[[Sequence[str] | None], Iterator[Row]] = field(repr=False)
    types: Mapping[str, str] = field(default_factory=dict)

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[Row]:
        """Yield the rows in order. Call it once.

        Args:
            columns: the columns that the caller reads; default: all. Of a parquet file only they are decoded; other
                formats give all of theirs.

        Raises:
            UsageError: there is no such column, or two have its name; or a row cannot be read and the table was opened
                without `on_bad_row`.
            TableError: the file is damaged.
        """
        if self.columns is not None:
            counts = Counter(self.columns)
            # Columns without a name, as spreadsheets write them, cannot be asked for.
            chosen = filter(None, self.columns) if columns is None else columns
            twice = next((name for name in chosen if counts[name] > 1), None)
            if twice is not None:
                raise UsageError(f"{self.source} has {counts[twice]} columns named {twice!r}; rename all but one")
            missing = next((name for name in columns or () if name not in counts), None)
            if missing is not None:
                raise UsageError(
                    f"{self.source} has no column {missing!r}; it has the columns {list_names(self.columns)}"
                )
        return self._read(columns)


def table_format(path: Path) -> str | None:
    """Return the format that a file name ends in, `.gz` and case left aside; None if it is none of FORMATS.

    >>> table_format(Path("pairs.v2.TSV.gz"))
    'tsv'
    """
    suffixes = [suffix.lower().removeprefix(".") for suffix in path.suffixes if suffix.lower() != ".gz"]
    ending = _ALIASES.get(suffixes[-1], suffixes[-1]) if suffixes else None
    return ending if ending in FORMATS else None


def open_binary(path: Path) -> IO[bytes]:
    """Open a file for reading; a name that ends in `.gz` is decompressed on the way. Raises OSError."""
    return decompressed(path.open("rb"), path.name)


def decompressed(stream: IO[bytes], name: str) -> IO[bytes]:
    """Return the content of a stream: decompressed where the name ends in `.gz`, else the stream itself."""
    return cast(IO[bytes], _GzipReader(stream)) if name.lower().endswith(".gz") else stream


class _GzipReader(gzip.GzipFile):
    """A gzip reader that closes the compressed stream with it, which `GzipFile` leaves open."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        super().__init__(fileobj=stream, mode="rb")

    def close(self) -> None:
        super().close()
        self._stream.close()


def open_table(
    stream: IO[bytes],
    file_format: str,
    source: str,
    *,
    text_column: str = "text",
    on_bad_row: OnBadRow | None = None,
) -> Table:
    """Open a table; its header is read at once.

    Args:
        stream: the content, decompressed; seekable for parquet.
        file_format: one of FORMATS.
        source: name of the file for messages and places.
        text_column: column name for lines of a txt file and for jsonl lines that are a string instead of an object.
        on_bad_row: called for every row that cannot be read: too few or too many fields, bytes that are not UTF-8, no
            JSON, a blank line (in txt and in tsv of one column it is an empty text). The other rows are read then.
            Without it, the first bad row raises.

    Raises:
        UsageError: the header cannot be read, or (while iterating) a quote in csv closes nothing or too early.
        TableError: the file is damaged.
    """
    if file_format == "parquet":
        return _open_parquet(stream, source)
    reader = _TextReader(stream, source, on_bad_row)
    if file_format == "txt":
        return Table(source, None, lambda _: reader.txt(text_column))
    if file_format == "jsonl":
        return Table(source, None, lambda _: reader.jsonl(text_column))
    columns, rows = reader.tsv() if file_format == "tsv" else reader.csv()
    return Table(source, columns, lambda _: rows)


def read_table(
    path: Path,
    *,
    columns: Sequence[str] | None = None,
    text_column: str = "text",
    on_bad_row: OnBadRow | None = None,
) -> Iterator[Row]:
    """Yield the rows of a file in the format of its name, gzipped or not.

    Args:
        columns: as in `Table.rows`.
        text_column, on_bad_row: as in `open_table`.

    Raises:
        OSError: the file cannot be opened.
        UsageError, TableError: as `open_table` and `Table.rows`.
    """
    with open_binary(path) as stream:
        table = open_table(stream, table_format(path) or "", path.name, text_column=text_column, on_bad_row=on_bad_row)
        yield from table.rows(columns)


def list_names(names: Sequence[str]) -> str:
    """Return names of columns for a message, the first ten of many."""
    return (", ".join(repr(name) for name in names[:10]) + (", ..." if len(names) > 10 else "")) or "(none)"


def first_surrogate(text: str) -> str | None:
    """Return the first half of a surrogate pair in a text, which no encoding can hold; None if there is none."""
    if text.isascii():
        return None
    match = _SURROGATE.search(text)
    return match.group() if match else None


def open_parquet(stream: IO[bytes], source: str) -> "ParquetFile":
    """Open a parquet file without reading any row.

    Raises:
        TableError: it is not parquet.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # Buffered reads in small pieces: by default a column of a whole row group, often the file, goes into memory.
        return pq.ParquetFile(stream, buffer_size=2**20, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise TableError(f"{source} is not a readable parquet file: {_one_line(error)}") from error


def _open_parquet(stream: IO[bytes], source: str) -> Table:
    import pyarrow as pa
    import pyarrow.types as arrow_types

    file = open_parquet(stream, source)
    schema = file.schema_arrow
    types = {
        name: str(kind.value_type if arrow_types.is_dictionary(kind) else kind)
        for name, kind in zip(schema.names, schema.types, strict=True)
    }

    def rows(columns: Sequence[str] | None) -> Iterator[Row]:
        number = 0
        try:
            for batch in file.iter_batches(PARQUET_ROWS, columns=None if columns is None else list(columns)):
                for values in zip(*batch.columns, strict=True):
                    number += 1
                    fields = {name: _parquet_value(value, name, source, number)
                              for name, value in zip(batch.schema.names, values, strict=True)}  # fmt: skip
                    yield Row(fields, source, number)
        except (pa.ArrowException, OSError) as error:
            raise TableError(f"{source}: damaged after row {number}: {_one_line(error)}") from error

    return Table(source, tuple(schema.names), rows, types)


def _parquet_value(value: Any, column: str, source: str, number: int) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        raise UsageError(f"{source}, row {number}: {column!r} is not UTF-8; repair the text") from error


@dataclass(frozen=True)
class _TextReader:
    """Readers of the text formats over one stream."""

    stream: IO[bytes]
    source: str
    on_bad_row: OnBadRow | None

    def bad(self, number: int, problem: str, advice: str = "") -> None:
        """Report a bad row, or raise UsageError if nobody listens."""
        if self.on_bad_row is None:
            self.stop(number, problem, advice)
        else:
            self.on_bad_row(f"{self.source}:{number}", problem)

    def stop(self, number: int, problem: str, advice: str) -> NoReturn:
        """Raise UsageError: the rows after this line cannot be known."""
        raise UsageError(f"{self.source}, line {number}: {problem}" + (f"; {advice}" if advice else ""))

    def lines(self, *, skip_bad: bool = True) -> Iterator[tuple[int, str]]:
        """Yield decoded lines with their `\\n`, numbered from 1.

        Args:
            skip_bad: leave out a line that is not UTF-8 after reporting it. Otherwise its bad bytes become surrogates,
                because it may be a part of a row.
        """
        for number in itertools.count(1):
            try:
                line = self.stream.readline(MAX_LINE_BYTES)
            except (OSError, EOFError, zlib.error) as error:
                raise TableError(f"{self.source} cannot be read to its end (line {number}): {error}") from error
            if not line:
                return
            if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                advice = "check that this is the right file and --input-format"
                self.stop(number, f"longer than {MAX_LINE_BYTES // 2**20} MiB", advice)
            if number == 1 and _is_utf16(line[:64]):
                self.stop(number, "the file is UTF-16", "convert it first: iconv -f utf-16 -t utf-8")
            encoding = "utf-8-sig" if number == 1 else "utf-8"
            try:
                text = line.decode(encoding)
            except UnicodeDecodeError as error:
                advice = "convert the file first, for example with iconv -f latin1 -t utf-8"
                self.bad(number, f"byte {error.start + 1} of the line is not UTF-8", advice)
                if skip_bad:
                    continue
                text = line.decode(encoding, "surrogateescape")
            if text:  # empty only where a file is nothing but its byte order mark
                yield number, text

    def txt(self, column: str) -> Iterator[Row]:
        for number, line in self.lines():
            yield Row({column: _without_ending(line)}, self.source, number)

    def jsonl(self, bare_column: str) -> Iterator[Row]:
        """Yield objects; a bare string is the field `bare_column`."""
        for number, line in self.lines():
            if not line.strip():
                self.bad(number, "blank, so it is no JSON", "remove the line")
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                self.bad(number, f"not JSON ({error})", "each line is one object or string")
                continue
            if isinstance(value, str):
                value = {bare_column: value}
            if isinstance(value, dict):
                yield Row(value, self.source, number)
            else:
                self.bad(number, f"{json_name(value)} found where an object or a string is needed")

    def tsv(self) -> tuple[tuple[str, ...], Iterator[Row]]:
        """Return the columns and the rows of a tsv file."""
        records = ((number, _without_ending(line).split("\t")) for number, line in self.lines(skip_bad=False))
        return self._rows(records, "tsv has no quoting: a text with a tab or a line break needs csv or jsonl")

    def csv(self) -> tuple[tuple[str, ...], Iterator[Row]]:
        """Return the columns and the rows of a csv file."""
        return self._rows(self._csv_records(), "quote fields that hold the separator, and remove blank lines")

    def _rows(self, records: Iterator[tuple[int, list[str]]], advice: str) -> tuple[tuple[str, ...], Iterator[Row]]:
        """Split records into the header and the rows that have a field for each of its columns."""
        _, header = next(records, (0, None))
        if header is None:
            raise UsageError(f"{self.source} is empty; its first line must name the columns")
        if any(map(first_surrogate, header)):
            raise UsageError(f"{self.source}: its first line must name the columns, and is not UTF-8")

        def rows() -> Iterator[Row]:
            for number, values in records:
                if any(map(first_surrogate, values)):
                    continue  # reported with its line already
                if self._fits(number, values, header, advice):
                    yield Row(dict(zip(header, values, strict=True)), self.source, number)

        return tuple(header), rows()

    def _csv_records(self) -> Iterator[tuple[int, list[str]]]:
        """Yield the fields of each record with the number of its last line."""
        # The module's own limit of 131,072 characters would refuse long texts.
        csv.field_size_limit(MAX_LINE_BYTES)
        # `strict`, because otherwise an unclosed quote silently makes one row of many.
        reader = csv.reader((line for _, line in self.lines(skip_bad=False)), strict=True)
        first_line = 1
        while True:
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                self.stop(first_line, str(error), "check its quotes (a quote in a quoted field is doubled)")
            yield reader.line_num, values
            first_line = reader.line_num + 1

    def _fits(self, number: int, values: Sequence[str], header: Sequence[str], advice: str) -> bool:
        if len(values) == len(header):
            return True
        self.bad(number, f"{len(values)} fields where the header has {len(header)}", advice)
        return False


def _is_utf16(beginning: bytes) -> bool:
    """True for a byte order mark of UTF-16, or where a quarter is NUL: UTF-16 has one beside each ASCII letter.

    Such a file can be valid UTF-8, and read as UTF-8 or Latin-1 it gives texts with NULs between the letters.
    """
    return beginning.startswith((b"\xff\xfe", b"\xfe\xff")) or 4 * beginning.count(0) >= len(beginning)


def _without_ending(line: str) -> str:
    """Return a line without its `\\n` and the `\\r` before it."""
    return line[:-1].removesuffix("\r") if line.endswith("\n") else line


def json_name(value: object) -> str:
    """Return the JSON name of a decoded value's type: null, boolean, number, list, string or object."""
    return _JSON_NAMES.get(type(value), "object")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
