"""The operator's page of models: who wants what, what came of the gates, and the steps that are a decision."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from urllib.parse import quote

from sqlalchemy import Connection
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from unmask.accounts import Accounts
from unmask.accounts.audit import Actor
from unmask.accounts.people import Person
from unmask.catalogue import Record, Status, votes
from unmask.catalogue.actions import decide
from unmask.catalogue.lifecycle import ALLOWED, GATE_NAMES
from unmask.catalogue.store import Outcome, outcomes, read_catalogue
from unmask.errors import UsageError
from unmask.web.page_shell import Render, show
from unmask.web.rendering import HEADERS
from unmask.web.sessions import Form, address_of, for_form, for_person

PAGE = "/admin/models"

# What an operator may decide on the page, and what the button says. The steps in between belong to the gates.
_DECISIONS: dict[Status, str] = {
    "coming soon": "Announce",
    "live": "Switch on",
    "deprecated": "Deprecate",
    "retired": "Retire",
}


@dataclass(frozen=True)
class Managed:
    """A model as its operator sees it."""

    record: Record
    wanted: votes.Wanted | None
    gates: list[Outcome]
    decisions: Sequence[tuple[str, str]]


@dataclass(frozen=True, eq=False)
class Operating:
    """The page, for people who are admins. `render` is `Website.render`, `mails` whether this server sends mail."""

    accounts: Accounts
    render: Render
    mails: bool

    def routes(self) -> list[Route]:
        """All of them."""
        return [
            Route(PAGE, for_person(self.models, admin=True)),
            Route(PAGE, for_form(self.decide, admin=True), methods=["POST"]),
        ]

    async def models(self, request: Request, person: Person) -> Response:
        """What is wanted, most votes first, and where every model stands."""
        return await self._page(request, person)

    async def decide(self, request: Request, person: Person, form: Form) -> Response:
        """A step of a model's lifecycle; then the page again."""
        model, status, until = form.get("model"), form.get("status"), form.get("until")
        actor = Actor(person.id, address_of(request))

        def take(connection: Connection) -> None:
            chosen: Status | None = next((known for known in _DECISIONS if known == status), None)
            if chosen is None:
                raise UsageError(f"{status[:40]!r} is no step that can be taken here")
            decide(connection, actor, model, chosen, until=_day(until) if chosen == "deprecated" else None)

        try:
            await self.accounts.write(take)
        except UsageError as error:
            return await self._page(request, person, error)
        return RedirectResponse(f"{PAGE}#{quote(model)}", 303, HEADERS)

    async def _page(self, request: Request, person: Person, wrong: UsageError | None = None) -> Response:
        managed = await self.accounts.read(_managed)
        waiting = await self.accounts.read(votes.letters_waiting) if self.mails else 0
        return show(
            self.render,
            request,
            "admin/models.html.j2",
            wrong=wrong,
            area="admin",
            person=person,
            queue=sorted((m for m in managed if m.wanted), key=lambda m: -m.wanted.votes if m.wanted else 0),
            managed=[m for m in managed if m.gates or m.record.status not in (None, "coming soon")],
            others=[m for m in managed if not m.gates and m.record.status == "coming soon"],
            gate_count=len(GATE_NAMES),
            waiting=waiting,
            action=PAGE,
            today=datetime.now(UTC).date().isoformat(),
        )


def _day(text: str) -> date:
    try:
        day = date.fromisoformat(text)
    except ValueError:
        raise UsageError(f"{text[:40]!r} is no day: write it as 2026-12-31") from None
    if day < datetime.now(UTC).date():
        raise UsageError(f"{day} is over: a deprecation announces a day that is to come")
    return day


def _managed(connection: Connection) -> list[Managed]:
    stored = read_catalogue(connection)
    wanted = {one.model: one for one in votes.queue(connection)}
    found = []
    for entry in stored.catalogue.entries():
        record = entry.record
        if record.role == "reference":
            continue
        after = ALLOWED[record.status] if record.status else frozenset(("coming soon",))
        decisions = [(status, label) for status, label in _DECISIONS.items() if status in after]
        if record.status == "benchmarking":
            decisions = []  # the gates' own business
        gates = list(outcomes(connection, record.id).values()) if record.id in stored.sources else []
        found.append(Managed(record, wanted.get(record.id), gates, decisions))
    return found
