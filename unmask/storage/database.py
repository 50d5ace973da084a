"""The database: SQLite under `UNMASK_HOME`, or Postgres by URL; its transactions and migrations."""

import re
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, Engine, event
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import DBAPIError, NoSuchModuleError, OperationalError, SQLAlchemyError

from unmask.errors import MissingDatabase, MissingPackages, StorageError, UsageError
from unmask.home import home

_MIGRATIONS = Path(__file__).parent / "migrations"

# Id of the lock that lets one of two processes migrate when both start at once. The number is arbitrary.
_MIGRATION_LOCK = 6_170_001

# How long a writer waits for another process's transaction, all of which are short.
_BUSY_SECONDS = 15

# SQLite copies its log into the file when a commit finds it longer than this, and flushes both while that commit
# waits. `checkpoint_wal` does it beside the work, long before.
_CHECKPOINT_PAGES = 50_000

# A kept connection that rested longer than this is asked first whether it still stands.
_RESTED_S = 1.0

# Another try may succeed: Postgres' serialization failure and deadlock, SQLite's writer that waited too long.
_TRANSIENT = ("40001", "40P01")


def default_url() -> str:
    """Return the URL of SQLite under `UNMASK_HOME`."""
    return f"sqlite:///{home() / 'accounts' / 'accounts.sqlite'}"


def now_ms() -> int:
    """Return Unix milliseconds."""
    return time.time_ns() // 1_000_000


class Database:
    """Connections and transactions.

    Args:
        url: `sqlite:///path`, `postgresql://...`, or a path.
        new: make the file of SQLite if it is missing.

    Raises:
        UsageError: the URL is wrong, or its driver is not installed.
        MissingDatabase: there is no file, and `new` is false.
        StorageError: the folder cannot be made.
    """

    def __init__(self, url: str, *, new: bool = True) -> None:
        parsed = _parse(url)
        self.kind = parsed.get_backend_name()
        self.display_url = parsed.render_as_string(hide_password=True)
        if self.kind == "sqlite":
            self._engine = _sqlite(parsed, new)
        else:
            self._engine = _postgres(parsed)

    @contextmanager
    def begin(self, *, flushed: bool = True, patient: bool = True) -> Iterator[Connection]:
        """Open a transaction that may write: committed at the end of the block, rolled back when it raises.

        On SQLite it is the only writer from its first moment on, so it never finds the ground changed under it.

        Args:
            flushed: on SQLite, wait for the disk at the end of the block. Without, a killed process loses nothing
                either, but a power cut may lose the last moments; the books still balance.
                Postgres follows its own `synchronous_commit`.
            patient: on SQLite, wait while another process writes; otherwise raise a `TransientError`.

        Raises:
            StorageError: the database cannot be reached, or refuses for want of space or rights.
        """
        writer = self.writer_connection()
        try:
            with writer.begin(flushed=flushed, patient=patient) as connection:
                yield connection
        finally:
            writer.close()

    def writer_connection(self) -> "WriterConnection":
        """Return a connection for many transactions, one after the other."""
        return WriterConnection(self)

    def connect(self) -> Connection:
        """Take a connection from the pool, for `WriterConnection` to manage."""
        return self._engine.connect()

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """Open a transaction that sees one state of everything, and should not write.

        Raises:
            StorageError: as for `begin`.
        """
        with self.wrap_errors(), self._engine.connect() as connection:
            if self.kind == "postgresql":
                connection = connection.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
            with connection.begin():
                yield connection

    def migrate(self) -> None:
        """Bring the tables to this version's state; nothing happens if they are.

        Raises:
            StorageError: also where the tables were made by a newer version.
        """
        with self.begin() as connection:
            if self.kind == "postgresql":
                connection.execute(sa.text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _MIGRATION_LOCK})
            if _is_newest(connection):
                return  # without Alembic, which takes a tenth of a second to import at every start
            from alembic import command
            from alembic.script import ScriptDirectory
            from alembic.util.exc import CommandError

            config = migration_config(connection)
            try:
                command.upgrade(config, "head")
            except CommandError as error:
                head = ScriptDirectory.from_config(config).get_current_head()
                raise StorageError(
                    f"the tables in {self.display_url} are not ones this version knows (its newest are {head}): "
                    f"{error}. Use the version that made them, or restore a backup"
                ) from error

    def checkpoint_wal(self) -> None:
        """On SQLite, copy the write-ahead log into the file. Call it often: a long log takes longer.

        Raises:
            StorageError: as for `begin`.
        """
        if self.kind == "sqlite":
            with self.wrap_errors(), self._engine.connect() as connection:
                raw: Any = connection.connection.dbapi_connection
                raw.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

    def has_transaction(self, connection: Connection) -> bool:
        """True while a commit would write what `begin` has written so far.

        SQLite undoes a whole transaction when the disk is full, cannot be read, or memory runs out. Postgres turns the
        commit of a transaction into a rollback, without an error, when a statement in it has failed.
        """
        raw: Any = connection.connection.dbapi_connection
        if self.kind == "sqlite":
            return raw.in_transaction
        return raw.info.transaction_status.name not in ("INERROR", "UNKNOWN")

    def close(self) -> None:
        """Close the connections that are not in use."""
        self._engine.dispose()

    @contextmanager
    def wrap_errors(self) -> Iterator[None]:
        """Translate SQLAlchemy's errors into a `StorageError`."""
        try:
            yield
        except SQLAlchemyError as error:
            # Without the statement and its values, which may be personal.
            reason = str(error.orig).strip() if isinstance(error, DBAPIError) else type(error).__name__
            message = f"the database {self.display_url} failed: {reason}"
            raise TransientError(message) if is_transient(error) else StorageError(message) from error


