"""Bytes on the wire: odd but legal HTTP/1.1 requests are answered, illegal ones refused, and no body is mixed up.

After most requests comes another one on the same connection, with a text of its own: its vector says whether the
bytes before it were read as one request and no more.
"""

import io
import itertools
import json
import re
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from tests.api.live import KEY, LocalService

JAVA_OFFER = (
    "Connection: Upgrade, HTTP2-Settings",
    "Upgrade: h2c",
    "HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA",
)
TEXT = "river stone"
LAST_TEXT = "the last request of the connection"

Expected = int | str  # a status, or the text whose vector is answered; "HEAD" for an answer without body


def head(start: str, *headers: str, host: str = "Host: test", key: str = KEY) -> bytes:
    lines = [start, host, f"Authorization: Bearer {key}", *headers]
    return "\r\n".join([*filter(None, lines), "", ""]).encode("latin1")


def embedding_body(text: str = TEXT) -> bytes:
    return json.dumps({"model": "tiny_llama", "input": text}).encode()


def post(
    *headers: str,
    text: str = TEXT,
    target: str = "/v1/embeddings",
    version: str = "1.1",
    media: str = "Content-Type: application/json",
    host: str = "Host: test",
) -> bytes:
    """An embeddings request with Content-Length."""
    body = embedding_body(text)
    start = f"POST {target} HTTP/{version}"
    return head(start, media, f"Content-Length: {len(body)}", *headers, host=host) + body


def chunked(
    *headers: str,
    size: int = 7,
    extension: str = "",
    trailers: tuple[str, ...] = (),
    coding: str = "Transfer-Encoding: chunked",
    form: str = "%x",
) -> bytes:
    """An embeddings request in chunks."""
    body = embedding_body()
    parts = [body[at : at + size] for at in range(0, len(body), size)]
    chunks = [(form % len(part) + extension).encode() + b"\r\n" + part + b"\r\n" for part in parts]
    end = "\r\n".join(["0" + extension, *trailers, "", ""]).encode()
    start = head("POST /v1/embeddings HTTP/1.1", "Content-Type: application/json", coding, *headers)
    return start + b"".join(chunks) + end


def get(
    path: str = "/health", *headers: str, method: str = "GET", version: str = "1.1", host: str = "Host: t"
) -> bytes:
    return head(f"{method} {path} HTTP/{version}", *headers, host=host)


LAST = post(text=LAST_TEXT)

