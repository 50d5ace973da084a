"""Places at an endpoint: never more requests than it takes, fair shares, and callers who wait or leave."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.router.fault_server import FaultServer, SeenRequest, after, fault_server, reply, right
from tests.router.test_attempts import DIM, RIGHT, ones, work_of
from unmask.errors import DeadlineExceeded, NoProvider, Overloaded
from unmask.router.attempts import answer
from unmask.router.choosing import ProviderPreferences
from unmask.router.embedding_work import EmbeddingWork
from unmask.router.endpoint import ProviderEndpoint
from unmask.router.hedging import MIN_SAMPLES
from unmask.router.model_endpoints import ModelEndpoints
from unmask.router.outbound import ProviderClient
from unmask.router.places import Place, Places, first_place
from unmask.router.providers import ProviderModel, RemoteProvider


def soon() -> float:
    return time.monotonic() + 60


class Busy:
    """A behaviour that waits before it answers, and counts the requests under way."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.under_way, self.peak = seconds, 0, 0

    async def __call__(self, server: FaultServer, request: SeenRequest, writer: asyncio.StreamWriter) -> bool:
        self.under_way += 1
        self.peak = max(self.peak, self.under_way)
        await asyncio.sleep(self.seconds)
        self.under_way -= 1
        return await right(server, request, writer)


def endpoint_at(url: str, name: str = "a", *, max_parallel: int, hedge: bool = False) -> ProviderEndpoint:
    model = ProviderModel(id="m", max_inputs=2, hedge=hedge)
    provider = RemoteProvider(
        name=name, kind="openai", url=url, private=True, max_parallel=max_parallel, models=(model,)
    )
    endpoint = ProviderEndpoint(ProviderClient(provider), model, random.Random(1))
    endpoint.admit(RIGHT, 0.01, time.monotonic())
    return endpoint


def model_of(*endpoints: ProviderEndpoint) -> ModelEndpoints:
    model = ModelEndpoints(endpoints)
    model.references = cast(Any, SimpleNamespace(dim=DIM))
    return model


@pytest.fixture
async def busy() -> AsyncIterator[tuple[Busy, ModelEndpoints]]:
    """A provider that takes two requests at a time, of two texts each."""
    behaviour = Busy(0.01)
    async with fault_server(ones, behaviour) as server:
        model = model_of(endpoint_at(server.url, max_parallel=2))
        yield behaviour, model
        assert [(e.places.num_held, e.places.num_waiting, e.load.requests) for e in model.endpoints] == [(0, 0, 0)]
        await model.endpoints[0].client.close()


def work_for(caller: str, texts: int = 1, seconds: float = 60, **changes: Any) -> EmbeddingWork:
    work = work_of(texts, seconds=seconds)
    for name, value in {"share": caller, **changes}.items():
        object.__setattr__(work, name, value)
    return work


async def test_the_parts_of_a_request_are_sent_as_places_allow(busy: tuple[Busy, ModelEndpoints]) -> None:
    behaviour, model = busy
    routed = await answer(model, None, work_for("a", 41), random.Random(1))
    assert routed.vectors.shape == (41, DIM) and behaviour.peak == 2


async def test_callers_wait_for_a_place_and_all_are_answered(busy: tuple[Busy, ModelEndpoints]) -> None:
    behaviour, model = busy
    works = [work_for(f"caller {number}", 1 + number % 5) for number in range(24)]
    tasks = [asyncio.create_task(answer(model, None, work, random.Random(1))) for work in works]
    await asyncio.sleep(0)
    assert model.waiting_tokens > 0  # which /metrics shows
    routed = await asyncio.gather(*tasks)
    assert [len(one.vectors) for one in routed] == [len(work.prompts) for work in works]
    assert behaviour.peak == 2 and model.waiting_tokens == 0
    assert all([attempt.outcome for attempt in work.attempts] == ["answered"] for work in works)


async def test_a_caller_with_much_to_do_leaves_places_for_others(busy: tuple[Busy, ModelEndpoints]) -> None:
    _, model = busy
    much = asyncio.create_task(answer(model, None, work_for("much", 400), random.Random(1)))
    await asyncio.sleep(0.01)
    for _ in range(5):
        await answer(model, None, work_for("little"), random.Random(1))
    assert not much.done()  # of its 200 parts most are still to come
    much.cancel()
    await asyncio.gather(much, return_exceptions=True)


