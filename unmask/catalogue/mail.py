"""Notices by mail, where the operator has named a mail server."""

import smtplib
import threading
from contextlib import ExitStack
from email.message import EmailMessage
from urllib.parse import quote, urlsplit

from unmask.catalogue.mail_server import MailServer
from unmask.catalogue.votes import Letter, claim_letters, unclaim_letter
from unmask.storage.database import Database, now_ms

# Errors that concern one letter. The mail server still accepts the next one.
_REFUSED = (smtplib.SMTPRecipientsRefused, smtplib.SMTPDataError, smtplib.SMTPNotSupportedError)


def send_notices(database: Database, server: MailServer, stopping: threading.Event | None = None) -> tuple[int, str]:
    """Mail every notice that has not been mailed yet.

    An address that the mail server refuses holds nobody else's mail up.

    Args:
        stopping: once it is set, no further letter is sent.

    Returns:
        How many went out, and what kept the others back, or "". Those are tried again the next time.

    Raises:
        StorageError: the database failed.
    """
    stopping = stopping or threading.Event()
    waiting, refused, sent, reason = list[Letter](), list[Letter](), 0, ""
    try:
        with ExitStack() as stack:
            session: smtplib.SMTP | None = None
            while not stopping.is_set() and (waiting := _claim(database)):
                session = session or stack.enter_context(server.connect())
                while waiting and not stopping.is_set():
                    try:
                        session.send_message(_written(waiting[0], server))
                        sent += 1
                    except _REFUSED as error:
                        refused.append(waiting[0])
                        reason = _reason(error, server)
                    waiting.pop(0)
    except (OSError, smtplib.SMTPException) as error:
        reason = _reason(error, server)
    finally:
        # Refused letters only now, or they would be claimed again at once.
        if left := [*refused, *waiting]:
            with database.begin() as connection:
                for letter in left:
                    unclaim_letter(connection, letter)
    return sent, reason


def _claim(database: Database) -> list[Letter]:
    with database.begin() as connection:
        return claim_letters(connection, now_ms())


def _reason(error: Exception, server: MailServer) -> str:
    # Without the server's words about an address: they name it, and this goes to a log.
    return f"{type(error).__name__} at {urlsplit(server.url).hostname}"


def _written(letter: Letter, server: MailServer) -> EmailMessage:
    message = EmailMessage()
    message["From"], message["To"] = server.sender, letter.to
    message["Subject"] = f"{letter.model} is live"
    message.set_content(
        f"{letter.model}, which you voted for, now answers requests:\n\n"
        f"{server.site.rstrip('/')}/models/{quote(letter.model)}\n\n"
        "You get this once, because you voted for it on its page.\n"
    )
    return message
