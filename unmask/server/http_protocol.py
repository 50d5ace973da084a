"""`HttpProtocol`: uvicorn's parser of HTTP/1.1 with limits, and with the rules of RFC 9110 and 9112 that it lacks."""

import asyncio
import re
import threading
from typing import Any, cast
from urllib.parse import urlsplit

import httptools
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from unmask.api.errors import ApiError, error_response
from unmask.api.middleware import new_request_id

# uvicorn's httptools parser takes headers of any size.
HEADER_LIMIT_BYTES = 65_536

# RFC 3986, 3.2.2 and 3.2.3: a name or an address, and perhaps a port.
_HOST = re.compile(rb"([A-Za-z0-9._~%!$&'()*+,;=-]*|\[[0-9A-Za-z.:~_-]+\])(:[0-9]*)?")
# Fields that hold one value. Of two, every server between caller and engine might take another one.
_SINGLE_HEADERS = (b"authorization", b"api-key", b"content-type")
_ABSOLUTE_TARGET = re.compile(rb"(?i)https?://")
_INVALID = "Invalid HTTP request received."
_REASONS = {400: b"Bad Request", 414: b"URI Too Long", 501: b"Not Implemented"}
_LONGEST_TARGET = 65_535  # bytes that httptools can parse
# Time that an idle connection stays open once the server stops: a round trip across an ocean.
LAST_REQUEST_S = 0.25
# Joining bytes copies them. A larger body is not copied, and takes a system call of its own.
_JOINED_BYTES = 65_536


