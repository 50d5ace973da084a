"""What Prometheus may know. Labels come from our own tables, never from a caller."""

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from unmask.api.traffic import History, Stretch

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST

# From a cached answer to a full batch on a slow machine.
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """The counters of one app, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._history = History()
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
            "Tokens in the queue of a model's engine",
            ["model"],
            registry=self._registry,
        )
        self._reused = Gauge(
            "unmask_reused_inputs",
            "Inputs answered without computing them again, since the model was loaded",
            ["model"],
            registry=self._registry,
        )
        prometheus_client.ProcessCollector(registry=self._registry)

    def request(self, route: str, status: int, seconds: float) -> None:
        """Count a request that was answered, or left by its caller (status 499)."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def tokens(self, model: str, count: int) -> None:
        """Count tokens that a model turned into vectors."""
        self._tokens.labels(model).inc(count)

    def embedded(self, model: str, tokens: int, seconds: float) -> None:
        """Count a request of the API that a model has answered."""
        self.tokens(model, tokens)
        self._history.add(model, tokens, seconds)

    def lately(self, model: str) -> list[Stretch]:
        """What a model has answered through the API in the last day, as far as this process knows."""
        return self._history.of(model)

    def waiting(self, model: str, count: int) -> None:
        """Set how many tokens wait for a model."""
        self._waiting.labels(model).set(count)

    def reused(self, model: str, count: int) -> None:
        """Set how many inputs a model has answered from what it computed before."""
        self._reused.labels(model).set(count)

    def answered(self, route: str) -> dict[int, int]:
        """How many requests a route answered since the start, by status."""
        return {
            int(sample.labels["status"]): int(sample.value)
            for metric in self._requests.collect()
            for sample in metric.samples
            if sample.name.endswith("_total") and sample.labels["route"] == route
        }

    def within(self, route: str) -> list[tuple[float, int]]:
        """How many requests of a route took no longer than so many seconds: (seconds, count), rising to infinity."""
        return [
            (float(sample.labels["le"]), int(sample.value))
            for metric in self._seconds.collect()
            for sample in metric.samples
            if sample.name.endswith("_bucket") and sample.labels["route"] == route
        ]

    def encoded(self) -> dict[str, int]:
        """Tokens turned into vectors since the start, by model."""
        return {
            sample.labels["model"]: int(sample.value)
            for metric in self._tokens.collect()
            for sample in metric.samples
            if sample.name.endswith("_total")
        }

    def exposition(self) -> bytes:
        """All of it in Prometheus' text format."""
        return prometheus_client.generate_latest(self._registry)
