"""`choose`: which endpoint answers a request. Filters first, then two drawn by weight, and the less loaded of them."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from unmask.conformance import PrecisionClass

# A free endpoint weighs as much as one of a tenth of the dearest one's price: not everything.
_CHEAPEST_SHARE = 0.1


@dataclass(frozen=True)
class ProviderPreferences:
    """A caller's field `provider`, in OpenRouter's words.

    Attributes:
        only: names that may answer; empty for all.
        ignore: names that may not.
        order: names to try in this order, before all others.
        allow_fallbacks: a second provider may be asked. Without, the first choice answers or nobody: the first name of
            `order` if there is one.
        sort: take the best by "price", "latency" or "throughput" in place of balancing; None to balance.
        precision: classes that may answer, beyond those of the model's vector space.
        data_collection: "deny" for providers that keep nothing.
    """

    only: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    order: tuple[str, ...] = ()
    allow_fallbacks: bool = True
    sort: Literal["price", "latency", "throughput"] | None = None
    precision: tuple[PrecisionClass, ...] = ()
    data_collection: Literal["allow", "deny"] = "allow"


class Candidate(NamedTuple):
    """An endpoint that could answer a request. A tuple, since every request makes one for each endpoint.

    Attributes:
        name: of the provider.
        priority: 0 first.
        price: cost of a million tokens there, in nano-dollars.
        share: of its traffic that it may have, below 1 while it starts slowly.
        load: expected load that this request meets there. Only the order of two loads has a meaning.
        seconds: expected for this request, from its first byte on.
        wait: seconds until there is a place for the request; 0 if there is one.
        latency: usual seconds of an answer there, whatever its size.
        throughput: usual tokens per second of an answer there.
        idle: nothing is in flight there. An idle endpoint may always be tried: what it last took may be long ago.
    """

    name: str
    priority: int
    price: int
    share: float
    load: float
    seconds: float
    wait: float = 0.0
    latency: float = 0.0
    throughput: float = 0.0
    idle: bool = False

    def fits(self, seconds: float) -> bool:
        """True if the request may be tried there by a caller who has `seconds` left."""
        return self.idle or self.wait + self.seconds <= seconds


def choose(
    candidates: Sequence[Candidate],
    preferences: ProviderPreferences,
    draw: random.Random,
    *,
    by_price_alone: bool = False,
) -> Candidate | None:
    """Return the endpoint that should answer; None if there is no candidate.

    Args:
        candidates: endpoints that can answer and may; see `permitted` for the caller's preferences.
        preferences: of the caller, for order and sorting.
        draw: source of chance.
        by_price_alone: take the cheapest of all, whatever its priority, unless the caller orders or sorts them.
    """
    if not candidates:
        return None
    for name in preferences.order:
        if match := next((candidate for candidate in candidates if candidate.name == name), None):
            return match
    if by_price_alone and preferences.sort is None:
        return min(candidates, key=lambda candidate: (candidate.price, candidate.load))
    first = min(candidate.priority for candidate in candidates)
    group = [candidate for candidate in candidates if candidate.priority == first]
    if preferences.sort == "price":
        return min(group, key=lambda candidate: (candidate.price, candidate.load))
    if preferences.sort == "latency":
        return min(group, key=lambda candidate: (candidate.latency, candidate.load))
    if preferences.sort == "throughput":
        return min(group, key=lambda candidate: (-candidate.throughput, candidate.load))
    return min(_two(group, draw), key=lambda candidate: candidate.load)


def permitted(name: str, data: str, preferences: ProviderPreferences) -> bool:
    """True if the caller's preferences let a provider answer.

    Args:
        name: of the provider.
        data: whether it keeps texts: "none", "30d" or "trains".
        preferences: of the caller.
    """
    if name in preferences.ignore or (preferences.only and name not in preferences.only):
        return False
    if not preferences.allow_fallbacks and preferences.order and name != preferences.order[0]:
        return False
    return data == "none" or preferences.data_collection == "allow"


def _two(group: Sequence[Candidate], draw: random.Random) -> list[Candidate]:
    """Draw two different candidates by weight: 1 / price squared, times the share of a slow start."""
    floor = max(1.0, _CHEAPEST_SHARE * max(candidate.price for candidate in group))
    weights = [candidate.share / max(candidate.price, floor) ** 2 for candidate in group]
    first = draw.choices(range(len(group)), weights)[0]
    if len(group) == 1:
        return [group[first]]
    weights[first] = 0.0
    second = draw.choices(range(len(group)), weights)[0]
    return [group[first], group[second]]
