"""A provider whose every answer is scripted: raw HTTP over asyncio, so that it can break any rule there is."""

import asyncio
import base64
import json
import ssl
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

VectorsOf = Callable[[Sequence[str], str], np.ndarray]


@dataclass(frozen=True)
class SeenRequest:
    """A request that the server has read."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]

    @property
    def texts(self) -> list[str]:
        inputs = self.body.get("input", self.body.get("inputs"))
        assert isinstance(inputs, list)
        return inputs


# Writes an answer; returns True if the connection stays open.
Behaviour = Callable[["FaultServer", SeenRequest, asyncio.StreamWriter], Awaitable[bool]]


@dataclass
class FaultServer:
    """The server and its script. Each request takes the next behaviour; the last one stays.

    Attributes:
        vectors_of: texts and instruction -> their vectors, for behaviours that answer rightly.
        script: behaviours to come.
        requests: all requests read so far.
        connections: connections accepted so far.
        arrived: set once a request has been read.
    """

    vectors_of: VectorsOf
    script: list[Behaviour] = field(default_factory=list)
    requests: list[SeenRequest] = field(default_factory=list)
    connections: int = 0
    url: str = ""
    arrived: asyncio.Event = field(default_factory=asyncio.Event)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while (request := await _read(reader)) is not None:
                self.requests.append(request)
                self.arrived.set()
                behaviour = self.script.pop(0) if len(self.script) > 1 else self.script[0]
                if not await behaviour(self, request, writer):
                    break
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def fault_server(
    vectors_of: VectorsOf, *script: Behaviour, tls: ssl.SSLContext | None = None, host: str = "127.0.0.1"
) -> AsyncIterator[FaultServer]:
    """Run a fault server on a port of its own."""
    server = FaultServer(vectors_of, list(script) or [right])
    listening = await asyncio.start_server(server.serve, host, 0, ssl=tls, limit=2**24)
    port = listening.sockets[0].getsockname()[1]
    server.url = f"{'https' if tls else 'http'}://{host}:{port}/v1"
    try:
        yield server
    finally:
        listening.close()


async def _read(reader: asyncio.StreamReader) -> SeenRequest | None:
    head = await reader.readuntil(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return SeenRequest(first.split()[1], headers, json.loads(body))


def reply(
    content: object, status: int = 200, headers: dict[str, str] | None = None, *, keep: bool = True, dots: float = 0
) -> Behaviour:
    """Answer with this content: bytes as they are, anything else as JSON. `dots`: seconds between two bytes."""
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    fields = {"content-type": "application/json", "content-length": str(len(body))} | (headers or {})
    head = f"HTTP/1.1 {status} X\r\n" + "".join(f"{name}: {value}\r\n" for name, value in fields.items()) + "\r\n"

    async def behave(server: FaultServer, request: SeenRequest, writer: asyncio.StreamWriter) -> bool:
        for part in (head.encode() + body,) if not dots else [bytes([b]) for b in head.encode() + body]:
            writer.write(part)
            await writer.drain()
            if dots:
                await asyncio.sleep(dots)
        return keep

    return behave


def envelope(vectors: Sequence[np.ndarray], **usage: Any) -> dict[str, Any]:
    """OpenAI's answer with vectors as base64 of little-endian float32."""
    data = [
        {"object": "embedding", "index": index, "embedding": base64.b64encode(row.astype("<f4").tobytes()).decode()}
        for index, row in enumerate(vectors)
    ]
    return {"object": "list", "data": data, "model": "m", "usage": usage or {"prompt_tokens": 7, "total_tokens": 7}}


def changed(change: Callable[[dict[str, Any]], object]) -> Behaviour:
    """Answer rightly, but with the envelope changed by `change`, which returns the new one or changes it in place."""

    async def behave(server: FaultServer, request: SeenRequest, writer: asyncio.StreamWriter) -> bool:
        vectors = server.vectors_of(request.texts, request.body.get("instruction", ""))
        answer = envelope(list(vectors))
        result = change(answer)
        return await reply(answer if result is None else result)(server, request, writer)

    return behave


async def right(server: FaultServer, request: SeenRequest, writer: asyncio.StreamWriter) -> bool:
    """Answer with the right vectors, in the format of the path."""
    vectors = server.vectors_of(request.texts, request.body.get("instruction", ""))
    answer = vectors.tolist() if request.path.endswith("/embed") else envelope(list(vectors))
    return await reply(answer)(server, request, writer)


def after(seconds: float, then: Behaviour = right) -> Behaviour:
    """Wait, then behave."""

    async def behave(server: FaultServer, request: SeenRequest, writer: asyncio.StreamWriter) -> bool:
        await asyncio.sleep(seconds)
        return await then(server, request, writer)

    return behave


async def silent(server: FaultServer, request: SeenRequest, writer: asyncio.StreamWriter) -> bool:
    """Say nothing."""
    await asyncio.sleep(3600)
    return False


def reset(before: bytes) -> Behaviour:
    """Write some bytes, then break the connection off."""

    async def behave(server: FaultServer, request: SeenRequest, writer: asyncio.StreamWriter) -> bool:
        writer.write(before)
        await writer.drain()
        transport: Any = writer.transport
        transport.abort()
        return False

    return behave


async def right_then_close(server: FaultServer, request: SeenRequest, writer: asyncio.StreamWriter) -> bool:
    """Answer, promise to keep the connection, and close it."""
    await right(server, request, writer)
    return False


@contextmanager
def fault_server_thread(vectors_of: VectorsOf, tls: ssl.SSLContext | None = None) -> Iterator[FaultServer]:
    """Run a fault server in a thread of its own, for tests without an event loop."""
    loop = asyncio.new_event_loop()
    started: Future[FaultServer] = Future()
    stop = asyncio.Event()

    async def serve() -> None:
        async with fault_server(vectors_of, tls=tls) as server:
            started.set_result(server)
            await stop.wait()

    def run() -> None:
        loop.run_until_complete(serve())
        for task in asyncio.all_tasks(loop):  # connections that still wait
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0.01))
        loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield started.result(60)
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(60)
        assert not thread.is_alive(), "the faulty server does not end"
