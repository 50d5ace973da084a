"""`answer`: the vectors of one request, from the local engine or from a provider, within the caller's deadline."""

import random
import time
from collections.abc import Coroutine, Sequence
from typing import Any, NamedTuple

import numpy as np

from unmask.accounts.costs import Reason
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
from unmask.router.choosing import Candidate, choose
from unmask.router.embedding_work import LOCAL, EmbeddingWork, RoutedVectors
from unmask.router.endpoint import ProviderEndpoint
from unmask.router.model_endpoints import ModelEndpoints
from unmask.router.places import Place
from unmask.router.request_history import Outcome
from unmask.router.retry_budget import LIFE_S
from unmask.router.signals import SIGNALS, AttemptFailed
from unmask.router.split_request import SplitRequest

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

_ANSWER_S = 0.02  # left for writing the answer


class _Turn(NamedTuple):
    """The choice of who is asked next.

    Attributes:
        chosen: who.
        place: there; None for the local engine, which has a queue of its own.
        candidates: all that could be asked.
        left: seconds that the caller has.
    """

    chosen: Candidate
    place: Place | None
    candidates: Sequence[Candidate]
    left: float


class _AttemptResult(NamedTuple):
    """The vectors of one attempt; the rest as in `RoutedVectors`."""

    vectors: np.ndarray
    endpoint: ProviderEndpoint
    changes: int


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
        while len(tried) < (_MAX_ATTEMPTS if work.preferences.allow_fallbacks else 1):
            turn = await _next_turn(model, engine, work, tried, failure, draw)
            tried.add(turn.chosen.name)
            try:
                if turn.place is None:
                    assert engine is not None  # it alone needs no place
                    vectors = await engine.run(work.prompts, deadline=work.deadline, caller=work.share)
                    return RoutedVectors(vectors, LOCAL, len(tried))
                answered = await _attempt_or_hedge(model, turn, turn.place, work, tried, draw)
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


async def _next_turn(
    model: ModelEndpoints,
    engine: Engine | None,
    work: EmbeddingWork,
    tried: set[str],
    failure: AttemptFailed | EngineError | None,
    draw: random.Random,
) -> _Turn:
    """Choose who is asked next. Waits for a place where all who could answer in time have none.

    Args:
        model, engine, work, draw: as for `answer`.
        tried: names that were asked.
        failure: of the last one; None for none.

    Raises:
        EngineError: nobody can be asked, by the deadline or at all, or a failed request may not be repeated.
    """
    is_repeated = isinstance(failure, AttemptFailed)
    while True:
        now = time.monotonic()
        left = work.deadline - now - _ANSWER_S
        if left <= 0:
            raise DeadlineExceeded(now - work.arrived)
        candidates = model.candidates(engine, work, tried, now)
        in_time = [candidate for candidate in candidates if candidate.fits(left)]
        if not in_time:
            raise _nobody(model, engine, candidates, failure, left, now)
        if isinstance(failure, AttemptFailed) and is_repeated:
            _require_repetition(model, engine, work, tried, failure, left)
            is_repeated = False  # paid for
        at_once = [candidate for candidate in in_time if not candidate.wait]
        chosen = choose(at_once, work.preferences, draw, by_price_alone=work.by_price_alone)
        if chosen is not None:
            place = None if chosen.name == LOCAL else model.endpoint(chosen.name).places.take(work.share)
            return _Turn(chosen, place, candidates, left)
        waited = await model.wait_for_place(in_time, work, now + left)
        if waited is None:
            continue
        endpoint, place = waited
        now = time.monotonic()
        if endpoint.is_open(now):
            chosen = endpoint.candidate(work.num_tokens, len(work.prompts), work.share, now)
            return _Turn(chosen, place, candidates, work.deadline - now - _ANSWER_S)
        place.release()


def _require_repetition(
    model: ModelEndpoints,
    engine: Engine | None,
    work: EmbeddingWork,
    tried: set[str],
    failure: AttemptFailed,
    left: float,
) -> None:
    """Pay for one more attempt after a failed one.

    Raises:
        NoProvider, ProviderRefused: there may be none.
    """
    now, signal = time.monotonic(), SIGNALS[failure.signal]
    if len(tried) >= _ATTEMPTS_WITH_BYTES and failure.signal != "unreachable":
        raise _nobody(model, engine, [], failure, left, now)
    if not model.budget.withdraw(round(work.num_tokens * signal.price), now):
        raise ProviderRefused(
            f"a provider of {model.id} failed, and too many requests of this model were repeated in the "
            f"last {LIFE_S:.0f} s to ask another one: try again after that time",
            retry_after=LIFE_S,
        )


