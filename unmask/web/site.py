"""`Site`: the parts of a server that its pages read, and the rendering of a page with its head and foot."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope

from unmask.accounts import Accounts
from unmask.accounts.tariff import TariffPrice
from unmask.api.errors import ApiError
from unmask.api.metrics import Metrics
from unmask.api.settings import ServeSettings
from unmask.api.web_pages import accepts_html
from unmask.catalogue import Catalogue
from unmask.router import ModelRegistry
from unmask.web.account_hooks import AccountHooks
from unmask.web.catalogue.model_view import ModelView, find_model_view, model_views
from unmask.web.catalogue.playground import TrialLimit
from unmask.web.page_context import page_context
from unmask.web.rendering import render_template, site_url


@dataclass(frozen=True, eq=False)
class Site:
    """Parts of one server. Data of a request, such as the prices shown, is in its `PageContext` instead.

    Attributes:
        catalogue: all models with their measurements.
        models: models that this server serves.
        settings: the server's settings.
        metrics: counters of the API.
        hooks: functions that read accounts for the catalogue's pages.
        accounts: None on a server without accounts.
        started: time of the server's start.
        trial_limit: counts the trials of each visitor of the playground.
    """

    catalogue: Catalogue
    models: ModelRegistry
    settings: ServeSettings
    metrics: Metrics
    hooks: AccountHooks = field(default_factory=AccountHooks)
    accounts: Accounts | None = None
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    trial_limit: TrialLimit = field(default_factory=TrialLimit)
    _start_clock: float = field(default_factory=time.monotonic)

    @property
    def needs_key(self) -> bool:
        """True if requests to the API need a key."""
        return bool(self.settings.api_keys) or self.accounts is not None

    @property
    def has_playground(self) -> bool:
        """True if visitors may try models: by the setting, else where no key is needed."""
        return not self.needs_key if self.settings.playground is None else self.settings.playground

    def uptime_s(self) -> float:
        return time.monotonic() - self._start_clock

    def model_views(self, request: Request) -> list[ModelView]:
        """Return a view of every model, with the prices of this request."""
        return model_views(self.catalogue, self.models, _prices(request))

    def find_model_view(self, request: Request, id: str) -> ModelView | None:
        """Return the view of the model with this id or alias, with the prices of this request."""
        return find_model_view(self.catalogue, self.models, id, _prices(request))

    def url(self, request: Request) -> str:
        """Return the address of this server: the operator's setting, else the one that the visitor's browser uses."""
        return site_url(request, self.settings.public_url)

    def render(
        self,
        request: Request,
        template: str,
        *,
        status: int = 200,
        headers: Mapping[str, str] | None = None,
        **values: object,
    ) -> Response:
        """Render a page, with the values that the head and foot of every page need."""
        return render_template(
            request,
            template,
            status=status,
            headers=self._visitor_headers() | dict(headers or {}),
            base=self.url(request),
            visitor_links=self.hooks.visitor_links(request),
            secured=self.needs_key,
            signs_up=self.accounts is not None,
            playground_open=self.has_playground,
            http_status=status,
            **values,
        )

    def error_page(self, scope: Scope, error: ApiError) -> Response | None:
        """Render an error as a page, for a browser that did not call the API; None for a program."""
        if scope["path"].startswith("/v1") or not accepts_html(scope):
            return None
        headers = dict(error.headers)
        if error.retry_after is not None:
            headers["retry-after"] = str(max(1, round(error.retry_after)))
        return self.render(Request(scope), "error.html.j2", status=error.status, headers=headers, message=str(error))

    def _visitor_headers(self) -> dict[str, str]:
        # With accounts, every page names its visitor, so no shared cache may store it.
        return {"cache-control": "private, no-cache", "vary": "accept, cookie, host"} if self.accounts else {}


def _prices(request: Request) -> Sequence[TariffPrice] | None:
    """Return the prices of a request; None on a server without accounts."""
    return page_context(request).prices
