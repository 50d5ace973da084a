"""Requests of clients that cannot run here (Java, Go, Rust, PHP, .NET, Ruby), as bytes on the wire.

Each row says which source it was written from: repository, file, version. "recorded" rows are what OpenJDK 17's own
client sent to a socket. What a row has from the source: the order and case of headers, the way to send a body, and the
spelling of JSON.
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
        source: the code that the row was written from.
        headers: lines as they are sent; KEY, HOST and LENGTH, the body's, are filled in.
        body: JSON with MODEL for the model's id.
        target: the path.
        chunks: sizes of the first chunks of a chunked body, whose rest is one more; empty for a body with a length.
    """

    source: str
    headers: str
    body: str
    target: str = "/v1/embeddings"
    chunks: tuple[int, ...] = ()

    def encode(self, host: str, model: str) -> bytes:
        """Return the bytes."""
        body = self.body.replace("MODEL", model).encode()
        filled = self.headers.replace("KEY", KEY).replace("HOST", host).replace("LENGTH", str(len(body))).strip("\n")
        lines = [f"POST {self.target.replace('MODEL', model)} HTTP/1.1", *filled.splitlines(), "", ""]
        head = "\r\n".join(lines).encode()
        if not self.chunks:
            return head + body
        pieces, start = b"", 0
        for size in (*self.chunks, len(body)):
            piece = body[start : start + size]
            start += size
            pieces += b"%x\r\n%b\r\n" % (len(piece), piece) if piece else b""
        return head + pieces + b"0\r\n\r\n"


def body(**fields: Any) -> str:
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":"))


def escaped_as_dotnet(text: str) -> str:
    """Return a JSON string as System.Text.Json's default encoder writes it: ASCII, no HTML, upper-case digits."""
    quoted = json.dumps(text)[1:-1].replace('\\"', "\\u0022").replace("<", "\\u003C").replace(">", "\\u003E")
    parts = quoted.split("\\u")
    return '"' + "\\u".join([parts[0], *(part[:4].upper() + part[4:] for part in parts[1:])]) + '"'


def escaped_as_go(text: str) -> str:
    """Return JSON as encoding/json writes it: UTF-8, and <, > and & as escapes."""
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


JDK_OFFER = """
Connection: Upgrade, HTTP2-Settings
{}Host: HOST
HTTP2-Settings: AAEAAEAAAAIAAAAAAAMAAAAAAAQBAAAAAAUAAEAAAAYABgAA
{}Upgrade: h2c
"""  # java.net.http offers HTTP/2 on plain connections

