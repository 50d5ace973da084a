"""Training rows from files and from the hub, each with the place it came from.

A bad row is never dropped in silence: it is counted, its place is kept, and past a set share the run stops.
"""

import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from unmask.errors import StorageError, UsageError

FORMATS = ("tsv", "csv", "jsonl", "parquet", "txt")
_HUB = "hf:"
# A share means nothing over a handful of rows.
_ENOUGH_ROWS = 200
# What a byte that is not UTF-8 is read as, and what a JSON escape may smuggle in; no tokenizer takes it.
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Row:
    """One row: its fields by name, and where it stands, as in `triplets.tsv.gz:17`."""

    fields: dict[str, Any]
    place: str


@dataclass
class BadRows:
    """Rows that could not be used: how many of how many, and the first few places with the reason.

    Args:
        allowed_share: share of bad rows past which the run stops.
    """

    allowed_share: float = 0.01
    seen: int = 0
    bad: int = 0
    places: list[str] = field(default_factory=list)

    def good(self) -> None:
        """Count one row that could be used."""
        self.seen += 1

    def report(self, place: str, reason: str) -> None:
        """Count one bad row.

        Raises:
            UsageError: too large a share of the rows is bad.
        """
        self.seen += 1
        self.bad += 1
        if len(self.places) < 20:
            self.places.append(f"{place}: {reason}")
        if self.seen >= _ENOUGH_ROWS:
            self._check()

    def close(self) -> None:
        """At the end of the data the share counts however few the rows."""
        self._check()

    def _check(self) -> None:
        if self.bad > self.allowed_share * self.seen:
            raise UsageError(
                f"{self.bad} of {self.seen} rows are unusable, more than the {self.allowed_share:.1%} allowed "
                f"(max_bad_rows); the first: {self.places[0]}"
            )


def read_rows(source: str, bad: BadRows, root: Path | None = None) -> Iterator[Row]:
    """Rows of a file or of a hub data set, one at a time.

    Args:
        source: a .tsv (header line, no quoting), .csv, .jsonl, .parquet or .txt file (one text per line, as field
            "text"), any of the text forms gzipped; or `hf:owner/name`, `hf:owner/name:config:split`.
        bad: told of every row that does not parse.
        root: folder that relative paths are taken from.

    Raises:
        UsageError: there is no such file, or its format is unknown.
        StorageError: it cannot be read.
    """
    if source.startswith(_HUB):
        yield from _hub_rows(source)
        return
    path = Path(source).expanduser()
    path = path if path.is_absolute() or root is None else root / path
    suffixes = [suffix.lstrip(".") for suffix in path.suffixes if suffix != ".gz"]
    kind = suffixes[-1] if suffixes else ""
    if kind not in FORMATS:
        raise UsageError(f"{source}: unknown kind of file; use one of .{', .'.join(FORMATS)} (text also as .gz)")
    if not path.is_file():
        raise UsageError(f"no training data at {path}; paths in a recipe are taken from --data or the recipe's folder")
    if kind == "parquet":
        rows = _parquet_rows(path)
    else:
        reader = {"tsv": _tsv_rows, "csv": _csv_rows, "jsonl": _jsonl_rows, "txt": _txt_rows}[kind]
        rows = _text_rows(reader, path, bad)
    for row in rows:
        broken = next((name for name, value in row.fields.items() if _broken(value)), None)
        if broken is None:
            yield row
        else:
            bad.report(row.place, f"{broken} is not valid UTF-8")


def _broken(value: Any) -> bool:
    if isinstance(value, list):
        return any(map(_broken, value))
    return isinstance(value, str) and _SURROGATE.search(value) is not None


def _text_rows(reader: Callable[[TextIO, str, BadRows], Iterator[Row]], path: Path, bad: BadRows) -> Iterator[Row]:
    with _opened(path) as file:
        yield from reader(file, path.name, bad)


def _tsv_rows(file: TextIO, name: str, bad: BadRows) -> Iterator[Row]:
    header = file.readline().rstrip("\r\n").split("\t")
    for number, line in enumerate(file, start=2):
        line = line.rstrip("\r\n")
        if not line and len(header) > 1:
            continue  # an empty line at the end of a file is no row
        values = line.split("\t")
        if len(values) != len(header):
            bad.report(f"{name}:{number}", f"{len(values)} columns instead of {len(header)}")
            continue
        yield Row(dict(zip(header, values, strict=True)), f"{name}:{number}")


def _csv_rows(file: TextIO, name: str, bad: BadRows) -> Iterator[Row]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # a text may be a book; csv's own limit is 128 KB
    reader = csv.DictReader(file)
    while True:
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            bad.report(f"{name}:{reader.reader.line_num}", f"not CSV ({error})")
            continue
        place = f"{name}:{reader.line_num}"
        if None in fields or None in fields.values():
            bad.report(place, f"not {len(reader.fieldnames or ())} columns")
            continue
        yield Row(dict(fields), place)


def _jsonl_rows(file: TextIO, name: str, bad: BadRows) -> Iterator[Row]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        place = f"{name}:{number}"
        try:
            fields = json.loads(line)
        except ValueError as error:
            bad.report(place, f"not JSON ({error})")
            continue
        if not isinstance(fields, dict):
            bad.report(place, f"a JSON {type(fields).__name__}, not an object")
            continue
        yield Row(fields, place)


def _txt_rows(file: TextIO, name: str, bad: BadRows) -> Iterator[Row]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield Row({"text": line.rstrip("\r\n")}, f"{name}:{number}")


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        for batch in pq.ParquetFile(path).iter_batches(batch_size=1024):
            for fields in batch.to_pylist():
                number += 1
                yield Row(fields, f"{path.name}:{number}")
    except (pa.ArrowException, OSError) as error:
        raise StorageError(f"{path} is not a readable parquet file: {error}") from error


def _hub_rows(source: str) -> Iterator[Row]:
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise UsageError(f"{source} is on the hub; install its reader with: pip install 'unmask[train]'") from error
    name, config, split = [*source.removeprefix(_HUB).split(":"), "", ""][:3]
    try:
        stream = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
    except (OSError, ValueError, DatasetsError) as error:
        raise UsageError(f"{source} cannot be read from the hub: {error}") from error
    number = 0
    try:
        for fields in stream:
            number += 1
            yield Row(dict(fields), f"{source}:{number}")
    except (OSError, DatasetsError) as error:
        raise StorageError(f"{source} cannot be read past row {number}: {error}") from error


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            # newline: a lone carriage return inside a text must not end the row. errors: one broken byte costs its row
            # and not the file. utf-8-sig: spreadsheets begin their files with a byte order mark.
            yield io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="\n")
    except (OSError, EOFError, zlib.error) as error:
        raise StorageError(f"{path} cannot be read to its end: {error}") from error
