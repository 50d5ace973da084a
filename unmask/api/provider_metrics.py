"""`ProviderCollector`: the figures of providers for Prometheus, read from the router's own totals at each scrape.

Nothing is counted twice, and a request pays for no label. A total begins anew when the process starts, or when the file
of providers gives a provider another address; Prometheus takes both for a reset.
"""

from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from unmask.router import PublicNames
from unmask.router.endpoint import ProviderEndpoint
from unmask.router.model_endpoints import ModelEndpoints
from unmask.router.totals import REFUSAL_REASONS

_OF_ENDPOINT = ("provider", "model")


class ProviderCollector(Collector):
    """The figures of all endpoints, by provider and model, and those of routing, by model."""

    def __init__(self) -> None:
        self._models: Sequence[ModelEndpoints] = ()
        self._names = PublicNames()

    def set(self, models: Iterable[ModelEndpoints], names: PublicNames) -> None:
        """Set the models to describe; without costs where providers are hidden."""
        self._models, self._names = list(models), names

    def collect(self) -> Iterator[Metric]:
        """Yield all figures. Those of endpoints that are gone are dropped."""
        endpoints = [
            ((self._names.public_name(endpoint.provider.name), endpoint.model.id), endpoint)
            for model in self._models
            for endpoint in model.endpoints
        ]
        yield from _attempts(endpoints)
        if not self._names.hides:
            yield _costs(endpoints)
        yield from _states(endpoints)
        yield from _routing(self._models)


_Labelled = Sequence[tuple[tuple[str, str], ProviderEndpoint]]


def _attempts(endpoints: _Labelled) -> Iterator[Metric]:
    attempts = CounterMetricFamily(
        "unmask_provider_attempts",
        "Attempts at a provider by outcome and by the reason for the attempt",
        labels=(*_OF_ENDPOINT, "outcome", "reason"),
    )
    seconds = HistogramMetricFamily(
        "unmask_provider_attempt_seconds",
        "Duration of an attempt for a caller by outcome",
        labels=(*_OF_ENDPOINT, "outcome"),
    )
    tokens = CounterMetricFamily(
        "unmask_provider_tokens",
        "Tokens of a provider's answers by this server's count (ours) and by the provider's (theirs)",
        labels=(*_OF_ENDPOINT, "counted"),
    )
    for labels, endpoint in endpoints:
        totals = endpoint.totals
        for (outcome, reason), count in totals.attempts.items():
            attempts.add_metric([*labels, outcome, reason], count)
        for outcome, durations in totals.seconds.items():
            seconds.add_metric([*labels, outcome], durations.cumulative(), durations.sum)
        tokens.add_metric([*labels, "ours"], totals.tokens)
        tokens.add_metric([*labels, "theirs"], totals.their_tokens)
    yield from (attempts, seconds, tokens)


def _costs(endpoints: _Labelled) -> Metric:
    costs = CounterMetricFamily(
        "unmask_provider_cost_nanodollars",
        "Cost of the attempts at a provider by the reason for the attempt",
        labels=(*_OF_ENDPOINT, "reason"),
    )
    for labels, endpoint in endpoints:
        for reason, nano in endpoint.costs.items():
            costs.add_metric([*labels, reason], nano)
    return costs


def _states(endpoints: _Labelled) -> Iterator[Metric]:
    def gauge(name: str, description: str, *labels: str) -> GaugeMetricFamily:
        return GaugeMetricFamily(f"unmask_provider_{name}", description, labels=(*_OF_ENDPOINT, *labels))

    in_flight = gauge("in_flight_tokens", "Tokens in flight at a provider")
    admitted = gauge("admitted", "1 if a provider's vectors were right in its last runs, else 0")
    closed = gauge("breaker_closed", "1 if traffic may go to a provider, else 0")
    distance = gauge("conformance_distance", "1 - cosine of a provider's canaries in its last full run", "stat")
    checked = gauge(
        "conformance_checked_timestamp_seconds", "Unix time at which a provider last began to answer canaries rightly"
    )
    for labels, endpoint in endpoints:
        in_flight.add_metric(labels, endpoint.load.tokens)
        admitted.add_metric(labels, endpoint.admission == "admitted")
        closed.add_metric(labels, endpoint.breaker.lets_in())
        if endpoint.conformance is not None:
            distance.add_metric([*labels, "worst"], endpoint.conformance.worst)
            distance.add_metric([*labels, "mean"], endpoint.conformance.mean)
        if endpoint.passed_at:
            checked.add_metric(labels, endpoint.passed_at)
    yield from (in_flight, admitted, closed, distance, checked)


def _routing(models: Sequence[ModelEndpoints]) -> Iterator[Metric]:
    retries = CounterMetricFamily(
        "unmask_retries",
        "Attempts at another provider by the outcome of the attempt before",
        labels=("model", "reason"),
    )
    hedges = CounterMetricFamily(
        "unmask_hedges", "Hedges by whether their answer was the one that counted", labels=("model", "won")
    )
    refusals = CounterMetricFamily(
        "unmask_router_refusals",
        "Requests of a model with providers that were not answered, by reason",
        labels=("model", "reason"),
    )
    for model in models:
        totals = model.totals
        for before, count in totals.retries.items():
            retries.add_metric([model.id, before], count)
        for won in (False, True):
            hedges.add_metric([model.id, str(won).lower()], totals.hedges[won])
        for reason in REFUSAL_REASONS:
            refusals.add_metric([model.id, reason], totals.refusals[reason])
    yield from (retries, hedges, refusals)
