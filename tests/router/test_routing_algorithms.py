"""The pure parts of the router: load, breaker, retry budget, choice. The clock is handed in, so nothing waits."""

import asyncio
import math
import random
from collections import Counter
from datetime import date

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from provider_choice import FAILING, SLOW, simulate

from unmask.router import breaker as breakers
from unmask.router.breaker import Breaker
from unmask.router.choosing import Candidate, ProviderPreferences, choose, permitted
from unmask.router.daily_cost import DailyCost
from unmask.router.hedging import MAX_TOKENS, MIN_DELAY_S, MIN_SAMPLES, UsualSeconds, first_result
from unmask.router.load import DECAY_S, MIN_TOKENS, PENALTY_S, EndpointLoad, PeakEwma, slow_start
from unmask.router.retry_budget import LIFE_S, RESERVE_PER_S, SHARE, RetryBudget
from unmask.router.signals import SIGNALS
from unmask.router.token_counts import TokenCounts

steps = st.lists(st.tuples(st.floats(0, 30), st.floats(1e-6, 100)), min_size=1, max_size=40)


@given(st.floats(1e-6, 10), steps)
def test_the_average_follows_its_closed_form(first: float, observations: list[tuple[float, float]]) -> None:
    average, now, expected = PeakEwma(first, 0.0), 0.0, first
    for seconds, value in observations:
        now += seconds
        weight = math.exp(-seconds / DECAY_S)
        expected = max(value, expected * weight + value * (1 - weight))
        average.observe(value, now)
        assert average.read(now) == pytest.approx(expected, rel=1e-9) and average.read(now) >= value
        assert average.read(now + DECAY_S) == pytest.approx(expected / math.e, rel=1e-9)


def test_a_clock_that_stands_still_or_steps_back_does_no_harm() -> None:
    average = PeakEwma(1.0, 100.0)
    average.observe(0.5, 100.0)
    average.observe(0.5, 50.0)
    assert average.read(20.0) == 1.0


@given(st.lists(st.tuples(st.floats(0, 3), st.booleans(), st.integers(1, 300_000)), max_size=120))
def test_withdrawals_never_exceed_the_budget_in_any_window(events: list[tuple[float, bool, int]]) -> None:
    budget, now = RetryBudget(), 0.0
    deposits: list[tuple[float, int]] = []
    withdrawals: list[tuple[float, int]] = []
    for seconds, is_deposit, tokens in events:
        now += seconds
        if is_deposit:
            budget.deposit(tokens, now)
            deposits.append((now, tokens))
        else:
            within = sum(amount for at, amount in withdrawals if at > now - LIFE_S) + tokens
            allowed = SHARE * sum(amount for at, amount in deposits if at > now - LIFE_S) + RESERVE_PER_S * LIFE_S
            done = budget.withdraw(tokens, now)
            assert done == (within <= allowed)
            withdrawals += [(now, tokens)] * done


