"""Outbound requests: every fault that a provider can have on the wire, and every rule that keeps it harmless."""

import asyncio
import datetime
import gzip
import ipaddress
import json
import logging
import socket
import ssl
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from email.utils import formatdate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.router.fault_server import (
    Behaviour,
    after,
    changed,
    envelope,
    fault_server,
    reply,
    reset,
    right,
    right_then_close,
    silent,
)
from unmask.conformance import Answer
from unmask.errors import UsageError
from unmask.router.addresses import check_address, check_url
from unmask.router.outbound import ProviderClient
from unmask.router.providers import ProviderModel, RemoteProvider
from unmask.router.signals import SIGNALS, AttemptFailed
from unmask.router.wire import ask, require_vectors

DIM = 16
KEY = "sk-provider-0123456789abcdef"
MODEL = ProviderModel(id="m", remote="there")


def vectors_of(texts: Sequence[str], instruction: str) -> np.ndarray:
    """A vector that depends on the text alone."""
    rows = [np.random.default_rng(sum(map(ord, text))).normal(size=DIM) for text in texts]
    return np.stack(rows).astype(np.float32)


def client_of(url: str, **fields: Any) -> ProviderClient:
    defaults: dict[str, Any] = {"name": "acme", "kind": "openai", "private": True, "models": (MODEL,)}
    return ProviderClient(RemoteProvider(url=url, **defaults | fields))


async def vectors_from(url: str, texts: Sequence[str] = ("a", "b"), seconds: float = 60, **fields: Any) -> np.ndarray:
    client = client_of(url, **fields)
    try:
        answer = await ask(client, MODEL, texts, dim=DIM, seconds=seconds)
        return require_vectors(answer, DIM, client.provider.name)
    finally:
        await client.close()


def test_a_server_without_providers_starts_without_aiohttp() -> None:
    script = "import sys, unmask.server.process, unmask.web; print('aiohttp' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


async def failure_of(*script: Behaviour, seconds: float = 60, **fields: Any) -> AttemptFailed:
    async with fault_server(vectors_of, *script) as server:
        with pytest.raises(AttemptFailed) as failed:
            await vectors_from(server.url, seconds=seconds, **fields)
        assert len(server.requests) <= 1
    return failed.value


async def test_each_kind_asks_in_its_own_words() -> None:
    async with fault_server(vectors_of) as server:
        for kind in ("openai", "unmask", "tei"):
            got = await vectors_from(server.url, seconds=600, kind=kind)
            np.testing.assert_allclose(got, unit(vectors_of(["a", "b"], "")), atol=1e-6)
        openai, ours, tei = server.requests
    assert (openai.path, ours.path, tei.path) == ("/v1/embeddings", "/v1/embeddings", "/v1/embed")
    assert openai.body == {"model": "there", "input": ["a", "b"], "encoding_format": "base64"}
    assert tei.body == {"inputs": ["a", "b"], "normalize": True, "truncate": False}
    assert 0 < int(ours.headers["request-deadline-ms"]) <= 600_000 and "request-deadline-ms" not in openai.headers


async def test_headers_are_built_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACME_KEY", KEY)
    async with fault_server(vectors_of) as server:
        await vectors_from(server.url, key_env="ACME_KEY")
        headers = server.requests[0].headers
    assert headers["authorization"] == f"Bearer {KEY}" and headers["accept-encoding"] == "identity"
    assert set(headers) == {
        "host", "content-type", "accept", "accept-encoding", "user-agent", "authorization", "content-length",
    }  # fmt: skip


async def test_floats_and_any_order_of_indices_are_read() -> None:
    def as_floats(answer: dict[str, Any]) -> None:
        for item, row in zip(answer["data"], vectors_of(["a", "b"], ""), strict=True):
            item["embedding"] = row.tolist()
        answer["data"].reverse()

    async with fault_server(vectors_of, changed(as_floats)) as server:
        got = await vectors_from(server.url)
    np.testing.assert_allclose(got, unit(vectors_of(["a", "b"], "")), atol=1e-6)


def without_index(answer: dict[str, Any]) -> None:
    answer["data"][1]["index"] = 2


def one_less(answer: dict[str, Any]) -> None:
    answer["data"].pop()


def one_more(answer: dict[str, Any]) -> None:
    answer["data"].append(answer["data"][0])


def twice(answer: dict[str, Any]) -> None:
    answer["data"][1]["index"] = 0


def no_base64(answer: dict[str, Any]) -> None:
    answer["data"][0]["embedding"] = "*" * 88


def with_rows(*rows: np.ndarray) -> Behaviour:
    return reply(envelope(list(rows)))


