"""Pages of the catalogue: home, list, model, comparison, documentation and status. Each is a function of the site."""

import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from urllib.parse import quote

import msgspec
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from unmask.api.endpoint_info import endpoint_list
from unmask.api.errors import ApiError
from unmask.api.schema import EndpointInfo
from unmask.catalogue import Measurement, Record
from unmask.catalogue.figures import SUITES, CategoryScores, SuiteScores
from unmask.catalogue.measurement import LOCAL, MTEB
from unmask.catalogue.speed import points_of
from unmask.engine.hand_thread import HandFigures
from unmask.router.served_model import ServedModel
from unmask.web.catalogue import alternates, documentation, quality_charts, speed_charts
from unmask.web.catalogue.comparison import MAX_MODELS, compare_models
from unmask.web.catalogue.listing import filter_choices, list_models
from unmask.web.catalogue.model_view import STATUS_MEANINGS, ModelView, number_sources, pipeline, source_key
from unmask.web.catalogue.snippets import Snippet, export_snippet, snippets
from unmask.web.query import parse_comparison_query, parse_listing_query
from unmask.web.rendering import HEADERS, environment, text_response
from unmask.web.site import Site

_EMBEDDINGS = "/v1/embeddings"
_REFUSED, _FAILED = (400, 401, 404, 405, 408, 413, 415, 429), 500


async def home_page(site: Site, request: Request) -> Response:
    views = site.model_views(request)
    live = [view for view in views if view.is_served]
    coming = [view for view in views if view.display_status == "coming soon"]
    return site.render(
        request,
        "home.html.j2",
        live=live,
        coming=sorted(coming, key=lambda view: -(view.figures.mteb or 0)),
        total=len(views),
        measurements=sum(len(view.entry.measurements) for view in views),
        snippets=_snippets(site, request, live[0].record) if live else [],
    )


async def list_page(site: Site, request: Request) -> Response:
    views, hooks = site.model_views(request), site.hooks
    choices = filter_choices(views, by_votes=hooks.vote_counts is not None)
    query = parse_listing_query(request.query_params, choices)
    votes = await hooks.vote_counts() if hooks.vote_counts and query.sort == "votes" else {}
    listing = list_models(views, query, choices, votes)
    return site.render(
        request,
        "models.html.j2",
        listing=listing,
        query=listing.query,
        priced=any(view.record.prices for view in listing.rows),
        speed=quality_charts.quality_and_speed(listing.matches),
        size=quality_charts.quality_and_size(listing.matches),
        request_form=await hooks.request_form(request) if hooks.request_form else None,
        votes=votes,
    )


async def model_page(site: Site, request: Request) -> Response:
    """Render a model as a page, or with .json or .md after its id as JSON or Markdown.

    Raises:
        ApiError: 404, no model has this id.
    """
    id: str = request.path_params["id"]
    view = site.find_model_view(request, id)
    for suffix, render in ((".json", _model_json), (".md", _model_markdown)):
        shorter = site.find_model_view(request, id.removesuffix(suffix)) if id.endswith(suffix) else None
        # A record of such a name hides no page of another model, unless it is the only one of both that answers.
        if shorter is not None and (view is None or shorter.is_served or not view.is_served):
            return render(site, request, shorter)
    if view is not None:
        if view.record.id != id:  # an alias: one page has one address
            return RedirectResponse(f"/models/{quote(view.record.id)}", 301, HEADERS)
        return await _model_html(site, request, view)
    raise ApiError(
        404,
        f"No model here is called {id[:120]!r}: see the list of models, or ask for it to be added.",
        code="model_not_found",
    )


async def comparison_page(site: Site, request: Request) -> Response:
    """Render models side by side.

    Raises:
        ApiError: 404, a model does not exist; 400, there are too many.
    """
    query = parse_comparison_query(request.query_params)
    canonical = f"/compare?models={','.join(query.ids)}" if query.ids else "/compare"
    models = []
    for id in query.ids:
        view = site.find_model_view(request, id)
        if view is None:
            message = f"No model here is called {id[:120]!r}: see the list of models."
            raise ApiError(404, message, param="models", code="model_not_found")
        models.append(view)
    if query.repeats_parameter:
        suffix = "&only=differences" if query.only_differences and query.ids else ""
        return RedirectResponse(canonical + suffix, 303, HEADERS)
    return site.render(
        request,
        "compare.html.j2",
        models=models,
        sections=compare_models(models) if len(models) > 1 else [],
        only=query.only_differences,
        canonical=canonical,
        ids=query.ids,
        others=[view.record.id for view in site.model_views(request) if view.record.id not in query.ids],
        max_models=MAX_MODELS,
    )


async def documentation_page(site: Site, request: Request) -> Response:
    live = next((view for view in site.model_views(request) if view.is_served), None)
    return site.render(
        request,
        "docs.html.j2",
        errors=documentation.error_rows(site.settings),
        limits=documentation.limit_rows(site.settings),
        snippets=_snippets(site, request, live.record if live else Record(id="MODEL")),
    )


