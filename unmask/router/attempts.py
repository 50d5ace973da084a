"""`answer`: the vectors of one request, from the local engine or from a provider, within the caller's deadline."""

import asyncio
import random
import re
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from unmask.accounts.costs import AttemptRecord, Reason
from unmask.checkpoint.tokenizer import TextTokenizer
from unmask.conformance import PrecisionClass, References
from unmask.conformance.references import space_precisions
from unmask.encoder import Prompt
from unmask.encoder.prompts import PromptBuilder
from unmask.engine import Engine
from unmask.errors import (
    DeadlineExceeded,
    EngineError,
    EngineStopped,
    NoConformingProvider,
    NoProvider,
    Overloaded,
    ProviderRefused,
)
from unmask.router import hedging
from unmask.router.checks import ReferencesStamp
from unmask.router.choosing import Candidate, ProviderPreferences, choose, permitted
from unmask.router.endpoint import ProviderEndpoint
from unmask.router.request_history import Outcome
from unmask.router.retry_budget import LIFE_S, RetryBudget
from unmask.router.signals import SIGNALS, AttemptFailed
from unmask.router.totals import RoutingTotals
from unmask.router.wire import ask, require_vectors

LOCAL = "local"  # name of this process's own engine among the providers

# A third attempt only if the second provider could not even be connected to.
_MAX_ATTEMPTS = 3
_ATTEMPTS_WITH_BYTES = 2

# An attempt may take this long, or four times the estimate; then another provider is more likely to answer.
_MIN_ATTEMPT_S = 10.0
_ATTEMPT_FACTOR = 4.0

# While another provider could answer, the first one gets this share of the caller's time, or four times the estimate.
_FIRST_SHARE = 0.5

# A caller's deadline is the provider's fault if it had four times the estimate and this long: longer than pauses of a
# healthy one, and longer still where few answers have shown yet how fast it is.
_FAULT_S, _UNKNOWN_FAULT_S = 0.5, 3.0
_KNOWN_ANSWERS = 10

# Usual seconds until a model without an admitted endpoint has one: while its references are computed, and while all are
# quarantined, which takes a person.
_REFERENCES_S, _OPERATOR_S = 30.0, 120.0

# Forms of the control tokens in use. The pattern matches more than those: a text that matches by chance is only sent
# elsewhere.
_CONTROL_TOKEN = re.compile(r"<[^\s<>]{1,40}>|\[[A-Za-z_0-9]{1,40}\]|!@#\$%")

_ANSWER_S = 0.02  # left for writing the answer


@dataclass(frozen=True, eq=False)
class EmbeddingWork:
    """The inputs of one request, ready to be embedded.

    Attributes:
        texts: the texts; None for token ids of the model, which only the local engine takes.
        prompts: their prompts.
        instruction: "" for none.
        raw: vectors are wanted as they leave the model, which only the local engine gives.
        deadline: `time.monotonic()` by which the caller needs them.
        share: the caller, for the fair queue of the local engine.
        income: nano-dollars that the caller pays; None on a server without accounts.
        is_replay: the income was earned by an earlier request, and there is no more of it.
        hedged: a second provider may be asked if the first is slow.
        preferences: about providers.
        precision: of the model's vectors here. Providers of another vector space answer only if the caller asks for
            their precision.
        attempts: filled in: the attempts at providers so far.
        arrived: `time.monotonic()` when the request was ready to be embedded.
    """

    texts: Sequence[str] | None
    prompts: Sequence[Prompt]
    instruction: str
    raw: bool
    deadline: float
    share: str
    preferences: ProviderPreferences
    precision: PrecisionClass
    income: int | None = None
    is_replay: bool = False
    hedged: bool = False
    attempts: list[AttemptRecord] = field(default_factory=list)
    arrived: float = field(default_factory=time.monotonic)

    @cached_property
    def num_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(len(prompt.ids) for prompt in self.prompts)


