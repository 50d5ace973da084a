"""Limits in a real Redis: the same algorithm, several servers, and a Redis that goes away."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis
from redis.connection import AbstractConnection

from tests.accounts.redis_server import RedisServer, redis_server
from unmask.accounts import Accounts, Caller
from unmask.accounts.keys import Key, KeySettings
from unmask.accounts.limits import BucketTake, LocalLimiter, RateLimitStatus, SharedLimiter
from unmask.errors import RateLimited, StorageError, UsageError

Make = Callable[..., SharedLimiter]


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with redis_server() as running:
        yield running


@pytest.fixture
def make(server: RedisServer) -> Iterator[Make]:
    made: list[SharedLimiter] = []

    def one(**options: str) -> SharedLimiter:
        made.append(SharedLimiter(server.url, **options))
        return made[-1]

    yield one
    for limiter in made:
        limiter.close()


def outcome(limiter: SharedLimiter | LocalLimiter, draws: list[BucketTake]) -> list[RateLimitStatus] | RateLimited:
    try:
        return limiter.take_now(draws, "tokens")
    except RateLimited as refused:
        return refused


def test_it_decides_as_the_limiter_of_one_server_does(make: Make):
    # That one is tested against an exact model. The clocks differ by the moments between the two calls, at most by the
    # longest time that both took together.
    shared, local, chance = make(), LocalLimiter(), random.Random(1)
    refusals, apart = 0, 0.01
    for _ in range(300):
        draws = [
            BucketTake("account", 30_000, chance.randint(0, 900)),
            BucketTake("key", 20_000, chance.randint(0, 900)),
        ]
        began = time.monotonic()
        ours, theirs = outcome(shared, draws), outcome(local, draws)
        apart = max(apart, time.monotonic() - began)
        if isinstance(ours, RateLimited) and isinstance(theirs, RateLimited):
            refusals += 1
            assert ours.retry_after == pytest.approx(theirs.retry_after, abs=2 * apart)
        elif isinstance(ours, list) and isinstance(theirs, list):
            for one, other in zip(ours, theirs, strict=True):
                assert one.limit == other.limit
                assert one.remaining == pytest.approx(other.remaining, abs=2 * apart * one.limit / 60 + 1)
                assert one.reset_s == pytest.approx(other.reset_s, abs=2 * apart)
        else:  # a hair's breadth apart, at the edge
            refused = ours if isinstance(ours, RateLimited) else theirs
            assert isinstance(refused, RateLimited)
            assert (refused.retry_after or 0) <= 2 * apart
            local._full_at = {}
            shared._redis.flushall()
    assert refusals > 50


def test_servers_together_let_through_what_one_would(make: Make):
    servers = [make() for _ in range(3)]
    outcomes: list[list[RateLimitStatus] | RateLimited] = []

    def spend(limiter: SharedLimiter) -> None:
        outcomes.extend(outcome(limiter, [BucketTake("key", 100, 1)]) for _ in range(60))

    began = time.monotonic()
    threads = [threading.Thread(target=spend, args=(limiter,)) for limiter in servers for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    flowed_in = (time.monotonic() - began) * 100 / 60
    let_through = sum(isinstance(one, list) for one in outcomes)
    assert len(outcomes) == 360
    assert 100 <= let_through <= 100 + flowed_in + 1


def test_all_draws_or_none(make: Make):
    limiter = make()
    draws = [BucketTake("account", 60, 10), BucketTake("key", 60, 61)]
    assert isinstance(outcome(limiter, draws), RateLimited)
    assert limiter.take_now([BucketTake("account", 60, 0)], "requests")[0].remaining == 60


def test_what_is_full_leaves_nothing_behind(make: Make, server: RedisServer):
    make().take_now([BucketTake("key", 60, 60), BucketTake("other", 60, 0)], "requests")
    with redis.Redis.from_url(server.url, decode_responses=True) as client:
        assert client.get("unmask:other") is None
        assert 0 < client.pttl("unmask:key") <= 60_001  # pyright: ignore[reportOperatorIssue]


def test_without_redis_each_server_counts_its_share(make: Make, server: RedisServer):
    first, second = make(), make()
    first.heartbeat()
    server.kill()
    for limiter in (first, second):
        answers = [outcome(limiter, [BucketTake("key", 100, 1)]) for _ in range(60)]
        assert sum(isinstance(answer, list) for answer in answers) in (50, 51)
        refused = answers[-1]
        assert isinstance(refused, RateLimited)
        assert "Limit 50" in str(refused)
    # What fits the whole minute is not called too large, and what does not still is.
    assert isinstance(outcome(first, [BucketTake("new", 100, 80)]), list)
    too_large = outcome(first, [BucketTake("new", 100, 101)])
    assert isinstance(too_large, RateLimited)
    assert "Limit 100, Requested 101" in str(too_large)


def test_a_lost_redis_is_asked_once_and_comes_back(
    make: Make, server: RedisServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    limiter = make()
    server.kill()
    limiter.take_now([BucketTake("key", 60, 1)], "requests")
    attempts, connect = [], AbstractConnection.connect

    def counted(connection: AbstractConnection) -> None:
        attempts.append(connection)
        connect(connection)

    monkeypatch.setattr(AbstractConnection, "connect", counted)
    for _ in range(100):
        limiter.take_now([BucketTake("other", 6000, 1)], "requests")
    assert attempts == [], "a caller waited for a Redis that is gone"
    limiter.heartbeat()
    assert attempts != []
    assert [record.message for record in caplog.records if "does not answer" in record.message] != []
    assert len(caplog.records) == 1, "once, not per request"
    server.start()
    limiter.heartbeat()
    assert "is back" in caplog.records[-1].message
    assert limiter.take_now([BucketTake("key", 60, 1)], "requests")[0].remaining == 59
    with redis.Redis.from_url(server.url) as client:
        assert client.exists("unmask:key")


def test_without_redis_nothing_passes_if_so_chosen(make: Make, server: RedisServer):
    limiter = make(on_redis_failure="refuse")
    server.kill()
    for _ in range(2):
        with pytest.raises(StorageError, match="does not answer"):
            limiter.take_now([BucketTake("key", 60, 1)], "requests")
    server.start()
    limiter.heartbeat()
    assert len(limiter.take_now([BucketTake("key", 60, 1)], "requests")) == 1


def test_a_redis_that_is_not_there_is_said_at_the_start(tmp_path: Path):
    with pytest.raises(StorageError, match=f"{tmp_path}/nothing does not answer .*: start it"):
        SharedLimiter(f"unix://{tmp_path}/nothing")
    with pytest.raises(UsageError, match="write redis://host:6379/0") as error:
        SharedLimiter("http://:secret@host")
    assert "secret" not in str(error.value)


async def test_accounts_of_two_servers_share_a_keys_minute(make: Make, url: str, tmp_path: Path):
    services = [Accounts(url, pepper=tmp_path / "pepper", limiter=make()) for _ in range(2)]
    key = Key(
        id="k",
        account_id="acct_1",
        settings=KeySettings(requests_per_minute=3),
        spent=0,
        created_at=0,
        revoked_at=None,
        used_at=None,
    )
    caller = Caller(account_id="acct_1", key=key, plan_requests_per_minute=None, plan_tokens_per_minute=None)
    try:
        for turn in range(3):
            level = await services[turn % 2].limit(caller, "requests", 1)
            assert level is not None
            assert level.remaining == 2 - turn
        with pytest.raises(RateLimited):
            await services[1].limit(caller, "requests", 1)
    finally:
        for service in services:
            service.close()


async def test_tries_to_sign_in_are_counted_together(make: Make, server: RedisServer, tmp_path: Path):
    file = f"sqlite:///{tmp_path / 'accounts.sqlite'}"
    services = [Accounts(file, pepper=tmp_path / "pepper", limiter=make()) for _ in range(2)]
    try:
        for turn in range(10):
            await services[turn % 2].membership._throttle("203.0.113.7", "one@example.org")
        with pytest.raises(RateLimited, match="Too many tries"):
            await services[0].membership._throttle("203.0.113.8", "ONE@example.org ")
        with redis.Redis.from_url(server.url, decode_responses=True) as client:
            names = client.keys("*")
        assert "one@example" not in repr(names)
    finally:
        for service in services:
            service.close()
