"""`CatalogueSync`: follow the operator's decisions in the database about models and providers."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from unmask.catalogue import Catalogue
from unmask.catalogue.lifecycle import Status
from unmask.catalogue.store import StoredCatalogue, read_catalogue, version
from unmask.errors import UnmaskError
from unmask.router.registry import ModelRegistry
from unmask.router.verdicts import Verdict, last_reload, read_verdicts
from unmask.storage.database import Database

log = logging.getLogger("unmask")

ANSWERING: tuple[Status, ...] = ("live", "deprecated")

_POLL_INTERVAL_S = 1.0


def sources_of_answering_models(stored: StoredCatalogue) -> dict[str, str]:
    """Return model id -> place of its weights, for models that the operator set live or deprecated.

    Models that only ship as live are not among them: they have passed no gate on this server.
    """
    return {
        entry.record.id: stored.sources[entry.record.id]
        for entry in stored.catalogue.entries()
        if entry.record.status in ANSWERING and entry.record.id in stored.sources
    }


def retired_models(stored: StoredCatalogue) -> set[str]:
    """Return the ids of retired models, which must not answer even if the command line names them."""
    return {entry.record.id for entry in stored.catalogue.entries() if entry.record.status == "retired"}


class CatalogueSync:
    """Keeps the registry of a process in step with the catalogue in the database.

    Args:
        models: the registry; its catalogue is updated as well.
        database: polled about once a second.
        version: version of the catalogue that `models` was made from.
        grace: seconds that requests have to finish with a model that is retired.
        on_live: called at the start, and whenever models have gone live, in the event loop; must not block.
    """

    def __init__(
        self,
        models: ModelRegistry,
        database: Database,
        version: int,
        *,
        grace: float = 30.0,
        on_live: Callable[[], None] = lambda: None,
    ) -> None:
        self._models, self._database, self._version, self._grace = models, database, version, grace
        self._on_live = on_live
        self._background: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Poll until cancelled. While the database cannot be reached, nothing changes."""
        failing = False
        self._on_live()
        while True:
            await asyncio.sleep(_POLL_INTERVAL_S)
            try:
                await self.poll()
            except UnmaskError as error:
                if not failing:
                    log.error("the catalogue cannot be read, it is tried again: %s", error)
                failing = True
            else:
                failing = False

    async def poll(self) -> bool:
        """Apply changes of the catalogue since the last poll. Return True if there were any."""
        changes = await asyncio.to_thread(self._read)
        if changes is None:
            return False
        stored, verdicts, reload = changes
        newly_live = _live_models(stored.catalogue) - _live_models(self._models.catalogue)
        self._models.catalogue.take(stored.catalogue)
        self._update_served(stored)
        self._add_answering(stored)
        if self._models.providers is not None:
            self._models.providers.take_verdicts(verdicts)
            self._models.providers.take_reload(reload)
        self._version = stored.version
        if newly_live:
            self._on_live()
        return True

    def _update_served(self, stored: StoredCatalogue) -> None:
        """Give every served model its new record, and remove the retired ones."""
        retired = retired_models(stored)
        for served in self._models.list():
            entry = stored.catalogue.get(served.record.id)
            if entry is not None and entry.record.id in retired:
                log.info("%s is retired and answers no more", entry.record.id)
                if removed := self._models.remove(entry.record.id):
                    self._run_in_background(removed.close(self._grace))
            elif entry is not None:
                served.update_record(entry.record)

    def _add_answering(self, stored: StoredCatalogue) -> None:
        for id, source in sources_of_answering_models(stored).items():
            entry = stored.catalogue.get(id)
            if self._models.find(id) is None and entry is not None:
                try:
                    self._models.add(source, entry.record)
                    log.info("%s went live", id)
                except UnmaskError as error:
                    log.error("%s went live but cannot be answered for: %s", id, error)

    def _run_in_background(self, work: Coroutine[Any, Any, None]) -> None:
        """Start work of any length without delaying the next poll."""
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def _read(self) -> tuple[StoredCatalogue, dict[tuple[str, str], Verdict], int] | None:
        with self._database.read() as connection:
            if version(connection) == self._version:
                return None
            return read_catalogue(connection), read_verdicts(connection), last_reload(connection)


def _live_models(catalogue: Catalogue) -> set[str]:
    return {entry.record.id for entry in catalogue.entries() if entry.record.status == "live"}
