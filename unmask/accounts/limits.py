"""Requests and tokens per minute, by the generic cell rate algorithm.

A bucket is one number: the moment by which everything taken so far would have flowed in evenly. Taking `n` of a
limit of `L` per minute moves it by 60 n / L seconds, and is refused if it would then lie more than a minute ahead.
So a quiet caller may use a whole minute's worth at once, and never more than that beyond the even flow.

The buckets of one server are in its process (`LocalLimiter`), those of several in Redis (`SharedLimiter`).
"""

import asyncio
import ipaddress
import logging
import math
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol

from unmask.errors import MissingPackages, RateLimited, StorageError, UsageError

log = logging.getLogger("unmask")

_PERIOD_S = 60.0

# Behaviour of a server while Redis does not answer. share: it counts alone, up to its share of each limit. refuse: it
# answers 503.
ON_REDIS_FAILURE = ("share", "refuse")

# A Redis nearby answers in a fraction of a millisecond; a caller should not wait long to be told that it is gone.
_REDIS_TIMEOUT_S = 0.25
_REDIS_THREADS = 4
_SERVER_SEEN_S = 30  # a server without a heartbeat for so long is not counted any more


@dataclass(frozen=True)
class BucketTake:
    """An amount to take from one bucket.

    Attributes:
        bucket: its name, such as "key:abc:tokens".
        limit: per minute.
        amount: how many; 0 only reads the status.
    """

    bucket: str
    limit: int
    amount: int


@dataclass(frozen=True)
class RateLimitStatus:
    """The state of a bucket after an amount was taken.

    Attributes:
        limit: per minute.
        remaining: amount that could be taken now.
        reset_s: seconds until it is full again.
    """

    limit: int
    remaining: int
    reset_s: float


class Limiter(Protocol):
    """Holds the buckets, in this process or in Redis."""

    async def take(self, takes: Sequence[BucketTake], kind: str) -> list[RateLimitStatus]:
        """Take all amounts, or none of them.

        Args:
            kind: "requests" or "tokens", for the message.

        Raises:
            RateLimited: one limit does not allow the amount now.
            StorageError: the buckets cannot be reached.
        """
        ...

    def heartbeat(self) -> None:
        """Called every few seconds, from any thread."""
        ...

    def close(self) -> None:
        """Close the connections."""
        ...


class LocalLimiter:
    """Buckets in this process. With N servers, each has its own buckets, and a caller gets up to N times as
    much.

    Args:
        clock: seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._full_at: dict[str, float] = {}
        self._lock = threading.Lock()
        self._swept = clock()

    async def take(self, takes: Sequence[BucketTake], kind: str) -> list[RateLimitStatus]:
        """As `Limiter.take`."""
        return self.take_now(takes, kind)

    def take_now(self, takes: Sequence[BucketTake], kind: str) -> list[RateLimitStatus]:
        """As `Limiter.take`, for callers without an event loop."""
        with self._lock:
            now = self._clock()
            self._sweep(now)
            after: dict[str, float] = {}
            for bucket_take in takes:
                start = max(after.get(bucket_take.bucket, self._full_at.get(bucket_take.bucket, now)), now)
                full_at = start + bucket_take.amount * _PERIOD_S / bucket_take.limit
                wait = full_at - now - _PERIOD_S
                # Sums of sixtieths are not exact; a millionth of a second is not worth a refusal.
                if wait > 1e-6:
                    raise _refused(bucket_take, kind, wait, start - now)
                after[bucket_take.bucket] = full_at
            self._full_at |= after
            return [_level(bucket_take.limit, after[bucket_take.bucket] - now) for bucket_take in takes]

    def heartbeat(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""

    def _sweep(self, now: float) -> None:
        """Forget full buckets: they are what a new one would be."""
        if now - self._swept >= _PERIOD_S:
            self._full_at = {bucket: full_at for bucket, full_at in self._full_at.items() if full_at > now}
            self._swept = now


# KEYS are buckets; ARGV is the period, then a limit and an amount for each. Answers {0, seconds ahead...} or
# {n, seconds to wait, seconds ahead} for the bucket that refuses. The time is Redis' own, so that no server's clock
# matters, counted from late 2026, so that a double has digits left for its fraction.
_TAKE = """
local time = redis.call('TIME')
local now = time[1] - 1790000000 + time[2] / 1000000
local period = tonumber(ARGV[1])
local after = {}
for i, bucket in ipairs(KEYS) do
  local limit, amount = tonumber(ARGV[2 * i]), tonumber(ARGV[2 * i + 1])
  local start = math.max(after[bucket] or tonumber(redis.call('GET', bucket) or now), now)
  local full_at = start + amount * period / limit
  local wait = full_at - now - period
  if wait > 1e-6 then
    return {i, string.format('%.17g', wait), string.format('%.17g', start - now)}
  end
  after[bucket] = full_at
