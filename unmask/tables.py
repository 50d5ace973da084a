"""Tables in files: txt, jsonl, csv, tsv and parquet, read row by row. Text formats may be gzipped.

Bulk encoding, training and evaluation read their files here. No row is dropped in silence. A row that cannot be read
stops the reader with an error that names its line, or, if the caller passes `on_bad_row`, is reported and skipped.

All text files are UTF-8, with or without a byte order mark. Only `\\n` ends a line; U+2028 and a lone `\\r` belong to
the text.
"""

import csv
import gzip
import itertools
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from unmask.errors import UsageError

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

FORMATS = ("tsv", "csv", "jsonl", "parquet", "txt")

# A longer line is a binary file or an unclosed quote; without a limit it would be read into memory whole.
MAX_LINE_BYTES = 64 * 2**20
# Rows of a parquet file that are decoded at a time.
PARQUET_ROWS = 1024

OnBadRow = Callable[[str, str], None]
"""Receives the place (`pairs.tsv:17`) and the reason of each row that cannot be read."""

# A surrogate stands for a byte that is not UTF-8 (PEP 383) or comes from a JSON escape. No tokenizer takes it.
_SURROGATE = re.compile("[\ud800-\udfff]")
_JSON_NAMES = {type(None): "null", bool: "boolean", int: "number", float: "number", list: "list", str: "string"}


