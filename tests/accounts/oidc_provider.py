"""A small OpenID Connect provider over real HTTP. It checks requests as strictly as the standard."""

import base64
import hashlib
import json
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

from joserfc import jwt
from joserfc.jwk import KeySet, RSAKey

CLIENT, SECRET = "unmask-of-the-test", "s3cret:of/the test"


@dataclass
class OidcProvider:
    """State of the provider, and the faults that a test turns on.

    Attributes:
        person: claims of whoever sits at the browser; None for somebody who does not agree.
        bent: claims that the ID token has instead; None takes one out.
        signs_with: the key that signs, which is not the one in the key set if a test says so.
        algorithm: of the signature.
        email_in: "token" or "userinfo".
        broken: paths that answer with 500.
        methods: how clients may authenticate.
        seen: the paths that were asked for.
    """

    url: str = ""
    person: dict[str, Any] | None = None
    bent: dict[str, Any] = field(default_factory=dict)
    key: RSAKey = field(default_factory=lambda: RSAKey.generate_key(2048, {"kid": "of the test"}))
    signs_with: Any = None
    algorithm: str = "RS256"
    email_in: str = "token"
    issuer: str = ""
    broken: tuple[str, ...] = ()
    methods: tuple[str, ...] = ("client_secret_basic",)
    seen: list[str] = field(default_factory=list)
    codes: dict[str, dict[str, str]] = field(default_factory=dict)
    tokens: dict[str, dict[str, Any]] = field(default_factory=dict)

    def straighten(self) -> None:
        """Turn off all faults and sign the person out."""
        self.person, self.bent, self.signs_with, self.algorithm = None, {}, None, "RS256"
        self.email_in, self.issuer, self.broken, self.methods = "token", "", (), ("client_secret_basic",)
        self.seen.clear()

    def discovery(self) -> dict[str, Any]:
        return {
            "issuer": self.issuer or self.url,
            "authorization_endpoint": f"{self.url}/authorize",
            "token_endpoint": f"{self.url}/token",
            "jwks_uri": f"{self.url}/jwks",
            "userinfo_endpoint": f"{self.url}/userinfo",
            "token_endpoint_auth_methods_supported": list(self.methods),
            "response_types_supported": ["code"],
            "subject_types_supported": ["public"],
            "id_token_signing_alg_values_supported": ["RS256"],
        }

    def authorize(self, query: dict[str, str]) -> str:
        """Return the address that the browser is redirected to."""
        assert query["response_type"] == "code" and query["client_id"] == CLIENT
        assert "openid" in query["scope"].split() and query["code_challenge_method"] == "S256"
        assert len(query["state"]) >= 32 and len(query["nonce"]) >= 32 and query["state"] != query["nonce"]
        if self.person is None:
            answer = {"error": "access_denied", "error_description": "Call +1 555 0100 at once"}
        else:
            answer = {"code": secrets.token_urlsafe(16)}
            self.codes[answer["code"]] = query
        return f"{query['redirect_uri']}?{urlencode(answer | {'state': query['state']})}"

    def token(self, sent: dict[str, str], authorization: str) -> tuple[int, dict[str, Any]]:
        """The answer of the token endpoint."""
        if "client_secret_basic" in self.methods:
            kind, _, text = authorization.partition(" ")
            credentials = tuple(map(unquote, base64.b64decode(text).decode().split(":", 1))) if kind == "Basic" else ()
        else:
            credentials = sent.get("client_id"), sent.get("client_secret")
        if credentials != (CLIENT, SECRET):
            return 401, {"error": "invalid_client"}
        query = self.codes.pop(sent.get("code", ""), None)
        if query is None or sent["grant_type"] != "authorization_code" or sent["redirect_uri"] != query["redirect_uri"]:
            return 400, {"error": "invalid_grant"}
        digest = hashlib.sha256(sent["code_verifier"].encode()).digest()
        if base64.urlsafe_b64encode(digest).decode().rstrip("=") != query["code_challenge"]:
            return 400, {"error": "invalid_grant"}
        assert self.person is not None
        now = int(time.time())
        own = {"iss": self.url, "aud": CLIENT, "iat": now, "exp": now + 300, "nonce": query["nonce"]}
        said = {name: self.person[name] for name in self.person if self.email_in == "token" or name == "sub"}
        claims = {name: value for name, value in (own | said | self.bent).items() if value is not None}
        header = {"alg": self.algorithm, "kid": "of the test"}
        access = secrets.token_urlsafe(16)
        self.tokens[access] = self.person
        signed = jwt.encode(header, claims, self.signs_with or self.key, algorithms=[self.algorithm])
        return 200, {"access_token": access, "token_type": "Bearer", "expires_in": 300, "id_token": signed}


class _Answers(BaseHTTPRequestHandler):
    provider: OidcProvider

    def do_GET(self) -> None:
        provider, parts = self.provider, urlsplit(self.path)
        provider.seen.append(parts.path)
        if parts.path in provider.broken:
            self.send_error(500)
        elif parts.path == "/.well-known/openid-configuration":
            self._json(200, provider.discovery())
        elif parts.path == "/jwks":
            self._json(200, dict(KeySet([provider.key]).as_dict(private=False)))
        elif parts.path == "/userinfo":
            self._json(200, provider.tokens[self.headers["authorization"].removeprefix("Bearer ")])
        elif parts.path == "/authorize":
            self.send_response(302)
            self.send_header("location", provider.authorize(_single(parts.query)))
            self.send_header("content-length", "0")
            self.end_headers()
        else:
            self.send_error(404)

    def do_POST(self) -> None:
        path = urlsplit(self.path).path
        self.provider.seen.append(path)
        sent = _single(self.rfile.read(int(self.headers["content-length"])).decode())
        if path in self.provider.broken:
            self.send_error(500)
        else:
            self._json(*self.provider.token(sent, self.headers.get("authorization", "")))

    def _json(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: tests read `seen`."""


def _single(query: str) -> dict[str, str]:
    return {name: values[0] for name, values in parse_qs(query, strict_parsing=True).items()}


@contextmanager
def provided() -> Iterator[OidcProvider]:
    """A provider for the block."""
    provider = OidcProvider()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Answers", (_Answers,), {"provider": provider}))
    provider.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield provider
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
