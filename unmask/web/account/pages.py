"""`/account`: overview, usage, requests, ledger and settings of the visitor's own account.

The account is always that of the session, never one that the request names.
"""

from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

from sqlalchemy import Connection
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from unmask.accounts import Accounts, audit, keys, people, tariff, usage
from unmask.accounts.keys import Key
from unmask.accounts.money import format_dollars
from unmask.accounts.people import Person
from unmask.accounts.taint import tainted_answers, tainted_windows
from unmask.accounts.usage import UsageGroup
from unmask.api.account_routes import date_range
from unmask.api.download import csv_file, csv_response
from unmask.api.errors import ApiError
from unmask.catalogue import votes
from unmask.errors import AccountError, UnmaskError, UsageError
from unmask.router import ModelRegistry
from unmask.storage.database import now_ms
from unmask.web.account.usage_chart import usage_chart
from unmask.web.forms import Form, sentence
from unmask.web.page_shell import RenderPage, render_private_page
from unmask.web.query import format_cursor, parse_choice, parse_cursor, parse_number
from unmask.web.sessions import (
    clear_session_cookie,
    client_address,
    redirect,
    require_form,
    require_person,
    session_token,
)

PER_PAGE = 50

_CSV_PAGE = 2_000  # rows read at a time
_OVERVIEW_DAYS = 30
_MEASURES = ("cost", "tokens", "requests")
_GROUPS = ("model", "key", "tier")


