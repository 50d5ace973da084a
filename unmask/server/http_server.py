"""`HttpServer`: uvicorn with the limits that it lacks and an orderly end, and its listening socket."""

import asyncio
import functools
import gc
import os
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from unmask.api.errors import ApiError, error_response
from unmask.api.middleware import new_request_id
from unmask.api.settings import ServeSettings

# uvicorn's httptools parser takes headers of any size.
HEADER_LIMIT_BYTES = 65_536


class LimitedHttpProtocol(HttpToolsProtocol):
    """uvicorn's protocol with limits. By itself it waits for headers for ever and takes any number of them.

    Args:
        header_timeout_s: time for the headers of a request, and for the rest of a body after an early answer.
    """

    def __init__(self, *args: Any, header_timeout_s: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._header_timeout_s = header_timeout_s
        self._header_timer: asyncio.TimerHandle | None = None
        self._header_bytes = 0
        self._in_body = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # pyright: ignore[reportArgumentType] - uvicorn narrows the type
        self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._headers_arrived()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._header_timer is None and (self.cycle is None or self.cycle.response_complete):
            self._expect_headers()
        self._header_bytes += len(data)
        super().data_received(data)
        if self._header_timer is not None and not self._in_body and self._header_bytes > HEADER_LIMIT_BYTES:
            self.transport.close()

    def on_headers_complete(self) -> None:
        self._headers_arrived()
        self._in_body = True
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_body = False
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        # Called for bytes that are not HTTP, before there is a request that the app could answer.
        response = error_response(ApiError(400, msg))
        lines = [
            b"HTTP/1.1 400 Bad Request",
            b"connection: close",
            b"x-request-id: " + new_request_id().encode(),
        ]
        lines += [name + b": " + value for name, value in response.raw_headers]
        self.transport.write(b"\r\n".join(lines) + b"\r\n\r\n" + bytes(response.body))
        self.transport.close()

    def _expect_headers(self) -> None:
        self._header_bytes = 0
        self._header_timer = self.loop.call_later(self._header_timeout_s, self.transport.close)

    def _headers_arrived(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None


class HttpServer(uvicorn.Server):
    """uvicorn's server with our settings and an orderly end.

    Args:
        app: the ASGI app.
        settings: the limits; host and port are those of the listening socket.
        stopping: set by the first signal.
        ready: called once connections are accepted.
    """

    def __init__(
        self, app: ASGIApp, settings: ServeSettings, stopping: threading.Event, ready: Callable[[], None]
    ) -> None:
        config = uvicorn.Config(
            app,
            loop="auto",
            http=functools.partial(  # pyright: ignore[reportArgumentType] - only ever called, like the class
                LimitedHttpProtocol, header_timeout_s=settings.header_timeout_s
            ),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=bool(settings.trusted_proxies),
            forwarded_allow_ips=list(settings.trusted_proxies),
            timeout_keep_alive=settings.keep_alive_s,  # pyright: ignore[reportArgumentType] - parts of a second work
            timeout_graceful_shutdown=settings.shutdown_grace_s,  # pyright: ignore[reportArgumentType]
        )
        super().__init__(config)
        self._grace_s = settings.shutdown_grace_s
        self._stopping = stopping
        self._stopped_at = 0.0
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        # All objects made until now stay. Each search among them for garbage would stop all requests for up to a tenth
        # of a second; a search now would find nothing and delay the first model.
        gc.freeze()
        self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # uvicorn would raise the signal again after an orderly end, and so never exit with 0.
        if self._stopping.is_set():
            os._exit(128 + sig)
        self.stop()

    def stop(self) -> None:
        """Begin an orderly end: accept no connections, and give accepted requests `shutdown_grace_s`."""
        self._stopping.set()
        self._stopped_at = time.monotonic()
        self.should_exit = True

    def grace_left(self) -> float:
        """Return the seconds that remain of the grace since `stop` was called."""
        return max(0.0, self._stopped_at + self._grace_s - time.monotonic())


def listen(host: str, port: int) -> socket.socket:
    """Bind a socket. Done before models are loaded, so that a taken port is reported at once.

    Raises:
        OSError: the address is taken, not allowed or not of this machine.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener


def base_url(listener: socket.socket) -> str:
    """Return the URL of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
