"""`ClusterWatch`: what a server with replicas does when the head of its cluster is lost."""

import asyncio
import logging
import signal
import threading
import time
from typing import Any

from unmask.cluster.connection import LOST, connection_fault, disconnect, reconnect
from unmask.errors import UnmaskError
from unmask.router import ModelRegistry

log = logging.getLogger("unmask")

# Seconds between two questions to the head, and without a good answer until it is given up.
_ASK_S, _LOST_S = 5.0, 15.0
# Seconds that one question may take, and those that requests under way have in replicas that still live.
_ANSWER_S, _GRACE_S = 10.0, 3.0


class ClusterWatch:
    """Asks the head of the cluster whether it lives, and looks for it again when it does not.

    Args:
        ray: the module, connected.
        address: of the cluster, see `connected`.
        models: of the server.

    Attributes:
        address: where the cluster is looked for.
    """

    def __init__(self, ray: Any, address: str, models: ModelRegistry) -> None:
        self.address = address
        self._ray, self._models = ray, models

    async def run(self) -> None:
        """Watch until cancelled."""
        silent_since: float | None = None
        while True:
            await asyncio.sleep(_ASK_S)
            asked_at = time.monotonic()
            fault = await self._fault()
            if not fault:
                silent_since = None
                continue
            silent_since = silent_since or asked_at  # a question may have waited in vain for long
            if time.monotonic() - silent_since >= _LOST_S:
                await self._lose(fault)
                await self._find()
                silent_since = None

    async def _fault(self) -> str:
        try:
            return await asyncio.wait_for(asyncio.to_thread(connection_fault, self._ray), _ANSWER_S)
        except TimeoutError:
            return "its head does not answer"
        except Exception as error:  # noqa: BLE001 - of whatever kind, it cannot be used
            return f"Ray raises {type(error).__name__}"

    async def _lose(self, fault: str) -> None:
        """Take leave of the cluster, before Ray ends this process."""
        log.error("the cluster is lost: %s; no replica answers until it is found again", fault)
        LOST.set()
        await self._models.lose_cluster(fault, _GRACE_S)
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        await asyncio.to_thread(disconnect, self._ray)
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():  # Ray leaves the default, which ends the process at once
                signal.signal(number, handler)
        LOST.clear()

    async def _find(self) -> None:
        """Connect again, as soon as a cluster answers at the address."""
        if self.address == "local":
            log.error("a cluster of this machine alone ends with its head: start the server again")
            await asyncio.Event().wait()
        said = ""
        while True:
            try:
                await asyncio.to_thread(reconnect, self.address)
                break
            except UnmaskError as error:
                if said != str(error):
                    said = str(error)
                    log.error("%s", said)
            await asyncio.sleep(_ASK_S)
        log.info("the cluster is found again")
        self._models.find_cluster()
