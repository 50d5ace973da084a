"""The routes, and the app that holds them."""

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from unmask import __version__
from unmask.accounts import Accounts
from unmask.accounts.tariff import Price
from unmask.api.account_routes import AccountRoutes
from unmask.api.authentication import Gate
from unmask.api.charging import Charging
from unmask.api.embeddings import Embeddings, deprecation, find_model
from unmask.api.errors import ApiError
from unmask.api.metrics import CONTENT_TYPE, Metrics
from unmask.api.middleware import Exchange
from unmask.api.openapi import document
from unmask.api.schema import Health, Index, Model, ModelList, Readiness
from unmask.api.settings import ServeSettings
from unmask.api.web_pages import BuildSite, Site, asks_for_html
from unmask.catalogue import Specification
from unmask.catalogue.pricing import prices_here
from unmask.router import Models, ServedModel

# A canary that takes longer stands behind a stuck engine; a load balancer asks again in any case.
_CANARY_TIMEOUT_S = 10


def create_app(
    models: Models,
    settings: ServeSettings,
    stopping: threading.Event | None = None,
    accounts: Accounts | None = None,
    build_site: BuildSite | None = None,
) -> ASGIApp:
    """The ASGI app over `models` and `accounts`, which the caller starts and closes.

    Args:
        models: what to serve.
        settings: limits and keys; its host and port do not matter here.
        stopping: to be set when the server begins to shut down.
        accounts: whose keys are asked for and whose credit pays; without, `settings.api_keys` decide.
        build_site: makes the pages for people; without it there is only the API.
    """
    metrics = Metrics()
    stopping = stopping or threading.Event()
    embeddings = Embeddings(models, settings, metrics, Charging(accounts, settings.credit_status))
    site = build_site(models, settings, metrics, accounts) if build_site else None
    pages = _Pages(models, metrics, stopping, site, accounts)
    openapi = document(
        secured=bool(settings.api_keys), body_limit=settings.body_limit_bytes, accounts=accounts is not None
    )

    async def describe(request: Request) -> Response:
        return _json(openapi)

    routes = [
        Route("/v1/embeddings", embeddings.answer, methods=["POST"]),
        Route("/v1/models", pages.models_list),
        Route("/v1/models/{id:path}", pages.model),
        Route("/health", pages.health),
        Route("/ready", pages.ready),
        Route("/metrics", pages.metrics_text),
        Route("/openapi.json", describe),
        Route("/", pages.index),
    ]
    if accounts is not None:
        about_account = AccountRoutes(accounts)
        routes += [
            Route("/v1/account", about_account.account),
            Route("/v1/usage", about_account.usage),
            Route("/v1/keys", about_account.keys),
        ]
    own = list(routes)
    if site is not None:
        routes += site.routes

    def public(scope: Scope) -> bool:
        """Whether a page for people is asked for, or one that is not there: neither needs a key."""
        if site is None or scope["path"] == "/":
            return site is not None and asks_for_html(scope)
        if any(route.matches(scope)[0] is not Match.NONE for route in own):
            return False
        return asks_for_html(scope) or any(route.matches(scope)[0] is Match.FULL for route in site.routes)

    # Starlette's redirects of trailing slashes would be built from the Host header, which anybody can set.
    router = Router(routes, redirect_slashes=False, default=_not_found)
    return Exchange(
        router,
        {route.endpoint: route.path for route in routes},
        Gate(settings.api_keys, accounts, public),
        metrics,
        stopping,
        site.error if site else None,
    )


@dataclass(frozen=True, eq=False)
class _Pages:
    """The routes that only read."""

    models: Models
    metrics: Metrics
    stopping: threading.Event
    site: Site | None
    accounts: Accounts | None

    async def models_list(self, request: Request) -> Response:
        charged = await self._charged()
        entries = [_entry(served, id, charged) for served in self.models.list() for id in _listed_ids(served)]
        return _json(ModelList(data=entries))

    async def model(self, request: Request) -> Response:
        served = find_model(self.models, request.path_params["id"])
        request.state.headers |= deprecation(served.record)
        return _json(_entry(served, served.record.id, await self._charged()))

    async def _charged(self) -> Sequence[Price] | None:
        """The operator's prices; None where nobody is charged."""
        return await self.accounts.prices() if self.accounts is not None else None

    async def health(self, request: Request) -> Response:
        return _json(Health())

    async def ready(self, request: Request) -> Response:
        if self.stopping.is_set():
            return _json(Readiness(status="stopping", models={}), 503)
        try:
            async with asyncio.timeout(_CANARY_TIMEOUT_S):
                findings = await self.models.canaries()
        except TimeoutError:
            findings = {"canary": f"no vector within {_CANARY_TIMEOUT_S} seconds"}
        for served in self.models.list():
            if served.state == "failed":  # its reason names files, and this page is public
                findings[served.record.id] = "failed to load, see the server's log"
        ready = all(finding == "ok" for finding in findings.values())
        return _json(Readiness(status="ready" if ready else "not ready", models=findings), 200 if ready else 503)

    async def metrics_text(self, request: Request) -> Response:
        for served in self.models.list():
            if served.state == "ready":
                engine = await served.engine()
                self.metrics.waiting(served.record.id, engine.waiting_tokens())
                self.metrics.reused(served.record.id, engine.reused)
        return Response(self.metrics.exposition(), headers={"content-type": CONTENT_TYPE})

    async def index(self, request: Request) -> Response:
        if self.site is not None and asks_for_html(request.scope):
            return await self.site.home(request)
        return _json(
            Index(
                name="unmask",
                version=__version__,
                embeddings="/v1/embeddings",
                models="/v1/models",
                health="/health",
                ready="/ready",
                metrics="/metrics",
                openapi="/openapi.json",
            )
        )


async def _not_found(scope: Scope, receive: Receive, send: Send) -> None:
    raise ApiError(404, f"There is nothing at {scope['path'][:200]}: see / for what there is.", code="not_found")


def _listed_ids(served: ServedModel) -> list[str]:
    """The id, and aliases with "embed" in them where it has not: n8n shows only such ids."""
    record = served.record
    if "embed" in record.id.lower():
        return [record.id]
    return [record.id, *(alias for alias in record.aliases if "embed" in alias)]


def _entry(served: ServedModel, id: str, charged: Sequence[Price] | None) -> Model:
    record = served.record
    until = record.history[-1].until if record.history else None
    fields: dict[str, object] = {name: getattr(record, name) for name in Specification.__struct_fields__}
    fields |= {
        "id": id,
        "status": served.state,
        "precision": served.dtype,
        "prices": msgspec.to_builtins(record.prices if charged is None else prices_here(record, charged)),
        "lifecycle": record.status,
        "shutdown_date": until.isoformat() if until else None,
    }
    return msgspec.convert(fields, Model)


def _json(content: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(content), status, media_type="application/json")
