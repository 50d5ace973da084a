"""`website`: the routes of all pages, each with the sessions and prices that it needs."""

import logging
from collections.abc import Awaitable, Callable, Sequence

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from unmask.accounts import Accounts
from unmask.accounts.tariff import TariffPrice
from unmask.api.errors import ApiError
from unmask.api.metrics import Metrics
from unmask.api.settings import ServeSettings
from unmask.api.web_pages import WebPages
from unmask.errors import StorageError
from unmask.router import ModelRegistry
from unmask.web.account.keys import KeyPages
from unmask.web.account.pages import AccountPages
from unmask.web.account.sign_in import SignInPages
from unmask.web.account.votes import VotePages, account_hooks
from unmask.web.account_hooks import AccountHooks
from unmask.web.admin.models import ModelAdminPages
from unmask.web.admin.pages import AdminPages
from unmask.web.admin.providers import ProviderAdminPages
from unmask.web.catalogue import feeds, pages
from unmask.web.catalogue.playground_page import playground_page
from unmask.web.page_context import page_context
from unmask.web.rendering import HEADERS, assets
from unmask.web.sessions import PageHandler, SessionMiddleware
from unmask.web.site import Site

log = logging.getLogger("unmask")

SitePage = Callable[[Site, Request], Awaitable[Response]]

CATALOGUE_PAGES: dict[str, SitePage] = {
    "/models": pages.list_page,
    "/models/{id:path}": pages.model_page,
    "/compare": pages.comparison_page,
    "/docs": pages.documentation_page,
    "/status": pages.status_page,
    "/llms.txt": feeds.llms_txt,
    "/sitemap.xml": feeds.sitemap,
    "/feed.xml": feeds.rss_feed,
    "/robots.txt": feeds.robots_txt,
}


def website(models: ModelRegistry, settings: ServeSettings, metrics: Metrics, accounts: Accounts | None) -> WebPages:
    """Build the pages of a server. With accounts they include sign-in, account and admin pages."""
    hooks = account_hooks(accounts) if accounts else AccountHooks()
    return build_pages(Site(models.catalogue, models, settings, metrics, hooks, accounts))


def build_pages(site: Site) -> WebPages:
    """Build the routes of a site. Adds served models that the catalogue lacks to the catalogue."""
    for served in site.models.list():
        if site.catalogue.get(served.record.id) is None:
            site.catalogue.put(served.record)

    def bind(page: SitePage) -> PageHandler:
        async def handler(request: Request) -> Response:
            return await page(site, request)

        return handler

    wrap = _account_middleware(site.accounts, site.settings) if site.accounts else lambda handler: handler

    routes = [Route(path, wrap(bind(page))) for path, page in CATALOGUE_PAGES.items()]
    routes.append(Route("/static/{name}", static_file))
    if site.has_playground:
        routes.append(Route("/playground", wrap(bind(playground_page)), methods=["GET", "POST"]))
    routes += [
        Route(route.path, wrap(route.endpoint), methods=list(route.methods or ())) for route in _account_routes(site)
    ]
    return WebPages(routes, wrap(bind(pages.home_page)), site.error_page)


def _account_middleware(accounts: Accounts, settings: ServeSettings) -> Callable[[PageHandler], PageHandler]:
    """Return a wrapper that resolves the visitor and reads the prices before a page is made."""
    sessions, prices = SessionMiddleware(accounts, settings), PriceReader(accounts)

    def wrap(handler: PageHandler) -> PageHandler:
        async def with_prices(request: Request) -> Response:
            page_context(request).prices = await prices.read()
            return await handler(request)

        return sessions.wrap(with_prices)

    return wrap


class PriceReader:
    """Reads the operator's prices; while the database fails, returns the prices read last."""

    def __init__(self, accounts: Accounts) -> None:
        self._accounts = accounts
        self._last: Sequence[TariffPrice] = ()

    async def read(self) -> Sequence[TariffPrice]:
        try:
            self._last = await self._accounts.prices()
        except StorageError as error:
            # Most of the catalogue can be shown without prices, and pages that need the database report it themselves.
            log.warning("prices are shown as they were: %s", error)
        return self._last


def _account_routes(site: Site) -> list[Route]:
    accounts = site.accounts
    if accounts is None:
        return []
    return [
        *SignInPages(accounts, site.render, site.url).routes(),
        *AccountPages(accounts, site.models, site.render).routes(),
        *KeyPages(accounts, site.models, site.render).routes(),
        *AdminPages(accounts, site.models, site.render).routes(),
        *VotePages(accounts, site.catalogue, site.render).routes(),
        *ProviderAdminPages(accounts, site.models, site.render).routes(),
        *ModelAdminPages(accounts, site.render, sends_mail=site.settings.mail is not None).routes(),
    ]


async def static_file(request: Request) -> Response:
    """Send a static file; cached for a year if the address has its digest.

    Raises:
        ApiError: 404, there is no such file.
    """
    name = request.path_params["name"]
    asset = assets().get(name)
    if asset is None:
        raise ApiError(404, f"There is no file {name[:80]!r}.", code="not_found")
    content, media_type, digest = asset
    current = request.query_params.get("v") == digest
    cache_control = "public, max-age=31536000, immutable" if current else "no-cache"
    headers = HEADERS | {"cache-control": cache_control, "etag": f'"{digest}"'}
    return Response(content, headers=headers, media_type=media_type)