@dataclass(frozen=True, eq=False)
class AccountPages:
    """The pages. `render` is `Site.render`."""

    accounts: Accounts
    models: ModelRegistry
    render: RenderPage

    def routes(self) -> list[Route]:
        return [
            Route("/account", require_person(self.overview)),
            Route("/account/usage", require_person(self.usage)),
            Route("/account/usage.csv", require_person(self.usage_csv)),
            Route("/account/requests", require_person(self.requests)),
            Route("/account/requests.csv", require_person(self.requests_csv)),
            Route("/account/ledger", require_person(self.ledger)),
            Route("/account/ledger.csv", require_person(self.ledger_csv)),
            Route("/account/settings", require_person(self.settings)),
            Route("/account/password", require_form(self.change_password), methods=["POST"]),
            Route("/account/unlink", require_form(self.unlink), methods=["POST"]),
            Route("/account/delete", require_form(self.delete), methods=["POST"]),
        ]

    async def overview(self, request: Request, person: Person) -> Response:
        now = now_ms()
        last = datetime.now(UTC).date()
        first = last - timedelta(_OVERVIEW_DAYS - 1)

        def read(connection: Connection) -> dict[str, Any]:
            account = people.account(connection, person.account_id)
            return {
                "account": account,
                "plan": next(plan for plan in tariff.all_plans(connection) if plan.name == account.plan),
                "keys": keys.list_keys(connection, account.id, now),
                "used": usage.usage_totals(connection, account.id, first, last, ("day", "model")),
                "requests": usage.charged_requests(connection, account.id, limit=5),
                "tainted": tainted_answers(connection, tainted_windows(connection, usage.day_start(first)), account.id),
                "notices": [notice for notice in votes.notices_of(connection, account.id) if not notice.seen],
            }

        values = await self._read(read)
        used: list[UsageGroup] = values["used"]
        return self._render(
            request,
            person,
            "account/overview.html.j2",
            **values,
            names=self.models.public_names,
            span=_OVERVIEW_DAYS,
            spent=sum(row.cost for row in used),
            tokens=sum(row.tokens for row in used),
            answered=sum(row.requests for row in used),
            chart=usage_chart(used, first, last, "cost", lambda row: row.model or ""),
            active_keys=[key for key in values["keys"] if key.state(now) == "active"],
            key_names=_key_names(values["keys"]),
        )

    async def usage(self, request: Request, person: Person) -> Response:
        first, last = date_range(request)
        measure = parse_choice(request.query_params, "what", _MEASURES)
        group = parse_choice(request.query_params, "by", _GROUPS)
        now = now_ms()

        def read(connection: Connection) -> tuple[list[UsageGroup], list[Key]]:
            account = person.account_id
            return (
                usage.usage_totals(connection, account, first, last, ("day", group)),
                keys.list_keys(connection, account, now),
            )

        used, own_keys = await self._read(read)
        names = _key_names(own_keys)

        def label(row: UsageGroup) -> str:
            value: str = getattr(row, group) or "no key"
            return names.get(value, value) if group == "key" else value

        return self._render(
            request,
            person,
            "account/usage.html.j2",
            first=first,
            last=last,
            measure=measure,
            group=group,
            totals=_totals(used, group, label),
            days=_by_day(used),
            chart=usage_chart(used, first, last, measure, label),
        )

    async def usage_csv(self, request: Request, person: Person) -> Response:
        first, last = date_range(request)
        used = await self._read(lambda connection: usage.usage_totals(connection, person.account_id, first, last))
        columns = ("day", "model", "key", "tier", "requests", "tokens", "cost")
        rows = ((u.day, u.model, u.key, u.tier, u.requests, u.tokens, format_dollars(u.cost)) for u in used)
        return csv_response("usage.csv", iter([csv_file(columns, rows)]))

    async def requests(self, request: Request, person: Person) -> Response:
        before, now = parse_cursor(request.query_params), now_ms()

        def read(connection: Connection) -> dict[str, Any]:
            account = person.account_id
            return {
                "requests": usage.charged_requests(connection, account, limit=PER_PAGE + 1, before=before),
                "keys": keys.list_keys(connection, account, now),
            }

        values = await self._read(read)
        rows = values["requests"]
        return self._render(
            request,
            person,
            "account/requests.html.j2",
            requests=rows[:PER_PAGE],
            older=format_cursor(rows[PER_PAGE - 1].at, rows[PER_PAGE - 1].id) if len(rows) > PER_PAGE else "",
            is_first_page=before is None,
            key_names=_key_names(values["keys"]),
        )

    async def requests_csv(self, request: Request, person: Person) -> Response:
        columns = ("charge", "request", "at", "key", "model", "tier", "tokens", "cost", "state")

        def read(connection: Connection, before: tuple[int, str] | None = None) -> Any:
            return usage.charged_requests(connection, person.account_id, limit=_CSV_PAGE, before=before)

        async def parts(page: Any) -> AsyncIterator[str]:
            yield csv_file(columns, ())
            while True:
                yield csv_file(
                    None,
                    (
                        (r.id, r.request, _utc(r.at), r.key, r.model, r.tier, r.tokens, format_dollars(r.cost), r.state)
                        for r in page
                    ),
                )
                if len(page) < _CSV_PAGE:
                    return
                before = page[-1].at, page[-1].id
                page = await self._read(lambda connection, before=before: read(connection, before), patient=True)

        # The first page is read before the answer begins: it may be refused.
        return csv_response("requests.csv", parts(await self._read(read)))

    async def ledger(self, request: Request, person: Person) -> Response:
        before = parse_number(request.query_params, "before")

        def read(connection: Connection) -> dict[str, Any]:
            account = people.account(connection, person.account_id)
            lines = usage.statement(connection, account.id, limit=PER_PAGE + 1, before=before)
            return {"account": account, "lines": lines}

        values = await self._read(read)
        lines = values["lines"]
        return self._render(
            request,
            person,
            "account/ledger.html.j2",
            account=values["account"],
            lines=lines[:PER_PAGE],
            older=lines[PER_PAGE - 1].number if len(lines) > PER_PAGE else None,
            is_first_page=before is None,
        )

    async def ledger_csv(self, request: Request, person: Person) -> Response:
        def read(connection: Connection, before: int | None = None) -> Any:
            return usage.statement(connection, person.account_id, limit=_CSV_PAGE, before=before)

        async def parts(page: Any) -> AsyncIterator[str]:
            yield csv_file(("entry", "at", "kind", "amount", "reference", "note"), ())
            while True:
                rows = ((e.number, _utc(e.at), e.kind, format_dollars(e.amount), e.reference, e.note) for e in page)
                yield csv_file(None, rows)
                if len(page) < _CSV_PAGE:
                    return
                before = page[-1].number
                page = await self._read(lambda connection, before=before: read(connection, before), patient=True)

        return csv_response("ledger.csv", parts(await self._read(read)))

    async def settings(self, request: Request, person: Person) -> Response:
        return await self._settings_page(request, person)

    async def change_password(self, request: Request, person: Person, form: Form) -> Response:
        old, new = form.raw("old"), form.raw("new")
        try:
            await self.accounts.membership.change_password(
                person, old, new, address=client_address(request), session=session_token(request)
            )
        except (UsageError, AccountError) as error:
            return await self._settings_page(request, person, error)
        return _signed_out(request, "password")

    async def unlink(self, request: Request, person: Person, form: Form) -> Response:
        try:
            await self.accounts.membership.unlink_identity(
                person,
                form.get("issuer"),
                form.raw("unlink_password"),
                address=client_address(request),
                session=session_token(request),
            )
        except (UsageError, AccountError) as error:
            return await self._settings_page(request, person, error)
        return _signed_out(request, "unlinked")

    async def delete(self, request: Request, person: Person, form: Form) -> Response:
        try:
            if form.get("sure") != "yes":
                raise UsageError("tick the box to delete the account: it cannot be undone")
            await self.accounts.membership.close_account(
                person, form.raw("password"), address=client_address(request), session=session_token(request)
            )
        except (UsageError, AccountError) as error:
            return await self._settings_page(request, person, error)
        return _signed_out(request, "deleted")

    def _render(
        self, request: Request, person: Person, template: str, error: UnmaskError | None = None, **values: object
    ) -> Response:
        values |= {"person": person, "area": "account", "now": now_ms()}
        return render_private_page(self.render, request, template, error=error, **values)

    async def _read(self, query: Callable[[Connection], Any], *, patient: bool = False) -> Any:
        """Run a query as `Accounts.read_report` does.

        Raises:
            ApiError: 400, a parameter of the address cannot be used in the query.
            StatisticsBusy: too many reports are being read.
        """
        try:
            return await self.accounts.read_report(query, patient=patient)
        except UsageError as error:
            raise ApiError(400, sentence(error)) from None

    async def _settings_page(self, request: Request, person: Person, error: UnmaskError | None = None) -> Response:
        def read(connection: Connection) -> dict[str, Any]:
            own = (person.id, person.account_id)
            return {
                "account": people.account(connection, person.account_id),
                "events": audit.events(connection, subjects=own, limit=20),
                "password": people.has_password(connection, person.id),
                "issuers": people.identities_of(connection, person.id),
            }

        values, provider = await self.accounts.read(read), self.accounts.provider
        return self._render(
            request,
            person,
            "account/settings.html.j2",
            error,
            **values,
            provider=provider.name if provider else "",
            issuer_choices=[(issuer, issuer) for issuer in values["issuers"]],
            linked=provider is not None and provider.settings.issuer in values["issuers"],
            shortest=people.SHORTEST_PASSWORD,
        )


