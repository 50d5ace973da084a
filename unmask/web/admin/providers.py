"""`/admin/providers`: who answers for models elsewhere, what they cost and earn, and the operator's verdicts."""

from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

from sqlalchemy import Connection
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from unmask.accounts import Accounts, costs, tariff
from unmask.accounts.audit import Actor
from unmask.accounts.costs import Margin
from unmask.accounts.people import Person
from unmask.accounts.taint import tainted_answers, tainted_windows
from unmask.accounts.usage import day_start
from unmask.api.endpoint_info import endpoint_list
from unmask.api.schema import EndpointInfo
from unmask.errors import UsageError
from unmask.router import ModelRegistry, PublicNames
from unmask.router.embedding_work import LOCAL
from unmask.router.endpoint import ProviderEndpoint
from unmask.router.verdicts import order_admission, order_quarantine, verdict_history
from unmask.storage.database import now_ms
from unmask.web.account.usage_chart import dollar_chart
from unmask.web.forms import Form
from unmask.web.page_shell import RenderPage, render_private_page
from unmask.web.sessions import client_address, redirect, require_form, require_person

PAGE = "/admin/providers"

_DAYS = 30
_VERDICTS = 30
_LONGEST_REASON = 200


@dataclass(frozen=True)
class ManagedProvider:
    """A provider of a model on the operator's page.

    Attributes:
        info: its public figures.
        cost: nano-dollars per million tokens there; `price`: what callers pay, None without a price.
        spent_today: nano-dollars of all its models; `daily_limit`: None for no limit.
        margin: of the last 30 days; None if it had nothing to do.
        owed: nano-dollars, over all its models.
        problem: why no provider of the model can be checked; "" for none. May name files of this machine.
    """

    info: EndpointInfo
    model: str
    cost: int
    price: int | None
    spent_today: int
    daily_limit: int | None
    margin: Margin | None
    owed: int
    problem: str

    @property
    def sells_below_cost(self) -> bool:
        """True if its answers cost more than callers pay for them."""
        return self.price is not None and self.cost > self.price


@dataclass(frozen=True, eq=False)
class ProviderAdminPages:
    """The page, for admins. `render` is `Site.render`."""

    accounts: Accounts
    models: ModelRegistry
    render: RenderPage

    def routes(self) -> list[Route]:
        return [
            Route(PAGE, require_person(self.providers, admin=True)),
            Route(PAGE, require_form(self.decide, admin=True), methods=["POST"]),
        ]

    async def providers(self, request: Request, person: Person) -> Response:
        """Show all providers with their state, findings, figures and costs, and the history of verdicts."""
        return await self._page(request, person)

    async def decide(self, request: Request, person: Person, form: Form) -> Response:
        """Quarantine a provider of a model, or have it checked and admitted; then show the page again."""
        provider, model, reason = form.get("provider"), form.get("model"), form.get("reason")
        actor, admits = Actor(person.id, client_address(request)), form.get("verdict") == "admit"

        def order(connection: Connection) -> None:
            if admits:
                order_admission(connection, actor, provider, model)
            elif not reason:
                raise UsageError("a quarantine needs a reason, for those who find it in the history")
            else:
                order_quarantine(connection, actor, provider, model, reason[:_LONGEST_REASON])

        try:
            if self._endpoint(provider, model) is None:
                raise UsageError(f"there is no provider {provider[:40]!r} of {model[:100]!r}")
            await self.accounts.write(order)
        except UsageError as error:
            return await self._page(request, person, error)
        return redirect(f"{PAGE}?done={'checked' if admits else 'quarantined'}")

    def _endpoint(self, provider: str, model: str) -> ProviderEndpoint | None:
        group = self.models.providers.of_model(model) if self.models.providers is not None else None
        endpoints = group.endpoints if group is not None else []
        return next((endpoint for endpoint in endpoints if endpoint.provider.name == provider), None)

    async def _page(self, request: Request, person: Person, error: UsageError | None = None) -> Response:
        last = datetime.now(UTC).date()
        first = last - timedelta(days=_DAYS - 1)
        values = await self.accounts.read_report(lambda connection: _read_books(connection, first))
        managed = self._managed(last, values["prices"], values["margins"], values["owed"])
        return render_private_page(
            self.render,
            request,
            "admin/providers.html.j2",
            error=error,
            area="admin",
            person=person,
            action=PAGE,
            managed=managed,
            chart=dollar_chart(values["daily"], first, last),
            verdicts=values["verdicts"],
            tainted=values["tainted"],
            has_providers=self.models.providers is not None,
        )

    def _managed(
        self, day: date, prices: list[tariff.TariffPrice], margins: list[Margin], owed: dict[str, int]
    ) -> list[ManagedProvider]:
        by_name = {(line.provider, line.model): line for line in margins}
        managed = []
        for served in self.models.list():
            group = self.models.providers.of_model(served.record.id) if self.models.providers is not None else None
            for info in endpoint_list(self.models, served, PublicNames()).data:
                endpoint = self._endpoint(info.name, served.record.id)
                if info.name == LOCAL or endpoint is None or group is None:
                    continue
                managed.append(
                    ManagedProvider(
                        info=info,
                        model=served.record.id,
                        cost=endpoint.model.cost_on(day),
                        price=tariff.effective_price(prices, served.record.id, "default"),
                        spent_today=endpoint.daily_cost.total(day),
                        daily_limit=endpoint.provider.max_daily_cost,
                        margin=by_name.get((info.name, served.record.id)),
                        owed=owed.get(info.name, 0),
                        problem=group.problem,
                    )
                )
        return managed


def _read_books(connection: Connection, first: date) -> dict[str, Any]:
    start, now = day_start(first), now_ms()
    return {
        "prices": tariff.all_prices(connection),
        "margins": costs.margins(connection, start, now + 1),
        "owed": costs.payables(connection),
        "daily": costs.daily_costs(connection, start),
        "verdicts": verdict_history(connection, limit=_VERDICTS),
        "tainted": tainted_answers(connection, tainted_windows(connection, start)),
    }
