"""A visitor over plain HTTP: keeps cookies, and fills in forms with the token of their page."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar
from urllib.parse import urlencode

from sqlalchemy import Connection

from tests.api.live import LocalService, Reply
from tests.web.conftest import HTML
from tests.web.html import Page
from unmask.accounts import Accounts, keys, ledger, people
from unmask.accounts.keys import KeySettings
from unmask.accounts.people import Person
from unmask.storage.database import now_ms

T = TypeVar("T")

PASSWORD = "correct horse battery"


def do(accounts: Accounts, piece: Callable[[Connection], T]) -> T:
    """Run a function in a transaction of the accounts' database."""
    with accounts.database.begin() as connection:
        return piece(connection)


def person(accounts: Accounts, email: str, *, admin: bool = False, nano: int = 1_000_000_000) -> Person:
    """Create a person with an account and credit."""

    # Made here, by the cheap hash of the tests, like that of an unknown address.
    hashed = people.hash_password(PASSWORD)

    def make(connection: Connection) -> Person:
        made = people.sign_up(connection, accounts.peppers, email, hashed, now_ms(), admin=admin)
        if nano:
            ledger.top_up(connection, made.account_id, nano, f"payment of {email}", now_ms(), note=f"for {email}")
        return made

    return do(accounts, make)


def key_of(accounts: Accounts, who: Person, **settings: Any) -> str:
    """Create an API key and return its secret."""
    return do(accounts, lambda c: keys.create(c, accounts.peppers, who.account_id, KeySettings(**settings), now_ms()))


class Visitor:
    """A visitor with cookies."""

    def __init__(self, service: LocalService, session: str = "") -> None:
        self.service = service
        self.cookies: dict[str, str] = {"unmask_session": session} if session else {}

    @classmethod
    def signed_in(cls, service: LocalService, accounts: Accounts, who: Person) -> "Visitor":
        """Return a visitor with a session, without the sign-in form."""
        return cls(service, do(accounts, lambda c: people.create_session(c, who.id, now_ms())))

    def get(self, path: str, **headers: str) -> Reply:
        return self._call("GET", path, None, headers)

    def page(self, path: str) -> Page:
        reply = self.get(path)
        assert reply.status == 200, (path, reply.status, reply.headers.get("location"))
        return Page(reply.body.decode())

    def post(self, path: str, fields: Mapping[str, str | list[str]], **headers: str) -> Reply:
        """Send a form with exactly these fields; no token is added."""
        body = urlencode(fields, doseq=True).encode()
        return self._call("POST", path, body, {"content-type": "application/x-www-form-urlencoded", **headers})

    def fill(self, form_on: str, path: str | None = None, **fields: str | list[str]) -> Reply:
        """Send the form of the page `form_on`, with its token, to `path` or to the page itself."""
        return self.post(path or form_on, {"token": self.token(form_on), **fields})

    def token(self, form_on: str = "/account/keys") -> str:
        inputs = self.page(form_on).all("input")
        return next(field["value"] for field in inputs if field.get("name") == "token")

    def _call(self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]) -> Reply:
        sent = {**HTML, **headers}
        if self.cookies:
            sent["cookie"] = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
        reply = self.service.call(method, path, body, sent, key=None)
        if cookie := reply.headers.get("set-cookie"):
            name, _, value = cookie.partition(";")[0].partition("=")
            self.cookies[name] = value
            if not value:
                del self.cookies[name]
        return reply
