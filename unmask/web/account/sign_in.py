"""Signing up, in and out, here or with an account elsewhere, and the first admin."""

from collections.abc import Callable
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from unmask.accounts import Accounts, actions, people
from unmask.accounts.audit import Actor
from unmask.accounts.people import Person
from unmask.accounts.provider import Provider, Visit
from unmask.errors import AccountError, AddressTaken, SignInRefused, UnmaskError, UsageError
from unmask.storage.database import now_ms
from unmask.web.page_shell import Render, show
from unmask.web.sessions import (
    Form,
    address_of,
    check_form,
    end_session,
    for_form,
    forget_visit,
    go,
    keep_visit,
    own_address,
    read_form,
    session_token,
    start_session,
    visit_of,
    visitor,
)

TO_PROVIDER = "/sign-in/provider"
_BACK = "/sign-in/provider/return"


@dataclass(frozen=True, eq=False)
class Entrance:
    """The pages. `render` is `Website.render`, `base` is `Website.base`."""

    accounts: Accounts
    render: Render
    base: Callable[[Request], str]

    def routes(self) -> list[Route]:
        """All of them."""
        elsewhere = [
            Route(TO_PROVIDER, self.to_provider),
            Route(_BACK, self.from_provider),
            Route("/account/link", for_form(self.link), methods=["POST"]),
        ]
        return [
            *(elsewhere if self.accounts.provider else []),
            Route("/sign-up", self.sign_up_page),
            Route("/sign-up", self.sign_up, methods=["POST"]),
            Route("/sign-in", self.sign_in_page),
            Route("/sign-in", self.sign_in, methods=["POST"]),
            Route("/first-admin", self.first_admin_page),
            Route("/first-admin", self.first_admin, methods=["POST"]),
            Route("/sign-out", for_form(self.sign_out), methods=["POST"]),
        ]

    async def sign_up_page(self, request: Request) -> Response:
        return await self._welcome(request, "sign-up")

    async def sign_up(self, request: Request) -> Response:
        """The answer is the same whether the address was free or taken, and so is the work."""
        form = await self._form(request)
        email = form.get("email")
        try:
            await self.accounts.sign_up(email, form.raw("password"), address=address_of(request))
        except AddressTaken:
            pass
        except (UsageError, AccountError) as wrong:
            return await self._welcome(request, "sign-up", wrong, email)
        return go("/sign-in?done=signed-up")

    async def sign_in_page(self, request: Request) -> Response:
        return await self._welcome(request, "sign-in", next=request.query_params.get("next", ""))

    async def sign_in(self, request: Request) -> Response:
        form = await self._form(request)
        email, next = form.get("email"), form.get("next")
        try:
            token = await self.accounts.sign_in(email, form.raw("password"), address=address_of(request))
        except AccountError as wrong:
            return await self._welcome(request, "sign-in", wrong, email, next)
        return await self._signed_in(request, token, own_address(next) or "/account")

    async def to_provider(self, request: Request) -> Response:
        """On to the provider; nothing has happened yet that would need a form's token."""
        next = own_address(request.query_params.get("next", ""))
        visit = Visit.begin(next=next)
        try:
            await self.accounts.throttle_place(address_of(request))
            answer = go(await self._provider.address(visit, self._back(request)))
        except AccountError as wrong:
            return await self._welcome(request, "sign-in", wrong, next=next)
        keep_visit(request, answer, visit)
        return answer

    async def from_provider(self, request: Request) -> Response:
        """Back again, signed in or with an identity to link."""
        visit, address, person = visit_of(request), address_of(request), await visitor(request)
        try:
            await self.accounts.throttle_place(address)
            identity = await self._provider.identity(visit, request.query_params, self._back(request))
            assert visit is not None, "without one, nobody came back"
            if not visit.person:
                token = await self.accounts.sign_in_as(identity, address=address)
                answer = await self._signed_in(request, token, own_address(visit.next) or "/account")
            elif person is None or person.id != visit.person:
                raise SignInRefused("you have signed out, or in as somebody else, in between: begin again")
            else:
                await self.accounts.link(person, identity, address=address)
                answer = go("/account/settings?done=linked")
        except (UsageError, AccountError) as wrong:
            if person is not None:
                answer = self._linking(request, person, wrong)
            else:
                answer = await self._welcome(request, "sign-in", wrong)
        forget_visit(request, answer)
        return answer

    async def link(self, request: Request, person: Person, form: Form) -> Response:
        """The way to the provider, for an account that somebody has already.

        It is a page with a link: browsers follow no redirect to another site from a form that may only go to ours.
        """
        visit = Visit.begin(person=person.id)
        session, address = session_token(request), address_of(request)
        try:
            await self.accounts.confirm(person, form.raw("own_password"), address=address, session=session)
            on = await self._provider.address(visit, self._back(request))
        except AccountError as wrong:
            return self._linking(request, person, wrong)
        answer = self._linking(request, person, on=on)
        keep_visit(request, answer, visit)
        return answer

    async def first_admin_page(self, request: Request) -> Response:
        return self._first_admin(request, request.query_params.get("invitation", ""))

    async def first_admin(self, request: Request) -> Response:
        form = await self._form(request)
        email, password, invitation = form.get("email"), form.raw("password"), form.get("invitation")
        address = address_of(request)
        try:
            await self.accounts.sign_up(email, password, address=address, invitation=invitation)
            token = await self.accounts.sign_in(email, password, address=address)
        except (UsageError, AccountError) as wrong:
            return self._first_admin(request, invitation, wrong, email)
        return await self._signed_in(request, token, "/admin")

    async def sign_out(self, request: Request, person: Person, form: Form) -> Response:
        token, actor, now = session_token(request), Actor(person.id, address_of(request)), now_ms()
        await self.accounts.write(lambda connection: actions.end_session(connection, actor, token, now))
        answer = go("/sign-in?done=signed-out")
        end_session(request, answer)
        return answer

    async def _form(self, request: Request) -> Form:
        """A form of somebody who need not be signed in."""
        form = await read_form(request)
        check_form(request, form)
        return form

    async def _welcome(
        self, request: Request, which: str, wrong: UnmaskError | None = None, email: str = "", next: str = ""
    ) -> Response:
        if wrong is None and await visitor(request) is not None:
            return go(own_address(next) or "/account")
        return show(
            self.render,
            request,
            f"account/{which}.html.j2",
            wrong=wrong,
            email=email,
            next=own_address(next),
            free_credit=self.accounts.free_credit,
            provider=self.accounts.provider.name if self.accounts.provider else "",
            shortest=people.SHORTEST_PASSWORD,
        )

    def _first_admin(
        self, request: Request, invitation: str, wrong: UnmaskError | None = None, email: str = ""
    ) -> Response:
        return show(
            self.render,
            request,
            "account/first-admin.html.j2",
            wrong=wrong,
            email=email,
            invitation=invitation[:100],
            shortest=people.SHORTEST_PASSWORD,
        )

    def _linking(self, request: Request, person: Person, wrong: UnmaskError | None = None, on: str = "") -> Response:
        name = self._provider.name
        values = {"person": person, "area": "account", "on": on, "provider": name}
        return show(self.render, request, "account/linking.html.j2", wrong=wrong, **values)

    @property
    def _provider(self) -> Provider:
        assert self.accounts.provider is not None, "these routes are there with a provider alone"
        return self.accounts.provider

    def _back(self, request: Request) -> str:
        return self.base(request) + _BACK

    async def _signed_in(self, request: Request, token: str, address: str) -> Response:
        """The answer that signs the browser in. A session that it had before ends."""
        if await visitor(request) is not None:
            old = session_token(request)
            await self.accounts.write(lambda connection: people.end_session(connection, old))
        answer = go(address)
        start_session(request, answer, token)
        return answer
