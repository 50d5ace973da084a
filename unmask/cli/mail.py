"""The mail server that a command is told of."""

from typing import TYPE_CHECKING, Annotated

from cyclopts import Group, Parameter

from unmask.cli.terminal import say

if TYPE_CHECKING:
    from unmask.catalogue.mail import MailServer
    from unmask.storage.database import Database

_MAIL = Group("Mail to those who wanted the model")

MailUrl = Annotated[
    str | None,
    Parameter(
        name="--mail-server",
        env_var="UNMASK_MAIL_SERVER",
        group=_MAIL,
        help="smtp://host:port or smtps://user:password@host:port. Left out: the notice on the account page alone.",
    ),
]
MailFrom = Annotated[
    str, Parameter(name="--mail-from", env_var="UNMASK_MAIL_FROM", group=_MAIL, help="Address that mail is from.")
]
PublicUrl = Annotated[
    str, Parameter(name="--public-url", env_var="UNMASK_PUBLIC_URL", group=_MAIL, help="Address of the pages.")
]


def named_server(url: str | None, sender: str, site: str) -> "MailServer | None":
    """Where mail is handed over; None where no server was named.

    Raises:
        UsageError: an address is none.
    """
    from unmask.catalogue.mail import MailServer

    return None if url is None else MailServer(url, sender, site)


def send(database: "Database", server: "MailServer | None") -> None:
    """Mail the notices that wait, and say what came of it."""
    from unmask.catalogue.mail import send_notices

    if server is None:
        return
    sent, reason = send_notices(database, server)
    say(f"{sent} mails were sent{f'; the others wait, after {reason}' if reason else ''}")
