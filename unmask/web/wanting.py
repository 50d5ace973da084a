"""Asking for models: the button, the form it sends, and a visitor's own page of what was asked for."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from unmask.accounts import Accounts
from unmask.accounts.database import now_ms
from unmask.accounts.people import Person
from unmask.api.errors import ApiError
from unmask.catalogue import Catalogue, Record, votes
from unmask.catalogue.requests import want
from unmask.errors import UsageError
from unmask.web.rendering import HEADERS
from unmask.web.seams import Seams, WantIt
from unmask.web.visitors import check_form, form_token, read_form, visitor

if TYPE_CHECKING:
    from unmask.web.website import Website

ACTION, PAGE, SIGN_IN = "/want", "/wanted", "/sign-in"


@dataclass(frozen=True, eq=False)
class Wanting:
    """What the pages need to know of votes.

    How many want a model, everybody sees. A visitor's own votes and notes are read by the account of that visitor's
    session and by nothing that an address or a form says.
    """

    catalogue: Catalogue
    accounts: Accounts

    def seams(self) -> Seams:
        """For the pages of the catalogue."""
        return Seams(want=self.button, ask=self.form, votes=self.counts)

    def routes(self, site: "Website") -> list[tuple[str, Callable[[Request], Awaitable[Response]], list[str]]]:
        """The pages of this module, as path, handler and methods."""

        async def wanted(request: Request) -> Response:
            return await self._wanted(request, site)

        return [(ACTION, self.take, ["POST"]), (PAGE, wanted, ["GET"])]

    async def counts(self) -> Mapping[str, int]:
        """How many want each model."""
        return await self.accounts.read(votes.counts)

    async def button(self, request: Request, record: Record) -> WantIt | None:
        """The button of a model that does not answer; None where nobody is to ask for it."""
        if record.role == "reference":
            return None
        person = await visitor(request)
        count = (await self.counts()).get(record.id, 0)
        if person is None:
            return WantIt(count, ACTION, sign_in=_sign_in(f"/models/{quote(record.id)}"))
        own = (await self.accounts.read(lambda c: votes.votes_of(c, person.account_id))).get(record.id)
        return WantIt(count, ACTION, own is not None, own.note if own else "", form_token(request))

    async def form(self, request: Request) -> WantIt:
        """The form for a model that is not in the catalogue."""
        if await visitor(request) is None:
            return WantIt(0, ACTION, sign_in=_sign_in("/models"))
        return WantIt(0, ACTION, token=form_token(request))

    async def take(self, request: Request) -> Response:
        """A vote, a changed note, or a vote taken back; then the page of the model again."""
        person = await _signed_in(request)
        form = await read_form(request)
        check_form(request, form)
        entry = self.catalogue.get(form.get("model"))
        model = entry.record.id if entry else form.get("model")
        account = person.account_id
        if form.get("withdraw"):
            await self.accounts.write(lambda connection: votes.withdraw(connection, account, model))
        else:
            note, now = form.get("note"), now_ms()
            try:
                await self.accounts.write(lambda connection: want(connection, account, model, note, now))
            except UsageError as error:
                raise ApiError(400, f"{str(error)[:1].upper()}{str(error)[1:]}.", param="model") from error
        known = self.catalogue.get(model) is not None
        return RedirectResponse(f"/models/{quote(model)}#way" if known else PAGE, 303, HEADERS)

    async def _wanted(self, request: Request, site: "Website") -> Response:
        person = await _signed_in(request)
        account = person.account_id
        own = await self.accounts.read(lambda connection: votes.votes_of(connection, account))
        notices = await self.accounts.read(lambda connection: votes.notices_of(connection, account))
        if any(not notice.seen for notice in notices):
            await self.accounts.write(lambda connection: votes.mark_seen(connection, account, now_ms()))
        return site.render(
            request,
            "wanted.html.j2",
            votes=[(vote, self.catalogue.get(vote.model)) for vote in own.values()],
            notices=notices,
            counts=await self.counts(),
            token=form_token(request),
            action=ACTION,
        )


async def _signed_in(request: Request) -> Person:
    person = await visitor(request)
    if person is None:
        raise ApiError(401, "Sign in first: what is asked for belongs to an account.", code="not_signed_in")
    return person


def _sign_in(after: str) -> str:
    return f"{SIGN_IN}?next={quote(after, safe='')}"