@dataclass(frozen=True, eq=False)
class RoutedVectors:
    """The vectors of a request.

    Attributes:
        vectors: float32 [n, dim]; of length 1 if a provider answered.
        provider: its name; `LOCAL` for this process's own engine.
        attempts: number of attempts.
        endpoint: the endpoint that answered; None for the local engine.
        changes: `endpoint.admission_changes` when it was asked.
    """

    vectors: np.ndarray
    provider: str
    attempts: int
    endpoint: ProviderEndpoint | None = None
    changes: int = 0

    def may_be_used(self) -> bool:
        """False if the endpoint has been taken out of traffic since it was asked."""
        return self.endpoint is None or self.endpoint.is_admitted_since(self.changes)


class _AttemptResult(NamedTuple):
    """The vectors of one attempt; the rest as in `RoutedVectors`."""

    vectors: np.ndarray
    endpoint: ProviderEndpoint
    changes: int


class ModelEndpoints:
    """All endpoints of a model.

    Args:
        endpoints: in the order of the file.
        min_margin: share of a request's price that must remain after a provider's cost.
        references_stamp: of the file that the references are read from; None where they are computed here.

    Attributes:
        references: of the model; None until they are computed, and before that nobody is admitted.
        prompts, tokenizer: its text handling, which needs no weights; None until it is read.
        problem: why there are no references, for the operator; "" for none.
        cross_check: the one that is under way; None for none.
        totals: further attempts and refusals of this process.
    """

    def __init__(
        self,
        endpoints: Sequence[ProviderEndpoint],
        min_margin: float = 0.0,
        references_stamp: ReferencesStamp | None = None,
    ) -> None:
        self.endpoints = list(endpoints)
        self.min_margin, self.references_stamp = min_margin, references_stamp
        self.references: References | None = None
        self.prompts: PromptBuilder | None = None
        self.tokenizer: TextTokenizer | None = None
        self.problem = ""
        self.cross_check: asyncio.Task[None] | None = None
        self.budget = RetryBudget()
        self.hedge_budget = RetryBudget(hedging.SHARE, 0)
        self.totals = RoutingTotals()

    def inherit(self, earlier: "ModelEndpoints") -> None:
        """Take over everything that is known of the model by the same references, after the file was read again."""
        self.references, self.prompts = earlier.references, earlier.prompts
        self.tokenizer, self.problem, self.totals = earlier.tokenizer, earlier.problem, earlier.totals
        for endpoint in self.endpoints:
            before = next((one for one in earlier.endpoints if one.is_same(endpoint)), None)
            if before is not None:
                endpoint.inherit(before)

    def end_cross_check(self, task: "asyncio.Task[None]") -> None:
        """Note that the cross-check has ended."""
        self.cross_check = None

    @property
    def id(self) -> str:
        """The model's id."""
        return self.endpoints[0].model.id

    def endpoint(self, provider: str) -> ProviderEndpoint:
        """Return the endpoint at a provider, which must have one."""
        return next(endpoint for endpoint in self.endpoints if endpoint.provider.name == provider)

    def may_hedge(self) -> bool:
        """True if two of its admitted providers take hedges, and no breaker of them is open.

        While a provider fails, hedges would add to the load of the others.
        """
        admitted = [endpoint for endpoint in self.endpoints if endpoint.admission == "admitted"]
        return sum(endpoint.model.hedge for endpoint in admitted) >= 2 and all(
            endpoint.breaker.lets_in() for endpoint in admitted
        )

    def take_hedge(self, tokens: int, now: float) -> bool:
        """Take the tokens of a hedge from both budgets. Returns False, and takes nothing, if one has too few."""
        if not (self.budget.covers(tokens, now) and self.hedge_budget.covers(tokens, now)):
            return False
        return self.budget.withdraw(tokens, now) and self.hedge_budget.withdraw(tokens, now)

    def any_admitted(self, precisions: Sequence[PrecisionClass] | None = None) -> bool:
        """True if some endpoint's vectors may be used, of any precision or of one of these."""
        return any(
            endpoint.admission == "admitted" and (precisions is None or endpoint.precision in precisions)
            for endpoint in self.endpoints
        )

    def checked_in(self, now: float) -> float:
        """Return the seconds after which an endpoint may have been admitted, for a model of which none is."""
        if self.references is None:
            return _OPERATOR_S if self.problem else _REFERENCES_S
        unchecked = (endpoint for endpoint in self.endpoints if endpoint.admission == "unchecked")
        runs = [max(0.0, endpoint.run_at - now) + endpoint.run_seconds for endpoint in unchecked]
        return max(1.0, min(runs, default=_OPERATOR_S))


