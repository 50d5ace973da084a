"""The operator's page of models: who wants what, what came of the gates, and the steps that are a decision."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import TYPE_CHECKING
from urllib.parse import quote

from sqlalchemy import Connection
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from unmask.accounts import Accounts, audit
from unmask.accounts.database import now_ms
from unmask.accounts.people import Person
from unmask.api.errors import ApiError
from unmask.catalogue import Record, Status, votes
from unmask.catalogue.lifecycle import ALLOWED
from unmask.catalogue.onboarding.gates import GATES
from unmask.catalogue.onboarding.run import take_live
from unmask.catalogue.requests import check_id
from unmask.catalogue.store import Outcome, outcomes, put_fields, read_catalogue, read_record, step
from unmask.errors import UsageError
from unmask.web.rendering import HEADERS
from unmask.web.visitors import address_of, check_form, form_token, read_form, visitor

if TYPE_CHECKING:
    from unmask.web.website import Website

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
    """The page, for people who are admins."""

    accounts: Accounts

    def routes(self, site: "Website") -> list[tuple[str, Callable[[Request], Awaitable[Response]], list[str]]]:
        """As path, handler and methods."""

        async def page(request: Request) -> Response:
            return await self._decide(request) if request.method == "POST" else await self._page(request, site)

        return [(PAGE, page, ["GET", "POST"])]

    async def _page(self, request: Request, site: "Website") -> Response:
        await _admin(request)
        managed = await self.accounts.read(_managed)
        waiting = [model for model in managed if model.wanted]
        return site.render(
            request,
            "operating.html.j2",
            queue=sorted(waiting, key=lambda model: -model.wanted.votes if model.wanted else 0),
            managed=[model for model in managed if model.gates or model.record.status not in (None, "coming soon")],
            others=[model for model in managed if not model.gates and model.record.status == "coming soon"],
            gate_count=len(GATES),
            token=form_token(request),
            action=PAGE,
            today=datetime.now(UTC).date().isoformat(),
        )

    async def _decide(self, request: Request) -> Response:
        person = await _admin(request)
        form = await read_form(request)
        check_form(request, form)
        model, status, until = form.get("model"), form.get("status"), form.get("until")
        chosen: Status | None = next((known for known in _DECISIONS if known == status), None)
        if chosen is None:
            raise ApiError(400, f"{status[:40]!r} is no step that can be taken here.", param="status")
        try:
            day = date.fromisoformat(until) if chosen == "deprecated" else None
        except ValueError:
            raise ApiError(400, "Say until which day it answers, as 2026-12-31.", param="until") from None
        address = address_of(request)

        def decide(connection: Connection, status: Status = chosen) -> None:
            _take(connection, model, status, day, person.id)
            audit.note(connection, now_ms(), person.id, "model.step", model, address=address, status=status)

        try:
            await self.accounts.write(decide)
        except UsageError as error:
            raise ApiError(409, f"{str(error)[:1].upper()}{str(error)[1:]}.", param="model") from error
        return RedirectResponse(f"{PAGE}#{quote(model)}", 303, HEADERS)


def _take(connection: Connection, model: str, status: Status, until: date | None, actor: str) -> None:
    record = read_record(connection, model)
    if record is None:
        check_id(model)
        put_fields(connection, model, {})
    if until is not None and until < datetime.now(UTC).date():
        raise UsageError(f"{until} is over: a deprecation announces a day that is to come")
    if status == "live" and record is not None and record.status == "staged":
        take_live(connection, model, actor=actor)
    else:
        step(connection, model, status, actor=actor, until=until)


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


async def _admin(request: Request) -> Person:
    """The visitor, who must be an admin. To anybody else there is no such page."""
    person = await visitor(request)
    if person is None or not person.admin:
        raise ApiError(404, f"There is nothing at {request.url.path[:200]}: see / for what there is.", code="not_found")
    return person