class BreakerMachine(RuleBasedStateMachine):
    """The breaker against a plain model of its rules."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.breaker = Breaker(random.Random(1))
        self.run = 0
        self.outcomes: list[tuple[float, bool]] = []
        self.opened_for = 0.0

    @rule(seconds=st.floats(0.001, 40))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: self.breaker.state == "closed")
    @rule()
    def succeed(self) -> None:
        self.breaker.succeeded(self.now)
        self.run = 0
        self.outcomes.append((self.now, True))

    @precondition(lambda self: self.breaker.state == "closed")
    @rule(in_run=st.booleans(), alone=st.booleans())
    def fail(self, in_run: bool, alone: bool) -> None:
        self.run += in_run
        self.outcomes.append((self.now, False))
        recent = [ok for at, ok in self.outcomes if at > self.now - breakers.WINDOW_S]
        trips = self.run >= breakers.RUN or (
            len(recent) >= breakers.MIN_REQUESTS and sum(recent) < breakers.MIN_SUCCESS * len(recent)
        )
        self.breaker.failed(self.now, in_run=in_run, alone=alone)
        assert (self.breaker.state == "open") == trips
        if trips:
            most = breakers.ALONE_MAX_S if alone else breakers.MAX_S
            assert self.now + breakers.FIRST_S / 2 <= self.breaker.probe_at <= self.now + most
            self.run, self.outcomes = 0, []

    @precondition(lambda self: self.breaker.state == "open")
    @rule(passed=st.booleans())
    def probe(self, passed: bool) -> None:
        due = self.now >= self.breaker.probe_at
        assert self.breaker.probe(self.now) == due
        if due:
            assert self.breaker.state == "half_open" and not self.breaker.probe(self.now)
            self.breaker.failed(self.now)  # a request that began before it opened
            self.breaker.succeeded(self.now)
            assert self.breaker.state == "half_open"
            self.breaker.probed(passed, self.now)
            assert self.breaker.state == ("closed" if passed else "open")

    @rule(passed=st.booleans())
    def hold(self, passed: bool) -> None:
        self.breaker.hold(self.now)
        self.breaker.succeeded(self.now)
        self.breaker.failed(self.now)
        due = self.breaker.probe_at
        self.breaker.hold(self.now + 0.1)  # a request that began before
        assert self.breaker.state == "held" and self.breaker.probe_at == due <= self.now + breakers.MAX_S
        self.now = max(self.now, due)
        assert self.breaker.probe(self.now) and not self.breaker.probe(self.now)
        self.breaker.probed(passed, self.now)
        assert self.breaker.state == ("closed" if passed else "held")
        self.breaker.close()
        self.run, self.outcomes = 0, []

    @invariant()
    def only_closed_lets_in(self) -> None:
        assert self.breaker.lets_in() == (self.breaker.state == "closed")


TestBreaker = BreakerMachine.TestCase
TestBreaker.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_breaker_that_is_held_asks_for_a_canary_within_seconds_and_then_less_often() -> None:
    breaker, now, waits = Breaker(random.Random(3)), 0.0, []
    breaker.hold(now)
    for _ in range(8):
        assert breaker.state == "held"
        waits.append(breaker.probe_at - now)
        now = breaker.probe_at
        assert breaker.probe(now)
        breaker.probed(False, now)
    assert waits[0] <= breakers.FIRST_S and breakers.MAX_S / 2 <= waits[-1] <= breakers.MAX_S


def test_a_breaker_stays_open_longer_each_time() -> None:
    breaker, now, waits = Breaker(random.Random(3)), 0.0, []
    for _ in range(9):
        for _ in range(breakers.RUN):
            breaker.failed(now)
        waits.append(breaker.probe_at - now)
        now = breaker.probe_at
        assert breaker.probe(now)
        breaker.probed(False, now)
        waits.append(breaker.probe_at - now)
        now = breaker.probe_at
        assert breaker.probe(now)
        breaker.probed(False, now)
    assert 2.5 <= waits[0] <= 5 < waits[2] and max(waits) <= 300
    assert all(wait >= 150 for wait in waits[8:])


candidates = st.lists(
    st.builds(
        Candidate,
        name=st.sampled_from("abcdefgh"),
        priority=st.integers(0, 3),
        price=st.sampled_from([0, 1, 4_000_000, 20_000_000]),
        share=st.floats(0.1, 1),
        load=st.floats(0, 1000),
        seconds=st.floats(0, 1000),
        latency=st.floats(0, 1000),
        throughput=st.floats(0, 1000),
    ),
    max_size=8,
    unique_by=lambda candidate: candidate.name,
)
preferences = st.builds(
    ProviderPreferences,
    order=st.lists(st.sampled_from("abcdefgh"), max_size=2).map(tuple),
    sort=st.sampled_from([None, "price", "latency", "throughput"]),
)


@given(candidates, preferences, st.booleans(), st.integers(0, 1000))
def test_a_choice_is_a_candidate_of_the_first_group(
    group: list[Candidate], preference: ProviderPreferences, by_price_alone: bool, seed: int
) -> None:
    chosen = choose(group, preference, random.Random(seed), by_price_alone=by_price_alone)
    if not group:
        assert chosen is None
        return
    assert chosen in group and chosen is not None
    named = [name for name in preference.order if name in {candidate.name for candidate in group}]
    if named:
        assert chosen.name == named[0]
        return
    if by_price_alone and preference.sort is None:  # the tier batch, whatever the priority
        assert (chosen.price, chosen.load) == min((candidate.price, candidate.load) for candidate in group)
        return
    first = [candidate for candidate in group if candidate.priority == min(c.priority for c in group)]
    assert chosen in first
    if preference.sort == "price":
        assert chosen.price == min(candidate.price for candidate in first)
    elif preference.sort == "latency":
        assert chosen.latency == min(candidate.latency for candidate in first)
    elif preference.sort == "throughput":
        assert chosen.throughput == max(candidate.throughput for candidate in first)
    elif len(first) == 2:
        assert chosen.load == min(candidate.load for candidate in first)


@given(
    st.sampled_from("abc"),
    st.sampled_from(["none", "30d", "trains"]),
    st.sets(st.sampled_from("abc")),
    st.sets(st.sampled_from("abc")),
    st.sampled_from(["allow", "deny"]),
)
def test_preferences_filter(name: str, data: str, only: set[str], ignore: set[str], collection: str) -> None:
    preference = ProviderPreferences(only=tuple(only), ignore=tuple(ignore), data_collection=collection)  # pyright: ignore[reportArgumentType]
    expected = name not in ignore and (not only or name in only) and (collection == "allow" or data == "none")
    assert permitted(name, data, preference) == expected
    alone = ProviderPreferences(order=("a", "b"), allow_fallbacks=False)
    assert permitted(name, data, alone) == (name == "a")


def test_cheap_endpoints_get_most_and_not_all() -> None:
    group = [Candidate(name, 0, price, 1.0, 1.0, 1.0) for name, price in (("cheap", 1), ("twice", 2), ("ten", 10))]
    draw = random.Random(5)
    first = Counter(choose([one], ProviderPreferences(), draw) for one in group)
    assert len(first) == 3
    drawn = Counter(
        candidate.name for _ in range(4000) for candidate in [choose(group, ProviderPreferences(), draw)] if candidate
    )
    assert drawn["cheap"] > drawn["twice"] > drawn["ten"]


def test_traffic_leaves_an_endpoint_that_becomes_slow_and_returns() -> None:
    counts = simulate(SLOW)
    before = sum(count["a"] for count in counts[5:10]) / 5
    assert 20 < before < 50
    assert all(count["a"] <= 0.25 * before for count in counts[12:40])
    assert sum(count["a"] for count in counts[100:110]) / 10 > 0.5 * before


def test_an_endpoint_that_fails_fast_loses_traffic() -> None:
    counts = simulate(FAILING, failing="a")
    assert sum(count["a"] for count in counts[2:]) < 0.1 * sum(sum(count.values()) for count in counts[2:])


@given(st.lists(st.sampled_from(["good", "bad", "busy"]), max_size=200))
def test_the_limit_adapts_within_its_bounds(outcomes: list[str]) -> None:
    load, now = EndpointLoad(8, 0.001, 0.0), 0.0
    for outcome in outcomes:
        now += 0.1
        before = load.limit
        if outcome == "good":
            load.succeeded(10, 0.1, now)
            assert before <= load.limit <= before + 1
        else:
            load.failed(10, now, busy=outcome == "busy")
            assert load.limit <= before and (outcome == "busy" or load.limit == before)
        assert 1 <= load.limit <= 8
    for _ in range(200):
        load.succeeded(10, 0.1, now)
    assert load.limit == 8


def test_a_penalty_is_never_below_what_is_known() -> None:
    load = EndpointLoad(8, 1.0, 0.0)
    load.failed(1000, 0.0)
    assert load.cost(1000, 0.0) == pytest.approx(1000)  # slower than the penalty already
    fresh = EndpointLoad(8, 1e-6, 0.0)
    fresh.failed(1000, 0.0)
    assert fresh.cost(1000, 0.0) == pytest.approx(PENALTY_S)
    fresh.failed(1000, 0.0, retry_after=60)
    assert fresh.cost(1000, 0.0) == pytest.approx(60)
    fresh.failed(1000, 0.0, retry_after=1e9)
    assert fresh.cost(1000, 0.0) == pytest.approx(300)


def test_the_usual_latency_and_speed_are_of_answers_as_they_were() -> None:
    """One provider gets short requests and answers them slowly, one gets long ones and is fast at them."""
    short, long = EndpointLoad(8, 0.001, 0.0), EndpointLoad(8, 0.001, 0.0)
    for _ in range(100):
        short.succeeded(8, 0.1, 1.0)
        long.succeeded(4096, 1.0, 1.0)
        long.failed(4096, 1.0)  # a failure is no answer
    assert (short.latency, long.latency) == (pytest.approx(0.1, rel=0.01), pytest.approx(1.0, rel=0.01))
    assert (short.throughput, long.throughput) == (pytest.approx(80, rel=0.1), pytest.approx(4096, rel=0.01))


def test_slow_start() -> None:
    assert [slow_start(seconds) for seconds in (0, 3, 15, 30, 300)] == [0.1, 0.1, 0.5, 1.0, 1.0]


def test_the_table_of_signals_never_blames_a_provider_for_its_caller() -> None:
    assert not SIGNALS["cancelled"].another and SIGNALS["cancelled"].breaker == "none"
    assert SIGNALS["rejected"].breaker == "none" and SIGNALS["rate_limited"].breaker == "rate"
    assert SIGNALS["unreachable"].price < 1 and [name for name, signal in SIGNALS.items() if signal.check] == [
        "malformed"
    ]


def test_a_failure_does_not_make_requests_look_hopeless() -> None:
    """Found by killing a provider under 64 callers: the load was taken for a duration, and callers were refused."""
    load = EndpointLoad(64, 0.02 / MIN_TOKENS, 0.0)
    for _ in range(64):
        load.start(64)
    load.succeeded(64, 0.5, 1.0)
    load.failed(64, 1.0)
    assert load.cost(64, 1.0) > PENALTY_S and load.expected_seconds(64) < 0.1
    for _ in range(50):
        load.succeeded(64, 0.5, 1.0)
    assert load.expected_seconds(64) == pytest.approx(0.5, rel=0.02)


days = st.sampled_from([date(2026, 11, 28), date(2026, 11, 29), date(2026, 11, 30)])


@given(st.lists(st.tuples(days, st.integers(0, 10**12)), max_size=30))
def test_a_days_cost_is_what_was_added_on_it(costs: list[tuple[date, int]]) -> None:
    cost = DailyCost()
    totals: Counter[date] = Counter()
    for day, amount in sorted(costs):
        cost.add(amount, day)
        totals[day] += amount
        assert cost.total(day) == cost.own(day) == totals[day]


def test_the_books_add_what_other_processes_spent() -> None:
    cost, day = DailyCost(), date(2026, 11, 28)
    cost.add(100, day)
    own = cost.own(day)
    cost.add(20, day)  # while the books were read
    cost.take_books(170, own, day)
    assert cost.total(day) == 190
    cost.take_books(0, own, day)  # the books are late: what is known here counts
    assert cost.total(day) == 120
    assert cost.total(date(2026, 11, 29)) == 0


@given(st.floats(0.5, 2), st.integers(0, 40), st.integers(0, 2**32))
def test_another_mix_of_lengths_is_no_other_count(slope: float, offset: int, seed: int) -> None:
    counts, draw, now = TokenCounts(), random.Random(seed), 0.0
    for longest in (100, 400, 30):
        for _ in range(300):
            ours = draw.randint(1, longest)
            theirs = math.floor(slope * ours + offset + draw.random())
            assert counts.add(ours, theirs, 1, now) is None
        now += 3600


def test_another_count_is_an_alarm_and_is_one_once() -> None:
    counts, draw = TokenCounts(), random.Random(3)
    alarms = []
    for hour in range(6):
        for _ in range(300):
            ours = draw.randint(5, 200)
            theirs = round((1.05 if hour >= 3 else 1) * ours) + 1
            alarms.append((hour, counts.add(ours, theirs, 1, 3600.0 * hour)))
    assert [hour for hour, change in alarms if change is not None] == [4]
    assert next(change for _, change in alarms if change is not None) == pytest.approx(0.05, abs=0.01)


async def answer_after(seconds: float, result: str | None, ended: list[str]) -> str | None:
    try:
        await asyncio.sleep(seconds)
    except asyncio.CancelledError:
        ended.append(f"{result} cancelled")
        raise
    if result == "error":
        raise RuntimeError(result)
    return result


@pytest.mark.parametrize(
    ("first", "second", "result", "cancelled"),
    [
        ((0, "a"), (0, "b"), "a", []),  # quick: no hedge
        ((60, "a"), (0, "b"), "b", ["a cancelled"]),
        ((0.05, "a"), (60, "b"), "a", ["b cancelled"]),
        ((0.05, "error"), (0.1, "b"), "b", []),
        ((0.05, None), (0.1, "b"), "b", []),
        ((0.1, "a"), (0.02, "error"), "a", []),
    ],
)
def test_the_first_good_result_counts(
    first: tuple[float, str | None], second: tuple[float, str | None], result: str, cancelled: list[str]
) -> None:
    ended: list[str] = []

    async def run() -> str | None:
        return await first_result(answer_after(*first, ended), 0.02, lambda: answer_after(*second, ended))

    assert asyncio.run(run()) == result and ended == cancelled


@pytest.mark.parametrize("first", [(0.03, "error"), (0.03, None)])
@pytest.mark.parametrize("second", ["error", None])
@pytest.mark.parametrize("at_once", [False, True])
def test_without_a_result_a_failure_is_raised_whoever_ended_last(
    first: tuple[float, str | None], second: str | None, at_once: bool
) -> None:
    async def end(result: str | None, gate: asyncio.Event) -> str | None:
        await gate.wait()  # both go on in one turn of the loop
        return await answer_after(0, result, [])

    async def run() -> str | None:
        if not at_once:
            return await first_result(answer_after(*first, []), 0.01, lambda: answer_after(0, second, []))
        gate = asyncio.Event()
        asyncio.get_running_loop().call_later(0.03, gate.set)
        return await first_result(end(first[1], gate), 0.01, lambda: end(second, gate))

    for _ in range(8):  # which of two that ended at once comes first out of a set is chance
        if "error" in (first[1], second):
            with pytest.raises(RuntimeError, match="error"):
                asyncio.run(run())
        else:
            assert asyncio.run(run()) is None


@given(st.lists(st.floats(0, 10), min_size=MIN_SAMPLES, max_size=250), st.integers(1, MAX_TOKENS))
def test_a_hedge_waits_for_the_slowest_twentieth(durations: list[float], tokens: int) -> None:
    usual = UsualSeconds()
    for number, seconds in enumerate(durations):
        assert usual.hedge_delay(tokens) is None or number >= MIN_SAMPLES
        usual.add(tokens, seconds)
    delay = usual.hedge_delay(tokens)
    assert delay is not None and delay >= MIN_DELAY_S
    assert sum(seconds > delay for seconds in durations) <= len(durations) * 0.05
    assert usual.hedge_delay(MAX_TOKENS + 1) is None


@given(st.lists(st.tuples(st.integers(1, 5000), st.booleans()), max_size=60))
def test_hedges_never_exceed_their_share(requests: list[tuple[int, bool]]) -> None:
    budget, deposits, taken = RetryBudget(0.05, 0), 0, 0
    for tokens, wants in requests:
        budget.deposit(tokens, 1.0)
        deposits += tokens
        if wants and budget.withdraw(tokens, 1.0):
            taken += tokens
        assert taken <= 0.05 * deposits


def test_a_budget_that_nobody_draws_on_remembers_its_last_seconds_alone() -> None:
    """A server without failures counts first attempts for months, and must not keep them."""
    budget = RetryBudget(0.5, 0)
    for number in range(10_000):
        budget.deposit(100, number / 10)
    assert len(budget._deposits._amounts) <= 10 * LIFE_S
    assert budget.covers(round(50 * 10 * LIFE_S), 999.9) and not budget.covers(round(50 * 10 * LIFE_S) + 51, 999.9)
