"""Votes for models: the button, the form that it sends, and the page of a visitor's own votes."""

from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from unmask.accounts import Accounts
from unmask.accounts.people import Person
from unmask.catalogue import Catalogue, Record, votes
from unmask.catalogue.model_requests import request_model
from unmask.errors import UsageError
from unmask.storage.database import now_ms
from unmask.web.account_hooks import AccountHooks, VoteButton
from unmask.web.forms import Form
from unmask.web.page_shell import RenderPage, render_private_page
from unmask.web.rendering import HEADERS
from unmask.web.sessions import current_visitor, form_token, require_form, require_person, visitor_links

PAGE, SIGN_IN = "/account/votes", "/sign-in"


def account_hooks(accounts: Accounts) -> AccountHooks:
    """Return the functions by which the catalogue's pages read accounts.

    The number of votes for a model is public. A visitor's own vote and note are read by the account of the visitor's
    session only, never by anything in the address or in a form.
    """

    async def vote_counts() -> Mapping[str, int]:
        return await accounts.read(votes.count_votes)

    async def vote_button(request: Request, record: Record) -> VoteButton | None:
        if record.role == "reference":
            return None
        person = await current_visitor(request)
        count = (await vote_counts()).get(record.id, 0)
        if person is None:
            return VoteButton(count, PAGE, sign_in=_sign_in(f"/models/{quote(record.id)}"))
        account = person.account_id
        vote = (await accounts.read(lambda connection: votes.votes_of(connection, account))).get(record.id)
        return VoteButton(count, PAGE, vote is not None, vote.note if vote else "", form_token(request))

    async def request_form(request: Request) -> VoteButton:
        if await current_visitor(request) is None:
            return VoteButton(0, PAGE, sign_in=_sign_in("/models"))
        return VoteButton(0, PAGE, token=form_token(request))

    return AccountHooks(visitor_links, vote_button, request_form, vote_counts)


@dataclass(frozen=True, eq=False)
class VotePages:
    """The form that takes votes, and the page of a visitor's own votes. `render` is `Site.render`."""

    accounts: Accounts
    catalogue: Catalogue
    render: RenderPage

    def routes(self) -> list[Route]:
        return [
            Route(PAGE, require_person(self.own_votes)),
            Route(PAGE, require_form(self.vote), methods=["POST"]),
        ]

    async def vote(self, request: Request, person: Person, form: Form) -> Response:
        """Add a vote, change its note, or withdraw it; then show the model's page again."""
        entry = self.catalogue.get(form.get("model"))
        model = entry.record.id if entry else form.get("model")
        account = person.account_id
        if form.get("withdraw"):
            await self.accounts.write(lambda connection: votes.withdraw(connection, account, model))
        else:
            note, now = form.get("note"), now_ms()
            try:
                await self.accounts.write(lambda connection: request_model(connection, account, model, note, now))
            except UsageError as error:
                return await self._page(request, person, error)
        in_catalogue = self.catalogue.get(model) is not None
        return RedirectResponse(f"/models/{quote(model)}#way" if in_catalogue else PAGE, 303, HEADERS)

    async def own_votes(self, request: Request, person: Person) -> Response:
        """Show the models that the visitor's account voted for, and which of them have gone live."""
        return await self._page(request, person)

    async def _page(self, request: Request, person: Person, error: UsageError | None = None) -> Response:
        account = person.account_id
        own = await self.accounts.read(lambda connection: votes.votes_of(connection, account))
        notices = await self.accounts.read(lambda connection: votes.notices_of(connection, account))
        if any(not notice.seen for notice in notices):
            await self.accounts.write(lambda connection: votes.mark_notices_read(connection, account, now_ms()))
        return render_private_page(
            self.render,
            request,
            "account/votes.html.j2",
            error=error,
            area="account",
            person=person,
            votes=[(vote, self.catalogue.get(vote.model)) for vote in own.values()],
            notices=notices,
            counts=await self.accounts.read(votes.count_votes),
            action=PAGE,
        )


def _sign_in(next_path: str) -> str:
    return f"{SIGN_IN}?next={quote(next_path, safe='')}"