async def test_a_caller_who_cannot_be_served_in_time_is_refused_at_once(busy: tuple[Busy, ModelEndpoints]) -> None:
    _, model = busy
    endpoint = model.endpoints[0]
    places = [cast(Place, endpoint.places.take("other")) for _ in range(2)]
    endpoint.load.start(8)
    endpoint.places._usual_seconds = 100.0
    with pytest.raises(Overloaded) as refused:
        await answer(model, None, work_for("late", seconds=30), random.Random(1))
    assert refused.value.retry_after >= 1 and endpoint.places.num_waiting == 0
    endpoint.places._usual_seconds = 0.0
    with pytest.raises(DeadlineExceeded):
        await answer(model, None, work_for("late", seconds=1), random.Random(1))
    endpoint.load.finish(8)
    for place in places:
        place.release()


async def test_callers_who_leave_while_they_wait_leave_nothing_behind(busy: tuple[Busy, ModelEndpoints]) -> None:
    _, model = busy
    for steps in range(0, 60, 3):
        tasks = [asyncio.create_task(answer(model, None, work_for(str(n), 5), random.Random(1))) for n in range(6)]
        for _ in range(steps):
            await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        places = model.endpoints[0].places
        assert (places.num_held, places.num_waiting, model.waiting_tokens) == (0, 0, 0)
        assert not places._turns and not places._held


async def test_whoever_waits_moves_when_the_endpoint_is_closed() -> None:
    async with fault_server(ones, after(0.01, reply({}, 401))) as server:
        endpoint = endpoint_at(server.url, max_parallel=1)
        model = model_of(endpoint)
        works = [work_for(str(number)) for number in range(6)]
        tasks = [answer(model, None, work, random.Random(1)) for work in works]
        errors = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(error) for error in errors} == {NoProvider} and len(server.requests) == 1
        assert (endpoint.places.num_held, endpoint.places.num_waiting) == (0, 0)
        await endpoint.client.close()


async def test_the_first_place_of_several_endpoints_is_taken() -> None:
    slow, fast = Busy(60), Busy(0.01)
    async with fault_server(ones, slow) as a, fault_server(ones, fast) as b:
        model = model_of(endpoint_at(a.url, "a", max_parallel=1), endpoint_at(b.url, "b", max_parallel=1))
        holder = asyncio.create_task(
            answer(model, None, work_of(1, preferences=ProviderPreferences(only=("a",))), random.Random(1))
        )
        await asyncio.sleep(0)
        routed = await asyncio.gather(
            *(answer(model, None, work_for(str(number)), random.Random(1)) for number in range(5))
        )
        assert {one.provider for one in routed} == {"b"} and fast.peak == 1
        holder.cancel()
        await asyncio.gather(holder, return_exceptions=True)
        for endpoint in model.endpoints:
            assert (endpoint.places.num_held, endpoint.places.num_waiting) == (0, 0)
            await endpoint.client.close()


async def test_a_hedge_never_waits_for_a_place() -> None:
    async with fault_server(ones, Busy(0.3)) as a, fault_server(ones) as b:
        model = model_of(*(endpoint_at(s.url, name, max_parallel=1, hedge=True) for s, name in ((a, "a"), (b, "b"))))
        for endpoint in model.endpoints:
            for _ in range(MIN_SAMPLES):
                endpoint.usual_seconds.add(4, 0.001)
        model.hedge_budget.deposit(10**6, time.monotonic())
        first = ProviderPreferences(order=("a",))
        place = cast(Place, model.endpoint("b").places.take("other"))
        routed = await answer(model, None, work_for("me", hedged=True, preferences=first), random.Random(1))
        assert (routed.provider, len(b.requests)) == ("a", 0)
        place.release()
        routed = await answer(model, None, work_for("me", hedged=True, preferences=first), random.Random(1))
        assert (routed.provider, len(b.requests)) == ("b", 1)
        for endpoint in model.endpoints:
            assert (endpoint.places.num_held, endpoint.load.requests) == (0, 0)
            await endpoint.client.close()


async def test_a_provider_whose_places_others_had_is_not_blamed(busy: tuple[Busy, ModelEndpoints]) -> None:
    _, model = busy
    endpoint = model.endpoints[0]
    endpoint.load.answers = 100  # so that half a second is ample time
    endpoint.places._limit = lambda: 1
    work = work_for("me", 8, seconds=1)
    task = asyncio.create_task(answer(model, None, work, random.Random(1)))
    await asyncio.sleep(0)
    place = await first_place([endpoint.places], "other", soon())  # between two of its parts
    with pytest.raises(DeadlineExceeded):
        await task
    assert place is not None and [attempt.outcome for attempt in work.attempts] == ["cancelled"]
    assert not endpoint.breaker._outcomes
    place.release()


