"""`/admin/models`: votes for models, results of the onboarding gates, and the operator's decisions."""

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
from unmask.catalogue.store import GateOutcome, gate_outcomes, read_catalogue
from unmask.errors import UsageError
from unmask.web.forms import Form
from unmask.web.page_shell import RenderPage, render_private_page
from unmask.web.rendering import HEADERS
from unmask.web.sessions import client_address, require_form, require_person

PAGE = "/admin/models"

# Status -> label of the button that sets it. The gates set the statuses in between.
_DECISIONS: dict[Status, str] = {
    "coming soon": "Announce",
    "live": "Switch on",
    "deprecated": "Deprecate",
    "retired": "Retire",
}


@dataclass(frozen=True)
class ManagedModel:
    """A model on the operator's page. `decisions` are the statuses that may follow, each with its button's label."""

    record: Record
    demand: votes.QueuedModel | None
    gates: list[GateOutcome]
    decisions: Sequence[tuple[str, str]]


@dataclass(frozen=True, eq=False)
class ModelAdminPages:
    """The page, for admins. `render` is `Site.render`; `sends_mail` is true if this server has a mail server."""

    accounts: Accounts
    render: RenderPage
    sends_mail: bool

    def routes(self) -> list[Route]:
        return [
            Route(PAGE, require_person(self.models, admin=True)),
            Route(PAGE, require_form(self.decide, admin=True), methods=["POST"]),
        ]

    async def models(self, request: Request, person: Person) -> Response:
        """Show the models with votes, most votes first, and the status of every model."""
        return await self._page(request, person)

    async def decide(self, request: Request, person: Person, form: Form) -> Response:
        """Set the status of a model; then show the page again."""
        model, status, until = form.get("model"), form.get("status"), form.get("until")
        actor = Actor(person.id, client_address(request))

        def set_status(connection: Connection) -> None:
            decision: Status | None = next((allowed for allowed in _DECISIONS if allowed == status), None)
            if decision is None:
                raise UsageError(f"{status[:40]!r} is no step that can be taken here")
            decide(connection, actor, model, decision, until=_future_day(until) if decision == "deprecated" else None)

        try:
            await self.accounts.write(set_status)
        except UsageError as error:
            return await self._page(request, person, error)
        return RedirectResponse(f"{PAGE}#{quote(model)}", 303, HEADERS)

    async def _page(self, request: Request, person: Person, error: UsageError | None = None) -> Response:
        managed = await self.accounts.read(_managed_models)
        waiting = await self.accounts.read(votes.count_unsent_letters) if self.sends_mail else 0
        return render_private_page(
            self.render,
            request,
            "admin/models.html.j2",
            error=error,
            area="admin",
            person=person,
            queue=sorted((m for m in managed if m.demand), key=lambda m: -m.demand.votes if m.demand else 0),
            managed=[m for m in managed if m.gates or m.record.status not in (None, "coming soon")],
            others=[m for m in managed if not m.gates and m.record.status == "coming soon"],
            gate_count=len(GATE_NAMES),
            waiting=waiting,
            action=PAGE,
            today=datetime.now(UTC).date().isoformat(),
        )


def _future_day(text: str) -> date:
    try:
        day = date.fromisoformat(text)
    except ValueError:
        raise UsageError(f"{text[:40]!r} is no day: write it as 2026-12-31") from None
    if day < datetime.now(UTC).date():
        raise UsageError(f"{day} is over: a deprecation announces a day that is to come")
    return day


def _managed_models(connection: Connection) -> list[ManagedModel]:
    stored = read_catalogue(connection)
    demand = {row.model: row for row in votes.queue(connection)}
    managed = []
    for entry in stored.catalogue.entries():
        record = entry.record
        if record.role == "reference":
            continue
        next_statuses = ALLOWED[record.status] if record.status else frozenset(("coming soon",))
        decisions = [(status, label) for status, label in _DECISIONS.items() if status in next_statuses]
        if record.status == "benchmarking":
            decisions = []  # the gates decide
        gates = list(gate_outcomes(connection, record.id).values()) if record.id in stored.sources else []
        managed.append(ManagedModel(record, demand.get(record.id), gates, decisions))
    return managed
