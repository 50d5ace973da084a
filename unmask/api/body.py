"""Read a request's body within a size and a time."""

import asyncio

from starlette.requests import ClientDisconnect, Request

from unmask.api.errors import ApiError


async def read_body(request: Request, limit: int, seconds: float) -> bytes:
    """Read the whole body of a request.

    Args:
        request: the request; nothing of its body has been read.
        limit: largest size in bytes, both as declared and as counted.
        seconds: time that it may take to arrive.

    Raises:
        ApiError: 413 or 408.
        ClientDisconnect: the connection was closed before the end.
    """
    # The parser has checked that Content-Length is a number. uvicorn discards the rest of a refused body, so that
    # the caller can finish sending and read the answer.
    if int(request.headers.get("content-length", 0)) > limit:
        raise _too_large(limit)
    chunks = []
    size = 0
    try:
        async with asyncio.timeout(seconds):
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                chunk = message.get("body", b"")
                size += len(chunk)
                if size > limit:
                    raise _too_large(limit)
                chunks.append(chunk)
                if not message.get("more_body", False):
                    return b"".join(chunks)
    except TimeoutError:
        raise ApiError(
            408,
            f"The body did not arrive within {seconds:g} seconds.",
            code="request_timeout",
            retry_after=1,
            headers={"connection": "close"},
        ) from None


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"The body is larger than {limit} bytes: send fewer inputs at a time.", code="too_large")
