"""`/account`: what people see and do of their own.

Whose things are shown hangs on who is signed in and on nothing in the request: an id in an address is looked for
among the visitor's own.
"""

from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

from sqlalchemy import Connection
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from unmask.accounts import Accounts, actions, audit, keys, people, tariff, usage
from unmask.accounts.audit import Actor
from unmask.accounts.keys import Key
from unmask.accounts.money import format_dollars
from unmask.accounts.people import Person
from unmask.accounts.usage import Line, Used
from unmask.api.account_routes import date_range
from unmask.api.download import csv_file, csv_response
from unmask.api.errors import ApiError
from unmask.catalogue import votes
from unmask.errors import AccountError, KeyRefused, UnmaskError, UsageError
from unmask.router import ModelRegistry
from unmask.storage.database import now_ms
from unmask.web.account.usage_chart import usage_chart
from unmask.web.forms import KeyFields, sentence
from unmask.web.page_shell import Render, show
from unmask.web.query import asked_choice, asked_number, asked_place
from unmask.web.sessions import Form, address_of, end_session, for_form, for_person, go, session_token

PER_PAGE = 50
OVERLAPS = {"0": "at once", "1": "in an hour", "24": "in a day", "168": "in a week"}  # by hours

_CSV_PAGE = 2_000
_OVERVIEW_DAYS = 30
_FIGURES = ("cost", "tokens", "requests")
_SERIES = ("model", "key", "tier")


