"""`ProviderClient`: HTTP requests to one provider, with every limit that a hostile one makes necessary.

The connection goes to an address that was checked as connected to. Redirects are not followed, and neither proxies nor
netrc are taken from the environment. Headers are built here and never copied from a caller. Answers are not
decompressed, and are read only up to the size that the request can have. A provider's own words reach nobody.
"""

import asyncio
import errno
import hashlib
import socket
import ssl
import time
from collections.abc import Mapping
from contextvars import ContextVar
from email.utils import parsedate_to_datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import aiohttp
from yarl import URL

from unmask import __version__
from unmask.errors import UsageError
from unmask.router.addresses import check_address
from unmask.router.providers import RemoteProvider
from unmask.router.signals import AttemptFailed, SignalName, signal_of_status

CONNECT_S = 2.0

# An error needs no more than this to say that the credit is used up.
_ERROR_BYTES = 65_536
_CHUNK = 65_536
_KEEP_ALIVE_S = 15.0
_MAX_RETRY_AFTER_S = 300.0
_NO_HEADERS: Mapping[str, str] = MappingProxyType({})
# Media types that errors are described with. Any other one is the provider's own words, and is not repeated.
_MEDIA_TYPES = frozenset(
    ("application/json", "application/problem+json", "application/octet-stream", "text/html", "text/plain", "text/xml")
)


class Content(NamedTuple):
    """The body of a successful answer.

    Attributes:
        body: JSON, not yet parsed.
        server: the header `server`, "" for none; a change of it makes a full run due, see `origins.py`.
    """

    body: bytes
    server: str


class ProviderClient:
    """Connections to one provider. Make and close it in the event loop that uses it.

    Args:
        provider: address, key and certificate authority.

    Raises:
        UsageError: the key, the certificate authority or the client's certificate cannot be read.
    """

    def __init__(self, provider: RemoteProvider) -> None:
        self.provider = provider
        self._key = provider.read_key()
        self._urls: dict[str, URL] = {}  # by path; parsed once
        self._own_headers = self._headers()
        self._ssl = _ssl_context(provider)
        self._session: aiohttp.ClientSession | None = None
        self._under_way = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def post(
        self, path: str, body: bytes, *, seconds: float, max_bytes: int, headers: Mapping[str, str] = {}
    ) -> Content:
        """Send one request and return the body of its answer.

        A request on a kept connection that the provider closed meanwhile is sent once more, over a new one.

        Args:
            path: appended to the provider's URL.
            body: JSON.
            seconds: for everything; connecting takes at most two of them.
            max_bytes: largest answer.
            headers: further headers, of this server's own making.

        Raises:
            AttemptFailed: there is no answer with status 200 and a JSON body of that size.
        """
        self._under_way += 1
        self._idle.clear()
        try:
            return await self._post_twice(path, body, time.monotonic() + seconds, max_bytes, headers)
        finally:
            self._under_way -= 1
            if not self._under_way:
                self._idle.set()

    async def close_when_idle(self) -> None:
        """Close all connections once the requests under way have ended, or at once when cancelled."""
        try:
            await self._idle.wait()
        finally:
            await self.close()

    async def close(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.TCPConnector(
                limit=0,  # the router counts requests
                ssl=self._ssl,
                keepalive_timeout=_KEEP_ALIVE_S,
                use_dns_cache=False,
                socket_factory=self._checked_socket,
            )
            self._session = aiohttp.ClientSession(
                connector=connector,
                trust_env=False,
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                skip_auto_headers=("user-agent", "accept", "accept-encoding"),
            )
        return self._session

    def _checked_socket(self, address: tuple[Any, ...]) -> socket.socket:
        """Make the socket for an address that aiohttp is about to connect to, or refuse it.

        With a proxy, this is the proxy's address: it resolves the provider's name itself.
        """
        if (state := _sending.get()) is not None:
            state.reused = False
        family, kind, protocol, _, where = address
        try:
            check_address(where[0], private=self.provider.private or self.provider.proxy is not None)
        except UsageError as refusal:
            raise OSError(errno.EPERM, str(refusal)) from None
        return socket.socket(family, kind, protocol)

    def _url(self, path: str) -> URL:
        if path not in self._urls:
            place = self.provider.url.rstrip("/") + path
            try:
                self._urls[path] = URL(place)
            except ValueError as error:
                raise aiohttp.InvalidURL(place) from error
        return self._urls[path]

    def _headers(self) -> dict[str, str]:
        headers = {
            "content-type": "application/json",
            "accept": "application/json",
            "accept-encoding": "identity",
            "user-agent": f"unmask/{__version__}",
        }
        if self._key:
            headers["authorization"] = f"Bearer {self._key}"
        return headers

    async def _post_twice(
        self, path: str, body: bytes, until: float, max_bytes: int, headers: Mapping[str, str]
    ) -> Content:
        """Send a request, and once more if a kept connection was closed before it answered."""
        for last in (False, True):
            state = _Sending()
            try:
                return await self._post(path, body, until, max_bytes, headers, state)
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                stale = isinstance(error, aiohttp.ServerDisconnectedError | ConnectionError | aiohttp.ClientOSError)
                stale = stale and not isinstance(error, aiohttp.ClientConnectorError)  # there was no connection yet
                if last or not (stale and state.reused and not state.answered):
                    raise self._failure(error) from None
        raise AssertionError("the second time returns or raises")

    async def _post(
        self, path: str, body: bytes, until: float, max_bytes: int, headers: Mapping[str, str], state: "_Sending"
    ) -> Content:
        timeout = aiohttp.ClientTimeout(total=max(0.001, until - time.monotonic()), sock_connect=CONNECT_S)
        _sending.set(state)
        async with self._open().post(
            self._url(path),
            data=body,
            headers={**self._own_headers, **headers} if headers else self._own_headers,
            allow_redirects=False,
            proxy=self.provider.proxy,
            timeout=timeout,
        ) as response:
            state.answered = True
            kind = response.content_type
            coding = response.headers.get("content-encoding", "identity").strip().lower()
            if response.status != 200:
                content = await _read(response, _ERROR_BYTES)
                raise self._refusal(response, content or b"")
            if coding != "identity":
                raise self._fails("failed", "its answer is compressed, which was not asked for", 200)
            if kind != "application/json" and not kind.endswith("+json"):
                raise self._fails("failed", f"status 200 with {_media_type(kind)} in place of JSON", 200)
            content = await _read(response, max_bytes)
            if content is None:
                raise self._fails("malformed", f"its answer is longer than {max_bytes} bytes", 200)
            return Content(content, response.headers.get("server", "")[:60])

    def _refusal(self, response: aiohttp.ClientResponse, content: bytes) -> AttemptFailed:
        """Describe a status other than 200. The body is hostile: of it only length and digest are kept."""
        quota = b'"insufficient_quota"' in content
        digest = hashlib.sha256(content).hexdigest()[:8]
        kind = _media_type(response.content_type)
        detail = f"status {response.status}, {kind}, {len(content)} bytes, digest {digest}"
        return self._fails(
            signal_of_status(response.status, quota=quota),
            detail,
            response.status,
            retry_after=_retry_after(response.headers.get("retry-after")),
        )

    def _failure(self, error: Exception) -> AttemptFailed:
        """Describe an exception of the connection."""
        if isinstance(error, aiohttp.ConnectionTimeoutError):
            return self._fails("unreachable", f"no connection within {CONNECT_S:g} seconds")
        if isinstance(error, aiohttp.ClientConnectorCertificateError):
            return self._fails("unreachable", "its certificate is not valid for this address and authority")
        if isinstance(error, aiohttp.ClientHttpProxyError | aiohttp.ClientProxyConnectionError):
            return self._fails("unreachable", "its proxy refuses, or cannot be connected to")
        if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ClientSSLError):
            cause = getattr(error, "os_error", None)
            is_ours = isinstance(cause, OSError) and cause.errno == errno.EPERM
            return self._fails("unreachable", str(cause.strerror) if is_ours and cause else type(error).__name__)
        if isinstance(error, TimeoutError):
            return self._fails("timeout")
        if isinstance(error, aiohttp.InvalidURL | aiohttp.ClientResponseError | aiohttp.ClientPayloadError):
            return self._fails("cut_off" if isinstance(error, aiohttp.ClientPayloadError) else "failed", "broken HTTP")
        return self._fails("cut_off", type(error).__name__)

    def _fails(
        self, signal: SignalName, detail: str = "", status: int | None = None, retry_after: float | None = None
    ) -> AttemptFailed:
        return AttemptFailed(self.provider.name, signal, detail, status=status, retry_after=retry_after)


