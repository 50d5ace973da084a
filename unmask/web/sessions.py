"""Who looks at a page, and whether a form came from a page of ours.

A session is a cookie that no script can read. A form's token is a digest of that cookie, so it is worth nothing to
anybody without it; visitors who are not signed in get a cookie for their forms alone.
"""

import hmac
import re
import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from urllib.parse import parse_qs, quote

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from unmask.accounts import Accounts, people
from unmask.accounts.people import Person
from unmask.accounts.provider import VISIT_MS, Visit
from unmask.api.body import read_body
from unmask.api.context import context_of
from unmask.api.errors import ApiError
from unmask.api.settings import ServeSettings
from unmask.errors import SignInRefused
from unmask.storage.database import now_ms
from unmask.web.rendering import HEADERS

Handler = Callable[[Request], Awaitable[Response]]

TOKEN = "token"  # the form's field

_SESSION, _FORM, _VISIT = "unmask_session", "unmask_form", "unmask_visit"
# A path without anything that a browser might take for another host.
_OWN_ADDRESS = re.compile(r"/(?:[A-Za-z0-9_~.%-][A-Za-z0-9_~.%/-]*)?(?:\?[A-Za-z0-9_~.%/=&+-]*)?")
_BODY_LIMIT = 64 * 1024
_MOST_FIELDS = 500


@dataclass(frozen=True)
class Reception:
    """What the functions here must know of the server. They find it in the request, where `receive` puts it."""

    accounts: Accounts
    settings: ServeSettings

    def receive(self, handler: Handler) -> Handler:
        """The same page, which knows who looks at it."""

        async def page(request: Request) -> Response:
            request.state.reception = self
            await visitor(request)
            return await handler(request)

        return page


class Form:
    """The fields of a form that was sent, each a text or several."""

    def __init__(self, fields: Mapping[str, list[str]]) -> None:
        self._fields = fields

    def get(self, name: str) -> str:
        """The field without blanks around it, or nothing."""
        return self.raw(name).strip()

    def raw(self, name: str) -> str:
        """The field as it was typed; what is for passwords."""
        return self._fields.get(name, [""])[0]

    def all(self, name: str) -> list[str]:
        """Every value of a field, such as ticked boxes."""
        return [value.strip() for value in self._fields.get(name, ()) if value.strip()]


def for_person(page: Callable[[Request, Person], Awaitable[Response]], *, admin: bool = False) -> Handler:
    """A page for somebody who is signed in; others are sent to sign in first.

    Args:
        admin: only for admins.

    Raises (the page):
        ApiError: 403, only an admin may see it.
    """

    async def handle(request: Request) -> Response:
        person = await visitor(request)
        if person is None:
            here = request.url.path + (f"?{request.url.query}" if request.url.query else "")
            return go(f"/sign-in?next={quote(here, safe='')}")
        _require_admin(person, admin)
        return await page(request, person)

    return handle


def for_form(act: Callable[[Request, Person, Form], Awaitable[Response]], *, admin: bool = False) -> Handler:
    """What a form does, for somebody who is signed in and sent it from its own page.

    Raises (the handler):
        ApiError: 403 for another's form, or one for admins; 400, 408 or 413 for one that cannot be read.
    """

    async def handle(request: Request) -> Response:
        person = await visitor(request)
        if person is None:
            return go("/sign-in")
        form = await read_form(request)
        check_form(request, form)
        _require_admin(person, admin)
        return await act(request, person, form)

    return handle


def go(address: str) -> Response:
    """The answer that sends a browser on to another page of ours."""
    return RedirectResponse(address, 303, HEADERS | {"cache-control": "private, no-store"})


def own_address(text: str) -> str:
    """An address to go on to, if it is one of this site; nothing otherwise."""
    return text if _OWN_ADDRESS.fullmatch(text) else ""


async def visitor(request: Request) -> Person | None:
    """Who is signed in. None for everybody else, and on a server without accounts.

    Raises:
        StorageError: the accounts cannot be reached.
    """
    reception = _reception(request)
    token = _cookie(request, _SESSION)
    if reception is None or not token:
        return None
    if not hasattr(request.state, "visitor"):
        now = now_ms()
        try:
            found = await reception.accounts.read(lambda connection: people.signed_in(connection, token, now))
        except SignInRefused:
            found = None
        request.state.visitor = found
    return request.state.visitor


def seen(request: Request) -> Person | None:
    """The visitor, for what cannot wait: None where nobody has asked for `visitor` yet."""
    return getattr(request.state, "visitor", None)


def visitor_links(request: Request) -> list[tuple[str, str]]:
    """What stands in every page's head for whoever looks at it, as `Seams.links` wants it."""
    person = seen(request)
    if person is None:
        return [("Sign in", "/sign-in")]
    return [("Account", "/account"), *([("Admin", "/admin")] if person.admin else [])]


