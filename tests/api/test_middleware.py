"""The middlewares around every route: ids, keys, bodies that are too large or too slow, clients that disconnect."""

import gc
import json
import re
import socket
from collections.abc import Callable, Sequence
from types import FrameType, TracebackType

import numpy as np
import pytest

from tests.api.live import KEY, LocalService, until
from unmask.encoder import Encoder, Prompt

LEFT = 'unmask_requests_total{route="/v1/embeddings",status="499"}'
ENVELOPE = {"message", "type", "param", "code"}


def status_of(connection: socket.socket) -> tuple[int, bytes]:
    """Status and the rest of an answer whose connection the server closes."""
    answer = b""
    while chunk := connection.recv(65536):
        answer += chunk
    return (int(answer.split(b" ", 2)[1]), answer) if answer else (0, answer)


@pytest.mark.parametrize("request_id", ["abc-123", "A.b:c_d", "x" * 128])
def test_a_plain_request_id_is_kept(service: LocalService, request_id: str):
    assert service.call("GET", "/health", headers={"x-request-id": request_id}).headers["x-request-id"] == request_id


@pytest.mark.parametrize("request_id", ["", "a b", "x" * 129, "a;b", "é"])
def test_an_odd_request_id_is_replaced(service: LocalService, request_id: str):
    reply = service.call("GET", "/health", headers={"x-request-id": request_id})
    assert re.fullmatch("req_[0-9a-f]{32}", reply.headers["x-request-id"])


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 200),
        ("GET", "/health", 200),
        ("GET", "/nothing/here", 404),
        ("GET", "/v1/models/", 200),
        ("GET", "/v1/models/no/such", 404),
        ("GET", "/v1/embeddings", 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/health", 405),
        ("BREW", "/", 400),
    ],
)
def test_every_answer_is_identified_and_every_error_has_the_envelope(
    service: LocalService, method: str, path: str, status: int
):
    reply = service.call(method, path)
    assert reply.status == status
    assert reply.headers["x-request-id"]
    if status != 400:  # not HTTP, so no request that could have taken time
        assert int(reply.headers["openai-processing-ms"]) >= 0
    if status >= 400:
        assert set(reply.error) == ENVELOPE
        assert reply.headers["x-should-retry"] == "false"
    if status == 405:
        assert reply.headers["allow"]


def test_without_a_key_only_health_and_readiness_answer(service: LocalService):
    for path in ("/health", "/ready"):
        assert service.call("GET", path, key=None).status == 200
    for path in ("/", "/v1/models", "/metrics", "/openapi.json", "/nothing", "/health/"):
        reply = service.call("GET", path, key=None)
        assert (reply.status, reply.error["code"]) == (401, "invalid_api_key")
        assert reply.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "wrong_key", [f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", "Bearer", "Bearer ", f"Basic {KEY}", KEY, "Bearer é"]
)
def test_a_wrong_key_is_refused_and_not_repeated(service: LocalService, wrong_key: str):
    reply = service.call("GET", "/v1/models", headers={"authorization": wrong_key}, key=None)
    assert (reply.status, reply.error["code"]) == (401, "invalid_api_key")
    assert KEY[5:-5] not in reply.error["message"]


def test_any_of_several_keys_opens(start: Callable[..., LocalService]):
    service = start(api_keys=("sk-first-key", "sk-second-key"), warm=())
    for key, status in (("sk-first-key", 200), ("sk-second-key", 200), (KEY, 401)):
        assert service.call("GET", "/v1/models", key=key).status == status


def test_without_keys_the_server_is_open(start: Callable[..., LocalService]):
    assert start(api_keys=(), warm=()).call("GET", "/v1/models", key=None).status == 200


@pytest.mark.parametrize("parameter", ["key", "api_key"])
@pytest.mark.parametrize("path", ["/v1/models", "/health", "/nothing"])
def test_a_key_in_the_url_is_refused_by_name(service: LocalService, path: str, parameter: str):
    reply = service.call("GET", f"{path}?{parameter}={KEY}")
    assert (reply.status, reply.error["param"], reply.error["code"]) == (400, parameter, "key_in_url")
    assert KEY not in reply.body.decode()


def test_a_body_over_the_limit(start: Callable[..., LocalService]):
    service = start(body_limit_bytes=10_000)
    assert service.embed("a", user="x" * 9000).status == 200
    large = json.dumps({"model": service.model, "input": "a", "user": "x" * 200_000}).encode()
    # In chunks there is no Content-Length to believe.
    for body in (large, iter([large[:5000], large[5000:]])):
        reply = service.call("POST", "/v1/embeddings", body)
        assert (reply.status, reply.error["code"]) == (413, "too_large")
        assert reply.headers["x-should-retry"] == "false"