class _Sending:
    """Progress of one request."""

    reused = True  # over a connection that was kept alive; False once a socket was made for it
    answered = False  # the headers of the answer have come


# The request that the current task sends. Tasks that aiohttp starts for it, to connect, have a copy of the reference.
_sending: ContextVar[_Sending | None] = ContextVar("sending", default=None)


async def _read(response: aiohttp.ClientResponse, most: int) -> bytes | None:
    """Read a body of at most `most` bytes; None if it is longer, and the connection is then closed."""
    chunks, size = [], 0
    async for chunk in response.content.iter_chunked(_CHUNK):
        size += len(chunk)
        if size > most:
            response.close()
            return None
        chunks.append(chunk)
    return b"".join(chunks)


def _media_type(kind: str) -> str:
    """Return a media type in words that are ours."""
    return kind if kind in _MEDIA_TYPES else "another media type"


def _retry_after(value: str | None) -> float | None:
    """Return the seconds of a `Retry-After` header in either form, at most five minutes; None if it says nothing."""
    if value is None:
        return None
    if value.strip().isascii() and value.strip().isdigit():
        return min(float(value.strip()[:9]), _MAX_RETRY_AFTER_S)
    try:
        return min(max(0.0, parsedate_to_datetime(value).timestamp() - time.time()), _MAX_RETRY_AFTER_S)
    except (ValueError, TypeError, OverflowError):
        return None


def _ssl_context(provider: RemoteProvider) -> ssl.SSLContext:
    ca_file = provider.ca_file
    try:
        context = ssl.create_default_context(cafile=str(Path(ca_file).expanduser()) if ca_file else None)
    except (OSError, ssl.SSLError) as error:
        raise UsageError(f"ca_file {ca_file} is no certificate authority: {error}") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if provider.client_cert_file is not None and provider.client_key_file is not None:
        files = [Path(file).expanduser() for file in (provider.client_cert_file, provider.client_key_file)]
        try:
            # A key with a password would be asked for on the terminal: an empty one is wrong at once.
            context.load_cert_chain(*files, password=b"")
        except (OSError, ssl.SSLError) as error:
            raise UsageError(f"client_cert_file {files[0]} and its key cannot be used: {error}") from None
    return context
