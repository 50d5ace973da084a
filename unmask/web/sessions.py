"""Sessions, cookies and form tokens: who looks at a page, and whether a form is from a page of ours.

A session is a cookie that no script can read. The token of a form is a digest of that cookie, so it is useless to
anybody without the cookie. Visitors who are not signed in get a cookie for form tokens only.
"""

import hmac
import re
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from urllib.parse import parse_qs, quote, unquote

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Match

from unmask.accounts import Accounts, people
from unmask.accounts.identity_provider import AUTHORIZATION_MS, AuthorizationRequest
from unmask.accounts.people import Person
from unmask.api.body import read_body
from unmask.api.context import context_of
from unmask.api.errors import ApiError
from unmask.api.settings import ServeSettings
from unmask.errors import SignInRefused
from unmask.storage.database import now_ms
from unmask.web.forms import Form
from unmask.web.page_context import page_context
from unmask.web.rendering import HEADERS

PageHandler = Callable[[Request], Awaitable[Response]]

TOKEN_FIELD = "token"

_SESSION, _FORM, _VISIT = "unmask_session", "unmask_form", "unmask_visit"
# First segments of the pages by which one signs in; going on to them would go in a circle.
_ENTRY_PAGES = ("sign-in", "sign-up", "sign-out", "first-admin")
# A path without characters that a browser could read as another host.
_LOCAL_PATH = re.compile(r"/(?:[A-Za-z0-9_~.%-][A-Za-z0-9_~.%/-]*)?(?:\?[A-Za-z0-9_~.%/=&+-]*)?")
_BODY_LIMIT_BYTES = 64 * 1024
_MAX_FIELDS = 500


@dataclass(frozen=True)
class SessionMiddleware:
    """Resolves the visitor before a page is made. The functions of this module find it in the `PageContext`."""

    accounts: Accounts
    settings: ServeSettings

    def wrap(self, handler: PageHandler) -> PageHandler:
        """Return the handler with the visitor resolved before it runs."""

        async def page(request: Request) -> Response:
            context = page_context(request)
            context.accounts, context.settings = self.accounts, self.settings
            _refuse_nul(request)
            await current_visitor(request)
            return await handler(request)

        return page


def require_person(page: Callable[[Request, Person], Awaitable[Response]], *, admin: bool = False) -> PageHandler:
    """Return a handler for visitors who are signed in; others are sent to the sign-in page first.

    Args:
        page: makes the page for the visitor.
        admin: only for admins.

    Raises (the handler):
        ApiError: 403, the page is for admins.
    """

    async def handler(request: Request) -> Response:
        person = await current_visitor(request)
        if person is None:
            here = request.url.path + (f"?{request.url.query}" if request.url.query else "")
            return redirect(f"/sign-in?next={quote(here, safe='')}")
        _require_admin(person, admin)
        return await page(request, person)

    return handler


def require_form(
    act: Callable[[Request, Person, Form], Awaitable[Response]], *, admin: bool = False, throttle: bool = True
) -> PageHandler:
    """Return a handler for a form that a signed-in visitor sent from its own page.

    Args:
        act: carries out the form.
        admin: only for admins, whose forms are not counted.
        throttle: count the form against the forms per minute of the visitor's account.

    Raises (the handler):
        RateLimited: too many forms of the account.
        ApiError: 403 for a wrong form token or a form for admins; 400, 408 or 413 for a form that cannot be read.
    """

    async def handler(request: Request) -> Response:
        person = await current_visitor(request)
        if person is None:
            return redirect("/sign-in")
        form = await read_form(request)
        _require_admin(person, admin)
        if admin:
            # A slow body can take half a minute, and the admin may have been frozen meanwhile.
            page_context(request).is_resolved = False
            person = await current_visitor(request)
            if person is None:
                return redirect("/sign-in")
            _require_admin(person, admin)
        elif throttle:
            accounts = page_context(request).accounts
            assert accounts is not None, "people are for servers with accounts"
            await accounts.membership.throttle_form(person)
        return await act(request, person, form)

    return handler