REQUESTS = {
    "java-jdk": WireRequest(
        "recorded: java.net.http.HttpClient of OpenJDK 17.0.15, BodyPublishers.ofString",
        JDK_OFFER.format("Content-Length: LENGTH\n", "")
        + """User-Agent: Java-http-client/17.0.15
Authorization: Bearer KEY
Content-Type: application/json""",
        body(model="MODEL", input=[TEXT]),
    ),
    "java-langchain4j": WireRequest(
        "langchain4j/langchain4j 1.19.0 (b8b809ed57): DefaultOpenAiClient.java, Json.java (indented), EmbeddingRequest"
        ".java, JdkHttpClient.java; recorded with OpenJDK 17.0.15",
        JDK_OFFER.format("Content-Length: LENGTH\n", "")
        + """Authorization: Bearer KEY
Content-Type: application/json
User-Agent: langchain4j-openai""",
        '{\n  "model" : "MODEL",\n  "input" : [ ' + json.dumps(TEXT, ensure_ascii=False) + " ]\n}",
    ),
    "java-spring-ai-1": WireRequest(
        "spring-projects/spring-ai v1.1.8: OpenAiApi.java (headers, EmbeddingRequest); its RestClient writes to "
        "a stream, so the body has no length; recorded with java.net.http of OpenJDK 17.0.15, "
        "BodyPublishers.ofInputStream",
        JDK_OFFER.format("", "Transfer-encoding: chunked\n")
        + """Authorization: Bearer KEY
Content-Type: application/json
User-Agent: spring-ai""",
        body(input=[TEXT], model="MODEL"),
        chunks=(1, 16),
    ),
    "java-url-connection": WireRequest(
        "recorded: java.net.HttpURLConnection of OpenJDK 17.0.15, setChunkedStreamingMode(0)",
        """
Authorization: Bearer KEY
Content-Type: application/json
User-Agent: Java/17.0.15
Host: HOST
Accept: text/html, image/gif, image/jpeg, */*; q=0.2
Connection: keep-alive
Transfer-Encoding: chunked""",
        body(model="MODEL", input=[TEXT]),
        chunks=(16,),
    ),
    # Spring AI 2 sends by this library too.
    "java-official": WireRequest(
        "openai/openai-java 4.52.0 (5f499c32eb): ClientOptions.kt, OpenAIClientImpl.kt, Headers.kt (sorted), "
        "RetryingHttpClient.kt, EmbeddingCreateParams.kt (base64 by default), OkHttpClient.kt; "
        "square/okhttp 4.12.0: BridgeInterceptor.kt",
        """
Authorization: Bearer KEY
User-Agent: OpenAIClientImpl/Java 4.52.0
X-Stainless-Arch: x64
X-Stainless-Kotlin-Version: 1.9.20
X-Stainless-Lang: java
X-Stainless-OS: Linux
X-Stainless-OS-Version: 6.1.0
X-Stainless-Package-Version: 4.52.0
X-Stainless-Retry-Count: 0
X-Stainless-Runtime: JRE
X-Stainless-Runtime-Version: 17.0.15
X-Stainless-Read-Timeout: 600
X-Stainless-Timeout: 600
Content-Type: application/json
Content-Length: LENGTH
Host: HOST
Connection: Keep-Alive
Accept-Encoding: gzip""",
        body(input=TEXT, model="MODEL", encoding_format="base64"),
    ),
    "go-openai": WireRequest(
        "sashabaranov/go-openai v1.42.0 (3d58ac5abb): embeddings.go (a map, so keys are sorted), client.go; "
        "golang/go: net/http/request.go (Request.write), encoding/json (HTML is escaped)",
        """
Host: HOST
User-Agent: Go-http-client/1.1
Content-Length: LENGTH
Accept: application/json
Authorization: Bearer KEY
Content-Type: application/json
Accept-Encoding: gzip""",
        escaped_as_go(body(input=[TEXT], model="MODEL")),
    ),
    "go-official": WireRequest(
        "openai/openai-go v3.52.0 (4e5a07a6a2): embedding.go, internal/requestconfig/requestconfig.go, "
        "internal/encoding/json; golang/go: net/http/request.go, net/textproto (X-Stainless-Os)",
        """
Host: HOST
User-Agent: OpenAI/Go 3.52.0
Content-Length: LENGTH
Accept: application/json
Authorization: Bearer KEY
Content-Type: application/json
X-Stainless-Arch: x64
X-Stainless-Lang: go
X-Stainless-Os: Linux
X-Stainless-Package-Version: 3.52.0
X-Stainless-Retry-Count: 0
X-Stainless-Runtime: go
X-Stainless-Runtime-Version: go1.25.0
Accept-Encoding: gzip""",
        body(input=[TEXT], model="MODEL", encoding_format="float"),
    ),
    # A Go reader of unknown length, as hand-written clients use one: net/http then sends it in chunks.
    "go-reader": WireRequest(
        "golang/go: net/http/request.go (NewRequestWithContext), net/http/transfer.go",
        """
Host: HOST
User-Agent: Go-http-client/1.1
Transfer-Encoding: chunked
Authorization: Bearer KEY
Content-Type: application/json
Accept-Encoding: gzip""",
        escaped_as_go(body(model="MODEL", input=TEXT)),
        chunks=(2048,),
    ),
    "rust": WireRequest(
        "64bit/async-openai 0.41.3 (ca746070fd): config.rs, client.rs, types/embeddings/embedding.rs; "
        "seanmonstar/reqwest 0.13.4: async_impl/client.rs (accept); hyperium/hyper 1.11.0: proto/h1/role.rs "
        "(lower case)",
        """
openai-organization: org
authorization: Bearer KEY
content-type: application/json
accept: */*
host: HOST
content-length: LENGTH""",
        body(model="MODEL", input=TEXT),
    ),
    "rust-azure": WireRequest(
        "64bit/async-openai 0.41.3 (ca746070fd): config.rs (AzureConfig); the rest as the row above",
        """
api-key: KEY
content-type: application/json
accept: */*
host: HOST
content-length: LENGTH""",
        body(model="MODEL", input=[TEXT]),
        target="/openai/deployments/MODEL/embeddings?api-version=2024-10-21",
    ),
    "php": WireRequest(
        "openai-php/client v0.20.1 (eace7a515d): Payload.php (JSON_UNESCAPED_UNICODE; slashes are escaped), "
        "Headers.php; guzzle/guzzle 7.8.1 (2779e868a0): Handler/CurlFactory.php, Utils.php (User-Agent)",
        """
Host: HOST
User-Agent: GuzzleHttp/7
Authorization: Bearer KEY
OpenAI-Organization: org
Content-Type: application/json
Content-Length: LENGTH""",
        body(model="MODEL", input=TEXT).replace("/", "\\/"),
    ),
    # Guzzle waits for 100 before a body of a megabyte; here it does so for a small one.
    "php-expect": WireRequest(
        "guzzle/guzzle 7.8.1 (2779e868a0): PrepareBodyMiddleware.php (100-Continue), Handler/CurlFactory.php",
        """
Host: HOST
Expect: 100-Continue
User-Agent: GuzzleHttp/7
Authorization: Bearer KEY
Content-Type: application/json
Content-Length: LENGTH""",
        '{"model":"MODEL","input":[' + ESCAPED.replace("/", "\\/") + "]}",
    ),
    "dotnet": WireRequest(
        "openai/openai-dotnet 2.13.0 (b3b4bbbc31): EmbeddingClient.cs (base64), EmbeddingClient.RestClient.cs, "
        "EmbeddingGenerationOptions.Serialization.cs, TelemetryDetails.cs; dotnet/runtime: HttpConnection.cs "
        "(WriteHeaders: Host, the request's headers, the content's), System.Text.Json's default encoder",
        """
Host: HOST
Accept: application/json
User-Agent: OpenAI/2.13.0 (.NET 9.0.9; Debian GNU/Linux 12 (bookworm))
Authorization: Bearer KEY
Content-Type: application/json
Content-Length: LENGTH""",
        '{"input":[' + escaped_as_dotnet(TEXT) + '],"model":"MODEL","encoding_format":"base64"}',
    ),
    "dotnet-azure": WireRequest(
        "Azure/azure-sdk-for-net: AzureEmbeddingClient.Protocol.cs, AzureOpenAIClient.cs (api-key before User-Agent); "
        "the rest as the row above",
        """
Host: HOST
Accept: application/json
api-key: KEY
User-Agent: azsdk-net-AI.OpenAI/2.1.0 (.NET 9.0.9; Debian GNU/Linux 12 (bookworm))
Content-Type: application/json
Content-Length: LENGTH""",
        '{"input":[' + escaped_as_dotnet(TEXT) + '],"model":"MODEL","encoding_format":"base64"}',
        target="/openai/deployments/MODEL/embeddings?api-version=2024-10-21",
    ),
    # System.Net.Http.Json.JsonContent has no length, as hand-written .NET clients use it.
    "dotnet-json": WireRequest(
        "dotnet/runtime: HttpConnection.cs (WriteHeaders), System.Net.Http.Json",
        """
Host: HOST
Authorization: Bearer KEY
Transfer-Encoding: chunked
Content-Type: application/json; charset=utf-8""",
        '{"model":"MODEL","input":[' + escaped_as_dotnet(TEXT) + "]}",
        chunks=(4096,),
    ),
    "ruby": WireRequest(
        "alexrudall/ruby-openai v8.3.0 (62938e02bb): http.rb (replaces Faraday's headers), http_headers.rb; "
        "ruby/net-http: generic_request.rb",
        """
Content-Type: application/json
Authorization: Bearer KEY
Accept-Encoding: gzip;q=1.0,deflate;q=0.6,identity;q=0.3
Accept: */*
User-Agent: Ruby
Host: HOST
Content-Length: LENGTH""",
        body(model="MODEL", input=TEXT),
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
