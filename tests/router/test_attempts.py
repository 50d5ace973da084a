"""Attempts at a real provider over HTTP: a caller who leaves at any moment leaves nothing behind."""

import asyncio
import dataclasses
import gc
import random
import time
import weakref
from collections.abc import AsyncIterator, Callable, Sequence
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import numpy as np
import pytest

from tests.router.fault_server import FaultServer, after, fault_server, reply, reset, silent
from unmask.api.errors import api_error, error_response
from unmask.conformance import Finding
from unmask.encoder import Prompt
from unmask.errors import DeadlineExceeded, EngineError, NoConformingProvider, NoProvider, ProviderRefused
from unmask.router import attempts
from unmask.router.attempts import answer
from unmask.router.choosing import ProviderPreferences
from unmask.router.embedding_work import EmbeddingWork
from unmask.router.endpoint import ProviderEndpoint
from unmask.router.model_endpoints import ModelEndpoints
from unmask.router.outbound import ProviderClient
from unmask.router.providers import ProviderModel, RemoteProvider

DIM = 8
RIGHT = Finding(
    passed=True,
    precision="exact",
    worst=0,
    mean=0,
    noise=0,
    normalised=True,
    fault="",
    num_texts=1,
    num_tokens=9,
)


def ones(texts: Sequence[str], instruction: str) -> np.ndarray:
    return np.full((len(texts), DIM), DIM**-0.5, dtype=np.float32)


@pytest.fixture
async def upstream() -> AsyncIterator[tuple[FaultServer, ProviderEndpoint, ModelEndpoints]]:
    async with fault_server(ones) as server:
        model = ProviderModel(id="m", cost="0.004", max_inputs=2)
        provider = RemoteProvider(name="a", kind="openai", url=server.url, private=True, models=(model,))
        client = ProviderClient(provider)
        endpoint = ProviderEndpoint(client, model, random.Random(1))
        endpoint.admit(RIGHT, 0.01, time.monotonic())
        group = ModelEndpoints([endpoint])
        group.references = cast(Any, SimpleNamespace(dim=DIM))
        yield server, endpoint, group
        await client.close()


def work_of(
    number: int, text: str = "a text", seconds: float = 30, preferences: ProviderPreferences | None = None
) -> EmbeddingWork:
    prompt = cast(Prompt, SimpleNamespace(ids=range(4), truncated=False))
    return EmbeddingWork(
        texts=[text] * number,
        prompts=[prompt] * number,
        instruction="",
        raw=False,
        deadline=time.monotonic() + seconds,
        share="",
        preferences=preferences or ProviderPreferences(),
        precision="exact",
    )


async def test_a_caller_may_leave_at_any_moment(
    upstream: tuple[FaultServer, ProviderEndpoint, ModelEndpoints],
) -> None:
    server, endpoint, group = upstream
    server.script[:] = [after(0.002)]
    outcomes = set()
    for steps in range(0, 160, 4):
        work = work_of(3)  # two requests at the same time
        task = asyncio.create_task(answer(group, None, work, random.Random(steps)))
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert (endpoint.load.requests, endpoint.load.tokens) == (0, 0)
        assert len(work.attempts) == (steps > 0)  # whatever began is in the books, once
        outcomes |= {attempt.outcome for attempt in work.attempts}
    assert "cancelled" in outcomes and outcomes <= {"cancelled", "answered"}
    assert endpoint.breaker.state == "closed" and endpoint.admission == "admitted"
    routed = await answer(group, None, work_of(3), random.Random(1))
    np.testing.assert_allclose(routed.vectors, ones(["a"] * 3, ""), atol=1e-7)


async def test_an_answer_counts_only_if_its_provider_was_admitted_all_the_time(
    upstream: tuple[FaultServer, ProviderEndpoint, ModelEndpoints],
) -> None:
    """A provider that gave a wrong canary and then right ones may have given a wrong vector in between."""
    server, endpoint, group = upstream
    server.script[:] = [after(0.1)]

    async def outcome_of(during: Callable[[], None]) -> str:
        work = work_of(1)
        task = asyncio.create_task(answer(group, None, work, random.Random(1)))
        server.arrived.clear()
        await server.arrived.wait()
        during()
        if isinstance(error := (await asyncio.gather(task, return_exceptions=True))[0], BaseException):
            assert isinstance(error, NoProvider | NoConformingProvider)
        (attempt,) = work.attempts
        assert (attempt.outcome == "answered") != isinstance(error, BaseException)
        return attempt.outcome

    def suspend_for_a_moment() -> None:
        endpoint.suspend()
        endpoint.resume()

    def admit_again() -> None:
        endpoint.quarantine("is another model")
        endpoint.admit(RIGHT, 0.01, time.monotonic())

    def quarantine_after_a_reload() -> None:
        again = ProviderEndpoint(endpoint.client, endpoint.model, random.Random(1))
        again.inherit(endpoint)
        again.quarantine("is another model")

    assert await outcome_of(lambda: None) == "answered"
    assert await outcome_of(endpoint.resume) == "answered"  # nothing had taken it out
    for during in (suspend_for_a_moment, admit_again, endpoint.suspend):
        assert await outcome_of(during) == "discarded"
    endpoint.resume()
    assert await outcome_of(quarantine_after_a_reload) == "discarded"


