"""`create_app`: the routes, and the middlewares around them."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import msgspec
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from unmask import __version__
from unmask.accounts import Accounts
from unmask.accounts.tariff import TariffPrice
from unmask.api.account_routes import AccountRoutes
from unmask.api.authentication import Authenticator
from unmask.api.charging import Charging
from unmask.api.context import context_of
from unmask.api.cors import CorsMiddleware
from unmask.api.dialects import dialect_error, dialect_routes, tei
from unmask.api.embeddings import USES, EmbeddingsRoute, deprecation_headers, find_model, split_use
from unmask.api.endpoint_info import endpoint_list
from unmask.api.errors import ApiError
from unmask.api.metrics import CONTENT_TYPE, Metrics
from unmask.api.middleware import (
    AccessLogMiddleware,
    AuthenticationMiddleware,
    ErrorMiddleware,
    RequestContextMiddleware,
    ResponseHeadersMiddleware,
)
from unmask.api.openapi import openapi_document
from unmask.api.schema import Health, Index, Model, ModelList, ModelPrice, Readiness
from unmask.api.settings import ServeSettings
from unmask.api.web_pages import WebPages, accepts_html
from unmask.catalogue import Record, Specification
from unmask.catalogue.pricing import charged_prices
from unmask.router import ModelRegistry, ServedModel
from unmask.router.route import space_of

# A canary that takes longer stands behind a stuck engine. A load balancer asks again in any case.
_CANARY_TIMEOUT_S = 10

Endpoint = Callable[[Request], Awaitable[Response]]


def create_app(
    models: ModelRegistry,
    settings: ServeSettings,
    *,
    metrics: Metrics | None = None,
    stopping: threading.Event | None = None,
    accounts: Accounts | None = None,
    pages: WebPages | None = None,
) -> ASGIApp:
    """Build the ASGI app over `models` and `accounts`, which the caller starts and closes.

    Args:
        models: the models to serve.
        settings: limits and keys; host and port are not used here.
        metrics: the counters, where the pages show them as well.
        stopping: set when the server begins to shut down.
        accounts: accounts whose keys are accepted and whose credit pays; without them `settings.api_keys` decide.
        pages: pages beside the API.
    """
    metrics = metrics or Metrics()
    stopping = stopping or threading.Event()
    charging = Charging(accounts, settings.credit_status)
    embeddings = EmbeddingsRoute(models, settings, metrics, charging)
    service = _ServiceRoutes(models, metrics, stopping, pages, accounts)
    openapi = openapi_document(
        secured=bool(settings.api_keys), body_limit=settings.body_limit_bytes, accounts=accounts is not None
    )

    async def describe(request: Request) -> Response:
        return _json(openapi)

    api_routes = [
        Route("/v1/embeddings", embeddings.answer, methods=["POST"]),  # first: routes are tried in their order
        *dialect_routes(embeddings),
        Route("/v1/models", service.list_models),
        Route("/v1/models/", service.list_models),  # from base URLs with a slash at the end
        Route("/v1/models/{id:path}/endpoints", service.endpoints),  # before the next route, whose id matches any path
        Route("/v1/models/{id:path}", service.model),
        Route("/health", service.health),
        Route("/ready", service.ready),
        Route("/metrics", service.metrics_text),
        Route("/openapi.json", describe),
        Route("/", _front(service.index, tei.embed_endpoint(embeddings)), methods=["GET", "POST"]),
    ]
    if accounts is not None:
        account = AccountRoutes(accounts, models, charging)
        api_routes += [
            Route("/v1/account", account.account),
            Route("/v1/usage", account.usage),
            Route("/v1/keys", account.keys),
        ]
    routes = [*api_routes, *(pages.routes if pages else ())]
    authenticator = Authenticator(settings.api_keys, accounts, _public_pages(api_routes, pages))
    middlewares = (  # outermost first
        Middleware(RequestContextMiddleware),
        Middleware(AccessLogMiddleware, metrics, {route.endpoint: route.path for route in [*routes, routes[0]]}),
        Middleware(ResponseHeadersMiddleware),
        Middleware(CorsMiddleware, settings.cors_origins, _pages_of(pages)),
        Middleware(ErrorMiddleware, stopping, _error_writer(pages)),
        Middleware(AuthenticationMiddleware, authenticator),
    )
    # Starlette's redirects of trailing slashes would be built from the Host header, which anybody can set.
    app: ASGIApp = Router(routes, redirect_slashes=False, default=_not_found)
    for middleware, arguments, options in reversed(middlewares):
        app = middleware(app, *arguments, **options)
    return app


def _front(index: Endpoint, embed: Endpoint) -> Endpoint:
    """Return the endpoint of `/`: one route for both methods, so that a 405 names both."""

    async def answer(request: Request) -> Response:
        return await (embed if request.method == "POST" else index)(request)

    return answer


def _public_pages(api_routes: Sequence[Route], pages: WebPages | None) -> Callable[[Scope], bool]:
    """Return a test for scopes that ask for a page, or for a page that does not exist: neither needs a key."""
    api_paths = {route.path for route in api_routes}  # those without parameters are found without a pattern

    def is_public(scope: Scope) -> bool:
        if pages is None or scope["path"] == "/":
            return pages is not None and scope["method"] != "POST" and accepts_html(scope)
        if scope["path"] in api_paths or any(route.matches(scope)[0] is not Match.NONE for route in api_routes):
            return False
        return accepts_html(scope) or any(route.matches(scope)[0] is Match.FULL for route in pages.routes)

    return is_public


def _error_writer(pages: WebPages | None) -> Callable[[Scope, ApiError], Response | None]:
    """Return the writer of errors that are not OpenAI's envelope: those of dialects, and pages."""

    def write(scope: Scope, error: ApiError) -> Response | None:
        return dialect_error(scope, error) or (pages.error(scope, error) if pages is not None else None)

    return write