async def test_an_endpoint_that_is_admitted_again_keeps_count_of_its_requests(
    busy: tuple[Busy, ModelEndpoints],
) -> None:
    _, model = busy
    endpoint = model.endpoints[0]
    task = asyncio.create_task(answer(model, None, work_for("a", 4), random.Random(1)))
    await asyncio.sleep(0.005)
    endpoint.quarantine("is another model")
    endpoint.admit(RIGHT, 0.01, time.monotonic())
    await asyncio.gather(task, return_exceptions=True)
    assert (endpoint.load.requests, endpoint.load.tokens) == (0, 0)  # and not below


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=60), st.integers(1, 6), st.randoms(use_true_random=False))
def test_places_are_shared_fairly(callers: list[str], limit: int, draw: random.Random) -> None:
    """Nobody is given a place while somebody who waits holds fewer, and no free place is left while anybody waits."""

    async def run() -> None:
        places, waiters, held = Places(lambda: limit), [], []
        for caller in callers:
            task = asyncio.create_task(places.obtain(caller, soon()))
            waiters.append((caller, task))
            await asyncio.sleep(0)
        while len(held) < len(callers) or places.num_held:
            await asyncio.sleep(0)
            new = [place for _, task in waiters if task.done() and (place := task.result()) and place not in held]
            held += new
            assert places.num_held <= limit and (places.num_held == limit or not places.num_waiting)
            under_way = [place for place in held if place._is_held]
            if under_way:
                place = draw.choice(under_way)
                counts = Counter(other.caller for other in under_way if other is not place)
                waiting = {caller for caller, task in waiters if not task.done()}
                before = [task for _, task in waiters if not task.done()]
                place.release()
                for _ in range(3):
                    await asyncio.sleep(0)
                served = [task.result() for task in before if task.done()]
                for other in served:
                    assert other is not None
                    assert counts[other.caller] == min(counts[caller] for caller in waiting)
        assert not places._turns and not places._waiting

    asyncio.run(run())


def turns_of(limit: Callable[[], int], waiting: str) -> str:
    """Let callers wait in this order, hand the one place on, and return the order in which they had it."""

    async def run() -> str:
        places, order = Places(limit), ""
        first = places.take("z")

        async def hold(caller: str) -> None:
            nonlocal order
            place = await places.obtain(caller, soon())
            assert place is not None
            order += caller
            place.release()

        tasks = [asyncio.create_task(hold(caller)) for caller in waiting]
        await asyncio.sleep(0)
        assert first is not None and places.take("late") is None
        first.release()
        await asyncio.gather(*tasks)
        return order

    return asyncio.run(run())


def test_a_single_place_changes_hands() -> None:
    assert turns_of(lambda: 1, "aaaabbc") == "abcabaa"


async def test_a_limit_that_rises_lets_waiters_in() -> None:
    limit = 1
    places = Places(lambda: limit)
    assert places.take("a") is not None
    task = asyncio.create_task(places.obtain("b", soon()))
    await asyncio.sleep(0)
    limit = 2
    places.serve()
    assert (await task) is not None and places.num_held == 2


async def test_a_place_that_comes_in_the_moment_of_leaving_goes_to_the_next() -> None:
    one, two = Places(lambda: 1), Places(lambda: 1)
    holders = [one.take("z"), two.take("z")]
    leaving = asyncio.create_task(first_place([one, two], "a", soon()))
    staying = asyncio.create_task(first_place([one, two], "b", soon()))
    await asyncio.sleep(0)
    for place in holders:
        assert place is not None
        place.release()  # the first goes to a, the second to b
    leaving.cancel()
    place = await staying
    assert (await asyncio.gather(leaving, return_exceptions=True))[0].__class__ is asyncio.CancelledError
    assert place is not None and one.num_held + two.num_held == 1
    place.release()
    place.release()  # once more does nothing
    assert (one.num_held, two.num_held, one.num_waiting, two.num_waiting) == (0, 0, 0, 0)


def test_the_wait_is_that_of_a_fair_turn() -> None:
    async def run() -> None:
        places = Places(lambda: 2)
        assert places.wait_seconds("a", 1.0) == 0.0
        assert places.take("a") and places.take("a")
        assert places.wait_seconds("a", 1.0) == 0.5  # a place becomes free every half second
        tasks = [asyncio.create_task(places.obtain("a", soon())) for _ in range(10)]
        await asyncio.sleep(0)
        assert places.wait_seconds("a", 1.0) == 5.5 and places.wait_seconds("b", 1.0) == 1.0
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(run())
