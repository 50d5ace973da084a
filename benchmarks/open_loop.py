"""An open-loop load generator: a request leaves when its time has come, whether earlier ones were answered or not.

Callers who wait for an answer before they send again slow down together with a slow server, and so hide it. Here the
time of an answer counts from the moment at which its request was due, also if the generator itself was late.
"""

import asyncio
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Answer:
    """One request: `due` in seconds since the start, `milliseconds` from then to the end of the answer.

    A connection that broke has status 0.
    """

    due: float
    milliseconds: float
    late_ms: float  # how long after `due` the generator sent it
    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


class Client:
    """Keep-alive connections to one server, as many as are needed at once."""

    def __init__(self, url: str, key: str | None = None) -> None:
        parts = urlsplit(url)
        assert parts.hostname and parts.port
        self._address = (parts.hostname, parts.port)
        bearer = f"authorization: Bearer {key}\r\n" if key else ""
        self._head = f"POST /v1/embeddings HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n{bearer}"
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def post(self, body: bytes, headers: str = "") -> tuple[int, dict[str, str], bytes]:
        """Send one request. Returns status, headers and body.

        Args:
            headers: more header lines, each with its line end.
        """
        reader, writer = await self._connection()
        writer.write(f"{self._head}{headers}content-length: {len(body)}\r\n\r\n".encode() + body)
        try:
            lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            answer_headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:-2])}
            content = await reader.readexactly(int(answer_headers["content-length"]))
        except BaseException:
            writer.close()
            raise
        if answer_headers.get("connection", "").lower() == "close":
            writer.close()
        else:
            self._idle.append((reader, writer))
        return int(lines[0].split()[1]), answer_headers, content

    async def _connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        while self._idle:
            reader, writer = self._idle.pop()
            if not reader.at_eof():  # the server closes what lies idle for long
                return reader, writer
            writer.close()
        return await asyncio.open_connection(*self._address)

    def close(self) -> None:
        for _, writer in self._idle:
            writer.close()
        self._idle.clear()


class Posts(Protocol):
    """Sends a body and returns status, headers and body of the answer, as `Client` does."""

    async def post(self, body: bytes, headers: str = "") -> tuple[int, dict[str, str], bytes]: ...


async def load(
    client: Posts, request: Callable[[int], tuple[bytes, str]], rate: float, seconds: float, seed: int
) -> list[Answer]:
    """Send `rate` requests per second at random moments (Poisson) for `seconds`, and wait for all answers.

    Args:
        request: body and more header lines of the n-th request.
    """
    chance = random.Random(seed)
    started = time.perf_counter()
    answers: list[Answer] = []
    running: set[asyncio.Task[None]] = set()

    async def one(number: int, due: float) -> None:
        body, headers = request(number)
        late = (time.perf_counter() - started - due) * 1000
        try:
            status, answer_headers, content = await client.post(body, headers)
        except (OSError, asyncio.IncompleteReadError):
            status, answer_headers, content = 0, {}, b""
        answers.append(Answer(due, (time.perf_counter() - started - due) * 1000, late, status, answer_headers, content))

    due, number = chance.expovariate(rate), 0
    while due < seconds:
        wait = due - (time.perf_counter() - started)
        if wait > 0:
            await asyncio.sleep(wait)
        task = asyncio.ensure_future(one(number, due))
        running.add(task)
        task.add_done_callback(running.discard)
        due, number = due + chance.expovariate(rate), number + 1
    await asyncio.gather(*running)
    return answers