@dataclass(frozen=True, eq=False)
class AccountPages:
    """The pages. `render` is `Website.render`."""

    accounts: Accounts
    models: ModelRegistry
    render: Render

    def routes(self) -> list[Route]:
        """All of them."""
        return [
            Route("/account", for_person(self.overview)),
            Route("/account/keys", for_person(self.keys)),
            Route("/account/keys", for_form(self.make_key), methods=["POST"]),
            Route("/account/keys/{id}", for_person(self.key)),
            Route("/account/keys/{id}", for_form(self.change_key), methods=["POST"]),
            Route("/account/keys/{id}/rotate", for_form(self.rotate_key), methods=["POST"]),
            Route("/account/keys/{id}/revoke", for_form(self.revoke_key), methods=["POST"]),
            Route("/account/usage", for_person(self.usage)),
            Route("/account/usage.csv", for_person(self.usage_csv)),
            Route("/account/requests", for_person(self.requests)),
            Route("/account/requests.csv", for_person(self.requests_csv)),
            Route("/account/ledger", for_person(self.ledger)),
            Route("/account/ledger.csv", for_person(self.ledger_csv)),
            Route("/account/settings", for_person(self.settings)),
            Route("/account/password", for_form(self.change_password), methods=["POST"]),
            Route("/account/unlink", for_form(self.unlink), methods=["POST"]),
            Route("/account/delete", for_form(self.delete), methods=["POST"]),
        ]

    async def overview(self, request: Request, person: Person) -> Response:
        now = now_ms()
        last = datetime.now(UTC).date()
        first = last - timedelta(_OVERVIEW_DAYS - 1)

        def ask(connection: Connection) -> dict[str, Any]:
            account = people.account(connection, person.account_id)
            return {
                "account": account,
                "plan": next(plan for plan in tariff.all_plans(connection) if plan.name == account.plan),
                "keys": keys.of_account(connection, account.id, now),
                "used": usage.used(connection, account.id, first, last, ("day", "model")),
                "requests": usage.requests(connection, account.id, limit=5),
                "notices": [notice for notice in votes.notices_of(connection, account.id) if not notice.seen],
            }

        found = await self._read(ask)
        used: list[Used] = found["used"]
        return self._show(
            request,
            person,
            "account/overview.html.j2",
            **found,
            span=_OVERVIEW_DAYS,
            spent=sum(row.cost for row in used),
            tokens=sum(row.tokens for row in used),
            answered=sum(row.requests for row in used),
            chart=usage_chart(used, first, last, "cost", lambda row: row.model or ""),
            working=[key for key in found["keys"] if key.state(now) == "active"],
            names=_names(found["keys"]),
            model=self._model(),
        )

    async def keys(self, request: Request, person: Person) -> Response:
        return await self._keys_page(request, person)

    async def make_key(self, request: Request, person: Person, form: Form) -> Response:
        fields, now, actor = KeyFields.read(form), now_ms(), Actor(person.id, address_of(request))

        def make(connection: Connection) -> str:
            return actions.create_key(connection, actor, self.accounts.peppers, person.account_id, settings, now)

        try:
            settings = fields.settings(now, self._models())
            made = await self.accounts.write(make)
        except (UsageError, AccountError) as wrong:
            return await self._keys_page(request, person, fields, wrong)
        return self._key_made(request, person, made, settings.name)

    async def key(self, request: Request, person: Person) -> Response:
        return self._key_page(request, person, await self._own_key(request, person))

    async def change_key(self, request: Request, person: Person, form: Form) -> Response:
        key = await self._own_key(request, person)
        fields, now, actor = KeyFields.read(form), now_ms(), Actor(person.id, address_of(request))

        def change(connection: Connection) -> None:
            actions.change_key(connection, actor, person.account_id, key.id, settings, now)

        try:
            settings = fields.settings(now, self._models(key), key.settings)
            await self.accounts.write(change)
        except (UsageError, AccountError) as wrong:
            return self._key_page(request, person, key, fields, wrong)
        return go(f"/account/keys/{key.id}?done=changed")

    async def rotate_key(self, request: Request, person: Person, form: Form) -> Response:
        key = await self._own_key(request, person)
        now, actor = now_ms(), Actor(person.id, address_of(request))

        def rotate(connection: Connection) -> str:
            account, overlap = person.account_id, int(hours) * 3_600_000
            return actions.rotate_key(
                connection, actor, self.accounts.peppers, account, key.id, now, overlap_ms=overlap
            )

        hours = form.get("hours")
        try:
            if hours not in OVERLAPS:
                raise UsageError("choose when the old key ends out of the list")
            made = await self.accounts.write(rotate)
        except (UsageError, AccountError) as wrong:
            return self._key_page(request, person, key, wrong=wrong)
        return self._key_made(request, person, made, key.settings.name, ends=OVERLAPS[hours])

    async def revoke_key(self, request: Request, person: Person, form: Form) -> Response:
        key = await self._own_key(request, person)
        now, actor = now_ms(), Actor(person.id, address_of(request))

        def revoke(connection: Connection) -> None:
            actions.revoke_key(connection, actor, person.account_id, key.id, now)

        await self.accounts.write(revoke)
        return go(f"/account/keys/{key.id}?done=revoked")

    async def usage(self, request: Request, person: Person) -> Response:
        first, last = date_range(request)
        what, by = asked_choice(request, "what", _FIGURES), asked_choice(request, "by", _SERIES)
        now = now_ms()

        def ask(connection: Connection) -> dict[str, Any]:
            return {
                "used": usage.used(connection, person.account_id, first, last, ("day", by)),
                "keys": keys.of_account(connection, person.account_id, now),
            }

        found = await self._read(ask)
        used: list[Used] = found["used"]
        names = _names(found["keys"])

        def series(row: Used) -> str:
            value: str = getattr(row, by) or "no key"
            return names.get(value, value) if by == "key" else value

        return self._show(
            request,
            person,
            "account/usage.html.j2",
            first=first,
            last=last,
            what=what,
            by=by,
            figures=_FIGURES,
            choices=_SERIES,
            totals=_totals(used, by, series),
            days=_by_day(used),
            chart=usage_chart(used, first, last, what, series),
        )

    async def usage_csv(self, request: Request, person: Person) -> Response:
        first, last = date_range(request)
        found = await self._read(lambda connection: usage.used(connection, person.account_id, first, last))
        columns = ("day", "model", "key", "tier", "requests", "tokens", "cost")
        rows = ((u.day, u.model, u.key, u.tier, u.requests, u.tokens, format_dollars(u.cost)) for u in found)
        return csv_response("usage.csv", iter([csv_file(columns, rows)]))

    async def requests(self, request: Request, person: Person) -> Response:
        before, now = asked_place(request), now_ms()

        def ask(connection: Connection) -> dict[str, Any]:
            account = person.account_id
            return {
                "requests": usage.requests(connection, account, limit=PER_PAGE + 1, before=before),
                "keys": keys.of_account(connection, account, now),
            }

        found = await self._read(ask)
        rows = found["requests"]
        more = f"{rows[PER_PAGE - 1].at}.{rows[PER_PAGE - 1].id}" if len(rows) > PER_PAGE else ""
        return self._show(
            request,
            person,
            "account/requests.html.j2",
            rows=rows[:PER_PAGE],
            more=more,
            later=before is not None,
            names=_names(found["keys"]),
        )

    async def requests_csv(self, request: Request, person: Person) -> Response:
        columns = ("charge", "request", "at", "key", "model", "tier", "tokens", "cost", "state")

        async def parts() -> AsyncIterator[str]:
            yield csv_file(columns, ())
            before: tuple[int, str] | None = None
            while True:
                page = await self._read(
                    lambda c, before=before: usage.requests(c, person.account_id, limit=_CSV_PAGE, before=before)
                )
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

        return csv_response("requests.csv", parts())

    async def ledger(self, request: Request, person: Person) -> Response:
        before = asked_number(request, "before")

        def ask(connection: Connection) -> dict[str, Any]:
            account = people.account(connection, person.account_id)
            lines = usage.statement(connection, account.id, limit=PER_PAGE + 1, before=before)
            return {"account": account, "lines": lines}

        found = await self._read(ask)
        lines: list[Line] = found["lines"]
        return self._show(
            request,
            person,
            "account/ledger.html.j2",
            account=found["account"],
            lines=lines[:PER_PAGE],
            more=lines[PER_PAGE - 1].number if len(lines) > PER_PAGE else None,
            later=before is not None,
        )

    async def ledger_csv(self, request: Request, person: Person) -> Response:
        async def parts() -> AsyncIterator[str]:
            yield csv_file(("entry", "at", "kind", "amount", "reference", "note"), ())
            before: int | None = None
            while True:
                page = await self._read(
                    lambda c, before=before: usage.statement(c, person.account_id, limit=_CSV_PAGE, before=before)
                )
                rows = ((e.number, _utc(e.at), e.kind, format_dollars(e.amount), e.reference, e.note) for e in page)
                yield csv_file(None, rows)
                if len(page) < _CSV_PAGE:
                    return
                before = page[-1].number

        return csv_response("ledger.csv", parts())

    async def settings(self, request: Request, person: Person) -> Response:
        return await self._settings_page(request, person)

    async def change_password(self, request: Request, person: Person, form: Form) -> Response:
        old, new = form.raw("old"), form.raw("new")
        try:
            await self.accounts.change_password(
                person, old, new, address=address_of(request), session=session_token(request)
            )
        except (UsageError, AccountError) as wrong:
            return await self._settings_page(request, person, wrong)
        answer = go("/sign-in?done=password")
        end_session(request, answer)
        return answer

    async def unlink(self, request: Request, person: Person, form: Form) -> Response:
        try:
            await self.accounts.unlink(
                person,
                form.get("issuer"),
                form.raw("unlink_password"),
                address=address_of(request),
                session=session_token(request),
            )
        except (UsageError, AccountError) as wrong:
            return await self._settings_page(request, person, wrong)
        answer = go("/sign-in?done=unlinked")
        end_session(request, answer)
        return answer

    async def delete(self, request: Request, person: Person, form: Form) -> Response:
        try:
            if form.get("sure") != "yes":
                raise UsageError("tick the box to delete the account: it cannot be undone")
            await self.accounts.close_account(
                person, form.raw("password"), address=address_of(request), session=session_token(request)
            )
        except (UsageError, AccountError) as wrong:
            return await self._settings_page(request, person, wrong)
        answer = go("/sign-in?done=deleted")
        end_session(request, answer)
        return answer

    def _show(
        self, request: Request, person: Person, template: str, wrong: UnmaskError | None = None, **values: object
    ) -> Response:
        return show(self.render, request, template, wrong=wrong, person=person, area="account", now=now_ms(), **values)

    async def _read(self, question: Callable[[Connection], Any]) -> Any:
        """As `Accounts.read`; a parameter that cannot be answered is the visitor's mistake."""
        try:
            return await self.accounts.read(question)
        except UsageError as error:
            raise ApiError(400, sentence(error)) from None

    async def _keys_page(
        self, request: Request, person: Person, fields: KeyFields | None = None, wrong: UnmaskError | None = None
    ) -> Response:
        now = now_ms()
        found = await self._read(lambda connection: keys.of_account(connection, person.account_id, now))
        return self._show(
            request,
            person,
            "account/keys.html.j2",
            wrong,
            keys=[key for key in found if key.state(now) == "active"],
            ended=[key for key in found if key.state(now) != "active"],
            fields=fields or KeyFields(),
            typed=fields is not None,
            models=self._models(),
        )

    def _key_page(
        self,
        request: Request,
        person: Person,
        key: Key,
        fields: KeyFields | None = None,
        wrong: UnmaskError | None = None,
    ) -> Response:
        return self._show(
            request,
            person,
            "account/key.html.j2",
            wrong,
            key=key,
            fields=fields or KeyFields.of(key.settings),
            models=self._models(key),
            overlaps=OVERLAPS,
        )

    def _key_made(self, request: Request, person: Person, made: str, name: str, ends: str = "") -> Response:
        id = keys.key_id(made)
        return self._show(
            request, person, "account/key-made.html.j2", made=made, id=id, name=name, ends=ends, model=self._model()
        )

    async def _settings_page(self, request: Request, person: Person, wrong: UnmaskError | None = None) -> Response:
        def ask(connection: Connection) -> dict[str, Any]:
            own = (person.id, person.account_id)
            return {
                "account": people.account(connection, person.account_id),
                "events": audit.events(connection, subjects=own, limit=20),
                "password": people.has_password(connection, person.id),
                "issuers": people.identities_of(connection, person.id),
            }

        found, provider = await self._read(ask), self.accounts.provider
        return self._show(
            request,
            person,
            "account/settings.html.j2",
            wrong,
            **found,
            provider=provider.name if provider else "",
            linked_by=[(issuer, issuer) for issuer in found["issuers"]],
            linked=provider is not None and provider.settings.issuer in found["issuers"],
            shortest=people.SHORTEST_PASSWORD,
        )

    async def _own_key(self, request: Request, person: Person) -> Key:
        """The key that the address names, if it is the visitor's.

        Raises:
            ApiError: 404, the visitor has no such key.
        """
        id, now = request.path_params["id"], now_ms()
        try:
            return await self.accounts.read(lambda connection: keys.one(connection, person.account_id, id, now))
        except KeyRefused:
            raise ApiError(404, f"You have no key {id[:40]!r}: see your keys.", code="not_found") from None

    def _model(self) -> str:
        served = self.models.list()
        return served[0].record.id if served else "MODEL"

    def _models(self, key: Key | None = None) -> list[str]:
        """Ids that a key may be narrowed to: those served here, and those it has already."""
        served = [served.record.id for served in self.models.list()]
        return list(dict.fromkeys([*served, *((key.settings.models if key else None) or ())]))