class WriterConnection:
    """A connection that one writer keeps: to take one from the pool and return it costs as much as a booking.

    Not for two threads at a time. After a failure the next transaction takes another connection.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._connection: Connection | None = None
        self._used = 0.0

    @contextmanager
    def begin(self, *, flushed: bool = True, patient: bool = True) -> Iterator[Connection]:
        """As `Database.begin`."""
        try:
            with self._database.wrap_errors():
                connection = self._live_connection()
                if self._database.kind == "sqlite":
                    _prepare(connection, "FULL" if flushed else "NORMAL", _BUSY_SECONDS * 1000 if patient else 0)
                with connection.begin():
                    yield connection
                    if not self._database.has_transaction(connection):
                        raise StorageError(
                            f"the database {self._database.display_url} undid the transaction; nothing of it was "
                            "written: look for room on its disk, and try again"
                        )
        except StorageError:
            self.close()
            raise
        self._used = time.monotonic()

    def close(self) -> None:
        """Give the connection back."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _live_connection(self) -> Connection:
        rested = time.monotonic() - self._used > _RESTED_S
        if self._connection is not None and rested and self._database.kind == "postgresql":
            self.close()  # the pool asks the server before it gives one out
        if self._connection is None:
            self._connection = self._database.connect().execution_options(unmask_writes=True)
        return self._connection


class RawStatement:
    """SQL that goes to the driver without SQLAlchemy, for the statements of every request.

    Through SQLAlchemy a statement takes five times as long as SQLite needs to run it. Errors are still SQLAlchemy's.

    Args:
        sql: one statement that both databases understand, with `:name` where a value goes.
    """

    def __init__(self, sql: str) -> None:
        self._texts = {"sqlite": sql, "postgresql": re.sub(r":(\w+)", r"%(\1)s", sql)}

    def rows(self, connection: Connection, values: Mapping[str, Any]) -> Sequence[tuple[Any, ...]]:
        """Run the statement and return its rows."""
        return self._run(connection, values, rows=True)

    def changed(self, connection: Connection, values: Mapping[str, Any]) -> int:
        """Run a statement without RETURNING, and return the number of rows that it changed."""
        return self._run(connection, values, rows=False)

    def _run(self, connection: Connection, values: Mapping[str, Any], *, rows: bool) -> Any:
        text = self._texts[connection.dialect.name]
        driver: Any = connection.dialect.dbapi
        raw: Any = connection.connection.dbapi_connection
        try:
            cursor = raw.execute(text, values)
            return cursor.fetchall() if rows else cursor.rowcount
        except driver.Error as error:
            raise DBAPIError(text, None, error) from error


class TransientError(StorageError):
    """The same transaction may succeed when it is tried again."""