class JoiningTransport(asyncio.Transport):
    """Transport that sends the head of an answer together with its body.

    uvicorn writes them one after the other: two system calls, two packets, and a client that wakes up twice. Here a
    write waits for the next one, and no longer than until the event loop's next turn, so that a body that is not ready
    does not hold its head back.

    Args:
        transport: the connection.
        loop: its event loop.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self._transport, self._loop = transport, loop
        self._first = b""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        # Not by writelines: asyncio's own, since 3.12, keeps an empty part for ever and never pauses the writer.
        if len(self._first) + len(data) > _JOINED_BYTES:
            self._flush()
            self._send(data)
        elif self._first:
            self._first += data
            self._flush()
        elif data:
            self._first = bytes(data)
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        if self._first:
            first, self._first = self._first, b""
            self._send(first)

    def _send(self, data: bytes | bytearray | memoryview) -> None:
        # The loop closes a connection whose client is gone, and `connection_lost` is called a turn later. In between
        # an answer, or the next one of several requests, may be written: uvloop raises then, and logs a traceback.
        if not self._transport.is_closing():
            self._transport.write(data)

    def forget(self) -> None:
        """Drop what was not sent: the connection is lost."""
        self._first = b""

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def abort(self) -> None:
        self.forget()
        self._transport.abort()

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def is_reading(self) -> bool:
        return self._transport.is_reading()

    def pause_reading(self) -> None:
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        self._transport.resume_reading()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._transport.get_extra_info(name, default)


class HttpProtocol(HttpToolsProtocol):
    """uvicorn's protocol with these additions.

    - An answer's head and body are written together (`JoiningTransport`).
    - Headers have a size limit and a time limit.
    - An offer to upgrade is ignored, and the request is answered (RFC 9110, 7.8). The JDK's HTTP client sends such an
      offer with its first request. httptools stops at it and drops the body; so the protocol gives the request to a
      new parser, without the offer.
    - A request has one valid Host, and no transfer coding but chunked. The host of an absolute target wins.
    - Fields after a chunked body are dropped: as headers, they would not have passed the checks of a proxy.
    - A message that is not HTTP is refused after the requests before it are answered, so that no client takes the
      refusal for another answer.
    - A request that is on its way when the server stops is answered; then its connection is closed.

    Args:
        header_timeout_s: time for the headers of a request, and for the rest of a body after an early answer.
        closing: set once the server accepts no more connections; one that is accepted in that moment gets one answer.
    """

    def __init__(self, *args: Any, header_timeout_s: float, closing: threading.Event, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._closing = closing
        self._header_timeout_s = header_timeout_s
        self._header_timer: asyncio.TimerHandle | None = None
        self._header_bytes = 0
        self._in_body = False
        self._running: RequestResponseCycle | None = None  # the request that is answered now; others wait for it
        self._offer_pending = False  # the headers had an offer to upgrade, and go to a new parser
        self._ending = False  # the server stops: the next answer is the last of this connection
        self._refusal: ApiError | None = None  # the answer to a message that is no request; nothing is read after it

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports have all methods of asyncio.Transport, and are none of its subclasses.
        self._joining = JoiningTransport(cast(asyncio.Transport, transport), self.loop)
        super().connection_made(self._joining)
        self._expect_headers()
        if self._closing.is_set():
            self.shutdown()

    def eof_received(self) -> None:
        self._joining.close()  # sends pending bytes, before the loop closes the connection

    def connection_lost(self, exc: Exception | None) -> None:
        self._joining.forget()
        self._headers_arrived()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """Close the connection after its last answer, or after `LAST_REQUEST_S` without a request.

        uvicorn closes an idle connection at once. Its client, or a load balancer that has just chosen this server, may
        have sent a request already, and cannot know whether it was computed and charged.
        """
        self._ending = True
        if self._is_idle():
            self.loop.call_later(LAST_REQUEST_S, self._close_if_idle)
        else:
            self.cycle.keep_alive = False

    def _close_if_idle(self) -> None:
        has_begun = self._header_timer is not None and self._header_bytes > 0
        if self._is_idle() and not has_begun:  # the rest of a head has the time that heads have
            self.transport.close()

    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def data_received(self, data: bytes) -> None:
        if self._refusal is not None:
            return
        if self._header_timer is None and self._is_idle():
            self._expect_headers()
        self._header_bytes += len(data)
        self._unset_keepalive_if_required()
        self._parse(data)
        if self._header_timer is not None and not self._in_body and self._header_bytes > HEADER_LIMIT_BYTES:
            self.transport.close()

    def _parse(self, data: bytes | memoryview) -> None:
        """Give bytes to the parser, and to a new one after each offer to upgrade."""
        rest = memoryview(data)
        try:
            while True:
                try:
                    self.parser.feed_data(rest)
                    return
                except httptools.HttpParserUpgrade as offer:
                    rest = rest[offer.args[0] :]
                    head = self._head_without_offer()
                    self.parser = httptools.HttpRequestParser(self)
                    self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
                    self._offer_pending = False
                    self.parser.feed_data(head)
        except httptools.HttpParserError:
            self._refuse(self._refusal or ApiError(400, _INVALID))

    def _head_without_offer(self) -> bytes:
        """Return the head of the current request without its offer to upgrade."""
        version = self.parser.get_http_version().encode()
        lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, version)]
        for name, value in self.headers:
            if name in (b"upgrade", b"http2-settings"):
                continue
            if name == b"connection":
                options = [option.strip() for option in value.split(b",")]
                value = b", ".join(o for o in options if o.lower() not in (b"upgrade", b"http2-settings"))
            lines.append(b"%b: %b" % (name, value))
        return b"\r\n".join(lines) + b"\r\n\r\n"

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_body:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self.parser.get_method() == b"CONNECT":
            self._stop(ApiError(501, "CONNECT is not supported: this server is no proxy."))
        if self.parser.should_upgrade():
            self._offer_pending = True
            return
        self._check_headers()
        self._read_target()
        self._headers_arrived()
        super().on_headers_complete()
        if self._ending:
            self.cycle.keep_alive = False
        self._in_body = True

    def on_message_complete(self) -> None:
        if self._offer_pending:
            return
        self._in_body = False
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._refusal is not None and self._running is not None and self._running.response_complete:
            self._write_refusal(self._refusal)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, msg))

    def _check_headers(self) -> None:
        """Check the headers that decide where a message ends and to whom it goes (RFC 9112, 3.2 and 6.1)."""
        names = [name for name, _ in self.headers]
        hosts = [value for name, value in self.headers if name == b"host"]
        version = self.parser.get_http_version()
        if (version == "1.1" and not hosts) or len(hosts) > 1 or not all(map(_HOST.fullmatch, hosts)):
            self._stop(ApiError(400, "A request has one header Host with a host and a port."))
        twice = next((name for name in _SINGLE_HEADERS if names.count(name) > 1), None)
        if twice is not None:
            self._stop(ApiError(400, f"A request has at most one header {twice.decode()}."))
        codings = b",".join(value for name, value in self.headers if name == b"transfer-encoding").strip().lower()
        if version not in ("1.0", "1.1"):
            self._stop(ApiError(400, f"HTTP/{version} is not supported: send HTTP/1.1."))
        if codings and version != "1.1":
            self._stop(ApiError(400, "Transfer-Encoding needs HTTP/1.1."))
        if codings not in (b"", b"chunked"):
            self._stop(ApiError(501, "The only supported Transfer-Encoding is chunked."))
        if codings and b"content-length" in names:
            self._stop(ApiError(400, "A request has Content-Length or Transfer-Encoding, not both."))

    def _read_target(self) -> None:
        """Replace an absolute target by its path, and the header Host by its host (RFC 9112, 3.2.2)."""
        if len(self.url) > _LONGEST_TARGET:
            self._stop(ApiError(414, f"The target of a request has at most {_LONGEST_TARGET} bytes."))
        if not _ABSOLUTE_TARGET.match(self.url):
            if self.url[:1] != b"/" and self.url != b"*":
                self._stop(ApiError(400, "The target of a request is a path or an address with http://."))
            return
        target = urlsplit(self.url.split(b"#")[0])
        host = target.netloc.rpartition(b"@")[2]
        if not host or not _HOST.fullmatch(host):
            self._stop(ApiError(400, "The target of the request has no valid host."))
        self.headers[:] = [(b"host", host), *((name, value) for name, value in self.headers if name != b"host")]
        self.url = (target.path or b"/") + (b"?" + target.query if target.query else b"")

    def _stop(self, refusal: ApiError) -> None:
        """End the parsing of this connection with an answer.

        Raises:
            ValueError: always; httptools turns it into its own error.
        """
        self._refusal = refusal
        raise ValueError(str(refusal))

    def _refuse(self, refusal: ApiError) -> None:
        """Answer a message that is no request, after the answers to the requests before it, and read no more."""
        self._refusal = refusal
        self._headers_arrived()
        if self._in_body and not (self.pipeline and self.pipeline[0][0] is self.cycle):
            if self.cycle.response_started:
                self.transport.close()  # this request has its answer, and another one would count for the next
                return
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            self._write_refusal(refusal)
            return
        if self._in_body:
            self.pipeline.popleft()  # the newest request, which waits for its turn and will never be whole
        if self._running is None or self._running.response_complete:
            self._write_refusal(refusal)

    def _write_refusal(self, refusal: ApiError) -> None:
        if self.transport.is_closing():
            return
        response = error_response(refusal)
        lines = [
            b"HTTP/1.1 %d %b" % (refusal.status, _REASONS[refusal.status]),
            b"connection: close",
            b"x-request-id: " + new_request_id().encode(),
        ]
        lines += [name + b": " + value for name, value in response.raw_headers]
        self.transport.write(b"\r\n".join(lines) + b"\r\n\r\n" + bytes(response.body))
        self.transport.close()

    def _expect_headers(self) -> None:
        self._header_bytes = 0
        self._header_timer = self.loop.call_later(self._header_timeout_s, self.transport.close)

    def _headers_arrived(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None
