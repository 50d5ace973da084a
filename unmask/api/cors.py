"""`CorsMiddleware`: let pages of named origins call the API from a browser, without cookies (the Fetch standard)."""

import re
from collections.abc import Callable, Sequence

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from unmask.api.context import context_of

_HEADER_NAMES = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+(\s*,\s*[A-Za-z0-9!#$%&'*+.^_`|~-]+)*")
_PREFLIGHT_SECONDS = "600"


class CorsMiddleware:
    """Answer preflights of allowed origins before any key is asked for, and name the origin in their answers.

    Args:
        app: the next app.
        origins: exact origins; with none, no answer has a CORS header.
        is_page: tells for a scope that its path is a page for people, which no other origin reads.
    """

    def __init__(self, app: ASGIApp, origins: Sequence[str], is_page: Callable[[Scope], bool]) -> None:
        self._app, self._origins, self._is_page = app, frozenset(origins), is_page

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._origins or self._is_page(scope):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        cors_headers = context_of(scope).response_headers
        cors_headers["vary"] = "Origin"  # a cache must not give one origin the answer for another
        if origin not in self._origins:
            await self._app(scope, receive, send)
            return
        cors_headers["access-control-allow-origin"] = origin
        if scope["method"] != "OPTIONS" or "access-control-request-method" not in headers:
            cors_headers["access-control-expose-headers"] = "*"
            await self._app(scope, receive, send)
            return
        cors_headers["vary"] = "Origin, Access-Control-Request-Headers"
        cors_headers["access-control-allow-methods"] = "GET, HEAD, POST"
        cors_headers["access-control-max-age"] = _PREFLIGHT_SECONDS
        # By name: "*" does not cover Authorization.
        if _HEADER_NAMES.fullmatch(names := headers.get("access-control-request-headers", "")):
            cors_headers["access-control-allow-headers"] = names
        if headers.get("access-control-request-private-network") == "true":
            cors_headers["access-control-allow-private-network"] = "true"
        await Response(status_code=204)(scope, receive, send)