ONES = np.ones(DIM)
MALFORMED: dict[str, Behaviour] = {
    "a gap in the indices": changed(without_index),
    "an index twice": changed(twice),
    "one vector less": changed(one_less),
    "one vector more": changed(one_more),
    "no base64": changed(no_base64),
    "truncated JSON": changed(lambda answer: json.dumps(answer)[:-20].encode()),
    "deep JSON": reply(b"[" * 200_000),
    "another envelope": reply({"embeddings": [[1.0]]}),
    "a null": reply({"data": [{"index": 0, "embedding": None}]}),
    "NaN": with_rows(ONES, ONES * np.nan),
    "infinity": with_rows(ONES, ONES * np.inf),
    "zeros": with_rows(ONES, ONES * 0),
    "one number less": with_rows(ONES[1:], ONES[1:]),
    "two lengths": with_rows(ONES, ONES[1:]),
    "a large body": reply(b'{"data": [' + b" " * 1_000_000),
}


@pytest.mark.parametrize("name", MALFORMED)
async def test_unusable_vectors_are_malformed(name: str) -> None:
    failed = await failure_of(MALFORMED[name])
    assert failed.signal == "malformed" and SIGNALS["malformed"].check


FAILED: dict[str, Behaviour] = {
    "HTML with 200": reply(b"<html>Welcome</html>", headers={"content-type": "text/html"}),
    "HTML with 502": reply(b"<html>Bad gateway</html>", 502, {"content-type": "text/html"}),
    "a redirect to metadata": reply(b"", 302, {"location": "http://169.254.169.254/latest"}),
    "a permanent redirect": reply(b"", 308, {"location": "/v1/elsewhere"}),
    "gzip that nobody asked for": reply(gzip.compress(b" " * 50_000_000), headers={"content-encoding": "gzip"}),
    "a header of a megabyte": reply({}, headers={"x-large": "x" * 1_000_000}),
    "no HTTP": reset(b"SSH-2.0-OpenSSH_9.9\r\n\r\n"),
    **{f"status {status}": reply({"error": {}}, status) for status in (408, 500, 503, 529)},
}


@pytest.mark.parametrize("name", FAILED)
async def test_what_is_no_answer_fails(name: str) -> None:
    assert (await failure_of(FAILED[name])).signal == "failed"


@pytest.mark.parametrize(
    ("status", "signal"),
    [(400, "rejected"), (413, "rejected"), (422, "rejected"), (401, "no_access"), (402, "no_access"),
     (403, "no_access"), (404, "no_access"), (429, "rate_limited")],
)  # fmt: skip
async def test_a_status_has_one_meaning(status: int, signal: str) -> None:
    failed = await failure_of(reply({"error": {"message": "no"}}, status))
    assert (failed.signal, failed.status) == (signal, status)


async def test_too_many_requests_say_when_to_come_back() -> None:
    date = formatdate(datetime.datetime.now(datetime.UTC).timestamp() + 60, usegmt=True)
    for value, low, high in (("7", 7, 7), (date, 50, 61), ("9" * 400, 300, 300), ("0", 0, 0)):
        failed = await failure_of(reply({}, 429, {"retry-after": value}))
        assert failed.retry_after is not None and low <= failed.retry_after <= high
    for value in ("soon", "-3", "²"):
        assert (await failure_of(reply({}, 429, {"retry-after": value.encode().decode("latin-1")}))).retry_after is None
    assert (await failure_of(reply({}, 429))).retry_after is None
    quota = await failure_of(reply({"error": {"code": "insufficient_quota"}}, 429))
    assert quota.signal == "no_access"


async def test_connections_that_break() -> None:
    assert (await failure_of(reset(b""))).signal == "cut_off"
    assert (await failure_of(reset(b"HTTP/1.1 200 OK\r\ncontent-"))).signal == "cut_off"
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 900\r\n\r\n"
    assert (await failure_of(reset(head + b'{"data":'))).signal == "cut_off"
    assert (await failure_of(silent, seconds=0.2)).signal == "timeout"
    assert (await failure_of(after(600), seconds=0.2)).signal == "timeout"
    slow = reply({}, dots=0.05)
    assert (await failure_of(slow, seconds=0.3)).signal == "timeout"


async def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(AttemptFailed) as refused:
        await vectors_from(f"http://127.0.0.1:{port}/v1")
    assert refused.value.signal == "unreachable"
    with pytest.raises(AttemptFailed) as unknown:
        await vectors_from("http://no-such-host.invalid/v1")
    assert unknown.value.signal == "unreachable"


async def test_a_kept_connection_that_was_closed_is_no_failure() -> None:
    async with fault_server(vectors_of, right_then_close, right) as server:
        client = client_of(server.url)
        first = await ask(client, MODEL, ["a"], dim=DIM, seconds=60)
        second = await ask(client, MODEL, ["a"], dim=DIM, seconds=60)
        np.testing.assert_array_equal(first.vectors[0], second.vectors[0])
        assert server.connections == 2
        await client.close()


