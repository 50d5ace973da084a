"""Asking for models: the button, the form it sends, and a visitor's own page of what was asked for."""

from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from unmask.accounts import Accounts
from unmask.accounts.people import Person
from unmask.catalogue import Catalogue, Record, votes
from unmask.catalogue.requests import want
from unmask.errors import UsageError
from unmask.storage.database import now_ms
from unmask.web.account_hooks import Seams, WantIt
from unmask.web.page_shell import Render, show
from unmask.web.rendering import HEADERS
from unmask.web.sessions import Form, for_form, for_person, form_token, visitor, visitor_links

ACTION, PAGE, SIGN_IN = "/want", "/wanted", "/sign-in"


def account_seams(accounts: Accounts) -> Seams:
    """What the pages of the catalogue ask of the accounts.

    How many want a model, everybody sees. A visitor's own vote and note are read by the account of that visitor's
    session and by nothing that an address or a form says.
    """

    async def counts() -> Mapping[str, int]:
        return await accounts.read(votes.counts)

    async def button(request: Request, record: Record) -> WantIt | None:
        if record.role == "reference":
            return None
        person = await visitor(request)
        count = (await counts()).get(record.id, 0)
        if person is None:
            return WantIt(count, ACTION, sign_in=_sign_in(f"/models/{quote(record.id)}"))
        account = person.account_id
        own = (await accounts.read(lambda connection: votes.votes_of(connection, account))).get(record.id)
        return WantIt(count, ACTION, own is not None, own.note if own else "", form_token(request))

    async def form(request: Request) -> WantIt:
        if await visitor(request) is None:
            return WantIt(0, ACTION, sign_in=_sign_in("/models"))
        return WantIt(0, ACTION, token=form_token(request))

    return Seams(links=visitor_links, want=button, ask=form, votes=counts)


@dataclass(frozen=True, eq=False)
class Wanting:
    """The form that takes votes, and a visitor's own page of them. `render` is `Website.render`."""

    accounts: Accounts
    catalogue: Catalogue
    render: Render

    def routes(self) -> list[Route]:
        """All of them."""
        return [Route(ACTION, for_form(self.take), methods=["POST"]), Route(PAGE, for_person(self.wanted))]

    async def take(self, request: Request, person: Person, form: Form) -> Response:
        """A vote, a changed note, or a vote taken back; then the page of the model again."""
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
                return await self._page(request, person, error)
        known = self.catalogue.get(model) is not None
        return RedirectResponse(f"/models/{quote(model)}#way" if known else PAGE, 303, HEADERS)

    async def wanted(self, request: Request, person: Person) -> Response:
        """What the visitor's account has asked for, and what of it is live."""
        return await self._page(request, person)

    async def _page(self, request: Request, person: Person, wrong: UsageError | None = None) -> Response:
        account = person.account_id
        own = await self.accounts.read(lambda connection: votes.votes_of(connection, account))
        notices = await self.accounts.read(lambda connection: votes.notices_of(connection, account))
        if any(not notice.seen for notice in notices):
            await self.accounts.write(lambda connection: votes.mark_seen(connection, account, now_ms()))
        return show(
            self.render,
            request,
            "account/wanted.html.j2",
            wrong=wrong,
            area="account",
            person=person,
            votes=[(vote, self.catalogue.get(vote.model)) for vote in own.values()],
            notices=notices,
            counts=await self.accounts.read(votes.counts),
            action=ACTION,
        )


def _sign_in(after: str) -> str:
    return f"{SIGN_IN}?next={quote(after, safe='')}"
