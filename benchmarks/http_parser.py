"""Time of one request in the HTTP parsers that the server could use: python benchmarks/http_parser.py

The app answers at once, so the time is that of the parser, the loop and the socket. An offer to upgrade is Java's.
h11 answers offers by itself; httptools needs our protocol, which gives such a request to a second parser.
"""

import asyncio
import functools
import logging
import socket
import statistics
import threading
import time
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from unmask.server.http_protocol import HttpProtocol

BODY = b'{"model": "m", "input": "' + b"some words " * 40 + b'"}'
OFFER = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAA\r\n"
ROUNDS, REQUESTS = 15, 400


async def app(scope: Any, receive: Any, send: Any) -> None:
    size = 0
    while True:
        message = await receive()
        size += len(message.get("body", b""))
        if not message.get("more_body"):
            break
    content = b"%06d" % size
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"6")]})
    await send({"type": "http.response.body", "body": content})


def request(offer: bytes) -> bytes:
    length = b"Content-Length: %d\r\n\r\n" % len(BODY)
    return b"POST / HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\n" + offer + length + BODY


def microseconds(protocol: Any, offer: bytes) -> tuple[float, bool]:
    """Return the median over the rounds of the mean time of a request, and whether every body arrived whole."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(app, http=protocol, ws="none", lifespan="off", log_config=None, access_log=False)
        server = uvicorn.Server(config)

        def run() -> None:
            with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
                runner.run(server.serve(sockets=[listener]))

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        data, times, whole = request(offer), [], True
        with socket.create_connection(listener.getsockname()) as client:
            for _ in range(ROUNDS):
                start = time.perf_counter()
                for _ in range(REQUESTS):
                    client.sendall(data)
                    answer = b""
                    while not answer.partition(b"\r\n\r\n")[2]:  # the app writes six bytes at once
                        answer += client.recv(65536)
                    whole &= answer.endswith(b"%06d" % len(BODY))
                times.append((time.perf_counter() - start) / REQUESTS * 1e6)
        server.should_exit = True
        thread.join()
        return statistics.median(times), whole


if __name__ == "__main__":
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # h11_impl warns of each offer
    ours = functools.partial(HttpProtocol, header_timeout_s=10)
    for name, protocol in (("h11", H11Protocol), ("httptools", HttpToolsProtocol), ("httptools, ours", ours)):
        for title, offer in (("plain", b""), ("with an offer", OFFER)):
            if protocol is HttpToolsProtocol and offer:
                continue  # it loses the body, and reads it as the next request
            value, whole = microseconds(protocol, offer)
            print(f"{name:16} {title:14} {value:7.0f} us a request{'' if whole else ', body lost'}", flush=True)