async def status_page(site: Site, request: Request) -> Response:
    by_status = site.metrics.requests_by_status(_EMBEDDINGS)
    cumulative = [(0.0, 0), *site.metrics.latency_buckets(_EMBEDDINGS)]
    buckets = [(low, high, n - before) for (low, before), (high, n) in pairwise(cumulative)]
    tokens = site.metrics.tokens_by_model()
    return site.render(
        request,
        "status.html.j2",
        models=[
            (view, view.served, await _waiting_tokens(view), tokens.get(view.record.id, 0))
            for view in site.model_views(request)
            if view.served
        ],
        replicas=[
            (view, hands)
            for view in site.model_views(request)
            if view.served and (hands := await _replicas(view.served))
        ],
        providers=[(view, endpoints) for view in site.model_views(request) if (endpoints := _endpoints(site, view))],
        started=site.started,
        uptime=site.uptime_s(),
        answered=by_status.get(200, 0),
        refused=sum(by_status.get(status, 0) for status in _REFUSED),
        failed=sum(n for status, n in by_status.items() if status >= _FAILED),
        disconnected=by_status.get(499, 0),
        buckets=[bucket for bucket in buckets if bucket[2]],
        largest_bucket=max((bucket[2] for bucket in buckets), default=0),
        system=f"{platform.system()}, {platform.machine()}",
    )


async def _model_html(site: Site, request: Request, view: ModelView) -> Response:
    recent = site.metrics.recent_traffic(view.record.id) if view.is_served else []
    points = points_of(view.figures.sweep)
    vote_button = site.hooks.vote_button
    return site.render(
        request,
        "model.html.j2",
        **_model_values(view),
        snippets=_snippets(site, request, view.record),
        export=export_snippet(view.record),
        related=_related(view, site.model_views(request)),
        vote_button=await vote_button(request, view.record) if vote_button and not view.is_served else None,
        points=points,
        sweep=speed_charts.sweep_charts(points) if view.is_served else [],
        recent=speed_charts.traffic_charts(recent),
        answered=sum(interval.requests for interval in recent),
        linked_data=alternates.linked_data(view, site.url(request)),
        tokens=site.metrics.tokens_by_model().get(view.record.id, 0),
        endpoints=_endpoints(site, view),
    )


def _endpoints(site: Site, view: ModelView) -> list[EndpointInfo]:
    """Return everybody who answers for a model; empty if it has no providers besides this server."""
    pool = site.models.providers
    if pool is None or view.served is None or pool.of_model(view.served.record.id) is None:
        return []
    return endpoint_list(site.models, view.served).data


def _model_json(site: Site, request: Request, view: ModelView) -> Response:
    text = msgspec.json.format(msgspec.json.encode(alternates.model_json(view))).decode()
    return text_response(request, text, "application/json")


def _model_markdown(site: Site, request: Request, view: ModelView) -> Response:
    values = _model_values(view) | {"base": site.url(request)}
    return text_response(request, environment().get_template("model.md.j2").render(**values), "text/markdown")


def _model_values(view: ModelView) -> dict[str, Any]:
    """Return the template values that the page and the Markdown have in common."""
    figures = view.figures
    published, measured = (figures.suites.get((MTEB, origin)) for origin in ("published", "measured"))
    return {
        "view": view,
        "record": view.record,
        "display_status": view.display_status,
        "meaning": STATUS_MEANINGS[view.display_status],
        "figures": figures,
        "published": published,
        "measured": measured,
        "mteb_rows": _category_rows(published, measured) if published or measured else [],
        "local": figures.suites.get((LOCAL, "measured")),
        "published_tasks": {task.what: task for task in published.tasks} if published else {},
        "sources": number_sources(view.entry.measurements),
        "source_key": source_key,
        "pipeline": pipeline(view),
    }


async def _replicas(served: ServedModel | None) -> list[HandFigures]:
    """Return the replicas of a model; empty for one that this process computes, or that is not loaded."""
    if served is None or served.state != "ready":
        return []
    engine = await served.engine()
    return engine.hands() if engine.has_replicas else []


async def _waiting_tokens(view: ModelView) -> int:
    if view.served is None or view.served.state != "ready":
        return 0
    return (await view.served.engine()).waiting_tokens()


def _snippets(site: Site, request: Request, record: Record) -> list[Snippet]:
    return snippets(record, site.url(request), secured=site.needs_key)


@dataclass(frozen=True)
class CategoryRow:
    """Published and measured scores of one category of a suite. `tasks` has (task, published, measured)."""

    category: str
    expected: int
    published: CategoryScores | None
    measured: CategoryScores | None
    tasks: list[tuple[str, Measurement | None, Measurement | None]]


def _category_rows(published: SuiteScores | None, measured: SuiteScores | None) -> list[CategoryRow]:
    rows = []
    for at, (category, expected) in enumerate(SUITES[MTEB].items()):
        theirs = published.categories[at] if published else None
        ours = measured.categories[at] if measured else None
        by_task = [{m.what: m for m in scores.tasks} if scores else {} for scores in (theirs, ours)]
        names = dict.fromkeys(name for scores in by_task for name in scores)
        tasks = [(name, by_task[0].get(name), by_task[1].get(name)) for name in names]
        rows.append(CategoryRow(category, expected, theirs, ours, tasks))
    return rows


def _related(view: ModelView, models: Sequence[ModelView], most: int = 3) -> list[ModelView]:
    """Return the most similar models: same base, then same owner, same architecture, similar size."""
    record = view.record

    def distance(other: ModelView) -> tuple[bool, bool, bool, float]:
        candidate = other.record
        sizes = (record.parameters, candidate.parameters)
        size_ratio = abs(math.log(sizes[0] / sizes[1])) if sizes[0] and sizes[1] else math.inf
        linked = candidate.id in {record.base} or record.id == candidate.base
        return (
            not (linked or (record.base is not None and candidate.base == record.base)),
            candidate.owned_by != record.owned_by,
            candidate.architecture != record.architecture,
            size_ratio,
        )

    return sorted((other for other in models if other.record.id != record.id), key=distance)[:most]
