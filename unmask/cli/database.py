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


def open_database(url: str | None, *, new: bool = False) -> "Database":
    """Open a database and migrate its tables. None means SQLite in UNMASK_HOME.

    Args:
        new: make a file of SQLite that is missing. Most commands refuse it: on an empty database, made because of a
            mistyped name, checks pass and backups succeed.

    Raises:
        UsageError, StorageError: as `Database`.
    """
    from unmask.storage.database import Database, default_url

    database = Database(url or default_url(), new=new)
    database.migrate()
    return database


@contextmanager
def write_transaction(url: str | None, *, new: bool = False) -> "Iterator[Connection]":
    """Open a transaction that may write, see `Database.begin` and `open_database`."""
    with closing(open_database(url, new=new)) as database, database.begin() as connection:
        yield connection


@contextmanager
def read_transaction(url: str | None, *, new: bool = False) -> "Iterator[Connection]":
    """Open a transaction that only reads, see `Database.read` and `open_database`."""
    with closing(open_database(url, new=new)) as database, database.read() as connection:
        yield connection
