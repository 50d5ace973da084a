"""`/admin`: what the operator's people see and do. Everything that they do is in the audit log."""

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
from unmask.accounts.tariff import Plan, Price
from unmask.api.errors import ApiError
from unmask.errors import AccountError, LedgerRefused, UnmaskError, UsageError
from unmask.router import ModelRegistry
from unmask.storage.database import now_ms
from unmask.web.account.pages import PER_PAGE
from unmask.web.forms import dollars, whole
from unmask.web.page_shell import Render, show
from unmask.web.query import asked_number, asked_place
from unmask.web.sessions import Form, address_of, for_form, for_person, go


@dataclass(frozen=True, eq=False)
class AdminPages:
    """The pages. `render` is `Website.render`."""

    accounts: Accounts
    models: ModelRegistry
    render: Render

    def routes(self) -> list[Route]:
        """All of them."""
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
            *(Route(path, for_person(page, admin=True)) for path, page in pages.items()),
            *(Route(path, for_form(act, admin=True), methods=["POST"]) for path, act in forms.items()),
        ]

    async def overview(self, request: Request, person: Person) -> Response:
        asked, before = request.query_params.get("find", "").strip(), asked_place(request)
        wrong: UnmaskError | None = None
        if asked:
            try:
                found = await self.accounts.read(lambda connection: people.find_account(connection, asked))
                return go(f"/admin/accounts/{found.id}")
            except UsageError:
                wrong = UsageError(f"no account has the id or the mail address {asked[:120]!r}")

        def ask(connection: Connection) -> dict[str, Any]:
            return {
                "found": people.newest_accounts(connection, limit=PER_PAGE + 1, before=before),
                "totals": people.totals(connection),
            }

        values = await self.accounts.read(ask)
        rows: list[Account] = values["found"]
        more = f"{rows[PER_PAGE - 1].created_at}.{rows[PER_PAGE - 1].id}" if len(rows) > PER_PAGE else ""
        return self._show(
            request,
            person,
            "admin/overview.html.j2",
            wrong,
            rows=rows[:PER_PAGE],
            more=more,
            later=before is not None,
            totals=values["totals"],
            asked=asked,
        )

    async def account(self, request: Request, person: Person) -> Response:
        return await self._account_page(request, person)

    async def set_state(self, request: Request, person: Person, form: Form) -> Response:
        id, now, actor = request.path_params["id"], now_ms(), Actor(person.id, address_of(request))
        frozen = form.get("state") == "frozen"

        def set_it(connection: Connection) -> None:
            actions.freeze_account(connection, actor, id, now, frozen=frozen)

        return await self._done(request, person, set_it, "frozen" if frozen else "thawed")

    async def top_up(self, request: Request, person: Person, form: Form) -> Response:
        id, now, actor = request.path_params["id"], now_ms(), Actor(person.id, address_of(request))
        reference, gift, note = form.get("reference"), form.get("gift") == "yes", form.get("note")[:200]

        def add(connection: Connection) -> None:
            amount = dollars(form.get("dollars"))
            if not actions.top_up(connection, actor, id, amount, reference, now, note=note, gift=gift):
                raise LedgerRefused(f"the reference {reference!r} is in the books already: nothing was added")

        return await self._done(request, person, add, "topped-up", form)

    async def assign_plan(self, request: Request, person: Person, form: Form) -> Response:
        id, now, plan = request.path_params["id"], now_ms(), form.get("plan")
        actor = Actor(person.id, address_of(request))

        def assign(connection: Connection) -> None:
            actions.assign_plan(connection, actor, id, plan, now)

        return await self._done(request, person, assign, "plan")

    async def refund(self, request: Request, person: Person, form: Form) -> Response:
        id, now, charge = request.path_params["id"], now_ms(), form.get("charge")
        actor, note = Actor(person.id, address_of(request)), form.get("note")[:200]

        def give_back(connection: Connection) -> None:
            if not actions.refund(connection, actor, charge, now, note=note, account=id):
                raise LedgerRefused(f"{charge} was refunded before, or cost nothing")

        return await self._done(request, person, give_back, "refunded", form)

    async def prices(self, request: Request, person: Person) -> Response:
        return await self._prices_page(request, person)

    async def set_price(self, request: Request, person: Person, form: Form) -> Response:
        model, tier, now = form.get("model"), form.get("tier"), now_ms()
        actor, remove = Actor(person.id, address_of(request)), form.get("remove") == "yes"

        def set_it(connection: Connection) -> None:
            if remove:
                actions.remove_price(connection, actor, model, tier, now)
            else:
                actions.set_price(connection, actor, Price(model, tier, dollars(form.get("dollars"))), now)

        try:
            if not remove and model not in await self._priceable():
                raise UsageError(f"there is no model {model[:100]!r}: choose out of the list")
            await self.accounts.write(set_it)
        except (UsageError, AccountError) as wrong:
            return await self._prices_page(request, person, wrong, form)
        return go("/admin/prices?done=price")

    async def plans(self, request: Request, person: Person) -> Response:
        return await self._plans_page(request, person)

    async def set_plan(self, request: Request, person: Person, form: Form) -> Response:
        name, now, actor = form.get("name"), now_ms(), Actor(person.id, address_of(request))

        def set_it(connection: Connection) -> None:
            if len(name) > 60:
                raise UsageError("a plan's name has at most 60 characters")
            limits = {
                "requests_per_minute": whole(form.get("requests_per_minute"), "requests per minute"),
                "tokens_per_minute": whole(form.get("tokens_per_minute"), "tokens per minute"),
            }
            actions.set_plan(connection, actor, Plan(name, **limits), now)

        try:
            await self.accounts.write(set_it)
        except (UsageError, AccountError) as wrong:
            return await self._plans_page(request, person, wrong, form)
        return go("/admin/plans?done=plans")

    async def log(self, request: Request, person: Person) -> Response:
        before = asked_number(request, "before")
        events = await self.accounts.read(lambda c: audit.events(c, limit=PER_PAGE + 1, before=before))
        return self._show(
            request,
            person,
            "admin/audit.html.j2",
            events=events[:PER_PAGE],
            more=events[PER_PAGE - 1][0] if len(events) > PER_PAGE else None,
            later=before is not None,
        )

    def _show(
        self, request: Request, person: Person, template: str, wrong: UnmaskError | None = None, **values: object
    ) -> Response:
        return show(self.render, request, template, wrong=wrong, person=person, area="admin", now=now_ms(), **values)

    async def _done(
        self,
        request: Request,
        person: Person,
        piece: Callable[[Connection], None],
        done: str,
        form: Form | None = None,
    ) -> Response:
        """Write something about the account that the address names, and show that account again."""
        id: str = request.path_params["id"]
        await self._known(id)
        try:
            await self.accounts.write(piece)
        except (UsageError, AccountError) as wrong:
            return await self._account_page(request, person, wrong, form)
        return go(f"/admin/accounts/{id}?done={done}")

    async def _known(self, id: str) -> Account:
        try:
            return await self.accounts.read(lambda connection: people.account(connection, id))
        except UsageError:
            raise ApiError(404, f"There is no account {id[:40]!r}.", code="not_found") from None

    async def _account_page(
        self, request: Request, person: Person, wrong: UnmaskError | None = None, form: Form | None = None
    ) -> Response:
        account, now = await self._known(request.path_params["id"]), now_ms()

        def ask(connection: Connection) -> dict[str, Any]:
            owners = people.everybody(connection, account.id)
            return {
                "account": people.account(connection, account.id),
                "owners": owners,
                "keys": keys.of_account(connection, account.id, now),
                "plans": tariff.all_plans(connection),
                "lines": usage.statement(connection, account.id, limit=20),
                "requests": usage.requests(connection, account.id, limit=20),
                "events": audit.events(connection, subjects=[account.id, *(owner.id for owner in owners)], limit=20),
            }

        values = await self.accounts.read(ask)
        return self._show(request, person, "admin/account.html.j2", wrong, typed=form or Form({}), **values)

    async def _prices_page(
        self, request: Request, person: Person, wrong: UnmaskError | None = None, form: Form | None = None
    ) -> Response:
        prices = await self.accounts.read(tariff.all_prices)
        known = {price.model for price in prices if price.tier == "default"}
        served = [served.record.id for served in self.models.list()]
        return self._show(
            request,
            person,
            "admin/prices.html.j2",
            wrong,
            prices=prices,
            models=await self._priceable(),
            tiers=tariff.TIERS,
            any=tariff.ANY_MODEL,
            missing=[] if tariff.ANY_MODEL in known else [model for model in served if model not in known],
            typed=form or Form({}),
        )

    async def _plans_page(
        self, request: Request, person: Person, wrong: UnmaskError | None = None, form: Form | None = None
    ) -> Response:
        plans = await self.accounts.read(tariff.all_plans)
        return self._show(request, person, "admin/plans.html.j2", wrong, plans=plans, typed=form or Form({}))

    async def _priceable(self) -> list[str]:
        """Every model that can have a price: those served, those that have one, and `*` for all others."""
        prices = await self.accounts.read(tariff.all_prices)
        served = [served.record.id for served in self.models.list()]
        return list(dict.fromkeys([*served, *(price.model for price in prices), tariff.ANY_MODEL]))
