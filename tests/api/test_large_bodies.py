"""Large bodies: no event loop waits for one, and none that a client may mean is refused."""

import asyncio
import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.api.live import LocalService
from unmask.api import large_bodies
from unmask.api.errors import ApiError
from unmask.api.large_bodies import LARGE_BYTES, MAX_NAMES, check_counts, parse_body

VALUES = 1000


def body_of(rest: bytes) -> bytes:
    return b'{"model":"m","input":"a",' + rest + b"}"


def fields(count: int) -> bytes:
    return b",".join(b'"k%d":1' % number for number in range(count))


@pytest.mark.parametrize(
    "body",
    [
        body_of(fields(MAX_NAMES)),
        body_of(b'"provider":{' + fields(MAX_NAMES) + b"}"),
        body_of(b'"o":[' + b"[]," * VALUES + b"1]"),
        body_of(b'"o":"' + b"\\\\" * 70_000 + b'","p":[' + b"1," * VALUES + b"1]"),
        body_of(b'"o":"' + b'\\"' * 70_000 + b'","p":[' + b"1," * VALUES + b"1]"),
    ],
)
def test_a_body_with_too_much_in_it_is_refused(body: bytes):
    with pytest.raises(ApiError, match="which is the most") as caught:
        check_counts(body, VALUES)
    assert caught.value.status == 400


PIECES = st.lists(st.sampled_from(['"', "\\", ":", ",", "{", "a", "é", "\n", '\\"']), max_size=12).map("".join)


@given(texts=st.lists(PIECES, max_size=8), step=st.integers(1, 9), is_ascii=st.booleans())
@example(texts=["\\", '\\\\"', ","], step=1, is_ascii=True)
def test_what_texts_hold_does_not_count(texts: list[str], step: int, is_ascii: bool):
    """The scan finds the same commas as the parser, wherever a step ends."""
    body = json.dumps({"input": texts, "a": 1}, ensure_ascii=is_ascii).encode()
    commas = max(len(texts) - 1, 0) + 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(large_bodies, "_STEP_BYTES", step)
        patch.setattr(large_bodies, "MAX_NAMES", 2)
        check_counts(body, commas + 1)
        with pytest.raises(ApiError, match="values"):
            check_counts(body, commas)
        patch.setattr(large_bodies, "MAX_NAMES", 1)
        with pytest.raises(ApiError, match="names"):
            check_counts(body, commas + 1)


def test_many_texts_of_code_are_no_fields():
    texts = ['{"a": [1, 2], "b\\": 3}\n' * 100] * 2048
    check_counts(json.dumps({"model": "m", "input": texts}).encode(), 2100)


async def test_only_large_bodies_take_a_thread():
    assert await parse_body(b" " * LARGE_BYTES, VALUES, threading.current_thread) is threading.current_thread()
    assert await parse_body(b" " * (LARGE_BYTES + 1), VALUES, threading.current_thread) is not threading.main_thread()


async def test_an_error_of_a_large_body_is_its_own():
    def refuse() -> None:
        raise ApiError(400, "no")

    with pytest.raises(ApiError, match="no"):
        await parse_body(b" " * (LARGE_BYTES + 1), VALUES, refuse)


@pytest.mark.parametrize("path", ["/v1/embeddings", "/api/embed", "/api/show", "/tokenize", "/v2/embed"])
def test_every_path_refuses_a_flood_of_fields(service: LocalService, path: str):
    body = b'{"model":"none","input":"a","inputs":"a","texts":["a"],' + fields(20_000) + b"}"
    reply = service.call("POST", path, body=body)
    assert reply.status == 400 and f"more than {MAX_NAMES} names" in reply.body.decode()


FLOODS: dict[str, Callable[[], bytes]] = {
    "fields": lambda: body_of(fields(1_000_000)),
    "lists": lambda: body_of(b'"o":[' + b"[]," * 5_000_000 + b"1]"),
    "objects": lambda: b'{"model":"none","input":[' + b'{"text":"a"},' * 1_200_000 + b'"a"]}',
}


@pytest.mark.parametrize("kind", FLOODS)
async def test_the_loop_goes_on_beside_a_large_body(kind: str):
    """Without the scan, each of these holds the interpreter for longer than this, in any thread."""
    body = FLOODS[kind]()
    longest, last = 0.0, time.perf_counter()

    async def watch() -> None:
        nonlocal longest, last
        while True:
            await asyncio.sleep(0.001)
            now = time.perf_counter()
            longest, last = max(longest, now - last), now

    watcher = asyncio.create_task(watch())
    with suppress(ApiError):
        await parse_body(body, 300_000, lambda: json.loads(body))
    watcher.cancel()
    assert longest < 0.25  # a busy machine included