async def test_a_new_connection_that_breaks_is_not_tried_again() -> None:
    async with fault_server(vectors_of, reset(b"")) as server:
        with pytest.raises(AttemptFailed):
            await vectors_from(server.url)
        assert server.connections == 1 and len(server.requests) == 1


async def test_a_key_in_an_error_reaches_nobody(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ACME_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    echo = reply({"error": {"message": f"Incorrect API key provided: {KEY}. Text: a secret"}}, 401)
    failed = await failure_of(echo, key_env="ACME_KEY")
    assert failed.signal == "no_access" and "digest" in str(failed)
    for message in (
        str(failed),
        repr(failed),
        failed.detail,
        caplog.text,
        repr(client_of("http://a/", key_env="ACME_KEY")),
    ):
        assert KEY not in message and "secret" not in message


async def test_neither_proxies_nor_netrc_come_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login a password b\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    async with fault_server(vectors_of) as server:
        await vectors_from(server.url)
        assert "authorization" not in server.requests[0].headers


async def test_cookies_are_not_kept() -> None:
    async with fault_server(
        vectors_of, reply(envelope([ONES]), headers={"set-cookie": "a=b; Path=/"}), right
    ) as server:
        client = client_of(server.url)
        for _ in range(2):
            await ask(client, MODEL, ["a"], dim=DIM, seconds=60)
        assert "cookie" not in server.requests[1].headers
        await client.close()


async def test_the_address_is_checked_as_connected() -> None:
    """The name is harmless and resolves to this machine, which a provider outside this network may not be."""
    async with fault_server(vectors_of) as server:
        port = server.url.split(":")[-1].partition("/")[0]
        for host in ("localhost", "127.0.0.1", "0x7f.1"):
            with pytest.raises(AttemptFailed) as failed:
                await vectors_from(f"http://{host}:{port}/v1", private=False)
            assert failed.value.signal == "unreachable" and "127.0.0.1" in failed.value.detail, host
        with pytest.raises(AttemptFailed):  # aiohttp takes this for no host at all
            await vectors_from(f"http://2130706433:{port}/v1", private=False)
        assert server.connections == 0
        await vectors_from(f"http://localhost:{port}/v1", private=True)
        assert server.connections == 1


NOT_GLOBAL = (
    "10.1.2.3 127.0.0.1 172.16.0.1 192.168.1.1 100.64.0.1 192.0.0.8 198.18.0.1 192.0.2.1 203.0.113.9 ::1 fd12::1 "
    "::ffff:127.0.0.1 ::ffff:10.0.0.1 64:ff9b::7f00:1 2002:7f00:1:: 2001:db8::1 fec0::1 64:ff9b:1::1 3fff::1 100::1"
)
FORBIDDEN = (
    "0.0.0.0 0.1.2.3 169.254.169.254 100.100.100.200 224.0.0.1 255.255.255.255 :: fe80::1%eth0 fd00:ec2::254 ff02::1 "
    "::ffff:169.254.169.254 64:ff9b::a9fe:a9fe 2002:a9fe:a9fe::"
)


def test_addresses() -> None:
    for address in ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "64:ff9b::808:808", "::ffff:8.8.8.8"]:
        check_address(address, private=False)
    for address in NOT_GLOBAL.split():
        check_address(address, private=True)
        with pytest.raises(UsageError, match="private = true"):
            check_address(address, private=False)
    for address in FORBIDDEN.split():
        for private in (True, False):
            with pytest.raises(UsageError, match="no provider may be there"):
                check_address(address, private=private)


@pytest.mark.parametrize(
    "url",
    ["http://api.example.org/v1", "https://user:pw@api.example.org", "https://api.example.org/v1?x=1",
     "https://api.example.org/#a", "https://api.example.org/%2e", "https://api.example.org./v1", "ftp://example.org",
     "https://", "https://0x7f.1/", "https://2130706433/", "https://127.1/", "https://[::ffff:169.254.169.254]/",
     "https://10.0.0.1/v1", "https://a b/", "https://api.example.org:99999/", "https://exa_mple.org", "https://1.2.3.0x4/"],
)  # fmt: skip
def test_urls_that_no_provider_may_have(url: str) -> None:
    with pytest.raises(UsageError):
        check_url(url, private=False)


def test_urls_that_a_provider_may_have() -> None:
    for url in ("https://api.example.org", "https://api.example.org:8443/v1/", "https://1.1.1.1/v1"):
        check_url(url, private=False)
    for url in ("http://gpu-2:8080/v1", "https://10.0.0.1/v1", "http://[::1]:8080/v1", "http://127.0.0.1:80"):
        check_url(url, private=True)


