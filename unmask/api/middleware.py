"""The middlewares around every route. `create_app` lists them in their order, outermost first.

Plain ASGI: Starlette's BaseHTTPMiddleware would hide the client's disconnect from the routes.
"""

import asyncio
import re
import secrets
import threading
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import structlog
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from unmask.api.authentication import Authenticator
from unmask.api.context import CLIENT_CLOSED_REQUEST, RequestContext, context_of, set_context
from unmask.api.errors import ApiError, api_error, error_response, internal_error
from unmask.api.metrics import Metrics
from unmask.errors import AccountError, EngineError, EngineStopped, InputError, UnmaskError

log = structlog.get_logger()

ErrorPage = Callable[[Scope, ApiError], Response | None]

_PLAIN_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class RequestContextMiddleware:
    """Give each request a `RequestContext` with its id, and put the id on every log line meanwhile."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        own_id = Headers(scope=scope).get("x-request-id", "")
        request_id = own_id if _PLAIN_ID.fullmatch(own_id) else new_request_id()
        set_context(scope, RequestContext(request_id))
        with structlog.contextvars.bound_contextvars(request_id=request_id):
            await self._app(scope, receive, send)


class AccessLogMiddleware:
    """Write one log line and count one request once the answer is over.

    Args:
        app: the next app.
        metrics: the counters.
        routes: route templates by endpoint, as labels of the counters.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, routes: Mapping[Any, str]) -> None:
        self._app, self._metrics, self._routes = app, metrics, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        context = context_of(scope)
        await self._app(scope, receive, send)
        route = self._routes.get(scope.get("endpoint"), "unmatched")
        self._metrics.count_request(route, context.status, context.elapsed_s())
        log.info(
            "request",
            method=scope["method"],
            path=scope["path"],
            status=context.status,
            ms=context.elapsed_ms(),
            tokens=context.tokens,
        )


class ResponseHeadersMiddleware:
    """Add the headers that every answer has, and those that a route has put into its context."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        context = context_of(scope)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                context.status = message["status"]
                added = context.response_headers | {
                    "x-request-id": context.request_id,
                    "openai-processing-ms": str(context.elapsed_ms()),
                }
                if context.status >= 400 and "expect" in Headers(scope=scope):
                    # The body may never come; the server would take the next request for it.
                    added["connection"] = "close"
                encoded = {name.lower().encode("latin-1"): value.encode("latin-1") for name, value in added.items()}
                own = [pair for pair in message["headers"] if pair[0] not in encoded]
                message["headers"] = [*own, *encoded.items()]
            await send(message)

        await self._app(scope, receive, send_with_headers)


class ErrorMiddleware:
    """Answer every exception: as OpenAI's error envelope, or as a page where a browser asks.

    Args:
        app: the next app.
        stopping: set once the server shuts down.
        error_page: renders an error as a page; returns None for requests that want the envelope.
    """

    def __init__(self, app: ASGIApp, stopping: threading.Event, error_page: ErrorPage | None = None) -> None:
        self._app, self._stopping, self._error_page = app, stopping, error_page

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        context = context_of(scope)
        scope["app"] = self  # makes Starlette's routing raise HTTPException instead of answering in plain text
        try:
            await self._app(scope, receive, send)
            return
        except ClientDisconnect:
            context.status = CLIENT_CLOSED_REQUEST
            return
        except asyncio.CancelledError:
            # Only the end of the shutdown's grace cancels a request; its caller should try elsewhere.
            if not self._stopping.is_set():
                raise
            failure = api_error(EngineStopped("The server is shutting down."))
        except Exception as error:  # noqa: BLE001 - every exception needs an answer and a log line
            failure = _failure(error, scope)
        try:
            if not context.status:
                page = self._error_page(scope, failure) if self._error_page else None
                await (page or error_response(failure))(scope, receive, send)
        finally:
            # Its traceback holds this frame, and the frames below with the caller's texts. As a cycle they would stay
            # in memory until Python searches for garbage: after some more refused bodies.
            del failure


class AuthenticationMiddleware:
    """Put the principal into the context, or raise the error that refuses the request."""

    def __init__(self, app: ASGIApp, authenticator: Authenticator) -> None:
        self._app, self._authenticator = app, authenticator

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            context_of(scope).principal = await self._authenticator.authenticate(scope)
        await self._app(scope, receive, send)


def new_request_id() -> str:
    """Return an id for a request whose caller named none."""
    return f"req_{secrets.token_hex(16)}"


def _failure(error: Exception, scope: Scope) -> ApiError:
    """Convert an exception to an answer, and log it if it concerns the operator."""
    if isinstance(error, HTTPException):
        message = f"{error.detail}: {scope['method']} {scope['path'][:200]}"
        return ApiError(error.status_code, message, headers=error.headers)
    if not isinstance(error, UnmaskError):
        # Without the exception's message: it may quote the caller's text.
        log.error("fault", error=type(error).__name__, frames=_frames(error))
        return internal_error()
    if not isinstance(error, ApiError | EngineError | InputError | AccountError):
        # Loading or storage failed. Such a message names files of this machine, never the caller's text.
        log.error("unavailable", error=type(error).__name__, reason=str(error))
    return api_error(error)


def _frames(error: BaseException) -> list[str]:
    return [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)]