@dataclass(frozen=True)
class Total:
    """Usage of one model, key or tier, or of one day."""

    what: str
    requests: int
    tokens: int
    cost: int
    key: str = ""


def _totals(used: Iterable[Used], by: str, name: Callable[[Used], str]) -> list[Total]:
    sums: dict[str, Total] = {}
    for row in used:
        id = getattr(row, by) or ""
        before = sums.get(id) or Total(name(row), 0, 0, 0, id if by == "key" else "")
        sums[id] = Total(
            before.what, before.requests + row.requests, before.tokens + row.tokens, before.cost + row.cost, before.key
        )
    return sorted(sums.values(), key=lambda total: (-total.cost, -total.tokens, total.what))


def _by_day(used: Iterable[Used]) -> list[tuple[date, Total]]:
    sums: dict[date, Total] = {}
    for row in used:
        assert row.day is not None, "asked for by day"
        before = sums.get(row.day) or Total("", 0, 0, 0)
        sums[row.day] = Total("", before.requests + row.requests, before.tokens + row.tokens, before.cost + row.cost)
    return sorted(sums.items(), reverse=True)


def _names(found: Sequence[Key]) -> dict[str, str]:
    """What to call each key: its name, with its id where two have the same or it has none."""
    counts: dict[str, int] = {}
    for key in found:
        counts[key.settings.name] = counts.get(key.settings.name, 0) + 1
    return {
        key.id: key.settings.name
        if key.settings.name and counts[key.settings.name] == 1
        else f"{key.settings.name} um_{key.id}".strip()
        for key in found
    }


def _utc(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="milliseconds")
