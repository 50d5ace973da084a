"""The load of an endpoint: peak EWMA of seconds per token, tokens in flight, how many requests it takes at a time.

All times are handed in, in seconds of a monotonic clock.
"""

import math

# Time constant of the average, as in Finagle's PeakEwma.
DECAY_S = 10.0

# A request costs as much as one of this many tokens, however short it is: the network and the overhead of the server.
MIN_TOKENS = 256

# A failure counts as a request that took this long. Otherwise a provider that refuses at once would look fast and get
# more requests.
PENALTY_S = 5.0
MAX_PENALTY_S = 300.0

_SLOW_START_S = 30.0
_SLOW_START_SHARE = 0.1

_DECREASE = 0.7

_NEWEST_SHARE = 0.1  # of the newest answer in the usual duration

_LEAST_S = 1e-6  # of an answer


class PeakEwma:
    """An average that rises at once and falls slowly, so that a provider that becomes slow is noticed at once.

    Finagle's PeakEwma: an observation above the average replaces it, one below it moves it. Between observations it
    decays towards 0, so that an idle provider is tried again.

    Args:
        value: first average; must be measured, since a small one would look free.
        now: time of it.
    """

    def __init__(self, value: float, now: float) -> None:
        self._value, self._at = value, now

    def observe(self, value: float, now: float) -> None:
        """Take one observation into the average."""
        weight = math.exp(-max(0.0, now - self._at) / DECAY_S)
        self._value = max(value, self._value * weight + value * (1 - weight))
        self._at = max(now, self._at)

    def read(self, now: float) -> float:
        """Return the average, decayed."""
        return self._value * math.exp(-max(0.0, now - self._at) / DECAY_S)


class EndpointLoad:
    """Load of one endpoint, as seen by this process.

    Args:
        max_parallel: most HTTP requests at a time.
        seconds_per_token: of the admission run.
        now: time.

    Attributes:
        tokens: tokens in flight.
        requests: requests in flight.
        answers: good answers so far, which the expected duration was learnt from.
        latency: usual seconds of a good answer, whatever its size.
        throughput: usual tokens per second of one.
    """

    def __init__(self, max_parallel: int, seconds_per_token: float, now: float) -> None:
        self.tokens = 0
        self.requests = 0
        self._max_parallel = max_parallel
        self.restart(seconds_per_token, now)

    def restart(self, seconds_per_token: float, now: float) -> None:
        """Forget all answers and failures, but not the requests in flight. Arguments as for the class."""
        self.answers = 0
        self._rate = PeakEwma(seconds_per_token, now)
        self._typical = seconds_per_token
        self.latency = seconds_per_token * MIN_TOKENS
        self.throughput = 1 / seconds_per_token
        self._limit = float(self._max_parallel)
        self._successes = 0

    @property
    def limit(self) -> int:
        """Most HTTP requests that may be in flight now."""
        return int(self._limit)

    def cost(self, tokens: int, now: float) -> float:
        """Return the load that a request of `tokens` would meet and add, to compare endpoints.

        It is no duration: it counts the tokens in flight although the latencies contain them already, and failures
        count as very slow answers.
        """
        return self._rate.read(now) * (self.tokens + max(tokens, MIN_TOKENS))

    def expected_seconds(self, tokens: int) -> float:
        """Return the seconds that a request of `tokens` usually takes now, by the last good answers."""
        return self._typical * max(tokens, MIN_TOKENS)

    def start(self, tokens: int) -> None:
        """Count a request in."""
        self.tokens += tokens
        self.requests += 1

    def finish(self, tokens: int) -> None:
        """Count a request out, whatever became of it."""
        self.tokens -= tokens
        self.requests -= 1

    def succeeded(self, tokens: int, seconds: float, now: float) -> None:
        """Take the duration of a good answer into account."""
        rate = seconds / max(tokens, MIN_TOKENS)
        self._rate.observe(rate, now)
        self._typical += _NEWEST_SHARE * (rate - self._typical)
        self.latency += _NEWEST_SHARE * (seconds - self.latency)
        self.throughput += _NEWEST_SHARE * (tokens / max(seconds, _LEAST_S) - self.throughput)
        self.answers += 1
        self._successes += 1
        if self._successes >= self._limit:
            self._limit = min(self._limit + 1, self._max_parallel)
            self._successes = 0

    def overtaken(self, tokens: int, seconds: float, now: float) -> None:
        """Count a request that had no answer after `seconds`, when another endpoint answered it."""
        self._rate.observe(max(seconds / max(tokens, MIN_TOKENS), self._rate.read(now)), now)

    def failed(self, tokens: int, now: float, *, retry_after: float | None = None, busy: bool = False) -> None:
        """Take a failure into account as a very slow answer.

        Args:
            tokens: of the request.
            now: time.
            retry_after: seconds that the provider asked for.
            busy: it said that it has too much to do, so fewer requests are sent at a time.
        """
        seconds = max(PENALTY_S, min(retry_after or 0.0, MAX_PENALTY_S))
        self._rate.observe(max(seconds / max(tokens, MIN_TOKENS), self._rate.read(now)), now)
        if busy:
            self._limit = max(1.0, self._limit * _DECREASE)
            self._successes = 0


def slow_start(seconds: float) -> float:
    """Return the share of its traffic that an endpoint gets `seconds` after it was admitted or came back."""
    return min(1.0, max(_SLOW_START_SHARE, seconds / _SLOW_START_S))
