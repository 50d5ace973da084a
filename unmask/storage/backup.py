"""Backups: all tables in one gzipped file of JSON lines, which either database can restore.

A backup sees one moment, also while a server is running. A backup and a restore move from SQLite to Postgres. The
pepper is not in it: the file alone must not be enough to test keys.
"""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import sqlalchemy as sa
from sqlalchemy import Connection

from unmask.disk import atomic_write
from unmask.errors import StorageError
from unmask.storage.database import Database
from unmask.storage.schema import DEFAULT_PLAN, catalogue_version, metadata, plans

_FORMAT = "unmask accounts 1"
_ROWS = 500
# Not restored: signing in again is better than a token from an old file.
_LEFT_OUT = ("sessions", "invitations")
# Tables that a migration leaves a row in.
_BORN_FULL = (plans, catalogue_version)
# Errors of reading a file with missing or changed bytes: of gzip, of the JSON, and of its lines.
_DAMAGE = (OSError, EOFError, zlib.error, ValueError, LookupError, TypeError, AttributeError)


def backup(database: Database, target: Path) -> int:
    """Write all tables to `target`. Returns the number of rows.

    Raises:
        StorageError: the database or the file fails.
    """
    count = 0
    with database.read() as connection, atomic_write(target) as partial:
        partial.touch(mode=0o600)
        with gzip.open(partial, "wt", encoding="utf-8", compresslevel=6) as file:
            head = {"format": _FORMAT, "schema": _revision(connection), "made": datetime.now(UTC).isoformat()}
            file.write(json.dumps(head) + "\n")
            for table in _tables():
                ordered = sa.select(table).order_by(*table.primary_key.columns)
                for row in connection.execution_options(yield_per=_ROWS).execute(ordered):
                    file.write(json.dumps([table.name, *row], ensure_ascii=False) + "\n")
                    count += 1
            file.write(json.dumps({"rows": count}) + "\n")
    return count


def check_head(source: Path) -> None:
    """Check that a file begins as a backup does.

    Raises:
        StorageError: it cannot be read, or is something else.
    """
    try:
        with gzip.open(source, "rt", encoding="utf-8") as file:
            if json.loads(file.readline())["format"] == _FORMAT:
                return
    except _DAMAGE as error:
        raise StorageError(f"{source} is not a whole backup: {error}") from error
    raise StorageError(f"{source} is not a backup that this version reads ({_FORMAT!r})")


def restore(database: Database, source: Path, *, check: Callable[[Connection], Sequence[object]]) -> int:
    """Read everything from `source` into an empty database, in one transaction.

    Args:
        check: lists the discrepancies in the restored books, such as `accounts.verification.discrepancies`. Any of
            them undoes the restore.

    Returns:
        The number of rows.

    Raises:
        StorageError: the database is not empty, or the file is not whole, of another version or does not add up.
    """
    database.migrate()
    with database.begin() as connection:
        for table in _tables():
            rows = int(connection.scalar(sa.select(sa.func.count()).select_from(table)) or 0)
            if rows and table not in _BORN_FULL:
                raise StorageError(
                    f"{database.display_url} has {rows} rows in {table.name}: restore into an empty database"
                )
        connection.execute(plans.delete().where(plans.c.name == DEFAULT_PLAN))
        connection.execute(catalogue_version.delete())
        try:
            with gzip.open(source, "rt", encoding="utf-8") as file:
                count = _fill(connection, file, source)
        except _DAMAGE as error:
            raise StorageError(f"{source} is not a whole backup: {error}") from error
        _continue_numbers(connection)
        if discrepancies := check(connection):
            raise StorageError(f"{source} does not add up ({discrepancies[0]}): nothing was restored")
    return count


def _fill(connection: Connection, file: IO[str], source: Path) -> int:
    head = json.loads(file.readline())
    if head.get("format") != _FORMAT or head.get("schema") != _revision(connection):
        raise StorageError(
            f"{source} has the tables of version {head.get('schema')}, this is {_revision(connection)}: "
            "restore it with the version that made it, which then migrates"
        )
    count = 0
    for lines in _chunks(file):
        by_table: dict[str, list[dict[str, Any]]] = {}
        for line in lines:
            values = json.loads(line)
            if isinstance(values, dict):
                if values["rows"] != count + sum(map(len, by_table.values())):
                    raise ValueError(f"it should have {values['rows']} rows")
                _insert(connection, by_table)
                return count + sum(map(len, by_table.values()))
            table = metadata.tables[values[0]]
            by_table.setdefault(table.name, []).append(dict(zip(table.c.keys(), values[1:], strict=True)))
        _insert(connection, by_table)
        count += sum(map(len, by_table.values()))
    raise ValueError("its end is missing")


def _chunks(file: IO[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    for line in file:
        chunk.append(line)
        if len(chunk) == _ROWS:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _insert(connection: Connection, by_table: dict[str, list[dict[str, Any]]]) -> None:
    for name, rows in by_table.items():
        connection.execute(metadata.tables[name].insert(), rows)


def _continue_numbers(connection: Connection) -> None:
    """Let Postgres number new rows behind the restored ones, as SQLite does by itself."""
    if connection.dialect.name != "postgresql":
        return
    for table in _tables():
        for column in table.primary_key.columns:
            if column.autoincrement is True:
                connection.exec_driver_sql(
                    f"SELECT setval(pg_get_serial_sequence('{table.name}', '{column.name}'), "
                    f"(SELECT coalesce(max({column.name}), 0) + 1 FROM {table.name}), false)"
                )


def _tables() -> list[sa.Table]:
    """In an order in which every row's references are there before it."""
    return [table for table in metadata.sorted_tables if table.name not in _LEFT_OUT]


def _revision(connection: Connection) -> str:
    return str(connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar())
