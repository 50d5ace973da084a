"""A real mail server of the tests' own, and what it received."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email import message_from_bytes
from email.message import Message
from typing import Any

from aiosmtpd.controller import Controller

from unmask.catalogue.mail_server import MailServer


@dataclass
class Inbox:
    """Letters that a mail server received.

    Attributes:
        letters: in the order in which they came.
        refused: how many addresses it still refuses, of whoever comes next.
        unknown: an address that it always refuses.
        open: while it is cleared, no letter is taken.
    """

    letters: list[Message] = field(default_factory=list)
    refused: int = 0
    unknown: str = ""
    open: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.open.set()

    @property
    def addresses(self) -> list[str]:
        return sorted(str(letter["To"]) for letter in self.letters)

    async def handle_RCPT(self, server: Any, session: Any, envelope: Any, address: str, options: Any) -> str:  # noqa: N802 - aiosmtpd's name
        if address == self.unknown:
            return f"550 nobody is called {address}"
        if self.refused:
            self.refused -= 1
            return "451 try again later"
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:  # noqa: N802 - aiosmtpd's name
        await asyncio.to_thread(self.open.wait, 30)
        self.letters.append(message_from_bytes(envelope.content))
        return "250 OK"


@contextmanager
def mail_server() -> Iterator[tuple[MailServer, Inbox]]:
    """Yield the address of a mail server, and its inbox."""
    inbox = Inbox()
    controller = Controller(inbox, hostname="127.0.0.1", port=free_port())
    controller.start()
    try:
        yield (
            MailServer(f"smtp://127.0.0.1:{controller.port}", "models@example.org", "https://embed.example.org"),
            inbox,
        )
    finally:
        controller.stop()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
