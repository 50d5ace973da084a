"""Where the pages for people join the API: a seam, so that this room knows nothing of what they show."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Scope

from unmask.accounts import Accounts
from unmask.api.errors import ApiError
from unmask.api.metrics import Metrics
from unmask.api.settings import ServeSettings
from unmask.router import Models


@dataclass(frozen=True)
class Site:
    """Pages that an app shows besides its API.

    Attributes:
        routes: all pages but the first.
        home: the page at `/`, which programs get as JSON.
        error: an error as a page; None where the caller is a program and wants the envelope.
    """

    routes: Sequence[Route]
    home: Callable[[Request], Awaitable[Response]]
    error: Callable[[Scope, ApiError], Response | None]


# What makes the pages of a server, when its parts are there; the accounts are None for a server without them.
BuildSite = Callable[[Models, ServeSettings, Metrics, Accounts | None], Site]


def asks_for_html(scope: Scope) -> bool:
    """Whether a browser asks, to go by what it accepts."""
    return scope["method"] in ("GET", "HEAD", "POST") and "text/html" in Headers(scope=scope).get("accept", "")
