"""Requests of clients that cannot run here (Java, Go, Rust, PHP, .NET, Ruby), as bytes on the wire.

Each row has the order and case of headers, the way to send a body, and the spelling of JSON that the client is known
for. The rows of async-openai, openai-php, go-openai and Azure's .NET client follow their sources, as far as these were
read; the others (JDK, OkHttp, Spring, openai-go, openai-dotnet, JsonContent, Ruby) follow documented behaviour and were
not compared with a recording.
"""

import base64
import json
import socket
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from tests.api.live import KEY, LocalService

TEXT = 'größer als 日本 / 5" <pipe> 🙂'
ESCAPED = json.dumps(TEXT)


@dataclass(frozen=True)
class WireRequest:
    """A request as its client writes it.

    Attributes:
        headers: lines as they are sent; KEY and HOST are filled in. The length is added where the body has one.
        body: JSON with MODEL for the model's id.
        target: the path.
        chunks: sizes of the chunks of a chunked body; empty for a body with a length.
        length: the header's name as the client writes it.
    """

    headers: str
    body: str
    target: str = "/v1/embeddings"
    chunks: tuple[int, ...] = ()
    length: str = "Content-Length"

    def encode(self, host: str, model: str) -> bytes:
        """Return the bytes."""
        filled = self.headers.replace("KEY", KEY).replace("HOST", host).strip("\n")
        lines = [f"POST {self.target.replace('MODEL', model)} HTTP/1.1", *filled.splitlines()]
        body = self.body.replace("MODEL", model).encode()
        if not self.chunks:
            return "\r\n".join([*lines, f"{self.length}: {len(body)}", "", ""]).encode() + body
        pieces, start = b"", 0
        for size in (*self.chunks, len(body)):
            piece = body[start : start + size]
            start += size
            pieces += b"%x\r\n%b\r\n" % (len(piece), piece) if piece else b""
        return "\r\n".join([*lines, "Transfer-Encoding: chunked", "", ""]).encode() + pieces + b"0\r\n\r\n"


def body(**fields: Any) -> str:
    return json.dumps({"model": "MODEL", **fields}, ensure_ascii=False, separators=(",", ":"))