class TableError(UsageError):
    """A file that is damaged as a whole: truncated, not gzip, not parquet."""


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
            columns: the only columns to decode in a parquet file; other formats give all of theirs.

        Raises:
            UsageError: a row cannot be read and the table was opened without `on_bad_row`.
            TableError: the file is damaged.
        """
        return self._read(columns)


def table_format(path: Path) -> str | None:
    """Return the format that a file name ends in, `.gz` left aside; None if it is none of FORMATS.

    >>> table_format(Path("pairs.v2.tsv.gz"))
    'tsv'
    """
    suffixes = [suffix.removeprefix(".") for suffix in path.suffixes if suffix != ".gz"]
    return suffixes[-1] if suffixes and suffixes[-1] in FORMATS else None


def open_binary(path: Path) -> IO[bytes]:
    """Open a file for reading; a name that ends in `.gz` is decompressed on the way. Raises OSError."""
    if path.suffix == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    return path.open("rb")


def open_table(
    stream: IO[bytes],
    file_format: str,
    source: str,
    *,
    quoted_tsv: bool = False,
    bare_strings: bool = False,
    text_column: str = "text",
    on_bad_row: OnBadRow | None = None,
) -> Table:
    """Open a table; its header is read at once.

    Args:
        stream: the content, decompressed; seekable for parquet.
        file_format: one of FORMATS.
        source: name of the file for messages and places.
        quoted_tsv: read tsv as csv with tabs. Otherwise a quote in a tsv file is a character like any other.
        bare_strings: accept jsonl lines that are a string instead of an object.
        text_column: column name for lines of a txt file and for bare strings.
        on_bad_row: called for every row that cannot be read; the other rows are read then. Blank lines are skipped,
            csv is read leniently, and a field with bytes that are not UTF-8 makes its row bad. Without it, the first
            bad row raises, and so does a blank line except in txt, where it is an empty text.

    Raises:
        UsageError: the header cannot be read.
        TableError: the file is damaged.
    """
    if file_format == "parquet":
        return _open_parquet(stream, source)
    reader = _TextReader(stream, source, on_bad_row)
    if file_format == "txt":
        return Table(source, None, lambda _: reader.checked(reader.txt(text_column)))
    if file_format == "jsonl":
        return Table(source, None, lambda _: reader.checked(reader.jsonl(text_column if bare_strings else None)))
    if file_format == "tsv" and not quoted_tsv:
        columns, rows = reader.tsv()
    else:
        columns, rows = reader.csv("\t" if file_format == "tsv" else ",")
    return Table(source, columns, lambda _: reader.checked(rows))


def read_table(path: Path, *, on_bad_row: OnBadRow | None = None) -> Iterator[Row]:
    """Yield the rows of a file in the format of its name, gzipped or not. Tsv is read without quoting.

    Raises:
        OSError: the file cannot be opened.
        UsageError, TableError: as `open_table` and `Table.rows`.
    """
    with open_binary(path) as stream:
        yield from open_table(stream, table_format(path) or "", path.name, on_bad_row=on_bad_row).rows()


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

    @property
    def lenient(self) -> bool:
        return self.on_bad_row is not None

    def bad(self, number: int, problem: str, advice: str = "") -> None:
        """Report a bad row, or raise UsageError if nobody listens."""
        if self.on_bad_row is not None:
            self.on_bad_row(f"{self.source}:{number}", problem)
            return
        raise UsageError(f"{self.source}, line {number}: {problem}" + (f"; {advice}" if advice else ""))

    def checked(self, rows: Iterator[Row]) -> Iterator[Row]:
        """Yield the rows; where bad rows are reported, those with a surrogate in a field are."""
        if not self.lenient:
            yield from rows
            return
        for row in rows:
            broken = next((name for name, value in row.fields.items() if _has_surrogate(value)), None)
            if broken is None:
                yield row
            else:
                self.bad(row.number, f"{broken} is not valid UTF-8")

    def lines(self) -> Iterator[tuple[int, str]]:
        """Yield decoded lines with their `\\n`, numbered from 1."""
        limit = -1 if self.lenient else MAX_LINE_BYTES
        for number in itertools.count(1):
            try:
                line = self.stream.readline(limit)
            except (OSError, EOFError, zlib.error) as error:
                raise TableError(f"{self.source} cannot be read to its end (line {number}): {error}") from error
            if not line:
                return
            if len(line) == limit and not line.endswith(b"\n"):
                advice = "check that this is the right file and --input-format"
                self.bad(number, f"longer than {MAX_LINE_BYTES // 2**20} MiB", advice)
            encoding = "utf-8-sig" if number == 1 else "utf-8"
            try:
                text = line.decode(encoding, "surrogateescape" if self.lenient else "strict")
            except UnicodeDecodeError as error:
                advice = "convert the file first, for example with iconv -f latin1 -t utf-8"
                self.bad(number, f"byte {error.start + 1} of the line is not UTF-8", advice)
                continue
            if text:  # empty only where a file is nothing but its byte order mark
                yield number, text

    def txt(self, column: str) -> Iterator[Row]:
        for number, line in self.lines():
            if self.lenient:
                if line.strip():
                    yield Row({column: line.rstrip("\r\n")}, self.source, number)
            else:
                text = line[:-1].removesuffix("\r") if line.endswith("\n") else line
                yield Row({column: text}, self.source, number)

    def jsonl(self, bare_column: str | None) -> Iterator[Row]:
        """Yield objects; bare strings too, as the field `bare_column`, unless it is None."""
        for number, line in self.lines():
            if not line.strip():
                if not self.lenient:
                    self.bad(number, "blank, so it is no JSON", "remove the line")
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                self.bad(number, f"not JSON ({error})", "each line is one object or string")
                continue
            if isinstance(value, str) and bare_column is not None:
                value = {bare_column: value}
            if isinstance(value, dict):
                yield Row(value, self.source, number)
            else:
                expected = "an object" if bare_column is None else "an object or a string"
                self.bad(number, f"{json_name(value)} found where {expected} is needed")

    def tsv(self) -> tuple[tuple[str, ...], Iterator[Row]]:
        """Return the columns and the rows of a tsv file without quoting."""
        lines = self.lines()
        _, first = next(lines, (1, ""))
        header = tuple(first.rstrip("\r\n").split("\t"))

        def rows() -> Iterator[Row]:
            for number, line in lines:
                line = line.rstrip("\r\n")
                if not line and len(header) > 1:
                    continue  # an empty line at the end of a file is no row
                values = line.split("\t")
                if self._fits(number, values, header):
                    yield Row(dict(zip(header, values, strict=True)), self.source, number)

        return header, rows()

    def csv(self, delimiter: str) -> tuple[tuple[str, ...], Iterator[Row]]:
        """Return the columns and the rows of a csv file."""
        records = self._csv_records(delimiter)
        header = tuple(next(records, (0, []))[1])
        if not header and not self.lenient:
            raise UsageError(f"{self.source} is empty; its first line must name the columns")

        def rows() -> Iterator[Row]:
            for number, values in records:
                if self.lenient and not values:
                    continue
                if self._fits(number, values, header):
                    yield Row(dict(zip(header, values, strict=True)), self.source, number)

        return header, rows()

    def _csv_records(self, delimiter: str) -> Iterator[tuple[int, list[str]]]:
        """Yield the fields of each record with the number of its last line."""
        # The module's own limit of 131,072 characters would refuse long texts.
        csv.field_size_limit(min(sys.maxsize, 2**31 - 1) if self.lenient else MAX_LINE_BYTES)
        # `strict`, because otherwise an unclosed quote silently makes one row of many.
        reader = csv.reader((line for _, line in self.lines()), delimiter=delimiter, strict=not self.lenient)
        first_line = 1
        while True:
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                if self.lenient:
                    self.bad(reader.line_num, f"not CSV ({error})")
                else:
                    self.bad(first_line, str(error), "check its quotes (a quote in a quoted field is doubled)")
                continue
            yield reader.line_num, values
            first_line = reader.line_num + 1

    def _fits(self, number: int, values: Sequence[str], header: Sequence[str]) -> bool:
        if len(values) == len(header):
            return True
        advice = "quote fields that hold the separator, and remove blank lines"
        self.bad(number, f"{len(values)} fields where the header has {len(header)}", advice)
        return False


def json_name(value: object) -> str:
    """Return the JSON name of a decoded value's type: null, boolean, number, list, string or object."""
    return _JSON_NAMES.get(type(value), "object")


def _has_surrogate(value: object) -> bool:
    if isinstance(value, list):
        return any(map(_has_surrogate, value))
    return isinstance(value, str) and first_surrogate(value) is not None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
