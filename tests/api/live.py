"""A live server over a small real model, and plain HTTP to talk to it."""

import asyncio
import base64
import http.client
import itertools
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from starlette.routing import Route

from unmask.accounts import Accounts
from unmask.api import ServeSettings, create_app
from unmask.api.metrics import Metrics
from unmask.api.web_pages import WebPages
from unmask.cluster.connection import import_ray
from unmask.router import ModelRegistry
from unmask.router.watch_intervals import WatchIntervals
from unmask.server.cluster_watch import ClusterWatch
from unmask.server.composition import book_providers, open_models, open_providers
from unmask.server.http_server import HttpServer, base_url, listen
from unmask.server.process import serve_models
from unmask.storage.database import Database

_FRESH = itertools.count()
KEY = "sk-test-0123456789abcdef0123456789"

BuildPages = Callable[[ModelRegistry, ServeSettings, Metrics, Accounts | None], WebPages]


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Poll until `condition` holds, for changes inside the server that send no signal."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.002)  # a loop without a pause would take the interpreter from the server


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        return self.json["error"]

    @property
    def vectors(self) -> np.ndarray:
        return np.array([as_vector(item["embedding"]) for item in self.json["data"]], dtype=np.float32)


def as_vector(embedding: str | list[float]) -> np.ndarray:
    if isinstance(embedding, str):
        return np.frombuffer(base64.b64decode(embedding), dtype="<f4")
    return np.array(embedding, dtype=np.float32)


@dataclass
class Service:
    """A running server and the id of its model."""

    url: str
    model: str

    @property
    def address(self) -> tuple[str, int]:
        parts = urlsplit(self.url)
        assert parts.hostname and parts.port
        return parts.hostname, parts.port

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, timeout=60)

    def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        key: str | None = KEY,
    ) -> Reply:
        """One request. A body of bytes is sent as it is, an iterator of them in chunks, anything else as JSON."""
        sent = {"authorization": f"Bearer {key}"} if key else {}
        if body is not None and not isinstance(body, bytes | Iterator):
            body = json.dumps(body).encode()
        if body is not None:
            sent["content-type"] = "application/json"
        connection = http.client.HTTPConnection(*self.address, timeout=60)
        try:
            connection.request(method, path, body, {**sent, **(headers or {})})
            response = connection.getresponse()
            return Reply(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        finally:
            connection.close()

    def embed(self, input: Any, headers: Mapping[str, str] | None = None, **fields: Any) -> Reply:
        body = {"model": self.model, "input": input} | fields
        return self.call("POST", "/v1/embeddings", body, headers)

    @contextmanager
    def busy(self) -> Iterator[socket.socket]:
        """Give the engine many seconds of work; closing the connection ends it."""
        with self.connect() as connection:
            connection.sendall(self.raw_request(json.dumps(self.long_work).encode()))
            until(lambda: self.waiting_tokens() > 100_000)
            yield connection

    @property
    def long_work(self) -> dict[str, Any]:
        # No two alike, today or the next time: what the server knows already would be no work.
        return {"model": self.model, "input": [f"{next(_FRESH)} " + "some words " * 40 for _ in range(1000)]}

    def metric(self, start: str) -> float:
        """Return a counter of the server by the start of its name and labels; the sum if several match."""
        lines = self.call("GET", "/metrics").body.decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(start))

    def waiting_tokens(self) -> float:
        return self.metric("unmask_waiting_tokens{")

    def refuses_connections(self) -> bool:
        try:
            self.connect().close()
        except ConnectionError:
            return True
        return False

    def raw_request(self, body: bytes, length: int | None = None) -> bytes:
        """The bytes of an embeddings request, for tests that send them in their own way."""
        head = [
            "POST /v1/embeddings HTTP/1.1",
            "host: test",
            "content-type: application/json",
            f"authorization: Bearer {KEY}",
            f"content-length: {len(body) if length is None else length}",
        ]
        return "\r\n".join([*head, "", ""]).encode() + body


@dataclass
class LocalService(Service):
    """A server in a thread of this process. Tests can read and change its models without HTTP."""

    models: ModelRegistry
    server: HttpServer
    loop: asyncio.AbstractEventLoop
    watch: ClusterWatch | None = None

    @property
    def routes(self) -> list[Route]:
        """All routes of the app, which is inside its middlewares."""
        app: Any = self.server.config.app
        while not hasattr(app, "routes"):
            app = app._app
        return app.routes


@contextmanager
def running(
    model: Path,
    accounts: Accounts | None = None,
    build_pages: BuildPages | None = None,
    catalogue: Database | None = None,
    intervals: WatchIntervals | None = None,
    **changes: Any,
) -> Iterator[LocalService]:
    """A server in a thread, by default with a key and without pages, over one warmed model.

    `intervals` are those of the canaries of its providers, where the setting `providers_file` names any.
    With `accounts`, theirs are the keys, and their database has the operator's side of the catalogue; without accounts
    that of `catalogue`, if there is one.
    """
    defaults: dict[str, Any] = {"port": 0, "models": (str(model),), "warm": (str(model),), "api_keys": (KEY,)}
    defaults["dtype"] = "float32"  # recorded answers are in it
    settings = ServeSettings(**defaults | changes)
    with ExitStack() as stack:
        listener = stack.enter_context(listen(settings.host, settings.port))
        settings = replace(settings, cache_bytes=0)  # each request is work
        stopping, ready = threading.Event(), threading.Event()
        models, sync = open_models(settings, accounts.database if accounts else catalogue, stopping)
        if settings.providers_file is not None:
            database = accounts.database if accounts else catalogue
            hides_names = settings.hide_providers
            models.providers = open_providers(settings.providers_file, models, database, hides_names=hides_names)
            if accounts is not None:
                book_providers(models.providers, accounts)
            models.providers.intervals = intervals or models.providers.intervals
        metrics = Metrics()
        pages = build_pages(models, settings, metrics, accounts) if build_pages else None
        app = create_app(models, settings, metrics=metrics, stopping=stopping, accounts=accounts, pages=pages)
        server = HttpServer(app, settings, stopping, ready.set)

        watch = ClusterWatch(import_ray(), settings.cluster, models) if settings.cluster is not None else None
        loops: list[asyncio.AbstractEventLoop] = []

        def run() -> None:
            with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
                loops.append(runner.get_loop())
                runner.run(serve_models(models, server, listener, sync, watch))

        thread = threading.Thread(target=run)
        thread.start()
        try:
            assert ready.wait(60)
            service = LocalService(base_url(listener), models.list()[0].record.id, models, server, loops[0], watch)
            if accounts is not None:
                deadline = time.monotonic() + 60
                while models.list()[0].state == "loading":
                    assert time.monotonic() < deadline
                    time.sleep(0.02)  # the load needs the interpreter more than this loop does
            elif settings.warm:
                assert service.embed("warm", {"prefer": "wait=60"}).status == 200
            yield service
        finally:
            server.stop()
            thread.join(60)
            assert not thread.is_alive(), "the server does not end"
