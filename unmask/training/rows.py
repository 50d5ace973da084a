"""Read training rows from files and from the hub, each with its file and line.

A bad row is never dropped silently: it is counted with its place, and above `max_bad_rows` the run stops.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from unmask.errors import MissingPackages, StorageError, TableError, UsageError
from unmask.tables import FORMATS, Row, read_table, table_format

__all__ = ["FORMATS", "BadRows", "Row", "read_rows"]

_HUB = "hf:"
# Over fewer rows the share of bad ones is too noisy to stop a run.
_ENOUGH_ROWS = 200


@dataclass
class BadRows:
    """Count of unusable rows, with the places of the first few and the reasons.

    Args:
        allowed_share: share of bad rows past which the run stops.

    Attributes:
        seen: rows read.
        bad: rows that could not be used.
        places: places and reasons of the first bad rows.
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
        """Check the share at the end of the data, however few rows there are.

        Raises:
            UsageError: too large a share of the rows is bad.
        """
        self._check()

    def _check(self) -> None:
        if self.bad > self.allowed_share * self.seen:
            raise UsageError(
                f"{self.bad} of {self.seen} rows are unusable, more than the {self.allowed_share:.1%} allowed "
                f"(max_bad_rows); the first: {self.places[0]}"
            )


def read_rows(
    source: str,
    bad: BadRows,
    root: Path | None = None,
    columns: Sequence[str] | None = None,
    text_column: str = "text",
) -> Iterator[Row]:
    """Yield the rows of a file or of a hub data set. `unmask encode` reads the same rows from the same file.

    Args:
        source: a .tsv (header line, no quoting), .csv, .jsonl, .parquet or .txt file (one text per line), any of the
            text forms gzipped; or `hf:owner/name`, `hf:owner/name:config:split`.
        bad: counts every row that cannot be parsed.
        root: folder that relative paths are taken from.
        columns: the columns that the caller reads; default: all.
        text_column: name of the field for lines of a txt file and for bare strings in jsonl.

    Raises:
        UsageError: there is no such file, its format is unknown, or two of the columns have one name.
        StorageError: it cannot be read.
    """
    if source.startswith(_HUB):
        yield from _hub_rows(source)
        return
    path = Path(source).expanduser()
    path = path if path.is_absolute() or root is None else root / path
    if table_format(path) is None:
        raise UsageError(f"{source}: unknown kind of file; use one of .{', .'.join(FORMATS)} (text also as .gz)")
    if not path.is_file():
        raise UsageError(f"no training data at {path}; paths in a recipe are taken from --data or the recipe's folder")
    try:
        yield from read_table(path, columns=columns, text_column=text_column, on_bad_row=bad.report)
    except (TableError, OSError) as error:
        raise StorageError(f"{path}: {error}") from error
    except UsageError:
        bad.close()  # rows before this one may be too many already, and are named first
        raise


def _hub_rows(source: str) -> Iterator[Row]:
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise MissingPackages(f"{source} is on the hub, and its reader needs", "train") from error
    name, config, split = [*source.removeprefix(_HUB).split(":"), "", ""][:3]
    try:
        stream = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
    except (OSError, ValueError, DatasetsError) as error:
        raise UsageError(f"{source} cannot be read from the hub: {error}") from error
    number = 0
    try:
        for fields in stream:
            number += 1
            yield Row(dict(fields), source, number)
    except (OSError, DatasetsError) as error:
        raise StorageError(f"{source} cannot be read past row {number}: {error}") from error
