"""`WebPages`: the pages that an app serves beside its API, as `web` hands them to `create_app`."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Scope

from unmask.api.errors import ApiError


@dataclass(frozen=True)
class WebPages:
    """Pages of a server.

    Attributes:
        routes: all pages but the first.
        home: the page at `/`; programs get JSON there.
        error: renders an error as a page; returns None for a program, which gets the error envelope.
    """

    routes: Sequence[Route]
    home: Callable[[Request], Awaitable[Response]]
    error: Callable[[Scope, ApiError], Response | None]


def accepts_html(scope: Scope) -> bool:
    """True if the client accepts HTML, as a browser does."""
    return scope["method"] in ("GET", "HEAD", "POST") and "text/html" in Headers(scope=scope).get("accept", "")
