"""`EmbeddingWork`: the inputs of one request on their way; `RoutedVectors`: their vectors, and who computed them."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from unmask.accounts.costs import AttemptRecord
from unmask.conformance import PrecisionClass
from unmask.encoder import Prompt
from unmask.router.choosing import ProviderPreferences
from unmask.router.endpoint import ProviderEndpoint

LOCAL = "local"  # name of this process's own engine among the providers


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
        by_price_alone: the cheapest provider is to answer, whatever its priority: the work is not urgent.
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
    by_price_alone: bool = False
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
