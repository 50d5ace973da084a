"""`ProviderEndpoint`: one model at one provider, with everything that this process knows about it."""

import asyncio
import logging
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from unmask.accounts import money
from unmask.accounts.costs import AttemptRecord, Reason
from unmask.conformance import Finding, PrecisionClass
from unmask.router.admission import Admission, AdmissionState
from unmask.router.breaker import Breaker
from unmask.router.choosing import Candidate
from unmask.router.daily_cost import DailyCost, seconds_to_midnight, today
from unmask.router.hedging import UsualSeconds
from unmask.router.load import EndpointLoad, slow_start
from unmask.router.origins import Origins
from unmask.router.places import Places
from unmask.router.providers import ProviderModel, RemoteProvider
from unmask.router.request_history import Outcome, RequestHistory
from unmask.router.signals import SIGNALS, AttemptFailed
from unmask.router.state_log import FailureOf, StateLog
from unmask.router.token_counts import TokenCounts
from unmask.router.totals import AttemptTotals
from unmask.storage.database import now_ms

if TYPE_CHECKING:
    from unmask.router.outbound import ProviderClient

log = logging.getLogger("unmask")

EndpointStatus = Literal["unchecked", "admitted", "probation", "quarantined", "open", "held", "spent"]

# Seconds per token before anything was measured: 2,000 tokens per second.
FIRST_RATE = 1 / 2000

_MAX_AVOID_S = 60.0

# After a breaker was open for longer than this, another server may have been started: all canaries are asked for.
_LONG_OUTAGE_S = 60.0