# Name, bytes, answers. Where the last answer is LAST_TEXT, LAST is sent as well.
LEGAL: list[tuple[str, bytes, list[Expected]]] = [
    ("Java's offer with Content-Length", post(*JAVA_OFFER), [TEXT, LAST_TEXT]),
    ("Java's offer in chunks", chunked(*JAVA_OFFER), [TEXT, LAST_TEXT]),
    ("Java's offer twice", post(*JAVA_OFFER) + chunked(*JAVA_OFFER), [TEXT, TEXT, LAST_TEXT]),
    ("Java's offer to a GET", get("/health", *JAVA_OFFER), [200, LAST_TEXT]),
    ("Java's offer to an empty POST", get("/health", *JAVA_OFFER, "Content-Length: 0", method="POST"),
     [405, LAST_TEXT]),
    ("an offer of a websocket", post("Connection: upgrade", "Upgrade: websocket"), [TEXT, LAST_TEXT]),
    ("an offer and close", post("Connection: Upgrade, close", "Upgrade: h2c"), [TEXT]),
    ("an offer in HTTP/1.0", post("Connection: Upgrade", "Upgrade: h2c", version="1.0"), [TEXT]),
    ("an offer in two Connection lines", post("Connection: Upgrade", "Connection: HTTP2-Settings", "Upgrade: h2c"),
     [TEXT, LAST_TEXT]),
    ("Upgrade without Connection", post("Upgrade: h2c, websocket"), [TEXT, LAST_TEXT]),
    ("an offer and Expect", post(*JAVA_OFFER, "Expect: 100-continue"), [TEXT, LAST_TEXT]),
    ("an offer and trailers", chunked(*JAVA_OFFER, trailers=("X-Sum: 1",)), [TEXT, LAST_TEXT]),
    ("Expect: 100-continue", post("Expect: 100-continue"), [TEXT, LAST_TEXT]),
    ("Expect in capitals", post("EXPECT: 100-Continue"), [TEXT, LAST_TEXT]),
    ("chunks", chunked(), [TEXT, LAST_TEXT]),
    ("chunks of one byte", chunked(size=1), [TEXT, LAST_TEXT]),
    ("chunk extensions", chunked(extension=";name=value"), [TEXT, LAST_TEXT]),
    ("a quoted chunk extension", chunked(extension=';name="a value"'), [TEXT, LAST_TEXT]),
    ("capital hexadecimal sizes", chunked(size=11, form="%X"), [TEXT, LAST_TEXT]),
    ("zeros before the sizes", chunked(form="000%x"), [TEXT, LAST_TEXT]),
    ("trailers", chunked("Trailer: X-Sum", trailers=("X-Sum: 1", "X-Other: 2")), [TEXT, LAST_TEXT]),
    ("Transfer-Encoding in capitals", chunked(coding="TRANSFER-ENCODING: Chunked"), [TEXT, LAST_TEXT]),
    ("an absolute target", post(target="http://test/v1/embeddings"), [TEXT, LAST_TEXT]),
    ("an absolute target of another host", post(target="http://other.example:80/v1/embeddings"), [TEXT, LAST_TEXT]),
    ("an absolute target in capitals", post(target="HTTP://TEST/v1/embeddings"), [TEXT, LAST_TEXT]),
    ("an absolute target without a path", get("http://test"), [200, LAST_TEXT]),
    ("an absolute target with a query", get("http://test/health?a=b"), [200, LAST_TEXT]),
    ("an escaped target", post(target="/v1/%65mbeddings"), [TEXT, LAST_TEXT]),
    ("an empty query", post(target="/v1/embeddings?"), [TEXT, LAST_TEXT]),
    ("a query with odd characters", get("/health?a=%00&b=[]{}|^`"), [200, LAST_TEXT]),
    ("three pipelined requests", post() + get() + post(text="another"), [TEXT, 200, "another", LAST_TEXT]),
    ("a pipelined error in the middle", post() + get("/nothing") + post(), [TEXT, 404, TEXT, LAST_TEXT]),
    ("empty lines before a request", b"\r\n\r\n" + post(), [TEXT, LAST_TEXT]),
    ("header names in every case", post("AcCePt: */*", "USER-AGENT: x", "x-EMPTY:"), [TEXT, LAST_TEXT]),
    ("no blank after the colon", post("Accept:*/*", media="content-type:application/json"), [TEXT, LAST_TEXT]),
    ("blanks around values", post("Accept: \t */* \t ", media="Content-Type:   application/json  "), [TEXT, LAST_TEXT]),
    ("a header in Latin-1", post("X-Name: J\xfcrgen"), [TEXT, LAST_TEXT]),
    ("an empty Host", post(host="Host:"), [TEXT, LAST_TEXT]),
    ("a Host of IPv6", post(host="Host: [::1]:8080"), [TEXT, LAST_TEXT]),
    ("HEAD", get(method="HEAD"), ["HEAD", LAST_TEXT]),
    ("HEAD of a path for POST", get("/v1/embeddings", method="HEAD"), ["HEAD", LAST_TEXT]),
    ("OPTIONS *", get("*", method="OPTIONS"), [204, LAST_TEXT]),
    ("OPTIONS of a path", get("/v1/embeddings", method="OPTIONS"), [405, LAST_TEXT]),
    ("GET with a body", get("/health", "Content-Length: 5") + b"hello", [200, LAST_TEXT]),
    ("DELETE with chunks", get("/health", "Transfer-Encoding: chunked", method="DELETE") + b"3\r\nabc\r\n0\r\n\r\n",
     [405, LAST_TEXT]),
    ("HTTP/1.0", post(version="1.0"), [TEXT]),
    ("HTTP/1.0 without Host", get(version="1.0", host=""), [200]),
    ("close", post("Connection: close"), [TEXT]),
    ("keep-alive", post("Connection: keep-alive", "Keep-Alive: timeout=5"), [TEXT, LAST_TEXT]),
    ("many Accept lines", post(*["Accept: application/json"] * 40), [TEXT, LAST_TEXT]),
    ("a method of WebDAV", get(method="PROPFIND"), [405, LAST_TEXT]),
]  # fmt: skip