async def answer(
    model: ModelEndpoints, engine: Engine | None, work: EmbeddingWork, draw: random.Random
) -> RoutedVectors:
    """Embed the inputs of a request: all of them at one provider, or not at all.

    Args:
        model: its endpoints.
        engine: this process's own engine, if it is loaded.
        work: the request.
        draw: source of chance.

    Raises:
        NoConformingProvider: nobody's vectors are known to be right.
        NoProvider: those whose vectors are right cannot answer now; carries `retry_after`.
        ProviderRefused: an attempt failed and the retry budget is used up.
        Overloaded, DeadlineExceeded, EngineStopped: as `Engine.run`.
    """
    tokens = work.num_tokens
    now = time.monotonic()
    model.budget.deposit(tokens, now)
    model.hedge_budget.deposit(tokens, now)
    tried: set[str] = set()
    failure: AttemptFailed | EngineError | None = None
    try:
        while len(tried) < _MAX_ATTEMPTS:
            now = time.monotonic()
            left = work.deadline - now - _ANSWER_S
            if left <= 0:
                raise DeadlineExceeded(now - work.arrived)
            candidates = _candidates(model, engine, work, tried, now)
            chosen = choose([one for one in candidates if one.fits(left)], work.preferences, draw)
            if chosen is None:
                raise _nobody(model, engine, candidates, failure, left, now)
            if isinstance(failure, AttemptFailed):
                signal = SIGNALS[failure.signal]
                if len(tried) >= _ATTEMPTS_WITH_BYTES and failure.signal != "unreachable":
                    raise _nobody(model, engine, [], failure, left, now)
                if not model.budget.withdraw(round(tokens * signal.price), now):
                    raise ProviderRefused(
                        f"a provider of {model.id} failed, and too many requests of this model were repeated in the "
                        f"last {LIFE_S:.0f} s to ask another one: try again after that time",
                        retry_after=LIFE_S,
                    )
            tried.add(chosen.name)
            try:
                if chosen.name == LOCAL and engine is not None:
                    vectors = await engine.run(work.prompts, deadline=work.deadline, caller=work.share)
                    return RoutedVectors(vectors, LOCAL, len(tried))
                limit = _time_limit(model, chosen, candidates, tokens, left, is_first=len(tried) == 1)
                answered = await _attempt_or_hedge(model, chosen, work, tried, draw, limit)
                if answered is not None:
                    name = answered.endpoint.provider.name
                    return RoutedVectors(answered.vectors, name, len(tried), answered.endpoint, answered.changes)
            except AttemptFailed as failed:
                failure = failed
            except (DeadlineExceeded, EngineStopped):
                raise
            except EngineError as failed:
                failure = failed
        raise _nobody(model, engine, [], failure, work.deadline - time.monotonic(), time.monotonic())
    finally:
        failure = None  # as a cycle with its traceback, it would keep the texts in memory for a while


def _candidates(
    model: ModelEndpoints, engine: Engine | None, work: EmbeddingWork, tried: set[str], now: float
) -> list[Candidate]:
    """Return those that may and can answer, filtered in this order: admitted, able, permitted, paid for, available."""
    tokens = work.num_tokens
    candidates = [
        endpoint.candidate(tokens, now)
        for endpoint in model.endpoints
        if endpoint.admission == "admitted"
        and _is_able(endpoint, work)
        and endpoint.precision in (*space_precisions(work.precision), *work.preferences.precision)
        and permitted(endpoint.provider.name, endpoint.provider.data, work.preferences)
        and endpoint.provider.name not in tried
        and endpoint.covers_cost(tokens, work.income, model.min_margin, is_replay=work.is_replay)
        and endpoint.is_available(now)
    ]
    if engine is not None and LOCAL not in tried and permitted(LOCAL, "none", work.preferences):
        rate = engine.tokens_per_second
        seconds = 0.0 if rate is None else (engine.waiting_tokens() + tokens) / rate
        # The engine refuses by itself what it cannot do in time, and says when it could.
        alone = not candidates
        candidates.insert(0, Candidate(LOCAL, 0, 0, 1.0, seconds, 0.0 if alone else seconds))
    return candidates


