"""`GET /v1/models/{id}/endpoints`: who answers for a model, and how well."""

import time
from dataclasses import asdict
from typing import Literal

import msgspec

from unmask.api.schema import ConformanceInfo, EndpointInfo, EndpointList, PercentileInfo
from unmask.conformance import References
from unmask.router import ModelRegistry, ServedModel
from unmask.router.attempts import LOCAL
from unmask.router.endpoint import Percentiles, ProviderEndpoint
from unmask.router.providers import PRECISION_CLASSES
from unmask.router.route import space_of


def endpoint_list(models: ModelRegistry, served: ServedModel) -> EndpointList:
    """Describe this server's own engine, if it ever loads the model, and all providers."""
    pool = models.providers
    group = pool.of_model(served.record.id) if pool is not None else None
    data = []
    if (state := served.state) != "remote":
        data.append(_local(served, state))
    if group is not None:
        data += [_remote(endpoint, group.references) for endpoint in group.endpoints]
    references = group.references if group is not None else None
    space = references.vector_space("exact") if references else space_of(served, served.dtype)
    return EndpointList(model=served.record.id, vector_space=space, data=data)


def _local(served: ServedModel, state: Literal["cold", "loading", "ready", "failed"]) -> EndpointInfo:
    return EndpointInfo(
        name=LOCAL,
        kind="local",
        status="admitted" if state == "ready" else state,
        precision=PRECISION_CLASSES[served.dtype],
        max_tokens=served.record.max_tokens,
    )


def _remote(endpoint: ProviderEndpoint, references: References | None) -> EndpointInfo:
    now, provider, model = time.monotonic(), endpoint.provider, endpoint.model
    run = endpoint.conformance
    return EndpointInfo(
        name=provider.name,
        kind=provider.kind,
        status=endpoint.status(now),
        precision=endpoint.precision,
        max_inputs=provider.inputs_per_request(model),
        max_tokens=model.max_tokens,
        priority=model.priority,
        data=provider.data,
        country=provider.country or None,
        latency_last_30m=_percentiles(endpoint.latency(now)),
        throughput_last_30m=_percentiles(endpoint.throughput(now)),
        uptime_last_5m=endpoint.uptime(300, now),
        uptime_last_30m=endpoint.uptime(1800, now),
        uptime_last_1d=endpoint.uptime(86_400, now),
        conformance=None
        if run is None or references is None
        else ConformanceInfo(
            worst=run.worst,
            mean=run.mean,
            noise=run.noise,
            set=references.set_version,
            checked=round(endpoint.passed_at),
            finding=endpoint.finding,
        ),
    )


def _percentiles(percentiles: Percentiles | None) -> PercentileInfo | None:
    return msgspec.convert(asdict(percentiles), PercentileInfo) if percentiles is not None else None