def form_token(request: Request) -> str:
    """What a form on this page carries in its field `token`. Gives the visitor a cookie for it where there is none.

    `visitor` must have been asked before, as it is on every page that `Reception.receive` wraps.
    """
    reception = _reception(request)
    assert reception is not None, "forms with a token are for servers with accounts"
    bound = _bound(request)
    if not bound:
        bound = secrets.token_urlsafe(24)
        # Kept for this request too: a page may have several forms.
        request.state.form_cookie = bound
        context_of(request).response_headers["set-cookie"] = _set_cookie(request, _FORM, bound)
    return reception.accounts.peppers.mark(f"form {bound}")


def check_form(request: Request, form: Form) -> None:
    """Whether the form came from a page that this very visitor was shown.

    Raises:
        ApiError: 403, it did not.
    """
    reception = _reception(request)
    bound = _bound(request)
    given = form.raw(TOKEN)
    good = reception is not None and hmac.compare_digest(
        reception.accounts.peppers.mark(f"form {bound}").encode(), given.encode()
    )
    if not bound or not good:
        raise ApiError(
            403,
            "This form is too old, or was not sent from its own page: go back, load the page again, and send it "
            "from there. Cookies must be allowed.",
            code="form_refused",
        )


async def read_form(request: Request) -> Form:
    """The form in a request's body. To be given to `check_form` before anything is done.

    Raises:
        ApiError: 400, 408 or 413.
    """
    reception = _reception(request)
    body = await read_body(request, _BODY_LIMIT, reception.settings.receive_timeout_s if reception else 30)
    try:
        text = body.decode("utf-8")
        fields = parse_qs(text, keep_blank_values=True, max_num_fields=_MOST_FIELDS, errors="strict")
    except ValueError as error:
        raise ApiError(400, "The form could not be read: send it as the page has it.", code="bad_form") from error
    return Form({name: [value.replace("\x00", "") for value in values] for name, values in fields.items()})


def address_of(request: Request) -> str:
    """Where a request comes from."""
    return request.client.host if request.client else ""


def session_token(request: Request) -> str:
    """The token of the session, or nothing."""
    return _cookie(request, _SESSION)


def start_session(request: Request, response: Response, token: str) -> None:
    """Sign the visitor's browser in with a token of `Accounts.sign_in`."""
    kept = f"; Max-Age={people.SESSION_MS // 1000}"
    response.headers.append("set-cookie", _set_cookie(request, _SESSION, token) + kept)


def end_session(request: Request, response: Response) -> None:
    """Make the visitor's browser forget the session. The session itself is ended by `people.end_session`."""
    response.headers.append("set-cookie", _set_cookie(request, _SESSION, "") + "; Max-Age=0")


def keep_visit(request: Request, response: Response, visit: Visit) -> None:
    """Let the visitor's browser keep what it needs to come back from the provider."""
    response.headers.append("set-cookie", _set_cookie(request, _VISIT, str(visit)) + f"; Max-Age={VISIT_MS // 1000}")


def visit_of(request: Request) -> Visit | None:
    """The visit to the provider from which a browser comes back, if it has begun one."""
    return Visit.read(_cookie(request, _VISIT))


def forget_visit(request: Request, response: Response) -> None:
    """Make the visitor's browser forget the visit, which is over."""
    response.headers.append("set-cookie", _set_cookie(request, _VISIT, "") + "; Max-Age=0")


def _require_admin(person: Person, admin: bool) -> None:
    if admin and not person.admin:
        raise ApiError(403, "These pages are for the admins of this server.", code="permission_denied")


def _reception(request: Request) -> Reception | None:
    return getattr(request.state, "reception", None)


def _bound(request: Request) -> str:
    """What a form's token is made from: the session, or else the cookie for forms."""
    if seen(request) is not None:
        return _cookie(request, _SESSION)
    return getattr(request.state, "form_cookie", "") or _cookie(request, _FORM)


def _secure(request: Request) -> bool:
    reception = _reception(request)
    public = reception.settings.public_url if reception else None
    return (public or str(request.url)).startswith("https://")


def _name(request: Request, name: str) -> str:
    # Browsers take a cookie of this name only from this very host, by https: no neighbour can plant one.
    return f"__Host-{name}" if _secure(request) else name


def _cookie(request: Request, name: str) -> str:
    return request.cookies.get(_name(request, name), "")


def _set_cookie(request: Request, name: str, value: str) -> str:
    secure = "; Secure" if _secure(request) else ""
    return f"{_name(request, name)}={value}; Path=/; HttpOnly; SameSite=Lax{secure}"