end
local answer = {0}
for i, bucket in ipairs(KEYS) do
  local ahead = after[bucket] - now
  if ahead > 0 then
    redis.call('SET', bucket, string.format('%.17g', after[bucket]), 'PX', math.ceil(ahead * 1000))
  end
  answer[i + 1] = string.format('%.17g', ahead)
end
return answer
"""


class SharedLimiter:
    """Buckets in Redis, so that several servers count together.

    When Redis does not answer, requests stop asking it until `heartbeat` finds it again. Meanwhile, with
    `on_redis_failure="share"`, each server counts by itself, against the limit divided by the number of servers last
    seen. Together they admit at most the limit and the burst that new buckets allow. With "refuse" no request that has
    a limit is admitted, and callers get a 503.

    Args:
        url: redis://[:password@]host[:port][/number], or rediss:// for TLS.
        on_redis_failure: one of `ON_REDIS_FAILURE`.
        prefix: of every name in Redis, to tell several installations apart.

    Raises:
        UsageError: the URL is wrong, or the client library is missing.
        StorageError: Redis does not answer now, which at the start is rather a wrong address than bad luck.
    """

    def __init__(self, url: str, *, on_redis_failure: str = "share", prefix: str = "unmask") -> None:
        try:
            import redis
            from redis.backoff import NoBackoff
            from redis.retry import Retry
        except ImportError as error:
            raise MissingPackages("limits in Redis need", "redis") from error
        if on_redis_failure not in ON_REDIS_FAILURE:
            raise UsageError(f"on_redis_failure={on_redis_failure!r}: choose one of {', '.join(ON_REDIS_FAILURE)}")
        try:
            self._redis = redis.Redis.from_url(
                url,
                socket_timeout=_REDIS_TIMEOUT_S,
                socket_connect_timeout=_REDIS_TIMEOUT_S,
                retry=Retry(NoBackoff(), 1),  # a connection that Redis closed while it lay idle
                decode_responses=True,
            )
        except ValueError as error:
            raise UsageError("the URL of the limits cannot be read: write redis://host:6379/0") from error
        self._failures = (redis.RedisError, OSError)
        at = self._redis.connection_pool.connection_kwargs
        self.address = str(at.get("path") or f"{at.get('host', 'localhost')}:{at.get('port', 6379)}")
        self._refuse = on_redis_failure == "refuse"
        self._prefix = prefix
        self._id = secrets.token_hex(8)
        self._servers = 1
        self._script = self._redis.register_script(_TAKE)
        self._alone = LocalLimiter()
        self._threads = ThreadPoolExecutor(_REDIS_THREADS, thread_name_prefix="unmask-limits")
        self._lost = False
        try:
            self._count_servers()
        except self._failures as error:
            self.close()
            raise StorageError(
                f"the Redis for limits at {self.address} does not answer ({error}): start it, or serve without --limits"
            ) from error

    async def take(self, takes: Sequence[BucketTake], kind: str) -> list[RateLimitStatus]:
        """As `Limiter.take`."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self.take_now, takes, kind)

    def take_now(self, takes: Sequence[BucketTake], kind: str) -> list[RateLimitStatus]:
        """As `Limiter.take`, for callers without an event loop."""
        if not self._lost:
            numbers = [number for bucket_take in takes for number in (bucket_take.limit, bucket_take.amount)]
            names = [f"{self._prefix}:{bucket_take.bucket}" for bucket_take in takes]
            try:
                first, *seconds = self._script(names, [_PERIOD_S, *numbers])
            except self._failures as error:
                self._lose(error)
            else:
                if first:
                    raise _refused(takes[first - 1], kind, float(seconds[0]), float(seconds[1]))
                return [
                    _level(bucket_take.limit, float(ahead)) for bucket_take, ahead in zip(takes, seconds, strict=True)
                ]
        if self._refuse:
            raise StorageError(f"the Redis for limits at {self.address} does not answer")
        return self._alone.take_now([self._share(bucket_take) for bucket_take in takes], kind)

    def heartbeat(self) -> None:
        """Tell the other servers that this one is running, and try to reach Redis again."""
        try:
            self._count_servers()
        except self._failures as error:
            self._lose(error)
            return
        if self._lost:
            log.warning("the Redis for limits at %s is back", self.address)
            self._lost = False

    def close(self) -> None:
        """Close the connections."""
        self._threads.shutdown()
        self._redis.close()

    def _count_servers(self) -> None:
        now = time.time()
        servers: Any = f"{self._prefix}:servers"
        with self._redis.pipeline() as pipe:
            pipe.zadd(servers, {self._id: now})
            pipe.zremrangebyscore(servers, "-inf", now - _SERVER_SEEN_S)
            pipe.zcard(servers)
            self._servers = max(1, pipe.execute()[-1])

    def _lose(self, error: Exception) -> None:
        if not self._lost:
            self._lost = True
            how = "requests with limits are refused" if self._refuse else f"each of {self._servers} servers counts"
            log.error("the Redis for limits at %s does not answer (%s): %s", self.address, type(error).__name__, how)

    def _share(self, bucket_take: BucketTake) -> BucketTake:
        if bucket_take.amount > bucket_take.limit:
            return bucket_take  # too large at any time
        limit = max(1, bucket_take.limit // self._servers)
        return replace(bucket_take, limit=limit, amount=min(bucket_take.amount, limit))


def _level(limit: int, ahead: float) -> RateLimitStatus:
    return RateLimitStatus(limit, max(0, math.floor((_PERIOD_S - ahead) * limit / _PERIOD_S + 1e-6)), max(0.0, ahead))


def _refused(bucket_take: BucketTake, kind: str, wait: float, ahead: float) -> RateLimited:
    unit = "RPM" if kind == "requests" else "TPM"
    if bucket_take.amount > bucket_take.limit:
        return RateLimited(
            f"Request too large on {kind} per min ({unit}): Limit {bucket_take.limit}, Requested {bucket_take.amount}. "
            "Send fewer at a time.",
            kind,
            None,
        )
    used = bucket_take.limit - _level(bucket_take.limit, ahead).remaining
    return RateLimited(
        f"Rate limit reached on {kind} per min ({unit}): Limit {bucket_take.limit}, Used {used}, "
        f"Requested {bucket_take.amount}. Please try again in {wait:.3g}s.",
        kind,
        wait,
    )


def caller_network(address: str) -> str:
    """Return the network that counts as one caller: an IPv4 address, or the /64 of an IPv6 address.

    A household or a rented server has a whole /64, so a limit per IPv6 address would limit nobody.
    """
    if ":" not in address:
        return address
    try:
        peer = ipaddress.IPv6Address(address)
    except ValueError:
        return address
    return str(peer.ipv4_mapped or ipaddress.IPv6Network((int(peer), 64), strict=False))
