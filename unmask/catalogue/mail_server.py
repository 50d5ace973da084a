"""`MailServer`: where notices are sent. This module imports no database, for the command line."""

import smtplib
import ssl
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from unmask.errors import UsageError

_TIMEOUT_S = 20.0


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
        """Open a session with the mail server, signed in where the address says so.

        Raises:
            OSError, smtplib.SMTPException: it cannot be had.
        """
        parts = urlsplit(self.url)
        host = str(parts.hostname)
        safe = ssl.create_default_context()
        if parts.scheme == "smtps":
            session: smtplib.SMTP = smtplib.SMTP_SSL(host, parts.port or 465, timeout=_TIMEOUT_S, context=safe)
        else:
            session = smtplib.SMTP(host, parts.port or 25, timeout=_TIMEOUT_S)
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
