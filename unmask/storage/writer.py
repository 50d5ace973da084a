"""The writer: runs a server's writes, several in one transaction where that is free.

SQLite has one writer at a time, and each commit has a cost. So one thread writes, and the pieces that arrive during a
commit go into the next transaction together, each behind its own savepoint. A piece that finds no writer active runs
in its own thread: without a flush it takes a fraction of a millisecond, less than handing it over. Postgres groups
flushes by itself: there each piece is a transaction, and a few threads run them.
"""

import logging
import queue
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from sqlalchemy import Connection

from unmask.errors import StorageError
from unmask.storage.database import Database, TransientError, WriterConnection

log = logging.getLogger("unmask")

T = TypeVar("T")

_TOGETHER = 64  # pieces in one transaction: a few tens of milliseconds at most
_THREADS = 6
_LINE = 20_000  # pieces that may wait; more means that the database stands still
_TRIES = 6

Outcome = tuple[Any, Exception | None]  # the result of a piece, or its error
Batch = list[tuple[Callable[[Connection], Any], Future[Any]]]


class Writer:
    """Runs pieces of work in transactions, in order on SQLite.

    A piece is a function of a connection. It may run more than once, and whatever it raises undoes it.

    Args:
        flushed: a piece is done only once it is on the disk, see `Database.begin`.
    """

    def __init__(self, database: Database, *, flushed: bool = True) -> None:
        self._database = database
        self._flushed = flushed
        self._together = _TOGETHER if database.kind == "sqlite" else 1
        self._line: queue.Queue[tuple[Callable[[Connection], Any], Future[Any]] | None] = queue.Queue(_LINE)
        count = 1 if database.kind == "sqlite" else _THREADS
        self._closed = False
        self._turn = threading.Lock()  # on SQLite, whose one connection has one writer at a time
        self._writer = database.writer_connection()
        self._threads = [
            threading.Thread(target=self._work, name=f"unmask-ledger-{index}", daemon=True) for index in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, piece: Callable[[Connection], T]) -> Future[T]:
        """Queue a piece. The future has its result once it is committed.

        Raises (from the future or at once):
            StorageError: the database failed, or too much waits for it.
            whatever the piece raises.
        """
        future: Future[T] = Future()
        if self._closed:
            raise StorageError("the ledger is closed: the server is shutting down")
        try:
            self._line.put_nowait((piece, future))
        except queue.Full:
            raise StorageError(f"{_LINE} writes wait for the database {self._database.display_url}") from None
        return future

    def try_inline(self, piece: Callable[[Connection], T]) -> Future[T] | None:
        """Run a piece in this thread, if that needs no waiting.

        Returns:
            Its result, or None if nothing was written and the piece must be submitted.
        """
        if self._database.kind != "sqlite" or self._flushed or self._closed or not self._line.empty():
            return None
        if not self._turn.acquire(blocking=False):
            return None
        future: Future[T] = Future()
        try:
            with self._writer.begin(flushed=False, patient=False) as connection:
                result = piece(connection)
        except TransientError:
            return None
        except Exception as error:  # noqa: BLE001 - it belongs to whoever waits
            future.set_exception(error)
        else:
            future.set_result(result)
        finally:
            self._turn.release()
        return future

    def checkpoint_wal(self) -> None:
        """Run `Database.checkpoint_wal` while nobody writes: a commit during it would wait for the disk."""
        with self._turn:
            self._database.checkpoint_wal()

    def close(self) -> None:
        """Write everything that was submitted, then stop."""
        self._closed = True
        for _ in self._threads:
            self._line.put(None)
        for thread in self._threads:
            thread.join()
        with self._turn:
            self._writer.close()

    def _work(self) -> None:
        writer = self._writer if self._database.kind == "sqlite" else self._database.writer_connection()
        try:
            self._work_with(writer)
        finally:
            if writer is not self._writer:
                writer.close()

    def _work_with(self, writer: WriterConnection) -> None:
        while (first := self._line.get()) is not None:
            batch = [first]
            ending = False
            while len(batch) < self._together:
                try:
                    item = self._line.get_nowait()
                except queue.Empty:
                    break
                if item is None:
                    ending = True
                    break
                batch.append(item)
            self._write(writer, [(piece, future) for piece, future in batch if future.set_running_or_notify_cancel()])
            if ending:
                return

    def _write(self, writer: WriterConnection, batch: Batch) -> None:
        try:
            outcomes = self._try(writer, batch)
        except _BatchUndone:
            # Each alone, so that only the piece at fault fails.
            outcomes = [self._try(writer, [item])[0] for item in batch]
        for (_, future), (result, error) in zip(batch, outcomes, strict=True):
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

    def _try(self, writer: WriterConnection, batch: Batch) -> list[Outcome]:
        """Write a batch, again and again while that may help; return the outcome of each piece.

        Raises:
            _BatchUndone: a piece undid the others.
        """
        for attempt in range(1, _TRIES + 1):
            try:
                if self._database.kind == "sqlite":
                    with self._turn:
                        return self._transaction(writer, batch)
                return self._transaction(writer, batch)
            except _BatchUndone:
                raise
            except TransientError as error:
                if attempt == _TRIES:
                    return [(None, error)] * len(batch)
                time.sleep(random.uniform(0, 0.01 * 2**attempt))
            except Exception as error:  # noqa: BLE001 - the callers get the error, and the thread lives on
                return [(None, error)] * len(batch)
        raise AssertionError("the last attempt returns")

    def _transaction(self, writer: WriterConnection, batch: Batch) -> list[Outcome]:
        if len(batch) == 1:
            with writer.begin(flushed=self._flushed) as connection:
                return [(batch[0][0](connection), None)]
        outcomes: list[Outcome] = []
        with writer.begin(flushed=self._flushed) as connection:
            for piece, _ in batch:
                try:
                    with self._database.wrap_errors(), connection.begin_nested():
                        result = piece(connection)
                    outcomes.append((result, None))
                except Exception as error:  # noqa: BLE001 - one piece's fault is not the others'
                    outcomes.append((None, error))
                if not self._database.has_transaction(connection):
                    # The next savepoint would begin a transaction of its own, and commit it.
                    raise _BatchUndone
        return outcomes


class _BatchUndone(Exception):
    """The database undid the transaction of a batch: no piece of it is written."""