def _time_limit(
    model: ModelEndpoints, chosen: Candidate, candidates: Sequence[Candidate], tokens: int, left: float, is_first: bool
) -> float:
    """Return the seconds after which another provider should be asked; infinity if none could answer then.

    Args:
        model: its endpoints.
        chosen: the provider to ask.
        candidates: all that could be asked.
        tokens: of the request.
        left: seconds that the caller has.
        is_first: no other provider was asked before. After a second one that was silent, no third one is asked.
    """
    limit = max(_FIRST_SHARE * left, _ATTEMPT_FACTOR * chosen.seconds)
    others = [candidate for candidate in candidates if candidate.name != chosen.name and candidate.fits(left - limit)]
    may_repeat = is_first and limit < left and bool(others) and model.budget.covers(tokens, time.monotonic())
    return limit if may_repeat else float("inf")


def _is_able(endpoint: ProviderEndpoint, work: EmbeddingWork) -> bool:
    """True if the provider's API can carry the request without changing what it means."""
    if work.texts is None or work.raw or (work.instruction and not endpoint.provider.takes_instructions):
        return False
    if endpoint.model.reads_control_tokens and any(map(_CONTROL_TOKEN.search, work.texts)):
        return False
    longest = endpoint.model.max_tokens
    return all(not prompt.truncated and (longest is None or len(prompt.ids) <= longest) for prompt in work.prompts)


async def _attempt_or_hedge(
    model: ModelEndpoints, chosen: Candidate, work: EmbeddingWork, tried: set[str], draw: random.Random, limit: float
) -> _AttemptResult | None:
    """Ask a provider for all texts, and another one if that takes unusually long. See `_attempt`.

    Args:
        model: its endpoints.
        chosen: the provider to ask.
        work: the request.
        tried: names that were asked; the one of a hedge is added.
        draw: source of chance.
        limit: seconds for the provider to ask; those of a hedge end with the caller's.
    """
    reason: Reason = "answer" if len(tried) == 1 else "retry"
    endpoint = model.endpoint(chosen.name)
    first = _attempt(model, endpoint, work, chosen.seconds, reason, limit)
    delay = endpoint.usual_seconds.hedge_delay(work.num_tokens) if work.hedged and endpoint.model.hedge else None
    if delay is None or reason == "retry" or not model.may_hedge():
        return await first

    def hedge() -> Coroutine[Any, Any, _AttemptResult | None] | None:
        now = time.monotonic()
        left = work.deadline - now - _ANSWER_S
        others = [
            candidate
            for candidate in _candidates(model, None, work, tried, now)
            if candidate.fits(left) and model.endpoint(candidate.name).model.hedge
        ]
        other = choose(others, work.preferences, draw)
        if other is None or not model.may_hedge() or not model.take_hedge(work.num_tokens, now):
            return None
        tried.add(other.name)
        return _attempt(model, model.endpoint(other.name), work, other.seconds, "hedge")

    return await hedging.first_result(first, delay, hedge)


