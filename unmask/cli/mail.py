"""The options of the mail server, and the sending of notices."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from cyclopts import Group, Parameter

from unmask.terminal import say

if TYPE_CHECKING:
    from unmask.catalogue.mail_server import MailServer
    from unmask.storage.database import Database

MAIL_GROUP = Group("Mail to people who voted for the model", sort_key=90)

PublicUrl = Annotated[
    str,
    Parameter(
        name="--public-url", env_var="UNMASK_PUBLIC_URL", group=MAIL_GROUP, help="Address of the server's pages."
    ),
]


@Parameter(name="*", group=MAIL_GROUP)
@dataclass(frozen=True, kw_only=True)
class MailOptions:
    """Options for outgoing mail.

    Attributes:
        mail_server: smtp://host:port or smtps://user:password@host:port. Default: no mail, only notices on the pages.
        mail_from: Sender's address.
    """

    mail_server: Annotated[str | None, Parameter(env_var="UNMASK_MAIL_SERVER")] = None
    mail_from: Annotated[str, Parameter(env_var="UNMASK_MAIL_FROM")] = ""

    def server(self, public_url: str) -> "MailServer | None":
        """Return the mail server; None if no server is named.

        Raises:
            UsageError: an address is malformed.
        """
        from unmask.catalogue.mail_server import MailServer

        return None if self.mail_server is None else MailServer(self.mail_server, self.mail_from, public_url)


NO_MAIL = MailOptions()


def send_waiting_notices(database: "Database", server: "MailServer | None") -> None:
    """Mail the waiting notices and report how many were sent. Do nothing without a server."""
    from unmask.catalogue.mail import send_notices

    if server is None:
        return
    sent, reason = send_notices(database, server)
    say(f"{sent} mails were sent{f'; the others wait, after {reason}' if reason else ''}")