def certificate(folder: Path, name: str, *, host: str = "127.0.0.1", days: int = 30) -> tuple[Path, ssl.SSLContext]:
    """A self-signed certificate for an address, as a file and as the context of a server."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=60))
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(host))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    file, key_file = folder / f"{name}.pem", folder / f"{name}.key"
    file.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    form = serialization.PrivateFormat.PKCS8
    key_file.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file, key_file)
    return file, context


async def test_certificates(tmp_path: Path) -> None:
    good, context = certificate(tmp_path, "good")
    async with fault_server(vectors_of, tls=context) as server:
        await vectors_from(server.url, ca_file=str(good))
        with pytest.raises(AttemptFailed) as self_signed:
            await vectors_from(server.url)
        assert self_signed.value.signal == "unreachable" and "certificate" in self_signed.value.detail
        assert len(server.requests) == 1
    for name, options in {"expired": {"days": -1}, "elsewhere": {"host": "127.0.0.2"}}.items():
        file, context = certificate(tmp_path, name, **options)  # pyright: ignore[reportArgumentType]
        async with fault_server(vectors_of, tls=context) as server:
            with pytest.raises(AttemptFailed) as failed:
                await vectors_from(server.url, ca_file=str(file))
            assert failed.value.signal == "unreachable" and not server.requests


async def test_a_provider_may_ask_for_a_certificate(tmp_path: Path) -> None:
    ca, context = certificate(tmp_path, "server")
    mine, _ = certificate(tmp_path, "mine")
    stranger, _ = certificate(tmp_path, "stranger")
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(mine)
    async with fault_server(vectors_of, tls=context) as server:
        fields: dict[str, Any] = {"ca_file": str(ca)}
        for name in ("", "stranger"):
            other: dict[str, Any] = {
                "client_cert_file": str(stranger),
                "client_key_file": str(tmp_path / "stranger.key"),
            }
            with pytest.raises(AttemptFailed) as refused:
                await vectors_from(server.url, **fields | (other if name else {}))
            assert refused.value.signal in ("cut_off", "unreachable") and not server.requests
        pair: dict[str, Any] = {"client_cert_file": str(mine), "client_key_file": str(tmp_path / "mine.key")}
        await vectors_from(server.url, **fields, **pair)
        assert len(server.requests) == 1
    with pytest.raises(UsageError, match=r"client_cert_file .* cannot be used"):
        client_of("https://a/", client_cert_file=str(mine), client_key_file=str(tmp_path / "stranger.key"))


@dataclass
class Proxy:
    """A proxy that tunnels, and notes the first line of each request."""

    status: int = 200
    lines: list[str] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        self.lines.append(head.split("\r\n")[0])
        assert KEY not in head
        writer.write(f"HTTP/1.1 {self.status} X\r\n\r\n".encode())
        if self.status == 200:
            host, _, port = head.split()[1].partition(":")
            up_reader, up_writer = await asyncio.open_connection(host, int(port))
            await asyncio.gather(pump(reader, up_writer), pump(up_reader, writer))
        writer.close()


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while content := await reader.read(65_536):
            writer.write(content)
            await writer.drain()
    except ConnectionError:
        pass
    writer.close()


async def test_a_proxy_of_the_file_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The key and the texts are inside the tunnel, and the certificate is the provider's own."""
    monkeypatch.setenv("ACME_KEY", KEY)
    ca, context = certificate(tmp_path, "server")
    proxy = Proxy()
    listening = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    async with fault_server(vectors_of, tls=context) as server:
        got = await vectors_from(server.url, proxy=url, ca_file=str(ca), key_env="ACME_KEY", private=False)
        np.testing.assert_allclose(got, unit(vectors_of(["a", "b"], "")), atol=1e-6)
        (request,) = server.requests
        assert request.headers["authorization"] == f"Bearer {KEY}"
        port = server.url.split(":")[-1].partition("/")[0]
        assert proxy.lines == [f"CONNECT 127.0.0.1:{port} HTTP/1.1"]
        proxy.status = 407
        with pytest.raises(AttemptFailed) as refused:
            await vectors_from(server.url, proxy=url, ca_file=str(ca))
        assert (refused.value.signal, "proxy" in refused.value.detail) == ("unreachable", True)
        for elsewhere in ("http://127.0.0.1:1", "http://169.254.169.254:80"):
            with pytest.raises(AttemptFailed) as gone:
                await vectors_from(server.url, proxy=elsewhere, ca_file=str(ca))
            assert gone.value.signal == "unreachable"
        assert len(server.requests) == 1
    listening.close()


async def test_a_cancelled_request_closes_its_connection() -> None:
    async with fault_server(vectors_of, silent) as server:
        client = client_of(server.url)
        task = asyncio.create_task(ask(client, MODEL, ["a"], dim=DIM, seconds=60))
        await server.arrived.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await client.close()


def test_answers_of_no_texts_have_no_vectors() -> None:
    with pytest.raises(AttemptFailed):
        require_vectors(Answer([np.ones(3)]), DIM, "acme")
