"""`/admin`: accounts, prices, plans and the audit log. Every change made here is in the audit log."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from unmask.accounts import Accounts, actions, audit, keys, people, tariff, usage
from unmask.accounts.audit import Actor
from unmask.accounts.people import Account, Person
from unmask.accounts.tariff import RatePlan, TariffPrice
from unmask.api.errors import ApiError
from unmask.errors import AccountError, LedgerRefused, UnmaskError, UsageError
from unmask.router import ModelRegistry
from unmask.storage.database import now_ms
from unmask.web.account.pages import PER_PAGE
from unmask.web.forms import Form, parse_amount, parse_whole_number
from unmask.web.page_shell import RenderPage, render_private_page
from unmask.web.query import format_cursor, parse_cursor, parse_number
from unmask.web.sessions import client_address, redirect, require_form, require_person


@dataclass(frozen=True, eq=False)
class AdminPages:
    """The pages, for admins. `render` is `Site.render`."""

    accounts: Accounts
    models: ModelRegistry
    render: RenderPage

    def routes(self) -> list[Route]:
        pages: dict[str, Callable[[Request, Person], Any]] = {
            "/admin": self.overview,
            "/admin/accounts/{id}": self.account,
            "/admin/prices": self.prices,
            "/admin/plans": self.plans,
            "/admin/audit": self.log,
        }
        forms: dict[str, Callable[[Request, Person, Form], Any]] = {
            "/admin/accounts/{id}/state": self.set_state,
            "/admin/accounts/{id}/top-up": self.top_up,
            "/admin/accounts/{id}/plan": self.assign_plan,
            "/admin/accounts/{id}/refund": self.refund,
            "/admin/prices": self.set_price,
            "/admin/plans": self.set_plan,
        }
        return [
            *(Route(path, require_person(page, admin=True)) for path, page in pages.items()),
            *(Route(path, require_form(act, admin=True), methods=["POST"]) for path, act in forms.items()),
        ]

    async def overview(self, request: Request, person: Person) -> Response:
        search, before = request.query_params.get("find", "").strip(), parse_cursor(request.query_params)
        error: UnmaskError | None = None
        if search:
            try:
                account = await self.accounts.read(lambda connection: people.find_account(connection, search))
                return redirect(f"/admin/accounts/{account.id}")
            except UsageError:
                error = UsageError(f"no account has the id or the mail address {search[:120]!r}")

        def read(connection: Connection) -> dict[str, Any]:
            return {
                "accounts": people.newest_accounts(connection, limit=PER_PAGE + 1, before=before),
                "totals": people.totals(connection),
            }

        values = await self.accounts.read(read)
        rows: list[Account] = values["accounts"]
        end = rows[PER_PAGE - 1] if len(rows) > PER_PAGE else None
        return self._render(
            request,
            person,
            "admin/overview.html.j2",
            error,
            rows=rows[:PER_PAGE],
            older=format_cursor(end.created_at, end.id) if end else "",
            is_first_page=before is None,
            totals=values["totals"],
            search=search,
        )

    async def account(self, request: Request, person: Person) -> Response:
        return await self._account_page(request, person)

    async def set_state(self, request: Request, person: Person, form: Form) -> Response:
        id, now, actor = request.path_params["id"], now_ms(), Actor(person.id, client_address(request))
        frozen = form.get("state") == "frozen"

        def set_state(connection: Connection) -> None:
            actions.set_account_frozen(connection, actor, id, now, frozen=frozen)

        return await self._write_account(request, person, set_state, "frozen" if frozen else "thawed")

    async def top_up(self, request: Request, person: Person, form: Form) -> Response:
        id, now, actor = request.path_params["id"], now_ms(), Actor(person.id, client_address(request))
        reference, gift, note = form.get("reference"), form.get("gift") == "yes", form.get("note")[:200]

        def add(connection: Connection) -> None:
            amount = parse_amount(form.get("dollars"))
            if not actions.top_up(connection, actor, id, amount, reference, now, note=note, gift=gift):
                raise LedgerRefused(f"the reference {reference!r} is in the books already: nothing was added")

        return await self._write_account(request, person, add, "topped-up", form)

    async def assign_plan(self, request: Request, person: Person, form: Form) -> Response:
        id, now, plan = request.path_params["id"], now_ms(), form.get("plan")
        actor = Actor(person.id, client_address(request))

        def assign(connection: Connection) -> None:
            actions.assign_plan(connection, actor, id, plan, now)

        return await self._write_account(request, person, assign, "plan")

    async def refund(self, request: Request, person: Person, form: Form) -> Response:
        id, now, charge = request.path_params["id"], now_ms(), form.get("charge")
        actor, note = Actor(person.id, client_address(request)), form.get("note")[:200]

        def give_back(connection: Connection) -> None:
            if not actions.refund(connection, actor, charge, now, note=note, account=id):
                raise LedgerRefused(f"{charge} was refunded before, or cost nothing")

        return await self._write_account(request, person, give_back, "refunded", form)

    async def prices(self, request: Request, person: Person) -> Response:
        return await self._prices_page(request, person)

    async def set_price(self, request: Request, person: Person, form: Form) -> Response:
        model, tier, now = form.get("model"), form.get("tier"), now_ms()
        actor, remove = Actor(person.id, client_address(request)), form.get("remove") == "yes"

        def set_price(connection: Connection) -> None:
            if remove:
                actions.remove_price(connection, actor, model, tier, now)
            else:
                actions.set_price(connection, actor, TariffPrice(model, tier, parse_amount(form.get("dollars"))), now)

        try:
            if not remove and model not in await self._priceable():
                raise UsageError(f"there is no model {model[:100]!r}: choose out of the list")
            await self.accounts.write(set_price)
        except (UsageError, AccountError) as error:
            return await self._prices_page(request, person, error, form)
        return redirect("/admin/prices?done=price")

    async def plans(self, request: Request, person: Person) -> Response:
        return await self._plans_page(request, person)

    async def set_plan(self, request: Request, person: Person, form: Form) -> Response:
        name, now, actor = form.get("name"), now_ms(), Actor(person.id, client_address(request))

        def set_plan(connection: Connection) -> None:
            if len(name) > 60:
                raise UsageError("a plan's name has at most 60 characters")
            limits = {
                "requests_per_minute": parse_whole_number(form.get("requests_per_minute"), "requests per minute"),
                "tokens_per_minute": parse_whole_number(form.get("tokens_per_minute"), "tokens per minute"),
            }
            actions.set_plan(connection, actor, RatePlan(name, **limits), now)

        try:
            await self.accounts.write(set_plan)
        except (UsageError, AccountError) as error:
            return await self._plans_page(request, person, error, form)
        return redirect("/admin/plans?done=plans")

    async def log(self, request: Request, person: Person) -> Response:
        before = parse_number(request.query_params, "before")
        events = await self.accounts.read(lambda c: audit.events(c, limit=PER_PAGE + 1, before=before))
        return self._render(
            request,
            person,
            "admin/audit.html.j2",
            events=events[:PER_PAGE],
            older=events[PER_PAGE - 1][0] if len(events) > PER_PAGE else None,
            is_first_page=before is None,
        )

    def _render(
        self, request: Request, person: Person, template: str, error: UnmaskError | None = None, **values: object
    ) -> Response:
        return render_private_page(
            self.render, request, template, error=error, person=person, area="admin", now=now_ms(), **values
        )

    async def _write_account(
        self,
        request: Request,
        person: Person,
        change: Callable[[Connection], None],
        notice: str,
        form: Form | None = None,
    ) -> Response:
        """Make a change to the account that the address names, and show the account again with a notice."""
        id: str = request.path_params["id"]
        await self._account(id)
        try:
            await self.accounts.write(change)
        except (UsageError, AccountError) as error:
            return await self._account_page(request, person, error, form)
        return redirect(f"/admin/accounts/{id}?done={notice}")

    async def _account(self, id: str) -> Account:
        try:
            return await self.accounts.read(lambda connection: people.account(connection, id))
        except UsageError:
            raise ApiError(404, f"There is no account {id[:40]!r}.", code="not_found") from None

    async def _account_page(
        self, request: Request, person: Person, error: UnmaskError | None = None, form: Form | None = None
    ) -> Response:
        account, now = await self._account(request.path_params["id"]), now_ms()

        def read(connection: Connection) -> dict[str, Any]:
            owners = people.list_people(connection, account.id)
            return {
                "account": people.account(connection, account.id),
                "owners": owners,
                "keys": keys.list_keys(connection, account.id, now),
                "plans": tariff.all_plans(connection),
                "lines": usage.statement(connection, account.id, limit=20),
                "requests": usage.charged_requests(connection, account.id, limit=20),
                "events": audit.events(connection, subjects=[account.id, *(owner.id for owner in owners)], limit=20),
            }

        values = await self.accounts.read(read)
        return self._render(request, person, "admin/account.html.j2", error, typed=form or Form({}), **values)

    async def _prices_page(
        self, request: Request, person: Person, error: UnmaskError | None = None, form: Form | None = None
    ) -> Response:
        prices = await self.accounts.read(tariff.all_prices)
        priced = {price.model for price in prices if price.tier == "default"}
        served = [served.record.id for served in self.models.list()]
        return self._render(
            request,
            person,
            "admin/prices.html.j2",
            error,
            prices=prices,
            models=await self._priceable(),
            tiers=tariff.TIERS,
            any=tariff.ANY_MODEL,
            missing=[] if tariff.ANY_MODEL in priced else [model for model in served if model not in priced],
            typed=form or Form({}),
        )

    async def _plans_page(
        self, request: Request, person: Person, error: UnmaskError | None = None, form: Form | None = None
    ) -> Response:
        plans = await self.accounts.read(tariff.all_plans)
        return self._render(request, person, "admin/plans.html.j2", error, plans=plans, typed=form or Form({}))

    async def _priceable(self) -> list[str]:
        """Return the models that can have a price: the served ones, those with a price, and `*` for all others."""
        prices = await self.accounts.read(tariff.all_prices)
        served = [served.record.id for served in self.models.list()]
        return list(dict.fromkeys([*served, *(price.model for price in prices), tariff.ANY_MODEL]))