def is_transient(error: BaseException) -> bool:
    """True if the same transaction may succeed when it is retried. Nothing of it was written."""
    if not isinstance(error, DBAPIError):
        return False
    return getattr(error.orig, "sqlstate", None) in _TRANSIENT or "database is locked" in str(error.orig)


def insert(connection: Connection, table: sa.Table) -> Any:
    """Return an INSERT that knows `on_conflict_do_nothing` and `on_conflict_do_update`, which both databases have."""
    return (postgresql if connection.dialect.name == "postgresql" else sqlite).insert(table)


def _is_newest(connection: Connection) -> bool:
    """True if the newest migration of this package was the last to run. Their files begin with their numbers."""
    newest = max(file.stem for file in _MIGRATIONS.glob("versions/v*_*.py")).partition("_")[0].removeprefix("v")
    if not sa.inspect(connection).has_table("alembic_version"):
        return False
    return connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalars().all() == [newest]


def migration_config(connection: Connection) -> Any:
    """Return Alembic's configuration for the migrations that ship in this package, over one connection."""
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


def _parse(url: str) -> URL:
    if "://" not in url:
        url = f"sqlite:///{Path(url).expanduser().absolute()}"
    try:
        parsed = make_url(url)
        name = parsed.get_backend_name()
    except (SQLAlchemyError, ValueError) as error:
        raise UsageError("the database URL cannot be read: write sqlite:///path or postgresql://...") from error
    if name == "postgres":
        parsed = parsed.set(drivername="postgresql")
        name = "postgresql"
    if name not in ("sqlite", "postgresql"):
        raise UsageError(f"databases of the kind {name!r} are not supported: use sqlite:///path or postgresql://...")
    if name == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise UsageError("a database in memory would forget every balance: name a file, as in sqlite:///path")
    return parsed.set(drivername="postgresql+psycopg") if name == "postgresql" else parsed


def _sqlite(url: URL, new: bool) -> Engine:
    path = Path(str(url.database))
    if not new and not path.exists():
        raise MissingDatabase(
            f"there is no database at {path.absolute()}: check --database (or UNMASK_DATABASE) and UNMASK_HOME; "
            "'unmask accounts create' and 'unmask serve' begin a new one"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.touch(mode=0o600)  # keys' digests and mail addresses are nobody else's business
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}; set UNMASK_HOME elsewhere") from error
    engine = sa.create_engine(
        url, connect_args={"timeout": _BUSY_SECONDS}, pool_size=8, max_overflow=16, pool_use_lifo=True
    )

    @event.listens_for(engine, "connect")
    def connected(dbapi: Any, record: Any) -> None:
        dbapi.isolation_level = None  # the driver would begin transactions late, and not for every statement
        cursor = dbapi.cursor()
        cursor.execute("PRAGMA journal_mode = WAL")
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.execute(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT_PAGES}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def began(connection: Connection) -> None:
        writes = connection.get_execution_options().get("unmask_writes")
        _execute_raw(connection, "BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _prepare(connection: Connection, synchronous: str, busy_ms: int) -> None:
    """Set the durability and the lock timeout of a connection to SQLite, if they differ from its last ones."""
    settings = synchronous, busy_ms
    if connection.info.get("writes") != settings:
        _execute_raw(connection, f"PRAGMA synchronous = {synchronous}")
        _execute_raw(connection, f"PRAGMA busy_timeout = {busy_ms}")
        connection.info["writes"] = settings


def _execute_raw(connection: Connection, text: str) -> None:
    raw: Any = connection.connection.dbapi_connection
    try:
        raw.execute(text)
    except sqlite3.Error as error:
        raise OperationalError(text, None, error) from error


def _postgres(url: URL) -> Engine:
    try:
        return sa.create_engine(
            url,
            pool_size=8,
            max_overflow=16,
            pool_pre_ping=True,
            pool_timeout=_BUSY_SECONDS,
            # Names of prepared statements belong to a session, which a connection pooler may swap.
            connect_args={"prepare_threshold": None, "connect_timeout": _BUSY_SECONDS, "application_name": "unmask"},
        )
    except (ImportError, NoSuchModuleError) as error:
        raise MissingPackages("Postgres needs", "postgres") from error