@dataclass(frozen=True)
class UsageTotal:
    """Usage of one model, key or tier, or of one day. `key` is the id of the key, for a link to its page."""

    label: str
    requests: int
    tokens: int
    cost: int
    key: str = ""


def _totals(used: Iterable[UsageGroup], group: str, label: Callable[[UsageGroup], str]) -> list[UsageTotal]:
    sums: dict[str, UsageTotal] = {}
    for row in used:
        id = getattr(row, group) or ""
        total = sums.get(id) or UsageTotal(label(row), 0, 0, 0, id if group == "key" else "")
        sums[id] = _add(total, row)
    return sorted(sums.values(), key=lambda total: (-total.cost, -total.tokens, total.label))


def _by_day(used: Iterable[UsageGroup]) -> list[tuple[date, UsageTotal]]:
    sums: dict[date, UsageTotal] = {}
    for row in used:
        assert row.day is not None, "the query groups by day"
        sums[row.day] = _add(sums.get(row.day) or UsageTotal("", 0, 0, 0), row)
    return sorted(sums.items(), reverse=True)


def _add(total: UsageTotal, row: UsageGroup) -> UsageTotal:
    return UsageTotal(
        total.label, total.requests + row.requests, total.tokens + row.tokens, total.cost + row.cost, total.key
    )


def _key_names(own_keys: Sequence[Key]) -> dict[str, str]:
    """Name each key by id: its name, followed by its id if it has no name or another key has the same."""
    counts: dict[str, int] = {}
    for key in own_keys:
        counts[key.settings.name] = counts.get(key.settings.name, 0) + 1
    return {
        key.id: key.settings.name
        if key.settings.name and counts[key.settings.name] == 1
        else f"{key.settings.name} um_{key.id}".strip()
        for key in own_keys
    }


def _signed_out(request: Request, notice: str) -> Response:
    """Send the browser to the sign-in page with a notice, and delete its session cookie."""
    response = redirect(f"/sign-in?done={notice}")
    clear_session_cookie(request, response)
    return response


def _utc(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="milliseconds")
