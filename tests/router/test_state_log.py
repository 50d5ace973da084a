import asyncio
import hashlib
import json
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.api.live import running, until
from tests.router.fault_server import Behaviour, fault_server_thread, reply, right
from tests.router.test_providers import MODEL, SLOW, Upstreams, providers_file
from unmask.encoder import Encoder
from unmask.router import breaker
from unmask.router.breaker import BreakerState
from unmask.router.signals import AttemptFailed, SignalName
from unmask.router.state_log import MAX_LINES, PERIOD_S, REPEAT_S, StateLog

SECRET, TEXT = "sk-provider-0123456789abcdef", "the private diary of a customer"
ECHO = {"error": {"message": f"wrong {SECRET} {TEXT}"}}


def failure(signal: SignalName = "failed", status: int | None = 500) -> AttemptFailed:
    return AttemptFailed("a", signal, f"status {status}, 7 bytes, digest 01234567", status=status)


def lines(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    """Level and text of the lines about provider a."""
    return [(record.levelname, text) for record in caplog.records if (text := record.getMessage()).startswith("a for ")]


def test_each_change_of_the_breaker_is_a_line_with_its_cause(caplog: pytest.LogCaptureFixture) -> None:
    state = StateLog("a", "m")
    state.note_failure(failure(), "request", "open", 0)
    for breaker_state in ("open", "half_open", "half_open", "closed"):
        state.note_breaker(breaker_state, 1)
    state.note_failure(failure("no_access", 401), "request", "held", 2)
    cause = "a answered with an error: status 500, 7 bytes, digest 01234567"
    refused = "a refuses this server's key, credit or model name: status 401, 7 bytes, digest 01234567"
    assert lines(caplog) == [
        ("WARNING", f"a for m: its breaker is open, and it gets no requests: failed: {cause}"),
        ("WARNING", "a for m: its breaker is half open, and canaries decide"),
        ("WARNING", "a for m: its breaker is closed, and it gets requests again"),
        (
            "ERROR",
            "a for m: its breaker is held open, since our account or configuration there is refused: no_access: "
            + refused,
        ),
    ]


def test_failures_of_one_kind_have_a_line_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    state = StateLog("a", "m")
    for _ in range(40):
        state.note_failure(failure(), "request", "closed", 0)
    state.note_failure(failure("rate_limited", 429), "request", "closed", 1)
    state.note_failure(failure(), "request", "closed", REPEAT_S)
    first, other, last = (text for _, text in lines(caplog))
    assert "failed: a answered with an error" in first and "rate_limited: a has too many requests" in other
    assert last.endswith("(39 more such failures since the last line)")


def test_silence_of_canaries_and_its_end_are_a_line_each(caplog: pytest.LogCaptureFixture) -> None:
    state = StateLog("a", "m")
    for now in (0, 60, 120):
        state.note_failure(failure("timeout"), "canaries", "closed", now)
    state.note_canaries()
    state.note_canaries()
    assert [text.split(": ")[1] for _, text in lines(caplog)] == [
        "canaries have no answer",
        "canaries are answered again",
    ]


def test_a_provider_that_flaps_does_not_flood_and_the_log_ends_with_its_state(caplog: pytest.LogCaptureFixture) -> None:
    state = StateLog("a", "m")
    for now in range(1000):
        change: BreakerState = "closed" if now % 2 else "open"
        state.note_failure(failure(), "canaries", change, now / 10)
    assert len(lines(caplog)) == 2 * MAX_LINES and "closed" in lines(caplog)[-1][1]
    state.note_failure(failure("no_access", 403), "request", "held", 100)
    assert len(lines(caplog)) == 2 * MAX_LINES
    state.note_breaker("held", PERIOD_S)  # the next look at it, when there is room again
    level, text = lines(caplog)[-1]
    assert level == "ERROR" and "held open" in text and "status 403" in text


@pytest.fixture(scope="module")
def upstreams(encoder: Encoder, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Upstreams]:
    lock = threading.Lock()

    def vectors_of(texts: Sequence[str], instruction: str) -> np.ndarray:
        with lock:
            return encoder.encode(list(texts), instruction=instruction)

    folder = tmp_path_factory.mktemp("log")
    (folder / "key").write_text(SECRET)
    (folder / "key").chmod(0o600)
    with fault_server_thread(vectors_of) as a, fault_server_thread(vectors_of) as b:
        file = providers_file(folder, a.url, b.url)
        file.write_text(file.read_text().replace('data = "30d"', f'key_file = "{folder / "key"}"'))
        with running(tiny_llama, providers_file=file, intervals=SLOW, warm=()) as service:
            upstreams = Upstreams(a, b, service)
            until(lambda: all(e.admission == "admitted" for e in upstreams.pool.models()[MODEL].endpoints), 60)
            yield upstreams


@pytest.fixture
def script(upstreams: Upstreams, caplog: pytest.LogCaptureFixture) -> Callable[..., None]:
    """A function that lets provider a behave so from now on, with nothing in the log."""
    upstreams.reset()
    endpoint = upstreams.endpoint("a")
    endpoint.state_log = StateLog("a", MODEL)
    caplog.clear()
    caplog.set_level(logging.DEBUG)

    def behave(*behaviours: Behaviour) -> None:
        upstreams.a.script[:] = behaviours

    return behave


def expect_nothing_private(text: str) -> None:
    for private in (SECRET, SECRET.removeprefix("sk-"), TEXT, "diary"):
        assert private not in text


@pytest.mark.parametrize("status", [401, 402, 403])
def test_a_refused_key_is_an_error_in_the_log_without_the_providers_words(
    upstreams: Upstreams, script: Callable[..., None], caplog: pytest.LogCaptureFixture, status: int
) -> None:
    script(reply(ECHO, status, {"content-type": f"text/{SECRET}"}), right)
    assert upstreams.embed(TEXT, provider={"order": ["a"]}).headers["x-unmask-provider"] == "b"
    (level, held), *_ = lines(caplog)
    body = json.dumps(ECHO).encode()
    digest = hashlib.sha256(body).hexdigest()[:8]
    assert level == "ERROR" and held.startswith(f"a for {MODEL}: its breaker is held open")
    assert f"no_access: a refuses this server's key, credit or model name: status {status}" in held
    assert f"{len(body)} bytes, digest {digest}" in held
    until(lambda: upstreams.endpoint("a").breaker.state == "closed")
    until(lambda: "its breaker is closed" in caplog.text)
    assert [text.split(": ")[1].split(",")[0] for _, text in lines(caplog)] == [
        "its breaker is held open",
        "its breaker is half open",
        "its breaker is closed",
    ]
    expect_nothing_private(caplog.text)


def test_failures_and_the_breaker_are_in_the_log_until_it_closes(
    upstreams: Upstreams, script: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    script(reply(ECHO, 500))
    for _ in range(breaker.RUN):
        assert upstreams.embed(TEXT, provider={"order": ["a"]}).headers["x-unmask-provider"] == "b"
    first, opened, *_ = lines(caplog)
    assert first[0] == opened[0] == "WARNING"
    assert "a request failed: failed: a answered with an error: status 500" in first[1]
    assert "its breaker is open, and it gets no requests: failed: " in opened[1]
    script(right)
    until(lambda: "its breaker is closed" in caplog.text)
    assert len(lines(caplog)) == 4
    expect_nothing_private(caplog.text)


def test_canaries_without_an_answer_are_in_the_log(
    upstreams: Upstreams, script: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    endpoint, pool = upstreams.endpoint("a"), upstreams.pool
    references = pool.models()[MODEL].references
    assert references is not None
    loop = next(iter(pool._watches)).get_loop()

    def light() -> None:
        asyncio.run_coroutine_threadsafe(pool._run_light(endpoint, references), loop).result(60)

    script(reply(ECHO, 503))
    light()
    light()
    script(right)
    light()
    assert [text.split(": ")[1] for _, text in lines(caplog)] == [
        "canaries have no answer",
        "canaries are answered again",
    ]
    expect_nothing_private(caplog.text)
