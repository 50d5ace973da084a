"""One request and its answer: identity, access, errors, the log line and the counters around every route.

Plain ASGI: Starlette's BaseHTTPMiddleware would hide the caller's disconnecting from the routes.
"""

import asyncio
import re
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, TypeVar

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from unmask.api.authentication import Gate
from unmask.api.errors import ApiError, api_error, error_response, internal_error
from unmask.api.metrics import Metrics
from unmask.errors import AccountError, EngineError, EngineStopped, InputError, UnmaskError

log = structlog.get_logger()

T = TypeVar("T")

CLIENT_GONE = 499  # nginx's number for a caller that did not wait; only logs and counters see it

_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class Exchange:
    """The outermost app.

    Args:
        app: the routes. In the request's state they find `admitted`, `request_id` and `headers`, to which they
            may add response headers, and may set `tokens` for the log.
        routes: route templates by endpoint, for the counters.
        gate: decides who may call.
        metrics: the counters.
        stopping: set once the server shuts down.
        error_page: an error as a page, for requests that want one.
    """

    def __init__(
        self,
        app: ASGIApp,
        routes: Mapping[Any, str],
        gate: Gate,
        metrics: Metrics,
        stopping: threading.Event,
        error_page: Callable[[Scope, ApiError], Response | None] | None = None,
    ) -> None:
        self._app = app
        self._routes = routes
        self._gate = gate
        self._metrics = metrics
        self._stopping = stopping
        self._error_page = error_page

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        asked = Headers(scope=scope)
        given = asked.get("x-request-id", "")
        request_id = given if _SANE_ID.fullmatch(given) else new_request_id()
        status = 0
        state = scope.setdefault("state", {})
        state["headers"] = {}
        state["request_id"] = request_id
        scope["app"] = self  # makes Starlette's routing raise HTTPException, where it would answer in plain text

        async def send_identified(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers.update(state["headers"])
                headers["x-request-id"] = request_id
                headers["openai-processing-ms"] = str(_milliseconds(started))
                if status >= 400 and "expect" in asked:
                    # Its body may never come, and the next request would be taken for it.
                    headers["connection"] = "close"
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            failure: ApiError | None = None
            try:
                state["admitted"] = await self._gate.admit(scope)
                await self._app(scope, receive, send_identified)
            except ClientDisconnect:
                status = CLIENT_GONE
            except asyncio.CancelledError:
                # Only the end of the shutdown's grace cancels a request; its caller should try elsewhere.
                if not self._stopping.is_set():
                    raise
                failure = api_error(EngineStopped("The server is shutting down."))
            except Exception as error:  # noqa: BLE001 - whatever it is, there must be an answer and a log line
                failure = _failure(error, scope)
            if failure is not None and not status:
                page = self._error_page(scope, failure) if self._error_page else None
                await (page or error_response(failure))(scope, receive, send_identified)
            self._record(scope, status, started)

    def _record(self, scope: Scope, status: int, started: float) -> None:
        route = self._routes.get(scope.get("endpoint"), "unmatched")
        self._metrics.request(route, status, time.perf_counter() - started)
        log.info(
            "request",
            method=scope["method"],
            path=scope["path"],
            status=status,
            ms=_milliseconds(started),
            tokens=scope["state"].get("tokens", 0),
        )


def _failure(error: Exception, scope: Scope) -> ApiError:
    """The answer to an error, which is logged if it is the operator's concern."""
    if isinstance(error, HTTPException):
        message = f"{error.detail}: {scope['method']} {scope['path'][:200]}"
        return ApiError(error.status_code, message, headers=error.headers)
    if not isinstance(error, UnmaskError):
        # Without the exception's message: it may quote what the caller sent.
        log.error("fault", error=type(error).__name__, frames=_frames(error))
        return internal_error()
    if not isinstance(error, ApiError | EngineError | InputError | AccountError):
        # Loading or storage failed: such a message names files, not what a caller sent.
        log.error("unavailable", error=type(error).__name__, reason=str(error))
    return api_error(error)


def new_request_id() -> str:
    """An id for a request whose caller named none."""
    return f"req_{uuid.uuid4().hex}"


async def read_body(request: Request, limit: int, seconds: float) -> bytes:
    """The whole body of a request.

    Args:
        request: whose body.
        limit: bytes it may have, by its own account and as counted.
        seconds: time it may take to arrive.

    Raises:
        ApiError: 413 or 408.
        ClientDisconnect: the connection was closed before the end.
    """
    too_large = ApiError(413, f"The body is larger than {limit} bytes: send fewer inputs at a time.", code="too_large")
    # The parser has checked that Content-Length is a number. uvicorn goes on to discard the rest of a refused
    # body, so that the caller can finish sending and read why.
    if int(request.headers.get("content-length", 0)) > limit:
        raise too_large
    chunks = []
    size = 0
    try:
        async with asyncio.timeout(seconds):
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                chunk = message.get("body", b"")
                size += len(chunk)
                if size > limit:
                    raise too_large
                chunks.append(chunk)
                if not message.get("more_body", False):
                    return b"".join(chunks)
    except TimeoutError:
        raise ApiError(
            408,
            f"The body did not arrive within {seconds:g} seconds.",
            code="request_timeout",
            retry_after=1,
            headers={"connection": "close"},
        ) from None


async def unless_gone(work: Coroutine[Any, Any, T], request: Request) -> T:
    """The result of `work`, which is cancelled when the caller hangs up. The body must have been read.

    Raises:
        ClientDisconnect: the caller did.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        task.cancel()
        watch.cancel()
        # The cancelled work must have given back what it held before the request counts as over.
        await asyncio.gather(task, watch, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _milliseconds(started: float) -> int:
    return round((time.perf_counter() - started) * 1000)


def _frames(error: BaseException) -> list[str]:
    return [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)]