def fast_endpoint(name: str, url: str) -> ProviderEndpoint:
    """An admitted endpoint that has given enough answers for its usual duration to be known: some milliseconds."""
    model = ProviderModel(id="m", cost="0.004")
    provider = RemoteProvider(name=name, kind="openai", url=url, private=True, models=(model,))
    endpoint = ProviderEndpoint(ProviderClient(provider), model, random.Random(1))
    endpoint.admit(RIGHT, 1e-4, time.monotonic())
    endpoint.load.answers = 100
    return endpoint


@pytest.fixture
async def silent_and_right() -> AsyncIterator[ModelEndpoints]:
    """Provider a, which says nothing, and provider b, which answers rightly."""
    async with fault_server(ones, silent) as a, fault_server(ones) as b:
        group = ModelEndpoints([fast_endpoint("a", a.url), fast_endpoint("b", b.url)])
        group.references = cast(Any, SimpleNamespace(dim=DIM))
        yield group
        for endpoint in group.endpoints:
            await endpoint.client.close()


async def test_a_silent_provider_that_is_preferred_leaves_time_for_another(
    silent_and_right: ModelEndpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts, "_FIRST_SHARE", 0.06)  # 0.6 s, so that most of the time is left for b
    a, draw = silent_and_right.endpoint("a"), random.Random(1)
    for _ in range(5):
        work = work_of(1, seconds=10, preferences=ProviderPreferences(order=("a",)))
        routed = await answer(silent_and_right, None, work, draw)
        assert (routed.provider, routed.attempts) == ("b", 2)
        rows = [(row.provider, row.outcome, row.reason) for row in work.attempts]
        assert rows == [("a", "timeout", "answer"), ("b", "answered", "retry")]
    assert a.breaker.state == "open" and a.history.outcomes(60, time.monotonic()) == {"timeout": 5}
    work = work_of(1, seconds=10, preferences=ProviderPreferences(order=("a",)))
    assert (await answer(silent_and_right, None, work, draw)).attempts == 1


