"""Browsers of other origins: preflights, answers, and no header at all for origins that nobody named."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.api.live import KEY, LocalService, running
from unmask.api import ServeSettings
from unmask.errors import UsageError
from unmask.web import website

ORIGIN = "http://localhost:3000"
OPENAI_HEADERS = "authorization,content-type,x-stainless-os,x-stainless-lang,x-stainless-retry-count"
PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": OPENAI_HEADERS}


@pytest.fixture(scope="module")
def open_to_origins(tiny_llama: Path) -> Iterator[LocalService]:
    with running(tiny_llama, None, website, cors_origins=(ORIGIN, "app://obsidian.md")) as service:
        yield service


def cors_headers(headers: dict[str, str]) -> set[str]:
    return {name for name in headers if name.startswith("access-control-")}


@pytest.mark.parametrize("origin", [ORIGIN, "app://obsidian.md"])
@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/models", "/nothing"])
def test_a_preflight_needs_no_key_and_gets_the_headers_it_asks_for(
    open_to_origins: LocalService, path: str, origin: str
):
    reply = open_to_origins.call("OPTIONS", path, headers={"Origin": origin, **PREFLIGHT}, key=None)
    assert (reply.status, reply.body) == (204, b"")
    assert reply.headers["access-control-allow-origin"] == origin
    assert reply.headers["access-control-allow-headers"] == OPENAI_HEADERS
    assert "POST" in reply.headers["access-control-allow-methods"]
    assert reply.headers["vary"].startswith("Origin")
    assert "access-control-allow-credentials" not in reply.headers


@pytest.mark.parametrize(("key", "status"), [(KEY, 200), (None, 401)])
def test_answers_and_errors_name_the_origin(open_to_origins: LocalService, key: str | None, status: int):
    body = {"model": open_to_origins.model, "input": "a"}
    reply = open_to_origins.call("POST", "/v1/embeddings", body, {"Origin": ORIGIN}, key=key)
    assert reply.status == status
    assert reply.headers["access-control-allow-origin"] == ORIGIN
    assert reply.headers["access-control-expose-headers"] == "*"
    assert "access-control-allow-credentials" not in reply.headers


@pytest.mark.parametrize(
    "origin",
    [
        "https://evil.example",
        "null",
        "http://localhost",
        "http://localhost:30000",
        "https://localhost:3000",
        "http://localhost:3000.evil.example",
        "HTTP://LOCALHOST:3000",
        "http://localhost:3000/",
        f"{ORIGIN}, {ORIGIN}",
        "",
    ],
)
def test_no_other_origin_is_named(open_to_origins: LocalService, origin: str):
    for method, headers in (("OPTIONS", PREFLIGHT), ("GET", {})):
        reply = open_to_origins.call(method, "/v1/models", headers={"Origin": origin, **headers})
        assert not cors_headers(reply.headers)
        assert reply.headers["vary"] == "Origin"


def test_pages_are_for_their_own_origin(open_to_origins: LocalService):
    for path in ("/models", "/status"):
        reply = open_to_origins.call("GET", path, headers={"Origin": ORIGIN, "Accept": "text/html"})
        assert reply.status == 200
        assert not cors_headers(reply.headers)


def test_header_names_that_are_none_are_not_repeated(open_to_origins: LocalService):
    headers = {"Origin": ORIGIN, **PREFLIGHT, "Access-Control-Request-Headers": "a b; c"}
    reply = open_to_origins.call("OPTIONS", "/v1/embeddings", headers=headers)
    assert reply.status == 204
    assert "access-control-allow-headers" not in reply.headers


def test_by_default_no_origin_is_allowed(service: LocalService):
    for method, headers in (("OPTIONS", PREFLIGHT), ("GET", {})):
        reply = service.call(method, "/v1/models", headers={"Origin": ORIGIN, **headers})
        assert not cors_headers(reply.headers)
        assert "vary" not in reply.headers


@pytest.mark.parametrize(
    "origin",
    ["*", "null", "", "localhost:3000", "http://localhost:3000/", "https://a.example/path", "https://*.example.org",
     "https://A.example", "https://a.example:443", "http://a.example:80", "https://me@a.example"],
)  # fmt: skip
def test_an_origin_that_no_browser_sends_is_refused(origin: str):
    with pytest.raises(UsageError, match="CORS origin"):
        ServeSettings(cors_origins=(origin,))


@pytest.mark.parametrize("origin", ["http://[::1]:3000", "capacitor://localhost", "chrome-extension://abcdef"])
def test_origins_of_every_kind_of_browser_app_are_accepted(origin: str):
    assert ServeSettings(cors_origins=(origin,)).cors_origins == (origin,)
