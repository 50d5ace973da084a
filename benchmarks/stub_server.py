"""A real server process with a stub in place of the model: everything else is what `unmask serve` runs.

    python benchmarks/stub_server.py SLOWEST_MS [DATABASE PEPPER]

It prints its address once it accepts connections. An answer's vectors are made up within `SLOWEST_MS`.
"""

import asyncio
import random
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from unmask.accounts import Accounts
from unmask.accounts.costs import AttemptRecord, Reason
from unmask.api import ServeSettings, create_app
from unmask.api.logs import configure_logging
from unmask.catalogue import Record
from unmask.router import EmbeddingWork, ModelOptions, ModelRegistry, PublicNames
from unmask.router.embedding_work import RoutedVectors
from unmask.server.http_server import HttpServer, base_url, listen
from unmask.server.process import serve_models
from unmask.storage.database import now_ms

MODEL = "stub/embed"


class Prompt:
    def __init__(self, text: str) -> None:
        self.ids = range(len(text.split()))
        self.truncated = False


class Encoder:
    dim = 8


class Engine:
    encoder = Encoder()

    def __init__(self, slowest_ms: float) -> None:
        self._slowest_s = slowest_ms / 1000

    async def prepare(self, texts: list[str], **_: Any) -> list[Prompt]:
        return [Prompt(text) for text in texts]

    async def run(self, prompts: list[Prompt], **_: Any) -> np.ndarray:
        if self._slowest_s:
            await asyncio.sleep(random.uniform(0, self._slowest_s))
        return np.ones((len(prompts), Encoder.dim), dtype=np.float32)


class Served:
    record = Record(id=MODEL)
    state = "ready"
    options = ModelOptions()

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def engine(self, wait: float = 0.0) -> Engine:
        return self._engine


class Prompts:
    def build(self, texts: list[str], *_: Any) -> list[Prompt]:
        return [Prompt(text) for text in texts]


class Providers:
    """In place of a pool: a provider that fails at one request in five, and another one that answers them all."""

    public_names = PublicNames()

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._endpoint = SimpleNamespace(
            provider=SimpleNamespace(name="stub-2"),
            precision="exact",
            conformance=None,
            passed_at=0.0,
            is_admitted_since=lambda changes: True,
        )
        self._group = SimpleNamespace(
            prompts=Prompts(),
            references=SimpleNamespace(dim=Encoder.dim, vector_space=lambda precision: "vs_stub"),
            any_admitted=lambda: True,
        )

    def start(self) -> None: ...

    def try_reload(self) -> None: ...

    def of_model(self, id: str) -> Any:
        return self._group

    def is_remote_only(self, id: str) -> bool:
        return True

    async def answer(self, group: object, engine: object, work: EmbeddingWork) -> RoutedVectors:
        if random.random() < 0.2:
            work.attempts.append(self._attempt(work, "stub-1", "failed", "answer"))
        vectors = await self._engine.run(cast(list[Prompt], work.prompts))
        work.attempts.append(self._attempt(work, "stub-2", "answered", "retry" if work.attempts else "answer"))
        return RoutedVectors(vectors, "stub-2", len(work.attempts), cast(Any, self._endpoint))

    def _attempt(self, work: EmbeddingWork, name: str, outcome: str, reason: Reason) -> AttemptRecord:
        return AttemptRecord(
            at=now_ms(),
            provider=name,
            model=MODEL,
            milliseconds=1,
            outcome=outcome,
            reason=reason,
            tokens=work.num_tokens,
            their_tokens=work.num_tokens + 1 if outcome == "answered" else None,
            price=3_333_333,
        )


class Stub:
    public_names = PublicNames()

    def __init__(self, slowest_ms: float, *, by_providers: bool) -> None:
        engine = Engine(slowest_ms)
        self._served = Served(engine)
        self.providers = Providers(engine) if by_providers else None

    def list(self) -> list[Served]:
        return [self._served]

    def find(self, id: str) -> Served | None:
        return self._served if id == MODEL else None

    async def start_loading(self) -> None: ...

    async def close(self, grace: float) -> None: ...


def say(address: str) -> None:
    print(address, flush=True)


def serve(
    slowest_ms: float,
    database: str | None,
    pepper: Path | None,
    tell: Callable[[str], None] = say,
    *,
    by_providers: bool = False,
) -> None:
    """Serve until SIGTERM, and `tell` the address once connections are accepted.

    With `by_providers`, two stubs of providers answer in place of one of the engine, so that requests have attempts.
    """
    configure_logging("error")  # a line per request would be half the work
    settings = ServeSettings(port=0, accounts_url=database)
    models = cast(ModelRegistry, Stub(slowest_ms, by_providers=by_providers))
    stopping = threading.Event()
    with listen(settings.host, settings.port) as listener:
        service = Accounts(database, pepper=pepper) if database is not None else None
        app = create_app(models, settings, stopping=stopping, accounts=service)
        server = HttpServer(app, settings, stopping, lambda: tell(base_url(listener)))
        with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
            runner.run(serve_models(models, server, listener))
        if service is not None:
            service.close()


if __name__ == "__main__":
    arguments = sys.argv[2:]
    serve(float(sys.argv[1]), arguments[0] if arguments else None, Path(arguments[1]) if arguments else None)
