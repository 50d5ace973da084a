"""`HttpServer`: uvicorn with our settings and an orderly end, and its listening socket."""

import functools
import gc
import os
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from unmask.api.settings import ServeSettings
from unmask.server.http_protocol import HttpProtocol


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
        self._closing = threading.Event()
        config = uvicorn.Config(
            app,
            loop="auto",
            http=functools.partial(  # pyright: ignore[reportArgumentType] - only ever called, like the class
                HttpProtocol, header_timeout_s=settings.header_timeout_s, closing=self._closing
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
        self._delay_s, self._grace_s = settings.stop_delay_s, settings.shutdown_grace_s
        self._stopping = stopping
        self._closes_at = 0.0
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        # All objects made until now stay. Each search among them for garbage would stop all requests for up to a tenth
        # of a second; a search now would find nothing and delay the first model.
        gc.freeze()
        self._ready()

    async def on_tick(self, counter: int) -> bool:
        # With a delay, the server goes on answering while load balancers see that /ready says no.
        return await super().on_tick(counter) and time.monotonic() >= self._closes_at

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._closing.set()
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # uvicorn would raise the signal again after an orderly end, and so never exit with 0.
        if self._stopping.is_set():
            os._exit(128 + sig)
        self.stop()

    def stop(self) -> None:
        """Begin an orderly end: say at /ready that the server stops, accept no connections after `stop_delay_s`, and
        give accepted requests `shutdown_grace_s` from then on.
        """
        self._stopping.set()
        self._closes_at = time.monotonic() + self._delay_s
        self.should_exit = True

    def grace_left(self) -> float:
        """Return the seconds that remain of the grace of accepted requests."""
        return max(0.0, self._closes_at + self._grace_s - time.monotonic())


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