def _pages_of(pages: WebPages | None) -> Callable[[Scope], bool]:
    """Return a test for scopes whose path is a page."""
    routes = pages.routes if pages is not None else ()
    return lambda scope: any(route.matches(scope)[0] is not Match.NONE for route in routes)


@dataclass(frozen=True, eq=False)
class _ServiceRoutes:
    """The read-only routes: models, health, readiness, counters, index."""

    models: ModelRegistry
    metrics: Metrics
    stopping: threading.Event
    pages: WebPages | None
    accounts: Accounts | None

    async def list_models(self, request: Request) -> Response:
        prices = await self._prices()
        entries = [_model_info(served, id, prices) for served in self.models.list() for id in listed_ids(served)]
        return _json(ModelList(data=entries))

    async def model(self, request: Request) -> Response:
        name, use = split_use(self.models, request.path_params["id"])
        served = find_model(self.models, name)
        context_of(request).response_headers |= deprecation_headers(served.record)
        id = f"{served.record.id}:{use}" if use else served.record.id
        return _json(_model_info(served, id, await self._prices()))

    async def endpoints(self, request: Request) -> Response:
        name, _ = split_use(self.models, request.path_params["id"])
        served = find_model(self.models, name)
        listed = endpoint_list(self.models, served)
        listed.prices = _prices_of(served.record, await self._prices())
        return _json(listed)

    async def _prices(self) -> Sequence[TariffPrice] | None:
        """Return the operator's prices; None where nobody is charged."""
        return await self.accounts.prices() if self.accounts is not None else None

    async def health(self, request: Request) -> Response:
        return _json(Health())

    async def ready(self, request: Request) -> Response:
        if self.stopping.is_set():
            return _json(Readiness(status="stopping", models={}), 503)
        try:
            async with asyncio.timeout(_CANARY_TIMEOUT_S):
                verdicts = await self.models.canaries()
        except TimeoutError:
            verdicts = {"canary": f"no vector within {_CANARY_TIMEOUT_S} seconds"}
        for served in self.models.list():
            if served.state == "failed" and not served.is_lost:  # its reason names files, and this page is public
                verdicts[served.record.id] = "failed to load, see the server's log"
        ready = all(verdict == "ok" for verdict in verdicts.values())
        return _json(Readiness(status="ready" if ready else "not ready", models=verdicts), 200 if ready else 503)

    async def metrics_text(self, request: Request) -> Response:
        groups = self.models.providers.models() if self.models.providers is not None else {}
        for served in self.models.list():
            group = groups.get(served.record.id)
            waiting = group.waiting_tokens if group is not None else 0
            if served.state == "ready":
                engine = await served.engine()
                self.metrics.set_waiting_tokens(served.record.id, waiting + engine.waiting_tokens())
                self.metrics.set_reused_inputs(served.record.id, engine.reused_prompts)
                if engine.has_replicas:
                    self.metrics.set_hands(served.record.id, engine.hands())
            elif served.state in ("failed", "loading"):  # it may have lost its replicas
                self.metrics.set_waiting_tokens(served.record.id, waiting)
                self.metrics.set_hands(served.record.id, [])
            elif group is not None:
                self.metrics.set_waiting_tokens(served.record.id, waiting)
        if self.models.providers is not None:
            self.metrics.set_providers(groups.values(), self.models.public_names)
        return Response(self.metrics.exposition(), headers={"content-type": CONTENT_TYPE})

    async def index(self, request: Request) -> Response:
        if self.pages is not None and accepts_html(request.scope):
            return await self.pages.home(request)
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
    if scope["path"] == "*" and scope["method"] == "OPTIONS":  # of the server as a whole (RFC 9110, 9.3.7)
        await Response(status_code=204, headers={"allow": "GET, HEAD, POST, OPTIONS"})(scope, receive, send)
        return
    hint = " Vectors are at POST /v1/embeddings." if "embed" in scope["path"] else ""
    message = f"There is nothing at {scope['path'][:200]}: see / for what there is.{hint}"
    raise ApiError(404, message, code="not_found")


def listed_ids(served: ServedModel) -> list[str]:
    """Return the ids that a model is listed by.

    Beside its own: aliases that contain "embed" if it does not, since n8n shows only such ids, and NAME:query and
    NAME:document for a model with instructions.
    """
    record = served.record
    ids = [record.id]
    if "embed" not in record.id.lower():
        ids += [alias for alias in record.aliases if "embed" in alias]
    if record.query_instruction or record.document_instruction:
        ids += [f"{record.id}:{use}" for use in USES]
    return ids


def _prices_of(record: Record, charged: Sequence[TariffPrice] | None) -> tuple[ModelPrice, ...]:
    """Return the prices of a model: those of its record, or those that are charged on a server with accounts."""
    prices = record.prices if charged is None else charged_prices(record, charged)
    return msgspec.convert(msgspec.to_builtins(prices), tuple[ModelPrice, ...])


def _model_info(served: ServedModel, id: str, prices: Sequence[TariffPrice] | None) -> Model:
    record = served.record
    until = record.history[-1].until if record.history else None
    fields: dict[str, object] = {name: getattr(record, name) for name in Specification.__struct_fields__}
    fields |= {
        "id": id,
        "status": served.state,
        "precision": served.dtype,
        "precision_reason": served.dtype_reason,
        "prices": msgspec.to_builtins(_prices_of(record, prices)),
        "lifecycle": record.status,
        "shutdown_date": until.isoformat() if until else None,
        "vector_space": space_of(served),
    }
    return msgspec.convert(fields, Model)


def _json(content: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(content), status, media_type="application/json")
