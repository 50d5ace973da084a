"""`JoiningTransport`: the head of an answer goes out with its body, and no byte is lost, late or out of order."""

import asyncio
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.server import ServerState

from tests.api.live import LocalService, until
from tests.server.test_http_protocol import get, post
from unmask.server.http_protocol import HttpProtocol, JoiningTransport


class Recorder:
    """A transport that notes what it is asked to send, one item per system call."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.closed_after: int | None = None

    def write(self, data: bytes) -> None:
        assert self.closed_after is None
        self.sent.append(bytes(data))

    def close(self) -> None:
        self.closed_after = len(self.sent)

    def abort(self) -> None:
        self.close()

    def is_closing(self) -> bool:
        return self.closed_after is not None


def joining(recorder: Recorder) -> JoiningTransport:
    return JoiningTransport(cast(Any, recorder), asyncio.get_running_loop())


async def test_a_head_goes_out_with_its_body():
    recorder = Recorder()
    transport = joining(recorder)
    transport.write(b"head ")
    transport.write(b"body")
    assert recorder.sent == [b"head body"]


async def test_a_head_does_not_wait_for_a_late_body():
    recorder = Recorder()
    transport = joining(recorder)
    transport.write(b"head ")
    await asyncio.sleep(0)
    assert recorder.sent == [b"head "]
    transport.write(b"body")
    await asyncio.sleep(0)
    assert recorder.sent == [b"head ", b"body"]


async def test_a_closed_connection_has_sent_everything():
    recorder = Recorder()
    transport = joining(recorder)
    transport.write(b"an answer without a body")
    transport.close()
    await asyncio.sleep(0)
    assert recorder.sent == [b"an answer without a body"] and recorder.closed_after == 1


@pytest.mark.parametrize("end", [JoiningTransport.abort, JoiningTransport.forget])
async def test_an_aborted_or_lost_connection_gets_no_more_bytes(end: Callable[[JoiningTransport], None]):
    """uvloop raises where a closed connection is written to, and its loop logs the traceback."""
    recorder = Recorder()
    transport = joining(recorder)
    transport.write(b"head ")
    end(transport)
    await asyncio.sleep(0)
    assert recorder.sent == []


@pytest.mark.parametrize("length", [9, 100_000])
async def test_a_connection_that_closed_in_between_gets_no_more_bytes(length: int):
    """The loop closes a connection whose client is gone; the protocol hears of it a turn later."""
    recorder = Recorder()
    transport = joining(recorder)
    transport.write(b"head ")
    recorder.close()
    transport.write(b"b" * length)
    await asyncio.sleep(0)
    transport.close()
    assert recorder.sent == []


@given(steps=st.lists(st.one_of(st.none(), st.binary(max_size=9))))
def test_bytes_keep_their_order(steps: list[bytes | None]):
    """None is a turn of the event loop."""

    async def run() -> None:
        recorder = Recorder()
        transport = joining(recorder)
        given_up_to = b""
        for step in steps:
            if step is None:
                await asyncio.sleep(0)
                assert b"".join(recorder.sent) == given_up_to  # nothing waits for longer than a turn
            else:
                transport.write(step)
                given_up_to += step
        transport.close()
        assert b"".join(recorder.sent) == given_up_to

    asyncio.run(run())


def test_a_server_answers_in_one_packet(service: LocalService):
    """A request's head and body come in one read: the client is woken up once."""
    with socket.create_connection(service.address, timeout=30) as connection:
        for request in (get("/v1/models"), post()):
            connection.sendall(request)
            answer = connection.recv(1_000_000)
            head, blank, body = answer.partition(b"\r\n\r\n")
            assert blank and head.startswith(b"HTTP/1.1 200") and b"\r\nconnection: close" not in head.lower()
            length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
            assert len(body) == length


async def test_a_large_body_is_not_copied():
    recorder = Recorder()
    transport = joining(recorder)
    transport.write(b"head ")
    transport.write(b"b" * 100_000)
    assert recorder.sent == [b"head ", b"b" * 100_000]


@dataclass
class ProtocolServer:
    """A server of one ASGI app with `HttpProtocol`.

    Attributes:
        address: of the server.
        errors: what its event loop had to report.
        state: uvicorn's: open connections, and tasks under way.
    """

    address: tuple[str, int]
    errors: list[str]
    state: ServerState


@contextmanager
def serving(app: ASGIApp, loop: Literal["uvloop", "asyncio"] = "uvloop") -> Iterator[ProtocolServer]:
    protocol = partial(HttpProtocol, header_timeout_s=10, closing=threading.Event())
    config = uvicorn.Config(app, loop=loop, http=protocol, ws="none", lifespan="off", log_config=None)  # pyright: ignore[reportArgumentType] - a callable will do
    server = uvicorn.Server(config)
    errors: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        async def serve() -> None:
            asyncio.get_running_loop().set_exception_handler(lambda _, about: errors.append(str(about)))
            await server._serve([listener])

        def run() -> None:
            with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
                runner.run(serve())

        thread = threading.Thread(target=run)
        thread.start()
        until(lambda: server.started)
        try:
            yield ProtocolServer(listener.getsockname(), errors, server.server_state)
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive(), "the server does not end"


def test_clients_that_reset_a_stream_leave_no_errors():
    """uvloop raises where a lost connection is written to, and its event loop reports it."""

    ended: list[int] = []

    async def rows(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(2000):
            await send({"type": "http.response.body", "body": b"a,b,c\n" * 10, "more_body": True})
            await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": b""})
        ended.append(1)

    with serving(rows) as server:
        for number in range(30):
            connection = socket.create_connection(server.address, timeout=30)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.sendall(get())
            assert connection.recv(1000)
            time.sleep(0.002 * (number % 3))  # so that streams are broken off in different places
            connection.close()
        until(lambda: len(ended) == 30)
        assert server.errors == []


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_clients_that_leave_before_their_answers_cause_no_errors(
    loop: Literal["uvloop", "asyncio"], caplog: pytest.LogCaptureFixture
):
    """Requests sent at once are answered one after the other, and the first answer meets a closed connection."""
    clients: set[tuple[str, int]] = set()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        clients.add(scope["client"])
        await asyncio.sleep(0.002)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
        await send({"type": "http.response.body", "body": b"hello"})

    with serving(app, loop) as server, caplog.at_level("WARNING"):
        for number in range(30):
            with socket.create_connection(server.address, timeout=30) as connection:
                connection.sendall(get() * 10)
            time.sleep(0.002 * (number % 3))  # so that answers meet the closed connection in different places
        until(lambda: len(clients) == 30 and not server.state.connections and not server.state.tasks)
        assert server.errors == []
    assert caplog.messages == []


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_a_client_that_stops_sending_in_the_same_turn_gets_its_answer(method: str):
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        length = [(b"content-length", b"5")]
        await send({"type": "http.response.start", "status": 200, "headers": length})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else b"hello"})
        connection.shutdown(socket.SHUT_WR)

    with serving(app) as server, socket.create_connection(server.address, timeout=30) as connection:
        connection.sendall(get(method=method))
        answer = b""
        while chunk := connection.recv(65_536):
            answer += chunk
    assert answer.endswith(b"\r\n\r\n" if method == "HEAD" else b"\r\n\r\nhello")
