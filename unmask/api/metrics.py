"""The counters that Prometheus reads. Labels come from our own tables, never from a caller."""

from collections.abc import Iterable, Sequence
from functools import cache

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from unmask.api.provider_metrics import ProviderCollector
from unmask.api.traffic import TrafficHistory, TrafficInterval
from unmask.engine.hand_thread import HandFigures
from unmask.router import PublicNames
from unmask.router.model_endpoints import ModelEndpoints

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST

# From a cached answer to a full batch on a slow machine.
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class HandGauges:
    """The figures of the processes that compute, by model and replica."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def gauge(name: str, description: str, *labels: str) -> Gauge:
            return Gauge(f"unmask_replica_{name}", description, ["model", "replica", *labels], registry=registry)

        self._up = gauge("up", "1 if the replica computes, 0 if it is being started, suspect or lost")
        self._speed = gauge("tokens_per_second", "Measured speed of the replica, 0 until it is known")
        self._forwards = gauge("forwards", "Forwards since the model was loaded: done, late or lost", "outcome")
        self._names: dict[str, set[str]] = {}  # model -> its replicas so far

    def set(self, model: str, hands: Sequence[HandFigures]) -> None:
        """Set the figures of all replicas of a model. The figures of replicas that are gone become 0."""
        names = self._names.setdefault(model, set())
        for name in names.difference(hand.name for hand in hands):
            self._up.labels(model, name).set(0)
            self._speed.labels(model, name).set(0)
        names.update(hand.name for hand in hands)
        for hand in hands:
            self._up.labels(model, hand.name).set(hand.state == "ready")
            self._speed.labels(model, hand.name).set(hand.tokens_per_second or 0)
            for outcome, count in hand.forwards.items():
                self._forwards.labels(model, hand.name, outcome).set(count)


class Metrics:
    """The counters of one app, in their own registry."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._traffic = TrafficHistory()
        self._requests = Counter(
            "unmask_requests", "Requests by route and status", ["route", "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "unmask_request_seconds",
            "Time from the headers to the last byte of the answer",
            ["route"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._tokens = Counter("unmask_tokens", "Tokens processed", ["model"], registry=self._registry)
        self._waiting = Gauge(
            "unmask_waiting_tokens",
            "Tokens that wait for a model's engine, or for a place at its providers",
            ["model"],
            registry=self._registry,
        )
        self._reused = Gauge(
            "unmask_reused_inputs",
            "Inputs answered without computing them again, since the model was loaded",
            ["model"],
            registry=self._registry,
        )
        self._hands = HandGauges(self._registry)
        self._providers = ProviderCollector()
        self._registry.register(self._providers)
        # The client checks and looks up labels at every call, which takes longer than to count.
        self._answers_of = cache(lambda route, status: self._requests.labels(route, str(status)))
        self._seconds_of = cache(self._seconds.labels)
        self._tokens_of = cache(self._tokens.labels)
        prometheus_client.ProcessCollector(registry=self._registry)

    def count_request(self, route: str, status: int, seconds: float) -> None:
        """Count a request by route and status; status 499 if its client disconnected."""
        self._answers_of(route, status).inc()
        self._seconds_of(route).observe(seconds)

    def count_tokens(self, model: str, count: int) -> None:
        """Count tokens that a model turned into vectors."""
        self._tokens_of(model).inc(count)

    def count_embedding(self, model: str, tokens: int, seconds: float) -> None:
        """Count a request of the embeddings route that a model has answered."""
        self.count_tokens(model, tokens)
        self._traffic.add(model, tokens, seconds)

    def recent_traffic(self, model: str) -> list[TrafficInterval]:
        """Return the requests that a model answered through the API of this process in the last day."""
        return self._traffic.of(model)

    def set_waiting_tokens(self, model: str, count: int) -> None:
        """Set the number of tokens in the queue of a model."""
        self._waiting.labels(model).set(count)

    def set_reused_inputs(self, model: str, count: int) -> None:
        """Set the number of inputs of a model that were answered from its cache."""
        self._reused.labels(model).set(count)

    def set_hands(self, model: str, hands: Sequence[HandFigures]) -> None:
        """Set the figures of the replicas of a model."""
        self._hands.set(model, hands)

    def set_providers(self, models: Iterable[ModelEndpoints], names: PublicNames) -> None:
        """Set the models with providers, see `ProviderCollector.set`."""
        self._providers.set(models, names)

    def requests_by_status(self, route: str) -> dict[int, int]:
        """Return the number of requests of a route since the start, by status."""
        return {
            int(sample.labels["status"]): int(sample.value)
            for metric in self._requests.collect()
            for sample in metric.samples
            if sample.name.endswith("_total") and sample.labels["route"] == route
        }

    def latency_buckets(self, route: str) -> list[tuple[float, int]]:
        """Return the cumulative latency histogram of a route: (seconds, requests within them), up to infinity."""
        return [
            (float(sample.labels["le"]), int(sample.value))
            for metric in self._seconds.collect()
            for sample in metric.samples
            if sample.name.endswith("_bucket") and sample.labels["route"] == route
        ]

    def tokens_by_model(self) -> dict[str, int]:
        """Return the number of tokens encoded since the start, by model."""
        return {
            sample.labels["model"]: int(sample.value)
            for metric in self._tokens.collect()
            for sample in metric.samples
            if sample.name.endswith("_total")
        }

    def exposition(self) -> bytes:
        """Return all counters in Prometheus' text format."""
        return prometheus_client.generate_latest(self._registry)