@dataclass(eq=False)
class ProviderEndpoint:
    """A model at a provider.

    Attributes:
        client: connections to the provider, shared by its models.
        model: the model there.
        draw: source of chance.
        daily_cost: of the provider, over all its models.
        finding: the fault with its subject; "" for none.
        conformance: last full run; None before it.
        passed_at: Unix seconds of the last passed run of either kind; 0 for never.
        wake: set when a check is due at once.
        full_due: a full run is due, whatever the time.
        run_at: `time.monotonic()` of the next run of canaries; `run_seconds`: that a full one takes.
        costs: nano-dollars of this process's attempts, by reason.
        totals: number, durations and tokens of this process's attempts.
        load: of callers' requests; `places`: which of their HTTP requests may be under way.
        usual_seconds: durations of its last answers.
        history: outcomes and speed of its last requests.
        state_log: lines for the operator about its failures and its breaker.
    """

    client: "ProviderClient"
    model: ProviderModel
    draw: random.Random
    daily_cost: DailyCost = field(default_factory=DailyCost)
    finding: str = ""
    conformance: Finding | None = None
    passed_at: float = 0.0
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    full_due: bool = True
    run_at: float = float("-inf")
    run_seconds: float = 5.0
    breaker: Breaker = field(init=False)
    load: EndpointLoad = field(init=False)
    places: Places = field(init=False)
    in_traffic_since: float = field(init=False)
    last_used: float = field(init=False, default=float("-inf"))
    costs: Counter[Reason] = field(init=False, default_factory=Counter)
    totals: AttemptTotals = field(init=False, default_factory=AttemptTotals)
    usual_seconds: UsualSeconds = field(init=False, default_factory=UsualSeconds)
    history: RequestHistory = field(init=False, default_factory=RequestHistory)
    state_log: StateLog = field(init=False)
    _token_counts: TokenCounts = field(init=False, default_factory=TokenCounts)
    _origins: Origins = field(init=False, default_factory=Origins)
    _admission: Admission = field(init=False, default_factory=Admission)
    _loss_logged: bool = field(init=False, default=False)
    _avoid_until: float = field(init=False, default=float("-inf"))

    def __post_init__(self) -> None:
        now = time.monotonic()
        self.breaker = Breaker(self.draw)
        self.load = load = EndpointLoad(self.provider.max_parallel, FIRST_RATE, now)
        self.places = Places(lambda: load.limit)
        self.in_traffic_since = now
        self.state_log = StateLog(self.provider.name, self.model.id)

    @property
    def admission(self) -> AdmissionState:
        """The state that says if its vectors may be used; only canaries and the operator change it."""
        return self._admission.state

    @property
    def admission_changes(self) -> int:
        """Number of changes of `admission` so far, to be read before a request is sent."""
        return self._admission.changes

    def is_admitted_since(self, changes: int) -> bool:
        """True if its vectors may be used, and may have been used all the time since `changes` was read."""
        return self._admission.is_unchanged(changes)

    @property
    def provider(self) -> RemoteProvider:
        """The provider."""
        return self.client.provider

    @property
    def precision(self) -> PrecisionClass | None:
        """Class that its vectors were found to have; None before the first full run."""
        return self.conformance.precision if self.conformance is not None else None

    def status(self, now: float) -> EndpointStatus:
        """Return its state in one word; "probation" while it starts slowly."""
        if self.admission != "admitted":
            return self.admission
        if self.breaker.state == "held":
            return "held"
        if not self.breaker.lets_in():
            return "open"
        if self.is_spent():
            return "spent"
        return "probation" if slow_start(now - self.in_traffic_since) < 1 else "admitted"

    def is_available(self, now: float) -> bool:
        """True if a request may be sent now."""
        return self.is_open(now) and self.places.has_room()

    def is_open(self, now: float) -> bool:
        """True if a request may be sent once there is a place for it."""
        return (
            self.admission == "admitted" and self.breaker.lets_in() and now >= self._avoid_until and not self.is_spent()
        )

    def is_spent(self) -> bool:
        """True if the provider has cost as much today as it may."""
        limit = self.provider.max_daily_cost
        return limit is not None and self.daily_cost.total(today()) >= limit

    def covers_cost(self, tokens: int, income: int | None, min_margin: float, *, is_replay: bool = False) -> bool:
        """True if a request leaves the margin after the provider's cost, or may make a loss there.

        Args:
            tokens: of the request.
            income: nano-dollars that the caller pays for it; None on a server without accounts.
            min_margin: share of the income that must remain.
            is_replay: an earlier request has earned the income. Where a margin must remain, nothing is left for a
                second answer; where none must, a caller whose answer was lost gets it at the price of the first.
        """
        if income is None or self.model.allow_loss:
            return True
        cost = money.cost(tokens, self.model.cost_on(today()))
        if is_replay and min_margin > 0:
            return cost == 0
        if cost <= income * (1 - min_margin):
            return True
        if not self._loss_logged:
            self._loss_logged = True
            log.warning(
                "%s costs more for %s than the model is sold for with a margin of %g: it gets no such request unless "
                "allow_loss = true",
                self.provider.name,
                self.model.id,
                min_margin,
            )
        return False

    def available_in(self, now: float) -> float:
        """Return the seconds after which it might be available; infinity if nobody knows."""
        if self.admission != "admitted":
            return float("inf")
        if self.breaker.state == "half_open":
            return 1.0
        if not self.breaker.lets_in():
            return max(0.0, self.breaker.probe_at - now)
        if self.is_spent():
            return seconds_to_midnight()
        return max(1.0, self._avoid_until - now)

    def candidate(self, tokens: int, texts: int, caller: str, now: float) -> Candidate:
        """Describe it for the choice.

        Args:
            tokens, texts: of the request.
            caller: whose request it is.
            now: time.
        """
        seconds, parts = self.load.expected_seconds(tokens), -(-texts // self.provider.inputs_per_request(self.model))
        if parts > 1:
            seconds = max(seconds, self.places.batch_seconds(parts))
        return Candidate(
            name=self.provider.name,
            priority=self.model.priority,
            price=self.model.cost_on(today()),
            share=slow_start(now - self.in_traffic_since),
            load=self.load.cost(tokens, now),
            seconds=seconds,
            wait=self.places.wait_seconds(caller, seconds),
            latency=self.load.latency,
            throughput=self.load.throughput,
            idle=not self.load.requests,
        )

    def admit(self, finding: Finding, seconds: float, now: float) -> None:
        """Let traffic in after a passed full run.

        Args:
            finding: of the run.
            seconds: that it took.
            now: time.
        """
        if self.admission != "admitted":
            self.in_traffic_since = now
            self.load.restart(seconds / max(finding.num_tokens, 1), now)
        before, theirs = self.conformance, finding.their_tokens
        self._admission.change("admitted")
        self.finding, self.conformance, self.run_seconds = "", finding, seconds
        self.passed_at = time.time() - seconds  # after its first canary, it may have drifted already
        self.state_log.note_canaries()
        if before is not None and theirs != before.their_tokens and finding.num_tokens == before.num_tokens:
            log.error(
                "%s counts %s tokens for the canaries of %s, and counted %s before: what it bills has changed",
                self.provider.name,
                theirs,
                self.model.id,
                before.their_tokens,
            )

    def is_same(self, other: "ProviderEndpoint") -> bool:
        """True if the other one is the same server, model and number of requests at a time."""
        return self._identity() == other._identity()

    def _identity(self) -> tuple[object, ...]:
        provider, model = self.provider, self.model
        return (
            provider.name,
            provider.kind,
            provider.url,
            provider.proxy,
            provider.max_parallel,
            model.id,
            model.name_there,
            model.precision,
            model.reads_control_tokens,
        )

    def inherit(self, earlier: "ProviderEndpoint") -> None:
        """Take over everything that is known of the same endpoint, after the file was read again."""
        # Requests under way at the earlier one learn by the shared admission that it was taken out.
        self._admission, self.finding, self.conformance = earlier._admission, earlier.finding, earlier.conformance
        self.passed_at, self.in_traffic_since = earlier.passed_at, earlier.in_traffic_since
        self.breaker, self.load, self._avoid_until = earlier.breaker, earlier.load, earlier._avoid_until
        self.places = earlier.places
        self.last_used, self.history, self.costs = earlier.last_used, earlier.history, earlier.costs
        self.usual_seconds, self._token_counts = earlier.usual_seconds, earlier._token_counts
        self.state_log, self.totals, self._origins = earlier.state_log, earlier.totals, earlier._origins

    def suspend(self) -> None:
        """Take it out of traffic because of one wrong canary, until the next run of canaries. Answers are discarded."""
        self._admission.suspend()

    def resume(self) -> None:
        """Let traffic in again after a right canary, if nothing but `suspend` had taken it out."""
        self._admission.resume()

    def pass_light_run(self, started_at: float) -> None:
        """Count a light run with right vectors, which lets traffic in again.

        Args:
            started_at: Unix seconds before the provider was asked; later, it may have drifted already.
        """
        self.passed_at = started_at
        self.resume()
        now = time.monotonic()
        if self.breaker.seconds_out(now) > _LONG_OUTAGE_S:
            self.order_full_run()
        if self.breaker.state == "half_open":
            self.in_traffic_since = now
            self.breaker.probed(True, now)
        elif self.breaker.state == "held":
            self.breaker.close()  # key, credit and model name are accepted again
        self.state_log.note_canaries()
        self.log_state()

    def order_full_run(self) -> None:
        """Let a full run follow at once. Traffic goes on meanwhile."""
        self.full_due = True
        self.wake.set()

    def compare_origin(self, origin: str, now: float) -> None:
        """Compare who answered with those before. Another server may give other vectors."""
        if self._origins.add(origin, now) and self.admission == "admitted":
            log.warning(
                "%s for %s: the header `server` or the model's name in its answers has changed, so all canaries are "
                "asked for",
                self.provider.name,
                self.model.id,
            )
            self.order_full_run()

    def log_state(self) -> None:
        """Log the state of the breaker if it has changed."""
        self.state_log.note_breaker(self.breaker.state, time.monotonic())

    def uncheck(self) -> None:
        """Take it out of traffic, and out of quarantine, until a full run has passed."""
        self._admission.change("unchecked")
        self.finding, self.full_due = "", True

    def quarantine(self, finding: str) -> None:
        """Take it out of traffic until a full run is asked for and passed. Answers on their way are discarded."""
        self._admission.change("quarantined")
        self.finding = finding

    def record(
        self, outcome: Outcome, reason: Reason, tokens: int, their_tokens: int | None, seconds: float
    ) -> AttemptRecord:
        """Describe an attempt for the books, and count its cost."""
        day = today()
        attempt = AttemptRecord(
            at=now_ms(),
            provider=self.provider.name,
            model=self.model.id,
            milliseconds=round(seconds * 1000),
            outcome=outcome,
            reason=reason,
            tokens=tokens,
            their_tokens=their_tokens,
            price=self.model.cost_on(day),
        )
        self.costs[reason] += attempt.cost
        self.totals.add(attempt, seconds)
        self.daily_cost.add(attempt.cost, day)
        return attempt

    def compare_counts(self, tokens: int, their_tokens: int | None, texts: int, now: float) -> None:
        """Compare the counts of an answer's tokens. A provider that begins to count otherwise has changed something.

        Args:
            tokens: by our count.
            their_tokens: by the provider's; None if it did not say.
            texts: of the request.
            now: time.
        """
        change = None if their_tokens is None else self._token_counts.add(tokens, their_tokens, texts, now)
        if change is not None:
            log.error(
                "%s counts %.0f %% %s tokens for %s than an hour ago: its tokenizer, its template or its bill has "
                "changed, and its vectors are checked",
                self.provider.name,
                100 * abs(change),
                "more" if change > 0 else "fewer",
                self.model.id,
            )
            self.order_full_run()

    def answered(self, tokens: int, seconds: float, now: float) -> None:
        """Count a good answer."""
        self.breaker.succeeded(now)
        self.load.succeeded(tokens, seconds, now)
        self.places.serve()  # there may be one more
        self.usual_seconds.add(tokens, seconds)
        self._note("answered", tokens, seconds, now)

    def failed(
        self,
        failure: AttemptFailed,
        tokens: int,
        seconds: float,
        now: float,
        *,
        alone: bool,
        of: FailureOf = "request",
    ) -> None:
        """Count and log a failure, by the table of signals."""
        signal = SIGNALS[failure.signal]
        if signal.breaker == "open":
            self.breaker.hold(now, alone=alone)
        elif signal.breaker != "none":
            self.breaker.failed(now, in_run=signal.breaker == "failure", alone=alone)
        if signal.breaker != "none":
            busy = failure.signal == "rate_limited" or failure.status == 503
            self.load.failed(tokens, now, retry_after=failure.retry_after, busy=busy)
            if failure.retry_after is not None:
                self._avoid_until = now + min(failure.retry_after, _MAX_AVOID_S)
        if signal.check:
            self.full_due = True
        if signal.check or not self.breaker.lets_in():
            self.wake.set()  # the time of its next canary is another one now
        self._note(failure.signal, tokens, seconds, now)
        self.state_log.note_failure(failure, of, self.breaker.state, now)

    def note_silence(self, failure: AttemptFailed, tokens: int, seconds: float, now: float) -> None:
        """Count and log a health check without an answer. A busy provider is not a sick one."""
        if self.breaker.state != "half_open" and failure.signal != "rate_limited":
            self.failed(failure, tokens, seconds, now, alone=False, of="canaries")
            return
        self.breaker.probed(False, now)
        self.state_log.note_failure(failure, "canaries", self.breaker.state, now)

    def cancelled(self, tokens: int, seconds: float, now: float) -> None:
        """Count an attempt that nobody waited for: no fault, but a use, and a sign of its speed."""
        self.load.overtaken(tokens, seconds, now)
        self._note("cancelled", tokens, seconds, now)

    def discarded(self, tokens: int, seconds: float, now: float) -> None:
        """Count an answer that came after the endpoint was quarantined."""
        self._note("discarded", tokens, seconds, now)

    def _note(self, outcome: Outcome, tokens: int, seconds: float, now: float) -> None:
        self.last_used = now
        self.history.add(outcome, tokens, seconds, now)