def _time_limit(model: ModelEndpoints, turn: _Turn, tokens: int, *, may_repeat: bool) -> float:
    """Return the seconds after which another provider should be asked; infinity if none could answer then.

    Args:
        model: its endpoints.
        turn: the provider to ask.
        tokens: of the request.
        may_repeat: another one may be asked after it: not after a second one that was silent, and not against the
            caller's wish.
    """
    chosen, left = turn.chosen, turn.left
    limit = max(_FIRST_SHARE * left, _ATTEMPT_FACTOR * chosen.seconds)
    others = [other for other in turn.candidates if other.name != chosen.name and other.fits(left - limit)]
    will_repeat = may_repeat and limit < left and bool(others) and model.budget.covers(tokens, time.monotonic())
    return limit if will_repeat else float("inf")


async def _attempt_or_hedge(
    model: ModelEndpoints, turn: _Turn, place: Place, work: EmbeddingWork, tried: set[str], draw: random.Random
) -> _AttemptResult | None:
    """Ask a provider for all texts, and another one if that takes unusually long. See `_attempt`.

    Args:
        model: its endpoints.
        turn: the provider to ask.
        place: there; released here, whatever happens.
        work: the request.
        tried: names that were asked; the one of a hedge is added.
        draw: source of chance.
    """
    reason: Reason = "answer" if len(tried) == 1 else "retry"
    may_repeat, is_hedged = work.preferences.allow_fallbacks, work.hedged and work.preferences.allow_fallbacks
    limit = _time_limit(model, turn, work.num_tokens, may_repeat=may_repeat and len(tried) == 1)
    endpoint, places = model.endpoint(turn.chosen.name), [place]
    first = _attempt(model, endpoint, place, work, turn.chosen.seconds, reason, limit)
    delay = endpoint.usual_seconds.hedge_delay(work.num_tokens) if is_hedged and endpoint.model.hedge else None

    def hedge() -> Coroutine[Any, Any, _AttemptResult | None] | None:
        now = time.monotonic()
        left = work.deadline - now - _ANSWER_S
        others = [
            candidate
            for candidate in model.candidates(None, work, tried, now)
            if candidate.fits(left) and not candidate.wait and model.endpoint(candidate.name).model.hedge
        ]
        other = choose(others, work.preferences, draw)
        if other is None or not model.may_hedge() or not model.take_hedge(work.num_tokens, now):
            return None
        place = model.endpoint(other.name).places.take(work.share)
        assert place is not None  # it need not wait
        tried.add(other.name)
        places.append(place)
        return _attempt(model, model.endpoint(other.name), place, work, other.seconds, "hedge")

    try:
        if delay is None or reason == "retry" or not model.may_hedge():
            return await first
        return await hedging.first_result(first, delay, hedge)
    finally:
        for one in places:  # also of a task that was cancelled before it began
            one.release()


async def _attempt(
    model: ModelEndpoints,
    endpoint: ProviderEndpoint,
    place: Place,
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
    assert model.references is not None  # the endpoint is admitted
    request = SplitRequest(endpoint, work, model.references.dim, started + seconds)
    endpoint.load.start(tokens)
    try:
        vectors, their_tokens = await request.send(place)
        outcome = "answered" if endpoint.is_admitted_since(changes) else "discarded"
    except AttemptFailed as failure:
        now = time.monotonic()
        if failure.signal != "timeout" or seconds - request.waited >= min(ample, most):
            outcome = failure.signal
            endpoint.failed(failure, tokens, now - started, now, alone=len(model.endpoints) == 1)
        if failure.signal == "timeout" and seconds == left:
            raise DeadlineExceeded(now - work.arrived) from None
        raise
    finally:
        endpoint.load.finish(tokens)
        place.release()
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
        seconds = min(candidate.wait + candidate.seconds for candidate in candidates) - left
        return Overloaded("no provider can answer by the deadline", retry_after=max(1.0, seconds))
    if engine is None and not model.any_admitted():
        message = "no provider of this model has been found to give the right vectors: none is better than wrong ones"
        return NoConformingProvider(message, retry_after=model.checked_in(now))
    soonest = min((endpoint.available_in(now) for endpoint in model.endpoints), default=float("inf"))
    return NoProvider(
        "no provider of this model that fits the request can answer now",
        retry_after=min(max(1.0, soonest), 60.0),
    )
