"""Notices by mail, where the operator has named a mail server."""

import smtplib
import ssl
from dataclasses import dataclass, field
from email.message import EmailMessage
from urllib.parse import quote, unquote, urlsplit

from unmask.catalogue.votes import Letter, claim_letters, unclaim_letter
from unmask.errors import UsageError
from unmask.storage.database import Database, now_ms

_SECONDS = 20.0

# What a mail server says about one letter; it takes the next one all the same.
_REFUSED = (smtplib.SMTPRecipientsRefused, smtplib.SMTPDataError, smtplib.SMTPNotSupportedError)


@dataclass(frozen=True)
class MailServer:
    """A mail server (SMTP).

    Attributes:
        url: `smtp://host:port` or `smtps://user:password@host:port`. On the former TLS is begun where the server
            offers it, and demanded where there is a password.
        sender: address that mail is from.
        site: address of this server's pages, for the links in it.

    Raises:
        UsageError: an address is malformed.
    """

    url: str = field(repr=False)
    sender: str
    site: str

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("smtp", "smtps") or not parts.hostname:
            raise UsageError("the mail server must be written smtp://host:port or smtps://user:password@host:port")
        if "@" not in self.sender or not self.sender.isprintable():
            raise UsageError(f"mail cannot be from {self.sender!r}: name an address with --mail-from")
        if not self.site.startswith(("http://", "https://")):
            raise UsageError(
                f"mail links to the pages, and {self.site!r} is no address of them: "
                "name it with --public-url, such as https://embed.example.org"
            )

    def connect(self) -> smtplib.SMTP:
        """A session, signed in where the address says so.

        Raises:
            OSError, smtplib.SMTPException: it cannot be had.
        """
        parts = urlsplit(self.url)
        host = str(parts.hostname)
        safe = ssl.create_default_context()
        if parts.scheme == "smtps":
            session: smtplib.SMTP = smtplib.SMTP_SSL(host, parts.port or 465, timeout=_SECONDS, context=safe)
        else:
            session = smtplib.SMTP(host, parts.port or 25, timeout=_SECONDS)
        try:
            if parts.scheme == "smtp":
                session.ehlo()
                if session.has_extn("starttls") or parts.username:
                    session.starttls(context=safe)
            if parts.username:
                session.login(unquote(parts.username), unquote(parts.password or ""))
        except (OSError, smtplib.SMTPException):
            session.close()
            raise
        return session


def send_notices(database: Database, server: MailServer) -> tuple[int, str]:
    """Mail every notice that has not been mailed yet.

    An address that the mail server refuses holds nobody else's mail up.

    Returns:
        How many went out, and what kept the others back, or "". Those are tried again the next time.

    Raises:
        StorageError: the database failed.
    """
    with database.begin() as connection:
        letters = claim_letters(connection, now_ms())
    if not letters:
        return 0, ""
    waiting, refused, reason = list(letters), list[Letter](), ""
    try:
        with server.connect() as session:
            while waiting:
                try:
                    session.send_message(_written(waiting[0], server))
                except _REFUSED as error:
                    refused.append(waiting[0])
                    reason = _reason(error, server)
                waiting.pop(0)
    except (OSError, smtplib.SMTPException) as error:
        reason = _reason(error, server)
    left = [*refused, *waiting]
    if left:
        with database.begin() as connection:
            for letter in left:
                unclaim_letter(connection, letter)
    return len(letters) - len(left), reason


def _reason(error: Exception, server: MailServer) -> str:
    # Without the server's words about an address: they name it, and this goes to a log.
    return f"{type(error).__name__} at {urlsplit(server.url).hostname}"


def _written(letter: Letter, server: MailServer) -> EmailMessage:
    message = EmailMessage()
    message["From"], message["To"] = server.sender, letter.to
    message["Subject"] = f"{letter.model} is live"
    message.set_content(
        f"{letter.model}, which you asked for, now answers requests:\n\n"
        f"{server.site.rstrip('/')}/models/{quote(letter.model)}\n\n"
        'You get this once, because you pressed "I want it" on its page.\n'
    )
    return message