# Name, bytes, status of the only answer. LAST follows each, and must not be answered from the bytes of an illegal body.
ILLEGAL: list[tuple[str, bytes, int]] = [
    ("no Host", post(host=""), 400),
    ("two Hosts", post("Host: other"), 400),
    ("a Host with a blank", post(host="Host: a b"), 400),
    ("a Host with a path", post(host="Host: test/path"), 400),
    ("a Host with an account", post(host="Host: me@test"), 400),
    ("a Host whose port is no number", post(host="Host: test:abc"), 400),
    ("a Host with two ports", post(host="Host: test:80:80"), 400),
    ("an absolute target whose port is no number", get("http://test:8x/health"), 400),
    ("two keys", post("Authorization: Bearer another"), 400),
    ("two media types", post("Content-Type: text/plain"), 400),
    ("a key twice", post(f"Authorization: Bearer {KEY}"), 400),
    ("a list of Hosts", post(host="Host: a\", \"b"), 400),
    ("Content-Length and chunks", post("Transfer-Encoding: chunked"), 400),
    ("chunks and Content-Length", chunked("Content-Length: 5"), 400),
    ("two Content-Lengths", post("Content-Length: 5"), 400),
    ("a negative Content-Length", get("/health", "Content-Length: -1"), 400),
    ("a signed Content-Length", get("/health", "Content-Length: +5") + b"hello", 400),
    ("a Content-Length in words", get("/health", "Content-Length: five"), 400),
    ("a hexadecimal Content-Length", get("/health", "Content-Length: 0x5") + b"hello", 400),
    ("a list of Content-Lengths", get("/health", "Content-Length: 5, 5") + b"hello", 400),
    ("a Content-Length with a blank", get("/health", "Content-Length: 1 2") + b"hello", 400),
    ("a Content-Length beyond 64 bits", get("/health", "Content-Length: 99999999999999999999999"), 400),
    ("chunks within gzip", chunked(coding="Transfer-Encoding: gzip, chunked"), 501),
    ("chunks twice", chunked(coding="Transfer-Encoding: chunked, chunked"), 400),
    ("chunks that are not last", chunked(coding="Transfer-Encoding: chunked, gzip"), 400),
    ("an unknown coding", chunked(coding="Transfer-Encoding: xchunked"), 501),
    ("chunks in HTTP/1.0", chunked().replace(b"HTTP/1.1", b"HTTP/1.0"), 400),
    ("a chunk size that is no number", chunked(form="x%x"), 400),
    ("a negative chunk size", chunked(form="-%x"), 400),
    ("a signed chunk size", chunked(form="+%x"), 400),
    ("a chunk size with 0x", chunked(form="0x%x"), 400),
    ("a chunk size beyond 64 bits", chunked(form="fffffffffffffffff%x"), 400),
    ("no chunk size", chunked(form="%.0s"), 400),
    ("a chunk that is too long", chunked().replace(b"\r\n7\r\n", b"\r\n3\r\n", 1), 400),
    ("a blank before the colon", post("Accept : */*"), 400),
    ("a header without a colon", post("Accept"), 400),
    ("a header without a name", post(": value"), 400),
    ("a header name with brackets", post("Ac(cept): x"), 400),
    ("a zero byte in a header", post("X-A: a\x00b"), 400),
    ("a zero byte in a name", post("X-\x00A: b"), 400),
    ("a return alone in a header", post("X-A: a\rb"), 400),
    ("a blank before the first header", post().replace(b"\r\nHost", b"\r\n Host", 1), 400),
    ("a method in small letters", post().replace(b"POST", b"post"), 400),
    ("an unknown method", get(method="BREW"), 400),
    ("a version of HTTP that is none", get(version="1.x"), 400),
    ("HTTP/2 in clear text", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    ("HTTP/3", get(version="3.0"), 400),
    ("no version", b"GET /health\r\n\r\n", 400),
    ("a protocol that is not HTTP", b"GET /health SIP/2.0\r\n\r\n", 400),
    ("two blanks in the first line", get().replace(b"GET /", b"GET  /", 1).replace(b" HTTP", b" x HTTP", 1), 400),
    ("a target without a slash", get("health"), 400),
    ("a target of another scheme", get("ftp://test/health"), 400),
    ("an absolute target without a host", get("http:///health"), 400),
    ("a zero byte in the target", get("/hea\x00lth"), 400),
    ("an unescaped letter in the target", get("/h\xe9alth"), 400),
    ("a target that is too long", get("/health?" + "a" * 65_535), 414),
    ("a target that is too long in an offer", get("/health?" + "a" * 65_535, *JAVA_OFFER), 414),
    ("a fold in a header", post("X-A: a\r\n b"), 400),
    ("lines that end in a line feed", post().replace(b"\r\n", b"\n", 3), 400),
    ("a Content-Length twice", post(f"Content-Length: {len(embedding_body())}"), 400),
    ("an empty Content-Length", get("/health", "Content-Length:"), 400),
    ("an empty Transfer-Encoding", post("Transfer-Encoding:"), 400),
    ("a blank after a chunk size", chunked(extension=" "), 400),
    ("a Content-Length in the trailers", chunked(trailers=("Content-Length: 5",)), 400),
    ("a Transfer-Encoding in the trailers", chunked(trailers=("Transfer-Encoding: chunked",)), 400),
    ("a trailer without a colon", chunked(trailers=("X-A",)), 400),
    ("two returns", post().replace(b"\r\n\r\n", b"\r\r\n\r\n", 1), 400),
    ("a return alone in a chunk extension", chunked(extension=";a\rb"), 400),
    ("a byte order mark", b"\xef\xbb\xbf" + post(), 400),
    ("CONNECT", b"CONNECT example.com:443 HTTP/1.1\r\nHost: example.com:443\r\n\r\n", 501),
    ("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    ("an offer and two Hosts", post("Host: other", *JAVA_OFFER), 400),
    ("an offer, Content-Length and chunks", post("Transfer-Encoding: chunked", *JAVA_OFFER), 400),
    ("an offer and broken chunks", chunked(*JAVA_OFFER, form="x%x"), 400),
]  # fmt: skip


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def vector(self) -> np.ndarray:
        return np.array(json.loads(self.body)["data"][0]["embedding"], dtype=np.float32)


def read_answers(stream: bytes, without_body: frozenset[int] = frozenset()) -> list[Answer]:
    """Parse all answers of a connection; those at the positions `without_body` answer HEAD."""
    file, answers = io.BytesIO(stream), []
    while line := file.readline():
        status = int(re.fullmatch(rb"HTTP/1\.1 (\d{3}) [^\r\n]*\r\n", line)[1])  # pyright: ignore[reportOptionalSubscript]
        headers = {}
        while (line := file.readline()) != b"\r\n":
            assert line.endswith(b"\r\n"), "the connection ended within the headers"
            name, _, value = line.decode("latin1").partition(":")
            headers[name.lower()] = value.strip()
        if status < 200:
            continue
        length = 0 if status == 204 or len(answers) in without_body else int(headers["content-length"])
        body = file.read(length)
        assert len(body) == length, "the connection ended within a body"
        answers.append(Answer(status, headers, body))
    return answers


def exchange(service: LocalService, parts: list[bytes], done: Callable[[bytes], bool], seconds: float = 60) -> bytes:
    """Send the parts, and read until the server closes, `done` holds or nothing has come for a while."""
    answer = b""
    with service.connect() as connection:
        connection.settimeout(seconds)
        try:
            for part in parts:
                connection.sendall(part)
                time.sleep(0.01 if len(parts) > 1 else 0)
            while not done(answer):
                if not (chunk := connection.recv(65536)):
                    break
                answer += chunk
        except (ConnectionError, TimeoutError):
            pass
    return answer


@pytest.fixture(scope="module")
def vector_of(service: LocalService) -> Callable[[str], np.ndarray]:
    vectors: dict[str, np.ndarray] = {}

    def vector(text: str) -> np.ndarray:
        if text not in vectors:
            vectors[text] = service.embed(text).vectors[0]
        return vectors[text]

    return vector


@pytest.mark.parametrize("in_pieces", [False, True], ids=["at once", "in pieces"])
@pytest.mark.parametrize(("data", "expected"), [case[1:] for case in LEGAL], ids=[case[0] for case in LEGAL])
def test_an_odd_but_legal_request_is_answered(
    service: LocalService,
    vector_of: Callable[[str], np.ndarray],
    data: bytes,
    expected: list[Expected],
    in_pieces: bool,
):
    stays_open = expected[-1] == LAST_TEXT
    data += LAST if stays_open else b""
    cuts = [*range(0, len(data), len(data) // 9), len(data)] if in_pieces else [0, len(data)]
    parts = [data[start:end] for start, end in itertools.pairwise(cuts)]
    ends = len(expected)
    stream = exchange(
        service, parts, lambda got: stays_open and got.count(b"x-request-id:") >= ends and got.endswith(b"}}")
    )
    answers = read_answers(stream, frozenset(i for i, item in enumerate(expected) if item == "HEAD"))
    assert len(answers) == len(expected), stream
    for answer, item in zip(answers, expected, strict=True):
        if isinstance(item, int):
            assert answer.status == item
        elif item == "HEAD":
            assert answer.status in (200, 405)
        else:
            assert answer.status == 200, answer.body
            np.testing.assert_array_equal(answer.vector, vector_of(item))
    if not stays_open:
        assert answers[-1].headers["connection"] == "close"


@pytest.mark.parametrize("first", [b"", post()], ids=["alone", "after a request"])
@pytest.mark.parametrize(("data", "status"), [case[1:] for case in ILLEGAL], ids=[case[0] for case in ILLEGAL])
def test_an_illegal_request_is_refused(
    service: LocalService, vector_of: Callable[[str], np.ndarray], data: bytes, status: int, first: bytes
):
    answers = read_answers(exchange(service, [first + data + LAST], lambda got: False))
    if first:
        assert answers[0].status == 200
        np.testing.assert_array_equal(answers.pop(0).vector, vector_of(TEXT))
    assert [answer.status for answer in answers] == [status]
    assert answers[0].headers["connection"] == "close"
    assert answers[0].headers["x-request-id"].startswith("req_")
    assert set(json.loads(answers[0].body)["error"]) == {"message", "type", "param", "code"}


def test_there_are_forty_of_each() -> None:
    assert min(len(LEGAL), len(ILLEGAL)) >= 40
    assert len({name for name, *_ in [*LEGAL, *ILLEGAL]}) == len(LEGAL) + len(ILLEGAL)


def test_a_field_after_the_body_is_no_header(service: LocalService):
    """A key after the body would have passed a proxy that checks or replaces keys."""
    data = chunked(trailers=(f"Authorization: Bearer {KEY}",)).replace(
        f"Authorization: Bearer {KEY}\r\n".encode(), b"", 1
    )
    (answer,) = read_answers(exchange(service, [data], lambda got: got.endswith(b"}}")))
    assert answer.status == 401


def test_an_absolute_target_replaces_the_host(service: LocalService):
    data = get("http://target.example/nothing", "Accept: application/json", "Connection: close")
    (answer,) = read_answers(exchange(service, [data], lambda got: False))
    assert answer.status == 404
    assert b"http" not in answer.body


def test_a_body_that_breaks_after_its_answer_gets_no_second_one(service: LocalService):
    start = head("POST /v1/embeddings HTTP/1.1", "Transfer-Encoding: chunked")  # 415: no media type
    with service.connect() as connection:
        connection.sendall(start)
        answer = connection.recv(65536)
        assert b" 415 " in answer
        connection.sendall(b"no chunk\r\n\r\n")
        connection.settimeout(60)
        assert connection.recv(65536) == b""


@pytest.mark.slow
def test_a_refusal_waits_for_slow_answers(service: LocalService):
    long_work = json.dumps(service.long_work).encode()
    with service.connect() as connection:
        connection.sendall(service.raw_request(long_work))
        connection.sendall(b"no request\r\n\r\n")
        connection.settimeout(60)
        stream = b""
        while chunk := connection.recv(1 << 20):
            stream += chunk
    first, second = read_answers(stream)
    assert (first.status, second.status) == (200, 400)
    assert first.body.count(b'"object":"embedding"') == len(service.long_work["input"])


def test_a_broken_message_in_the_queue_is_dropped_alone(service: LocalService, vector_of: Callable[[str], np.ndarray]):
    data = post() + chunked(form="x%x") + LAST
    first, second = read_answers(exchange(service, [data], lambda got: False))
    assert (first.status, second.status) == (200, 400)
    np.testing.assert_array_equal(first.vector, vector_of(TEXT))


def test_the_socket_is_closed_after_a_refusal(service: LocalService):
    with socket.create_connection(service.address, timeout=60) as connection:
        connection.sendall(b"nothing\r\n\r\n")
        while connection.recv(65536):
            pass
