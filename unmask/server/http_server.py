"""The process: a listening socket, uvicorn with the limits it lacks, and an orderly end."""

import asyncio
import functools
import gc
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from unmask.accounts import Accounts, people, tariff
from unmask.accounts.limits import SharedLimiter
from unmask.api.app import create_app
from unmask.api.errors import ApiError, error_response
from unmask.api.logs import configure_logging
from unmask.api.middleware import new_request_id
from unmask.api.settings import ServeSettings
from unmask.api.web_pages import BuildSite
from unmask.catalogue.store import opened, read_catalogue
from unmask.errors import NoPrice
from unmask.router import Follower, Models, answering, retired
from unmask.storage.database import Database, now_ms

log = logging.getLogger("unmask")

# uvicorn's httptools parser takes headers of any size.
HEADER_LIMIT_BYTES = 65_536


class Connection(HttpToolsProtocol):
    """uvicorn's protocol with limits: by itself it waits for headers for ever and takes any number of them.

    Args:
        header_timeout_s: time for a request's headers, and for the rest of a body after an early answer.
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
        # Reached with bytes that are no HTTP, before there is any request for the app to answer.
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


class Server(uvicorn.Server):
    """uvicorn's server with this package's settings.

    Args:
        app: what to serve.
        settings: limits; host and port are the listening socket's.
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
                Connection, header_timeout_s=settings.header_timeout_s
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
        # What was made until now stays. Looking through it for garbage again and again would stop all requests for
        # up to a tenth of a second each time; once, now, would find nothing and hold up the first model.
        gc.freeze()
        self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # uvicorn would raise the signal again after an orderly end, and so never end with 0.
        if self._stopping.is_set():
            os._exit(128 + sig)
        self.stop()

    def stop(self) -> None:
        """Begin an orderly end: no new connections, and `shutdown_grace_s` for the accepted requests."""
        self._stopping.set()
        self._stopped_at = time.monotonic()
        self.should_exit = True

    def grace_left(self) -> float:
        """Seconds of the grace that remain once `stop` was called."""
        return max(0.0, self._stopped_at + self._grace_s - time.monotonic())


def serve(settings: ServeSettings, build_site: BuildSite | None = None) -> int:
    """Serve until SIGTERM or SIGINT.

    Args:
        settings: how.
        build_site: makes the pages for people; without it there is only the API.

    Returns:
        The process's exit code: 0 after an orderly end, 1 if the address cannot be listened on.

    Raises:
        UsageError, CheckpointError: a model's name or files are wrong.
        UsageError, StorageError: the accounts' database, pepper or Redis is.
    """
    secrets = (settings.provider.client_secret,) if settings.provider else ()
    configure_logging(settings.log_level, (*settings.api_keys, *secrets))
    try:
        listener = listen(settings.host, settings.port)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        sys.stderr.write(f"cannot listen on {settings.host} port {settings.port}: {reason}. Choose another port.\n")
        return 1
    with listener:
        accounts = None
        if settings.database is not None:
            accounts = Accounts(
                settings.database,
                limiter=SharedLimiter(settings.limits, without=settings.limits_without) if settings.limits else None,
                free_credit=settings.free_credit,
                flush_charges=settings.flush_charges,
                provider=settings.provider,
            )
        database = accounts.database if accounts is not None else None
        if database is None and settings.catalogue is not None:
            database = opened(settings.catalogue)
        models, follower = open_models(settings, database)
        models.begin()
        stopping = threading.Event()
        app = create_app(models, settings, stopping, accounts, build_site)
        invited = invite(accounts, settings.public_url or base_url(listener)) if accounts and build_site else None
        server = Server(app, settings, stopping, lambda: _announce(listener, models, settings, accounts, invited))
        try:
            with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
                runner.run(serve_models(models, server, listener, follower))
        finally:
            if accounts is not None:
                accounts.close()
            elif database is not None:
                database.close()
    return 0


def open_models(settings: ServeSettings, database: Database | None) -> tuple[Models, Follower | None]:
    """The models of a server: those it was started with, and those that its operator took live.

    Args:
        database: with the operator's side of the catalogue; without, what ships is all there is.

    Returns:
        The models, and what keeps them to the database.

    Raises:
        UsageError: a model's name is wrong, or the catalogue cannot be read.
    """
    given: dict[str, Any] = {
        "queue_tokens": settings.queue_tokens,
        "cache_bytes": settings.cache_bytes,
        "dtype": settings.dtype,
        "device": settings.device,
    }
    if database is None:
        return Models(settings.models, warm=settings.warm, **given), None
    with database.read() as connection:
        stored = read_catalogue(connection)
    over = retired(stored)
    for name in over.intersection(settings.models):
        log.warning("%s is retired and answers nobody: 'unmask catalogue announce %s' takes it up again", name, name)
    models = Models(
        [name for name in settings.models if name not in over],
        warm=[name for name in settings.warm if name not in over],
        catalogue=stored.catalogue,
        sources=stored.sources,
        **given,
    )
    for id, source in answering(stored).items():
        entry = stored.catalogue.get(id)
        if models.find(id) is None and entry is not None:
            models.add(source, entry.record)
    return models, Follower(models, database, stored.version, grace=settings.shutdown_grace_s, mail=settings.mail)


async def serve_models(
    models: Models, server: Server, listener: socket.socket, follower: Follower | None = None
) -> None:
    """Start the models, serve until the server stops, and close them after their last request."""
    await models.start()
    following = asyncio.create_task(follower.run()) if follower else None
    try:
        await server.serve([listener])
    finally:
        if following is not None:
            following.cancel()
        await models.close(server.grace_left())


def listen(host: str, port: int) -> socket.socket:
    """A bound socket, taken before any model is loaded for nothing.

    Raises:
        OSError: the address is taken, not allowed or not ours.
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
    """The URL under which a socket's address is reached."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def invite(accounts: Accounts, url: str) -> str | None:
    """The link by which the first admin is made, once and within a day; None if there is an admin."""
    now = now_ms()
    with accounts.database.begin() as connection:
        token = people.invite_first_admin(connection, now)
    return f"{url.rstrip('/')}/first-admin?invitation={token}" if token else None


def _announce(
    listener: socket.socket,
    models: Models,
    settings: ServeSettings,
    accounts: Accounts | None,
    invited: str | None,
) -> None:
    url = base_url(listener)
    served = [model.record for model in models.list()]
    width = max((len(record.id) for record in served), default=0)
    lines = [
        f"unmask serves {url}/v1",
        *(f"  {record.id:<{width}}  {record.summary}".rstrip() for record in served),
    ]
    if served:
        secured = settings.api_keys or accounts is not None
        key = ' -H "Authorization: Bearer $KEY"' if secured else ""
        body = f'{{"model": "{served[0].id}", "input": "some text"}}'
        lines.append(f"curl {url}/v1/embeddings -H 'Content-Type: application/json'{key} -d '{body}'")
    if accounts is not None:
        lines += _about(accounts, [record.id for record in served])
        if invited:
            lines.append(f"There is no admin yet. Whoever opens this link first becomes one, within a day: {invited}")
    elif not settings.api_keys:
        lines.append("No accounts and no keys: whoever uses this machine may call it.")
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


def _about(accounts: Accounts, models: list[str]) -> list[str]:
    lines = [f"Accounts in {accounts.database.shown}: callers need a key, see 'unmask accounts --help'."]
    with accounts.database.read() as connection:
        for model in models:
            try:
                tariff.price(connection, model, "default")
            except NoPrice:
                lines.append(f"No price for {model}, so it answers nobody yet: unmask accounts price {model} DOLLARS")
    return lines
