"""Following the operator: a model that goes live is answered for at once, one that is retired no longer."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

from unmask.catalogue import Catalogue
from unmask.catalogue.lifecycle import Status
from unmask.catalogue.mail import MailServer, send_notices
from unmask.catalogue.store import Stored, read_catalogue, version
from unmask.errors import UnmaskError
from unmask.router.registry import Models
from unmask.storage.database import Database

log = logging.getLogger("unmask")

ANSWERING: tuple[Status, ...] = ("live", "deprecated")

_EVERY_S = 1.0


def answering(stored: Stored) -> dict[str, str]:
    """The models that the operator's steps say are answered for, with where their weights are.

    What merely ships as live is not among them: it has passed no gate here.
    """
    return {
        entry.record.id: stored.sources[entry.record.id]
        for entry in stored.catalogue.entries()
        if entry.record.status in ANSWERING and entry.record.id in stored.sources
    }


def retired(stored: Stored) -> set[str]:
    """The models that answer no more, whoever names them."""
    return {entry.record.id for entry in stored.catalogue.entries() if entry.record.status == "retired"}


class Follower:
    """Keeps the models of a process to what the database says.

    Args:
        models: of this process; its catalogue is kept up to date as well.
        database: what to look at, about once a second.
        version: the version that `models` was made from.
        grace: seconds that requests have to finish with a model that is retired.
        mail: where the notices go that a model which goes live leaves for those who wanted it; None for nowhere.
    """

    def __init__(
        self,
        models: Models,
        database: Database,
        version: int,
        *,
        grace: float = 30.0,
        mail: MailServer | None = None,
    ) -> None:
        self._models, self._database, self._version, self._grace = models, database, version, grace
        self._mail = mail
        self._aside: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Look again and again, until cancelled. A database that cannot be reached changes nothing."""
        told = False
        self._send_mail()  # what waits since an earlier process could not send it
        while True:
            await asyncio.sleep(_EVERY_S)
            try:
                await self.look()
            except UnmaskError as error:
                if not told:
                    log.error("the catalogue cannot be read, it is tried again: %s", error)
                told = True
            else:
                told = False

    async def look(self) -> bool:
        """Take over what has changed since the last look. Whether anything had."""
        stored = await asyncio.to_thread(self._read)
        if stored is None:
            return False
        fresh = _live(stored.catalogue) - _live(self._models.catalogue)
        self._models.catalogue.take(stored.catalogue)
        gone = retired(stored)
        for served in self._models.list():
            entry = stored.catalogue.get(served.record.id)
            if entry is not None and entry.record.id in gone:
                log.info("%s is retired and answers no more", entry.record.id)
                if leaving := self._models.remove(entry.record.id):
                    self._do_aside(leaving.close(self._grace))
            elif entry is not None:
                served.learn(entry.record)
        for id, source in answering(stored).items():
            entry = stored.catalogue.get(id)
            if self._models.find(id) is None and entry is not None:
                try:
                    self._models.add(source, entry.record)
                    log.info("%s went live", id)
                except UnmaskError as error:
                    log.error("%s went live but cannot be answered for: %s", id, error)
        self._version = stored.version
        if fresh:
            self._send_mail()
        return True

    def _send_mail(self) -> None:
        if self._mail is not None:
            self._do_aside(asyncio.to_thread(_deliver, self._database, self._mail))

    def _do_aside(self, work: Coroutine[Any, Any, None]) -> None:
        """Begin what is not waited for: it may take as long as it likes, the next look may not."""
        task = asyncio.create_task(work)
        self._aside.add(task)
        task.add_done_callback(self._aside.discard)

    def _read(self) -> Stored | None:
        with self._database.read() as connection:
            return None if version(connection) == self._version else read_catalogue(connection)


def _live(catalogue: Catalogue) -> set[str]:
    return {entry.record.id for entry in catalogue.entries() if entry.record.status == "live"}


def _deliver(database: Database, mail: MailServer) -> None:
    # All of it in a thread, so that what came of it is logged even if the server stops meanwhile.
    try:
        sent, reason = send_notices(database, mail)
    except UnmaskError as error:
        log.error("mail to those who wanted a model waits, and is tried again with the next: %s", error)
        return
    if sent:
        log.info("%d mails were sent to those who wanted a model", sent)
    if reason:
        log.error("mail to those who wanted a model waits, and is tried again with the next: %s", reason)
