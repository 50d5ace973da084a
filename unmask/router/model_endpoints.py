"""`ModelEndpoints`: all endpoints of one model, and those of them that may and can answer a request."""

import asyncio
import re
from collections.abc import Sequence
from typing import NamedTuple

from unmask.checkpoint.tokenizer import TextTokenizer
from unmask.conformance import PrecisionClass, References
from unmask.conformance.references import space_precisions
from unmask.encoder.prompts import PromptBuilder
from unmask.engine import Engine
from unmask.router import hedging, retry_budget
from unmask.router.checks import ReferencesStamp
from unmask.router.choosing import Candidate, permitted
from unmask.router.embedding_work import LOCAL, EmbeddingWork
from unmask.router.endpoint import ProviderEndpoint
from unmask.router.places import Place, first_place
from unmask.router.retry_budget import RetryBudget
from unmask.router.totals import RoutingTotals

# Usual seconds until a model without an admitted endpoint has one: while its references are computed, and while all are
# quarantined, which takes a person.
_REFERENCES_S, _OPERATOR_S = 30.0, 120.0

# Forms of the control tokens in use. The pattern matches more than those: a text that matches by chance is only sent
# elsewhere.
_CONTROL_TOKEN = re.compile(r"<[^\s<>]{1,40}>|\[[A-Za-z_0-9]{1,40}\]|!@#\$%")


class BudgetShares(NamedTuple):
    """Shares of a model's tokens that retries and hedges may cost."""

    retry: float = retry_budget.SHARE
    hedge: float = hedging.SHARE


USUAL_SHARES = BudgetShares()


class ModelEndpoints:
    """All endpoints of a model.

    Args:
        endpoints: in the order of the file.
        min_margin: share of a request's price that must remain after a provider's cost.
        references_stamp: of the file that the references are read from; None where they are computed here.
        shares: of its tokens that retries and hedges may cost.

    Attributes:
        references: of the model; None until they are computed, and before that nobody is admitted.
        prompts, tokenizer: its text handling, which needs no weights; None until it is read.
        problem: why there are no references, for the operator; "" for none.
        cross_check: the one that is under way; None for none.
        waiting_tokens: tokens of the requests that wait for a place at an endpoint.
        totals: further attempts and refusals of this process.
    """

    def __init__(
        self,
        endpoints: Sequence[ProviderEndpoint],
        min_margin: float = 0.0,
        references_stamp: ReferencesStamp | None = None,
        shares: BudgetShares = USUAL_SHARES,
    ) -> None:
        self.endpoints = list(endpoints)
        self.min_margin, self.references_stamp = min_margin, references_stamp
        self.references: References | None = None
        self.prompts: PromptBuilder | None = None
        self.tokenizer: TextTokenizer | None = None
        self.problem = ""
        self.cross_check: asyncio.Task[None] | None = None
        self.waiting_tokens = 0
        self.budget = RetryBudget(shares.retry)
        self.hedge_budget = RetryBudget(shares.hedge, 0)
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

    def candidates(self, engine: Engine | None, work: EmbeddingWork, tried: set[str], now: float) -> list[Candidate]:
        """Return those that may and can answer, filtered in this order: admitted, able, permitted, paid for, open.

        Endpoints without a free place are among them, with the time that one takes.

        Args:
            engine: this process's own engine; None if it is not loaded, or not asked.
            work: the request.
            tried: names that were asked already.
            now: time.
        """
        tokens, precisions = work.num_tokens, (*space_precisions(work.precision), *work.preferences.precision)
        candidates = [
            endpoint.candidate(tokens, len(work.prompts), work.share, now)
            for endpoint in self.endpoints
            if endpoint.admission == "admitted"
            and _is_able(endpoint, work)
            and endpoint.precision in precisions
            and permitted(endpoint.provider.name, endpoint.provider.data, work.preferences)
            and endpoint.provider.name not in tried
            and endpoint.covers_cost(tokens, work.income, self.min_margin, is_replay=work.is_replay)
            and endpoint.is_open(now)
        ]
        if engine is not None and LOCAL not in tried and permitted(LOCAL, "none", work.preferences):
            rate = engine.tokens_per_second
            seconds = 0.0 if rate is None else (engine.waiting_tokens() + tokens) / rate
            # The engine refuses by itself what it cannot do in time, and says when it could.
            expected = 0.0 if not candidates else seconds
            own = Candidate(LOCAL, 0, 0, 1.0, seconds, expected, latency=seconds, throughput=rate or float("inf"))
            candidates.insert(0, own)
        return candidates

    async def wait_for_place(
        self, candidates: Sequence[Candidate], work: EmbeddingWork, until: float
    ) -> tuple[ProviderEndpoint, Place] | None:
        """Wait until one of some endpoints without a free place has one for this caller; None if that is not in time.

        Args:
            candidates: of the endpoints.
            work: the request.
            until: `time.monotonic()`.
        """
        endpoints = [self.endpoint(candidate.name) for candidate in candidates]
        self.waiting_tokens += work.num_tokens
        try:
            place = await first_place([endpoint.places for endpoint in endpoints], work.share, until)
        finally:
            self.waiting_tokens -= work.num_tokens
        if place is None:
            return None
        return next(endpoint for endpoint in endpoints if endpoint.places is place.places), place

    def checked_in(self, now: float) -> float:
        """Return the seconds after which an endpoint may have been admitted, for a model of which none is."""
        if self.references is None:
            return _OPERATOR_S if self.problem else _REFERENCES_S
        unchecked = (endpoint for endpoint in self.endpoints if endpoint.admission == "unchecked")
        runs = [max(0.0, endpoint.run_at - now) + endpoint.run_seconds for endpoint in unchecked]
        return max(1.0, min(runs, default=_OPERATOR_S))


def _is_able(endpoint: ProviderEndpoint, work: EmbeddingWork) -> bool:
    """True if the provider's API can carry the request without changing what it means."""
    if work.texts is None or work.raw or (work.instruction and not endpoint.provider.takes_instructions):
        return False
    if endpoint.model.reads_control_tokens and any(map(_CONTROL_TOKEN.search, work.texts)):
        return False
    longest = endpoint.model.max_tokens
    return all(not prompt.truncated and (longest is None or len(prompt.ids) <= longest) for prompt in work.prompts)
