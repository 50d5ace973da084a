"""`GET /v1/models/{id}/endpoints`: who answers for a model, and how well."""

import time
from dataclasses import asdict
from typing import Literal

import msgspec

from unmask.api.schema import ConformanceInfo, EndpointInfo, EndpointList, PercentileInfo
from unmask.conformance import Finding, References
from unmask.router import ModelRegistry, PublicNames, ServedModel
from unmask.router.embedding_work import LOCAL
from unmask.router.endpoint import EndpointStatus, ProviderEndpoint
from unmask.router.request_history import DAY_S, Percentiles
from unmask.router.route import space_of


def endpoint_list(models: ModelRegistry, served: ServedModel, names: PublicNames | None = None) -> EndpointList:
    """Describe this server's own engine, if it ever loads the model, and all providers.

    Args:
        models: of the server.
        served: the model.
        names: the names of the providers; None for those that callers see.
    """
    names = models.public_names if names is None else names
    pool = models.providers
    group = pool.of_model(served.record.id) if pool is not None else None
    data = []
    if (state := served.state) != "remote":
        data.append(_local(served, state))
    if group is not None:
        longest = served.record.max_tokens
        data += [_remote(endpoint, group.references, names, longest) for endpoint in group.endpoints]
    references, precision = group.references if group is not None else None, served.precision_class
    space = references.vector_space(precision) if references and precision else space_of(served)
    if data and data[0].name == LOCAL:
        data[0].vector_space = space
    return EndpointList(model=served.record.id, vector_space=space, data=data)


def _local(served: ServedModel, state: Literal["cold", "loading", "ready", "failed"]) -> EndpointInfo:
    return EndpointInfo(
        name=LOCAL,
        kind="local",
        status="admitted" if state == "ready" else state,
        precision=served.precision_class,
        max_tokens=served.record.max_tokens,
    )


def _remote(
    endpoint: ProviderEndpoint, references: References | None, names: PublicNames, longest: int | None
) -> EndpointInfo:
    """Describe a provider; `longest` is the model's own limit of tokens."""
    now, provider, model = time.monotonic(), endpoint.provider, endpoint.model
    run, name, status = endpoint.conformance, names.public_name(provider.name), endpoint.status(now)
    return EndpointInfo(
        name=name,
        kind="remote" if names.hides else provider.kind,
        status=status,
        precision=endpoint.precision,
        vector_space=references.vector_space(endpoint.precision) if references and endpoint.precision else None,
        max_inputs=provider.inputs_per_request(model),
        max_tokens=min(filter(None, (model.max_tokens, longest)), default=None),
        priority=0 if names.hides else model.priority,  # often an order of prices
        data=provider.data,
        country=None if names.hides else provider.country or None,
        latency_last_30m=_percentiles(endpoint.history.latency(now)),
        throughput_last_30m=_percentiles(endpoint.history.throughput(now)),
        uptime_last_5m=endpoint.history.uptime(300, now),
        uptime_last_30m=endpoint.history.uptime(1800, now),
        uptime_last_1d=endpoint.history.uptime(DAY_S, now),
        conformance=None
        if run is None or references is None
        else ConformanceInfo(
            worst=run.worst,
            mean=run.mean,
            noise=run.noise,
            set=references.set_version,
            checked=int(endpoint.passed_at),  # rounded up, it would be a time that has not come
            finding=_hidden_finding(name, run, status) if names.hides else endpoint.finding,
        ),
    )


def _hidden_finding(name: str, run: Finding, status: EndpointStatus) -> str:
    """Return the fault of a full run. An operator's own words are left out: they may have any name in them."""
    if run.fault:
        return f"{name} {run.fault}"
    return f"{name} was taken out of traffic" if status == "quarantined" else ""


def _percentiles(percentiles: Percentiles | None) -> PercentileInfo | None:
    return msgspec.convert(asdict(percentiles), PercentileInfo) if percentiles is not None else None
