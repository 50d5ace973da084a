"""The process around the app: slow and broken connections, start and end."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.api.live import KEY, LocalService, Service, until
from tests.api.test_middleware import status_of
from unmask.api import ServeSettings
from unmask.catalogue.mail_server import MailServer
from unmask.errors import UsageError
from unmask.server.http_protocol import HEADER_LIMIT_BYTES, LAST_REQUEST_S


def test_headers_that_do_not_arrive_end_the_connection(start: Callable[..., Service]):
    service = start(header_timeout_s=0.3, warm=())
    request = b"GET /health HTTP/1.1\r\nhost: test\r\n\r\n"
    with service.connect() as silent, service.connect() as halfway, service.connect() as second:
        halfway.sendall(b"GET /health HTTP/1.1\r\nhost: te")
        second.sendall(request)
        assert b"200 OK" in second.recv(65536)
        second.sendall(b"\r\n")  # ends uvicorn's own keep-alive timer, and begins no request
        for connection in (silent, halfway, second):
            assert status_of(connection) == (0, b"")


def test_headers_one_byte_at_a_time_end_the_connection(start: Callable[..., Service]):
    service = start(header_timeout_s=0.3, warm=())
    with service.connect() as connection, pytest.raises(ConnectionError):
        for byte in iter(lambda: b"a", None):
            connection.sendall(byte)


def test_headers_without_end_close_the_connection(service: Service):
    with service.connect() as connection, pytest.raises(ConnectionError):
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: ")
        for _ in range(1000):
            connection.sendall(b"a" * HEADER_LIMIT_BYTES)


@pytest.mark.parametrize("noise", [b"\x16\x03\x01\x02\x00", b"HELLO\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n"])
def test_bytes_that_are_no_http_get_an_envelope(service: Service, noise: bytes):
    with service.connect() as connection:
        connection.sendall(noise)
        status, answer = status_of(connection)
    assert status == 400
    assert set(json.loads(answer.partition(b"\r\n\r\n")[2])["error"]) == {"message", "type", "param", "code"}
    assert b"x-request-id: req_" in answer


def test_pipelined_requests_are_answered_in_order(service: Service):
    with service.connect() as connection:
        for id in ("one", "two"):
            connection.sendall(f"GET /health HTTP/1.1\r\nhost: t\r\nx-request-id: {id}\r\n\r\n".encode())
        answer = b""
        while answer.count(b'{"status":"ok"}') < 2:
            answer += connection.recv(65536)
    assert 0 < answer.index(b"x-request-id: one") < answer.index(b"x-request-id: two")


PROGRAM = """
import sys
from unmask.api import ServeSettings
from unmask.server import serve
model, port, key = sys.argv[1:]
sys.exit(serve(ServeSettings(port=int(port), models=(model,), warm=(model,), api_keys=(key,))))
"""


@contextmanager
def process(model: Path, port: int = 0) -> Iterator[subprocess.Popen[str]]:
    """`serve` as the command line runs it."""
    running = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(model), str(port), KEY],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield running
    finally:
        running.kill()
        running.communicate()


def announced(running: subprocess.Popen[str]) -> Service:
    """The service of a process that accepts connections."""
    assert running.stdout
    url = running.stdout.readline().split()[-1].removesuffix("/v1")
    model = running.stdout.readline().split()[0]
    assert running.stdout.readline().startswith(f"curl {url}/v1/embeddings")
    service = Service(url, model)
    assert service.embed("warm", {"prefer": "wait=60"}).status == 200
    return service


def test_a_signal_ends_the_server_after_the_accepted_request(tiny_llama: Path):
    with process(tiny_llama) as running:
        service = announced(running)
        with service.busy() as connection:
            running.send_signal(signal.SIGTERM)
            status, answer = status_of(connection)
        assert status == 200
        assert answer.count(b'"object":"embedding"') == len(service.long_work["input"])
        assert running.wait(60) == 0
        with pytest.raises(ConnectionRefusedError):
            service.connect()
        assert running.stderr
        lines = [json.loads(line) for line in running.stderr.read().splitlines()]
    request = next(line for line in lines if line["event"] == "request" and line["tokens"] > 100_000)
    assert (request["method"], request["path"], request["status"]) == ("POST", "/v1/embeddings", 200)
    assert request["request_id"].startswith("req_")
    assert not any(secret in json.dumps(lines) for secret in (KEY, "some words"))


def test_a_request_on_its_way_is_answered_when_the_server_stops(start: Callable[..., LocalService]):
    service = start(warm=())
    request = b"GET /health HTTP/1.1\r\nhost: t\r\n\r\n"
    with service.connect() as second, service.connect() as fresh, service.connect() as silent:
        second.sendall(request)
        assert b"200 OK" in second.recv(65536)
        service.server.stop()
        until(service.refuses_connections)
        for connection in (second, fresh):
            connection.sendall(request)
            status, answer = status_of(connection)
            assert (status, b"connection: close" in answer.lower()) == (200, True)
        assert status_of(silent) == (0, b"")


def test_a_head_that_comes_in_two_parts_is_answered_when_the_server_stops(start: Callable[..., LocalService]):
    service = start(warm=())
    with service.connect() as connection:
        service.server.stop()
        until(service.refuses_connections)
        connection.sendall(b"GET /health HTTP/1.1\r\nho")
        time.sleep(2 * LAST_REQUEST_S)
        connection.sendall(b"st: t\r\n\r\n")
        assert status_of(connection)[0] == 200


def test_with_a_delay_the_server_answers_until_a_balancer_has_noticed(start: Callable[..., LocalService]):
    service = start(stop_delay_s=1.5, shutdown_grace_s=1.0, warm=())
    assert service.call("GET", "/ready").status == 200
    service.server.stop()
    refused = service.call("GET", "/ready")
    assert (refused.status, refused.json["status"]) == (503, "stopping")
    assert service.call("GET", "/health").status == 200
    until(service.refuses_connections)
    assert service.server.grace_left() > 0  # it begins with the delay's end


def test_what_is_not_done_when_the_grace_ends_is_refused(start: Callable[..., LocalService]):
    service = start(shutdown_grace_s=0.3)
    with service.busy() as connection:
        service.server.stop()
        status, answer = status_of(connection)
    assert status == 503
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "server_stopping"


def test_a_second_signal_ends_it_at_once(tiny_llama: Path):
    with process(tiny_llama) as running:
        service = announced(running)
        with service.busy():
            running.send_signal(signal.SIGTERM)
            until(service.refuses_connections)
            running.send_signal(signal.SIGTERM)
            assert running.wait(60) == 128 + signal.SIGTERM


def test_a_taken_port_is_said_in_one_sentence(tiny_llama: Path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with process(tiny_llama, port) as running:
            output, complaint = running.communicate(timeout=60)
    assert (running.returncode, output) == (1, "")
    assert complaint == f"cannot listen on 127.0.0.1 port {port}: {os.strerror(98)}. Choose another port.\n"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", ""])
def test_an_open_host_needs_a_key(host: str):
    with pytest.raises(UsageError, match="no API key is set"):
        ServeSettings(host=host)
    assert ServeSettings(host=host, api_keys=(KEY,)).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_this_machine_needs_none(host: str):
    assert ServeSettings(host=host).api_keys == ()


@pytest.mark.parametrize(
    "settings",
    [
        {"port": -1},
        {"port": 65536},
        {"body_limit_bytes": 0},
        {"receive_timeout_s": -1},
        {"log_level": "loud"},
        {"api_keys": ("",)},
        {"api_keys": ("two words",)},
        {"api_keys": ("kéy",)},
        {"mail": MailServer("smtp://localhost", "models@example.org", "https://embed.example.org")},
    ],
)
def test_impossible_settings_are_refused(settings: dict):
    with pytest.raises(UsageError):
        ServeSettings(**settings)


def test_keys_do_not_show():
    assert KEY not in repr(ServeSettings(api_keys=(KEY,)))