def redirect(address: str) -> Response:
    """Send the browser to another page with GET. The response is not cached."""
    return RedirectResponse(address, 303, HEADERS | {"cache-control": "private, no-store"})


def own_page(request: Request, address: str) -> str:
    """Return an address to go on to if it is that of a page here; otherwise an empty text. Prevents open redirects.

    The address must be in the one form that every browser and proxy reads alike: a path without empty or dot segments,
    backslashes and control characters, encoded or not. What it leads to must be a route of this server that a browser
    may open, and not one for signing in.
    """
    if not _LOCAL_PATH.fullmatch(address):
        return ""
    path = unquote(address.partition("?")[0])
    segments = path.split("/")[1:]
    # A percent sign that is left is an address encoded twice, which something behind this server may decode again.
    odd = "%" in path or "\\" in path or not path.isprintable()
    if odd or any(segment in ("", ".", "..") for segment in segments[:-1]) or segments[-1] in (".", ".."):
        return ""
    if segments[0] in _ENTRY_PAGES:
        return ""
    scope = {**request.scope, "method": "GET", "path": path, "raw_path": path.encode()}
    is_route = any(route.matches(scope)[0] is Match.FULL for route in request.scope["router"].routes)
    return address if is_route else ""


async def current_visitor(request: Request) -> Person | None:
    """Return the person who is signed in. None for everybody else, and on a server without accounts.

    Raises:
        StorageError: the accounts cannot be reached.
    """
    context = page_context(request)
    token = _cookie(request, _SESSION)
    if context.accounts is None or not token:
        return None
    if not context.is_resolved:
        now = now_ms()
        try:
            context.visitor = await context.accounts.read(
                lambda connection: people.person_of_session(connection, token, now)
            )
        except SignInRefused:
            context.visitor = None
        context.is_resolved = True
    return context.visitor


def cached_visitor(request: Request) -> Person | None:
    """Return the visitor without a database query; None if `current_visitor` has not been called before."""
    return page_context(request).visitor


def visitor_links(request: Request) -> list[tuple[str, str]]:
    """Return the visitor's links in the head of every page; see `AccountHooks.visitor_links`."""
    person = cached_visitor(request)
    if person is None:
        return [("Sign in", "/sign-in")]
    return [("Account", "/account"), *([("Admin", "/admin")] if person.admin else [])]


def form_token(request: Request) -> str:
    """Return the token for the forms of this page. Sets the form cookie if the visitor has neither it nor a session.

    Needs the visitor, which `SessionMiddleware` resolves before every page.
    """
    context = page_context(request)
    assert context.accounts is not None, "forms with a token are for servers with accounts"
    secret = _token_secret(request)
    if not secret:
        secret = secrets.token_urlsafe(24)
        # Kept for the other forms of this page, which are to have the same token.
        context.form_cookie = secret
        context_of(request).response_headers["set-cookie"] = _set_cookie(request, _FORM, secret)
    return context.accounts.peppers.permanent_digest(f"form {secret}")


async def read_form(request: Request) -> Form:
    """Read the form in the body of a request, and check that it is from a page that this visitor was shown.

    Raises:
        ApiError: 400, 408 or 413 if it cannot be read; 403 if its token is not this visitor's.
    """
    settings = page_context(request).settings
    body = await read_body(request, _BODY_LIMIT_BYTES, settings.receive_timeout_s if settings else 30)
    try:
        text = body.decode("utf-8")
        fields = parse_qs(text, keep_blank_values=True, max_num_fields=_MAX_FIELDS, errors="strict")
    except ValueError as error:
        raise ApiError(400, "The form could not be read: send it as the page has it.", code="bad_form") from error
    form = Form(fields)
    _check_token(request, form)
    if any("\x00" in value for values in fields.values() for value in values):
        # No database takes it, and a text without it would be another text.
        raise ApiError(400, "A field holds the character U+0000: remove it, and send the form again.", code="bad_form")
    return form


