"""`NoticeMailer`: mail the voters of a model when it goes live."""

import asyncio
import logging
import threading

from unmask.catalogue.mail import send_notices
from unmask.catalogue.mail_server import MailServer
from unmask.errors import UnmaskError
from unmask.storage.database import Database

log = logging.getLogger("unmask")


class NoticeMailer:
    """Sends waiting notices in the background.

    Args:
        database: holds the notices that a model leaves for its voters when it goes live.
        mail: the mail server.
        stopping: set when the server begins to shut down. The letters that are left are sent after the next start.
    """

    def __init__(self, database: Database, mail: MailServer, stopping: threading.Event) -> None:
        self._database, self._mail, self._stopping = database, mail, stopping
        self._background: set[asyncio.Task[None]] = set()

    def send(self) -> None:
        """Begin to send all waiting notices, those of an earlier process included. Does not block."""
        task = asyncio.create_task(asyncio.to_thread(self._send))
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def _send(self) -> None:
        # Logs inside the thread, so that the outcome is logged even if the server stops meanwhile.
        try:
            sent, failure = send_notices(self._database, self._mail, self._stopping)
        except UnmaskError as error:
            log.error("mail to voters waits, and is tried again with the next: %s", error)
            return
        if sent:
            log.info("%d mails were sent to voters", sent)
        if failure:
            log.error("mail to voters waits, and is tried again with the next: %s", failure)