REQUESTS = {
    # java.net.http.HttpClient, which LangChain4j and Spring AI use by default: it offers HTTP/2 on plain connections.
    "java-jdk": WireRequest(
        """
Connection: Upgrade, HTTP2-Settings
Host: HOST
HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA
Upgrade: h2c
User-Agent: Java-http-client/21.0.5
Authorization: Bearer KEY
Content-Type: application/json""",
        body(input=[TEXT]),
    ),
    # okhttp3.internal.http.BridgeInterceptor under openai-java, whose EmbeddingCreateParams ask for base64.
    "java-okhttp": WireRequest(
        """
User-Agent: OpenAI/Java 4.6.1
X-Stainless-Arch: x64
X-Stainless-Lang: java
X-Stainless-OS: Linux
X-Stainless-OS-Version: 6.1
X-Stainless-Package-Version: 4.6.1
X-Stainless-Runtime: JRE
X-Stainless-Runtime-Version: 21.0.5
X-Stainless-Read-Timeout: 600
X-Stainless-Timeout: 600
X-Stainless-Retry-Count: 0
Authorization: Bearer KEY
Accept: application/json
Content-Type: application/json
Host: HOST
Connection: Keep-Alive
Accept-Encoding: gzip""",
        body(input=TEXT, encoding_format="base64"),
    ),
    # Spring's RestClient with java.net.HttpURLConnection: the converter streams, so the body is chunked.
    "java-spring": WireRequest(
        """
Authorization: Bearer KEY
Content-Type: application/json
User-Agent: Java/21.0.5
Host: HOST
Accept: text/html, image/gif, image/jpeg, */*; q=0.2
Connection: keep-alive""",
        body(input=[TEXT]),
        chunks=(1, 16),
    ),
    # go-openai, embeddings.go: `user` is sent empty; net/http orders headers by name and escapes < and > in JSON.
    "go-openai": WireRequest(
        """
Host: HOST
User-Agent: Go-http-client/1.1
Accept: application/json
Authorization: Bearer KEY
Content-Type: application/json
Accept-Encoding: gzip""",
        body(input=[TEXT], user="").replace("<", "\\u003c").replace(">", "\\u003e"),
    ),
    # openai-go: header names as net/http canonicalises them; a reader without length makes the body chunked.
    "go-official": WireRequest(
        """
Host: HOST
User-Agent: OpenAI/Go 2.7.1
Accept: application/json
Authorization: Bearer KEY
Content-Type: application/json
X-Stainless-Arch: x64
X-Stainless-Lang: go
X-Stainless-Os: Linux
X-Stainless-Package-Version: 2.7.1
X-Stainless-Retry-Count: 0
X-Stainless-Runtime: go
X-Stainless-Runtime-Version: go1.25.0
Accept-Encoding: gzip""",
        body(input=[TEXT], encoding_format="float"),
        chunks=(2048,),
    ),
    # async-openai over reqwest and hyper: names in lower case.
    "rust": WireRequest(
        """
openai-organization: org
authorization: Bearer KEY
content-type: application/json
accept: */*
host: HOST""",
        body(input=TEXT),
        length="content-length",
    ),
    # async-openai, AzureConfig in config.rs.
    "rust-azure": WireRequest(
        """
api-key: KEY
content-type: application/json
accept: */*
host: HOST""",
        body(input=[TEXT]),
        target="/openai/deployments/MODEL/embeddings?api-version=2024-10-21",
        length="content-length",
    ),
    # openai-php, Payload.php over Guzzle: json_encode escapes slashes and everything beyond ASCII.
    "php": WireRequest(
        """
Host: HOST
User-Agent: GuzzleHttp/7
Authorization: Bearer KEY
OpenAI-Organization: org
Content-Type: application/json""",
        '{"model":"MODEL","input":' + ESCAPED.replace("/", "\\/") + "}",
    ),
    # PHP's cURL waits for 100 before a large body; here it does so for a small one.
    "php-expect": WireRequest(
        """
Host: HOST
User-Agent: GuzzleHttp/7
Authorization: Bearer KEY
Content-Type: application/json
Expect: 100-continue""",
        '{"model":"MODEL","input":[' + ESCAPED + "]}",
    ),
    # openai-dotnet, EmbeddingClient: base64, and System.Text.Json escapes everything beyond ASCII, quotes and <>.
    "dotnet": WireRequest(
        """
Host: HOST
Accept: application/json
User-Agent: OpenAI/2.5.0 (.NET 9.0.9; Debian GNU/Linux 12 (bookworm))
Authorization: Bearer KEY
Content-Type: application/json""",
        '{"input":['
        + ESCAPED.replace('\\"', "\\u0022").replace("<", "\\u003C").replace(">", "\\u003E")
        + '],"model":"MODEL","encoding_format":"base64"}',
    ),
    # Azure.AI.OpenAI, AzureEmbeddingClient.
    "dotnet-azure": WireRequest(
        """
Host: HOST
Accept: application/json
x-ms-client-request-id: 4ba3bb6c-3c5b-4d5f-9f4c-7a0e6f7f5b3d
x-ms-return-client-request-id: true
User-Agent: azsdk-net-AI.OpenAI/2.1.0 (.NET 9.0.9; Debian GNU/Linux 12 (bookworm))
api-key: KEY
Content-Type: application/json""",
        '{"input":[' + ESCAPED + '],"encoding_format":"base64"}',
        target="/openai/deployments/MODEL/embeddings?api-version=2024-10-21",
    ),
    # System.Net.Http.Json.JsonContent, as hand-written .NET clients use it.
    "dotnet-json": WireRequest(
        """
Host: HOST
Authorization: Bearer KEY
Content-Type: application/json; charset=utf-8""",
        '{"model":"MODEL","input":[' + ESCAPED + "]}",
        chunks=(4096,),
    ),
    # ruby-openai over Faraday and net/http.
    "ruby": WireRequest(
        """
Content-Type: application/json
Authorization: Bearer KEY
User-Agent: Faraday v2.13.4
Accept-Encoding: gzip;q=1.0,deflate;q=0.6,identity;q=0.3
Accept: */*
Host: HOST""",
        body(input=TEXT),
    ),
}


def exchange(service: LocalService, sent: bytes, count: int) -> list[tuple[int, bytes]]:
    """Send bytes over one connection; return status and body of so many answers, without interim ones."""
    host, port = service.url.removeprefix("http://").split(":")
    answers: list[tuple[int, bytes]] = []
    with socket.create_connection((host, int(port)), timeout=30) as line, line.makefile("rb") as received:
        line.sendall(sent)
        while len(answers) < count:
            status = int(received.readline().split()[1])
            headers = dict(line.decode().lower().split(": ", 1) for line in iter(received.readline, b"\r\n"))
            content = received.read(int(headers.get("content-length", 0)))
            if status >= 200:
                answers.append((status, content))
    return answers


@pytest.mark.parametrize("name", REQUESTS)
def test_a_client_gets_its_vector_twice_on_one_connection(service: LocalService, name: str):
    request = REQUESTS[name]
    expected = service.embed([TEXT]).vectors[0]
    sent = request.encode(service.url.removeprefix("http://"), service.model)
    for status, content in exchange(service, sent * 2, 2):
        assert status == 200, content
        answer = json.loads(content)
        vector = answer["data"][0]["embedding"]
        if "base64" in request.body:
            vector = np.frombuffer(base64.b64decode(vector), dtype="<f4")
        np.testing.assert_array_equal(np.asarray(vector, dtype=np.float32), expected)
        assert answer["model"] == service.model and answer["usage"]["prompt_tokens"] > 0