def client_address(request: Request) -> str:
    """Return the IP address of the client."""
    return request.client.host if request.client else ""


def session_token(request: Request) -> str:
    """Return the token of the session; an empty text without one."""
    return _cookie(request, _SESSION)


def set_session_cookie(request: Request, response: Response, token: str) -> None:
    """Sign the visitor's browser in with a token of `Accounts.sign_in`."""
    max_age = f"; Max-Age={people.SESSION_MS // 1000}"
    response.headers.append("set-cookie", _set_cookie(request, _SESSION, token) + max_age)


def clear_session_cookie(request: Request, response: Response) -> None:
    """Delete the session cookie in the browser. The session itself is ended in the database."""
    response.headers.append("set-cookie", _set_cookie(request, _SESSION, "") + "; Max-Age=0")


def set_visit_cookie(request: Request, response: Response, visit: AuthorizationRequest) -> None:
    """Store in the browser the state with which it comes back from the OpenID Connect provider."""
    response.headers.append(
        "set-cookie", _set_cookie(request, _VISIT, str(visit)) + f"; Max-Age={AUTHORIZATION_MS // 1000}"
    )


def read_visit_cookie(request: Request) -> AuthorizationRequest | None:
    """Return the visit to the provider from which the browser comes back; None if it has begun none."""
    return AuthorizationRequest.read(_cookie(request, _VISIT))


def clear_visit_cookie(request: Request, response: Response) -> None:
    """Delete the visit cookie in the browser, after the visit."""
    response.headers.append("set-cookie", _set_cookie(request, _VISIT, "") + "; Max-Age=0")


def _check_token(request: Request, form: Form) -> None:
    accounts = page_context(request).accounts
    secret = _token_secret(request)
    valid = accounts is not None and hmac.compare_digest(
        accounts.peppers.permanent_digest(f"form {secret}").encode(), form.raw(TOKEN_FIELD).encode()
    )
    if not secret or not valid:
        raise ApiError(
            403,
            "This form is too old, or was not sent from its own page: go back, load the page again, and send it "
            "from there. Cookies must be allowed.",
            code="form_refused",
        )


def _require_admin(person: Person, admin: bool) -> None:
    if admin and not person.admin:
        raise ApiError(403, "These pages are for the admins of this server.", code="permission_denied")


def _token_secret(request: Request) -> str:
    """Return the cookie that form tokens are made from: that of the session, else the form cookie."""
    if cached_visitor(request) is not None:
        return _cookie(request, _SESSION)
    return page_context(request).form_cookie or _cookie(request, _FORM)


def _refuse_nul(request: Request) -> None:
    """Refuse an address that holds the character U+0000, which no text of Postgres can hold."""
    texts = (*request.path_params.values(), *(text for pair in request.query_params.multi_items() for text in pair))
    if any("\x00" in text for text in texts if isinstance(text, str)):
        raise ApiError(400, "The address holds the character U+0000 (%00): remove it.", code="bad_address")


def _is_https(request: Request) -> bool:
    settings = page_context(request).settings
    public = settings.public_url if settings else None
    return (public or str(request.url)).startswith("https://")


def _cookie_name(request: Request, name: str) -> str:
    # Browsers accept a cookie with this prefix only from this host over https: no other host can plant one.
    return f"__Host-{name}" if _is_https(request) else name


def _cookie(request: Request, name: str) -> str:
    return request.cookies.get(_cookie_name(request, name), "")


def _set_cookie(request: Request, name: str, value: str) -> str:
    secure = "; Secure" if _is_https(request) else ""
    return f"{_cookie_name(request, name)}={value}; Path=/; HttpOnly; SameSite=Lax{secure}"