def test_a_body_far_over_the_limit_is_read_past_the_answer(service: LocalService):
    reply = service.call("POST", "/v1/embeddings", b" " * 40_000_000)
    assert (reply.status, reply.error["code"]) == (413, "too_large")


def test_a_body_that_waits_to_be_wanted(service: LocalService):
    with service.connect() as connection:
        head = service.raw_request(b"", length=100).replace(b"\r\n\r\n", b"\r\nexpect: 100-continue\r\n\r\n")
        connection.sendall(head.replace(KEY.encode(), b"wrong"))
        assert status_of(connection)[0] == 401  # and closed, or what came next would be taken for the body
    with service.connect() as connection:
        body = json.dumps({"model": service.model, "input": "a"}).encode()
        connection.sendall(head.replace(b"length: 100", f"length: {len(body)}".encode()))
        assert connection.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body)
        assert b" 200 OK" in connection.recv(65536)


def test_a_body_that_stops_arriving(start: Callable[..., LocalService]):
    service = start(receive_timeout_s=0.3)
    with service.connect() as connection:
        connection.sendall(service.raw_request(b'{"model":', length=500))
        status, answer = status_of(connection)
    assert status == 408
    assert set(json.loads(answer.partition(b"\r\n\r\n")[2])["error"]) == ENVELOPE
    assert b"x-should-retry: true" in answer


def test_a_caller_who_leaves_stops_the_work(start: Callable[..., LocalService], monkeypatch: pytest.MonkeyPatch):
    service = start()
    computed, forward_pack = [], Encoder.forward_pack

    def counted(encoder: Encoder, prompts: Sequence[Prompt]) -> np.ndarray:
        computed.extend(prompts)
        return forward_pack(encoder, prompts)

    monkeypatch.setattr(Encoder, "forward_pack", counted)
    with service.busy() as connection:
        connection.close()
        until(lambda: service.waiting_tokens() == 0)
    until(lambda: service.metric(LEFT) == 1)
    assert len(computed) < len(service.long_work["input"])


def test_a_caller_who_leaves_before_the_end_of_the_body(start: Callable[..., LocalService]):
    service = start()
    with service.connect() as connection:
        connection.sendall(service.raw_request(b'{"model":', length=500))
    until(lambda: service.metric(LEFT) == 1)


def test_a_fault_of_ours_is_an_answer_without_details(
    start: Callable[..., LocalService], monkeypatch: pytest.MonkeyPatch
):
    service = start()

    def broken(id: str) -> None:
        raise KeyError(f"secret detail of {id}")

    monkeypatch.setattr(service.models, "find", broken)
    reply = service.embed("my private text")
    assert (reply.status, reply.error["type"], reply.error["code"]) == (500, "server_error", "internal_error")
    assert "secret" not in reply.body.decode()
    assert reply.headers["x-request-id"]
    assert service.call("GET", "/health").status == 200


def test_a_refused_request_leaves_nothing_in_memory(service: LocalService):
    """An exception that a frame keeps in a variable is a cycle, which held bodies until Python searched for garbage."""
    long = "some words " * 20_000
    requests = {
        "no JSON": lambda: service.call("POST", "/v1/embeddings", b'{"input": "' + long.encode()),
        "no such model": lambda: service.embed([long], model="nope"),
        "wrong field": lambda: service.embed([long], dimensions="x"),
        "too long": lambda: service.embed([long], truncate=False),
        "too late": lambda: service.call(
            "POST",
            "/v1/embeddings",
            json.dumps({"model": service.model, "input": [long] * 4}).encode(),
            headers={"request-deadline-ms": "1"},
        ),
        "no key": lambda: service.call("POST", "/v1/embeddings", b"{}", key=None),
        "no such page": lambda: service.call("GET", "/nope"),
    }
    for name, refused in requests.items():
        refused()
        gc.collect()
        gc.disable()
        try:
            assert refused().status >= 400
            gc.set_debug(gc.DEBUG_SAVEALL)
            gc.collect()
            frames = [thing for thing in gc.garbage if isinstance(thing, FrameType | TracebackType)]
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()
        assert [frame.f_code.co_name for frame in frames if isinstance(frame, FrameType)] == [], name
