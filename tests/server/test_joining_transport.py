"""`JoiningTransport`: the head of an answer goes out with its body, and no byte is lost, late or out of order."""

import asyncio
import socket
from typing import Any, cast

from hypothesis import given
from hypothesis import strategies as st

from tests.api.live import LocalService
from tests.server.test_http_protocol import get, post
from unmask.server.http_protocol import JoiningTransport


class Recorder:
    """A transport that notes what it is asked to send, one item per system call."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.closed_after: int | None = None

    def write(self, data: bytes) -> None:
        assert self.closed_after is None
        self.sent.append(bytes(data))

    def writelines(self, parts: list[bytes]) -> None:
        assert self.closed_after is None
        self.sent.append(b"".join(parts))

    def close(self) -> None:
        self.closed_after = len(self.sent)

    def abort(self) -> None:
        self.close()


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


async def test_an_aborted_connection_sends_no_more():
    recorder = Recorder()
    transport = joining(recorder)
    transport.write(b"head ")
    transport.abort()
    await asyncio.sleep(0)
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