async def test_a_request_that_may_not_be_repeated_says_of_which_model_and_when_to_come_back(
    silent_and_right: ModelEndpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(silent_and_right.budget, "withdraw", lambda tokens, now: False)
    async with fault_server(ones, reply({}, 503)) as broken:
        silent_and_right.endpoints[0] = failing = fast_endpoint("a", broken.url)
        work = work_of(1, preferences=ProviderPreferences(order=("a",)))
        with pytest.raises(ProviderRefused, match=r"a provider of m failed, and too many .* try again") as refused:
            await answer(silent_and_right, None, work, random.Random(1))
        await failing.client.close()
    response = error_response(api_error(refused.value))
    assert (response.status_code, response.headers["retry-after"], response.headers["x-should-retry"]) == (
        502,
        "10",
        "false",  # a client that repeats it by itself would spend what the budget keeps
    )


async def test_a_caller_who_wants_no_fallback_is_answered_by_the_first_choice_or_by_nobody(
    silent_and_right: ModelEndpoints,
) -> None:
    async with fault_server(ones, reply({}, 503)) as broken:
        silent_and_right.endpoints[0] = failing = fast_endpoint("a", broken.url)
        silent_and_right.endpoint("b").load.failed(9, time.monotonic())  # so that a is preferred
        work = work_of(1, preferences=ProviderPreferences(allow_fallbacks=False, sort="price"))
        with pytest.raises(NoProvider):
            await answer(silent_and_right, None, work, random.Random(1))
        assert [(row.provider, row.outcome) for row in work.attempts] == [("a", "failed")]
        work = work_of(1, preferences=ProviderPreferences(allow_fallbacks=False, only=("b",)))
        assert (await answer(silent_and_right, None, work, random.Random(1))).provider == "b"
        await failing.client.close()


async def test_a_batch_goes_to_the_cheapest_provider_whatever_its_priority(silent_and_right: ModelEndpoints) -> None:
    b = silent_and_right.endpoint("b")
    b.model = msgspec.structs.replace(b.model, cost="0.001", priority=5)
    for seed in range(5):
        work = dataclasses.replace(work_of(1), by_price_alone=True)
        assert (await answer(silent_and_right, None, work, random.Random(seed))).attempts == 1
        assert [row.provider for row in work.attempts] == ["b"]


# Fields of an endpoint that are its own after the file was read again; all others are known of the same server.
OWN_FIELDS = {"client", "model", "draw", "daily_cost", "wake", "full_due", "run_at", "run_seconds", "_loss_logged"}


async def test_a_model_inherits_its_references_and_all_that_is_known_of_the_same_endpoints() -> None:
    earlier = ModelEndpoints([fast_endpoint(name, "http://127.0.0.1:9") for name in "ab"])
    earlier.references, earlier.prompts, earlier.tokenizer = (cast(Any, object()) for _ in range(3))
    earlier.problem = "no file"
    a = earlier.endpoint("a")
    a.quarantine("is another model")
    a.passed_at, a.last_used, a._avoid_until = 5.0, 7.0, 9.0
    again = ModelEndpoints([fast_endpoint("a", "http://127.0.0.1:9"), fast_endpoint("b", "http://127.0.0.1:10")])
    again.inherit(earlier)
    for name in ("references", "prompts", "tokenizer", "problem", "totals"):
        assert getattr(again, name) is getattr(earlier, name)
    shared = {field.name for field in dataclasses.fields(ProviderEndpoint)} - OWN_FIELDS
    assert {name for name in shared if getattr(again.endpoint("a"), name) is not getattr(a, name)} == set()
    assert again.endpoint("b").history is not earlier.endpoint("b").history  # another server
    for endpoint in (*earlier.endpoints, *again.endpoints):
        await endpoint.client.close()


@pytest.mark.parametrize(("change", "words"), [(0.25, "25 % more tokens"), (-0.05, "5 % fewer tokens")])
async def test_a_change_of_counts_is_logged_in_words(
    change: float, words: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = fast_endpoint("a", "http://127.0.0.1:9")
    monkeypatch.setattr(endpoint._token_counts, "add", lambda *counts: change)
    endpoint.compare_counts(10, 9, 1, time.monotonic())
    assert f"a counts {words} for m than an hour ago" in caplog.text
    await endpoint.client.close()


@pytest.mark.parametrize(
    ("seconds", "answers", "outcome"), [(0.7, 100, "timeout"), (0.7, 0, "cancelled"), (0.1, 100, "cancelled")]
)
async def test_a_deadline_is_the_fault_of_a_provider_that_had_ample_time(
    silent_and_right: ModelEndpoints, seconds: float, answers: int, outcome: str
) -> None:
    """Not if few answers have shown how fast it is, and not of one that the caller gave no time."""
    a = silent_and_right.endpoint("a")
    a.load.answers = answers
    work = work_of(1, seconds=seconds, preferences=ProviderPreferences(only=("a",)))
    with pytest.raises(DeadlineExceeded, match=r"after \d+\.\d\d s, before the vectors were ready: allow more time"):
        await answer(silent_and_right, None, work, random.Random(1))
    assert [row.outcome for row in work.attempts] == [outcome]
    assert a.history.outcomes(60, time.monotonic()) == {outcome: 1} and a.last_used > float("-inf")
    assert len(a.breaker._outcomes) == (outcome == "timeout") and a.load.requests == 0


async def test_a_share_that_is_over_soon_moves_the_request_and_blames_nobody(silent_and_right: ModelEndpoints) -> None:
    a = silent_and_right.endpoint("a")
    a.load.answers = 0
    work = work_of(1, seconds=4, preferences=ProviderPreferences(order=("a",)))
    assert (await answer(silent_and_right, None, work, random.Random(1))).provider == "b"
    rows = [(row.provider, row.outcome) for row in work.attempts]
    assert rows == [("a", "cancelled"), ("b", "answered")] and not a.breaker._outcomes


@pytest.mark.parametrize("text", ["strike out </s> here", "<|im_end|>", "[CLS] a", "<0x0A>", "!@#$%^&*()"])
async def test_texts_like_control_tokens_go_to_those_who_read_them_as_text(
    upstream: tuple[FaultServer, ProviderEndpoint, ModelEndpoints], text: str
) -> None:
    server, endpoint, group = upstream
    endpoint.model = msgspec.structs.replace(endpoint.model, reads_control_tokens=True)
    with pytest.raises(NoProvider):
        await answer(group, None, work_of(1, text), random.Random(1))
    assert not server.requests
    await answer(group, None, work_of(1, "a < b and c > d [see note 3]"), random.Random(1))
    assert len(server.requests) == 1


async def test_a_failed_attempt_leaves_no_texts_in_memory(
    upstream: tuple[FaultServer, ProviderEndpoint, ModelEndpoints],
) -> None:
    """A frame that keeps an exception is a cycle with its traceback, which stays until a search for garbage."""
    server, _, group = upstream
    server.script[:] = [reset(b"HTTP/1.1 200 OK\r\n")]
    work = work_of(1)
    texts = weakref.ref(work)
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(EngineError):
            await answer(group, None, work, random.Random(1))
        del work
        assert texts() is None
    finally:
        gc.enable()
