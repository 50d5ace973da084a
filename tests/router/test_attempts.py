"""Attempts at a real provider over HTTP: a caller who leaves at any moment leaves nothing behind."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Sequence
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from tests.router.fault_server import FaultServer, after, fault_server
from unmask.conformance import Finding
from unmask.encoder import Prompt
from unmask.router.attempts import EmbeddingWork, ModelEndpoints, answer
from unmask.router.choosing import ProviderPreferences
from unmask.router.endpoint import ProviderEndpoint
from unmask.router.outbound import ProviderClient
from unmask.router.providers import ProviderModel, RemoteProvider

DIM = 8


def ones(texts: Sequence[str], instruction: str) -> np.ndarray:
    return np.full((len(texts), DIM), DIM**-0.5, dtype=np.float32)


@pytest.fixture
async def upstream() -> AsyncIterator[tuple[FaultServer, ProviderEndpoint, ModelEndpoints]]:
    async with fault_server(ones) as server:
        model = ProviderModel(id="m", cost="0.004", max_inputs=2)
        provider = RemoteProvider(name="a", kind="openai", url=server.url, private=True, models=(model,))
        client = ProviderClient(provider)
        endpoint = ProviderEndpoint(client, model, random.Random(1))
        finding = Finding(
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
        endpoint.admit(finding, 0.01, time.monotonic())
        group = ModelEndpoints([endpoint])
        group.references = cast(Any, SimpleNamespace(dim=DIM))
        yield server, endpoint, group
        await client.close()


def work_of(number: int) -> EmbeddingWork:
    prompt = cast(Prompt, SimpleNamespace(ids=range(4), truncated=False))
    return EmbeddingWork(
        texts=["a text"] * number,
        prompts=[prompt] * number,
        instruction="",
        raw=False,
        deadline=time.monotonic() + 30,
        share="",
        preferences=ProviderPreferences(),
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
