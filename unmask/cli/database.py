"""The option `--database` and transactions on the database that it names."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from unmask.storage.database import Database

DatabaseUrl = Annotated[
    str | None,
    Parameter(
        name="--database",
        env_var="UNMASK_DATABASE",
        help="sqlite:///path or postgresql://user@host/name. Default: SQLite in UNMASK_HOME.",
    ),
]


def open_database(url: str | None) -> "Database":
    """Open a database and migrate its tables. None means SQLite in UNMASK_HOME.

    Raises:
        UsageError, StorageError: as `Database`.
    """
    from unmask.storage.database import Database, default_url

    database = Database(url or default_url())
    database.migrate()
    return database


@contextmanager
def write_transaction(url: str | None) -> "Iterator[Connection]":
    """Open a transaction that may write, see `Database.begin`."""
    with closing(open_database(url)) as database, database.begin() as connection:
        yield connection


@contextmanager
def read_transaction(url: str | None) -> "Iterator[Connection]":
    """Open a transaction that only reads, see `Database.read`."""
    with closing(open_database(url)) as database, database.read() as connection:
        yield connection