async def _attempt(
    model: ModelEndpoints,
    endpoint: ProviderEndpoint,
    work: EmbeddingWork,
    estimate: float,
    reason: Reason,
    limit: float = float("inf"),
) -> _AttemptResult | None:
    """Ask one provider for all texts. Returns None if it was taken out of traffic meanwhile, be it for a moment.

    Raises:
        AttemptFailed: it failed, or its share of the time is over. A fault is counted already.
        DeadlineExceeded: the caller's time is over. That is a fault of the provider if it has had ample time.
    """
    tokens, started, changes = work.num_tokens, time.monotonic(), endpoint.admission_changes
    outcome: Outcome = "cancelled"  # unless something else happens
    their_tokens: int | None = None
    left = work.deadline - started - _ANSWER_S
    most = max(_MIN_ATTEMPT_S, _ATTEMPT_FACTOR * estimate)
    seconds = min(left, limit, most)
    ample = max(_ATTEMPT_FACTOR * estimate, _FAULT_S if endpoint.load.answers >= _KNOWN_ANSWERS else _UNKNOWN_FAULT_S)
    endpoint.load.start(tokens)
    try:
        vectors, their_tokens = await _vectors_from(model, endpoint, work, seconds)
        outcome = "answered" if endpoint.is_admitted_since(changes) else "discarded"
    except AttemptFailed as failure:
        now = time.monotonic()
        if failure.signal != "timeout" or seconds >= min(ample, most):
            outcome = failure.signal
            endpoint.failed(failure, tokens, now - started, now, alone=len(model.endpoints) == 1)
        if failure.signal == "timeout" and seconds == left:
            raise DeadlineExceeded(now - work.arrived) from None
        raise
    finally:
        endpoint.load.finish(tokens)
        now = time.monotonic()
        work.attempts.append(endpoint.record(outcome, reason, tokens, their_tokens, now - started))
        if outcome == "cancelled":
            endpoint.cancelled(tokens, now - started, now)
    now = time.monotonic()
    if outcome == "discarded":
        endpoint.discarded(tokens, now - started, now)
        return None
    endpoint.answered(tokens, now - started, now)
    endpoint.compare_counts(tokens, their_tokens, len(work.prompts), now)
    return _AttemptResult(vectors, endpoint, changes)


async def _vectors_from(
    model: ModelEndpoints, endpoint: ProviderEndpoint, work: EmbeddingWork, seconds: float
) -> tuple[np.ndarray, int | None]:
    """Send the texts in requests of the size that the provider takes, at the same time, and join their vectors.

    Returns:
        The vectors, and the tokens by the provider's count; None if it did not say.
    """
    references = model.references
    assert references is not None and work.texts is not None  # the endpoint is admitted, and able
    size, name = endpoint.provider.inputs_per_request(endpoint.model), endpoint.provider.name
    is_normalised = endpoint.conformance is not None and endpoint.conformance.normalised

    counts: list[int | None] = []

    async def part(texts: Sequence[str]) -> np.ndarray:
        received = await ask(
            endpoint.client, endpoint.model, texts, instruction=work.instruction, dim=references.dim, seconds=seconds
        )
        counts.append(received.prompt_tokens)
        endpoint.compare_origin(received.origin, time.monotonic())
        return require_vectors(received, references.dim, name, has_unit_length=is_normalised)

    parts = [work.texts[first : first + size] for first in range(0, len(work.texts), size)]
    if len(parts) == 1:
        return await part(parts[0]), counts[0]
    tasks = [asyncio.ensure_future(part(texts)) for texts in parts]
    try:
        vectors = np.concatenate(await asyncio.gather(*tasks))
        return vectors, None if None in counts else sum(count for count in counts if count is not None)
    finally:
        for task in tasks:
            task.cancel()  # whole or not at all
        await asyncio.gather(*tasks, return_exceptions=True)


def _nobody(
    model: ModelEndpoints,
    engine: Engine | None,
    candidates: Sequence[Candidate],
    failure: Exception | None,
    left: float,
    now: float,
) -> EngineError:
    """Return the error of a request that nobody answers."""
    if isinstance(failure, EngineError):
        return failure
    if candidates:
        seconds = min(candidate.seconds for candidate in candidates) - left
        return Overloaded("no provider can answer by the deadline", retry_after=max(1.0, seconds))
    if engine is None and not model.any_admitted():
        message = "no provider of this model has been found to give the right vectors: none is better than wrong ones"
        return NoConformingProvider(message, retry_after=model.checked_in(now))
    soonest = min((endpoint.available_in(now) for endpoint in model.endpoints), default=float("inf"))
    return NoProvider(
        "no provider of this model that fits the request can answer now",
        retry_after=min(max(1.0, soonest), 60.0),
    )
