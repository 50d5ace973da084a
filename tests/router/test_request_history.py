"""Counts and percentiles of the last requests to an endpoint: right at any rate, and for an idle endpoint."""

import random

from tests.router.test_attempts import fast_endpoint
from unmask.api.metrics import Metrics
from unmask.router import PublicNames
from unmask.router.model_endpoints import ModelEndpoints
from unmask.router.recent_intervals import RecentIntervals
from unmask.router.request_history import DAY_S, RequestHistory

START = 1_000_000.0


def test_every_request_of_the_day_counts_at_a_high_rate() -> None:
    history = RequestHistory()
    for number in range(120_000):  # 200 a second
        history.add("timeout" if number < 30_000 else "answered", 10, 0.5, START + number / 200)
    now = START + 600
    assert history.outcomes(DAY_S, now) == {"timeout": 30_000, "answered": 90_000}
    assert history.uptime(DAY_S, now) == 0.75 and history.uptime(300, now) == 1.0
    assert (latency := history.latency(now)) is not None and latency.p99 == 0.5
    assert (throughput := history.throughput(now)) is not None and throughput.p50 == 20


def test_an_idle_endpoint_forgets_after_a_day() -> None:
    history = RequestHistory()
    for _ in range(200):
        history.add("answered", 10, 0.5, START)
    assert history.uptime(DAY_S, START + DAY_S) == 1.0 and history.latency(START + DAY_S) is None
    later = START + DAY_S + 120
    assert history.outcomes(DAY_S, later) == {} and history.uptime(DAY_S, later) is None


def test_outcomes_that_are_nobodys_fault_change_no_uptime() -> None:
    history = RequestHistory()
    for outcome in ("rate_limited", "rejected", "cancelled", "discarded"):
        for _ in range(100):
            history.add(outcome, 10, 0.5, START)
    assert history.uptime(300, START) is None
    for number in range(100):
        history.add("answered" if number else "malformed", 10, 0.5, START)
    assert history.uptime(300, START) == 0.99


def test_memory_is_bounded_and_a_clock_that_was_set_back_loses_nothing() -> None:
    class Count:
        def __init__(self, start: int) -> None:
            self.start, self.number = start, 0

    intervals = RecentIntervals(Count, 10, 3)
    for second in [*range(100), 55]:
        intervals.current(second).number += 1
    assert [(count.start, count.number) for count in intervals.started_after(-1)] == [(70, 10), (80, 10), (90, 11)]
    assert [count.start for count in intervals.started_after(80)] == [90]


async def test_metrics_drop_providers_that_are_gone_and_keep_what_was_counted() -> None:
    first, second = (fast_endpoint(name, "http://127.0.0.1:9") for name in "ab")
    for endpoint in (first, second):
        endpoint.record("timeout", "answer", 1, None, 1.0)
    both, metrics, names = ModelEndpoints([first, second]), Metrics(), PublicNames.of(["a", "b"], hides=False)
    metrics.set_providers([both], names)
    for name in (b"a", b"b"):
        assert b'outcome="timeout",provider="%s",reason="answer"} 1.0' % name in metrics.exposition()
    alone = ModelEndpoints([first])
    alone.inherit(both)
    metrics.set_providers([alone], names)
    text = metrics.exposition()
    assert b'outcome="timeout",provider="a",reason="answer"} 1.0' in text and b'provider="b"' not in text
    for endpoint in (first, second):
        await endpoint.client.close()


def test_random_times_are_counted_as_a_list_counts_them() -> None:
    draw, history = random.Random(4), RequestHistory()
    times = sorted(START + draw.uniform(0, 2 * DAY_S) for _ in range(3_000))
    for at in times:
        history.add("answered", 1, 0.5, at)
    now = START + 2 * DAY_S
    for seconds in (300, 1800, DAY_S):
        exact = sum(at > now - seconds for at in times)
        minute_more = sum(at > now - seconds - 60 for at in times)
        assert exact <= history.outcomes(seconds, now)["answered"] <= minute_more
