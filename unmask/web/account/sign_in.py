"""Sign-up, sign-in and sign-out, by password or by an OpenID Connect provider, and the first admin's page."""

from collections.abc import Callable
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from unmask.accounts import Accounts, actions, people
from unmask.accounts.audit import Actor
from unmask.accounts.identity_provider import AuthorizationRequest, IdentityProvider
from unmask.accounts.people import Person
from unmask.errors import AccountError, AddressTaken, SignInRefused, UnmaskError, UsageError
from unmask.storage.database import now_ms
from unmask.web.forms import Form
from unmask.web.page_shell import RenderPage, render_private_page
from unmask.web.sessions import (
    clear_session_cookie,
    clear_visit_cookie,
    client_address,
    current_visitor,
    own_page,
    read_form,
    read_visit_cookie,
    redirect,
    require_form,
    session_token,
    set_session_cookie,
    set_visit_cookie,
)

TO_PROVIDER = "/sign-in/provider"
_RETURN = "/sign-in/provider/return"


@dataclass(frozen=True, eq=False)
class SignInPages:
    """The pages for signing up, in and out. `render` is `Site.render`, `url` is `Site.url`."""

    accounts: Accounts
    render: RenderPage
    url: Callable[[Request], str]

    def routes(self) -> list[Route]:
        provider_routes = [
            Route(TO_PROVIDER, self.to_provider),
            Route(_RETURN, self.from_provider),
            Route("/account/link", require_form(self.link), methods=["POST"]),
        ]
        return [
            *(provider_routes if self.accounts.provider else []),
            Route("/sign-up", self.sign_up_page),
            Route("/sign-up", self.sign_up, methods=["POST"]),
            Route("/sign-in", self.sign_in_page),
            Route("/sign-in", self.sign_in, methods=["POST"]),
            Route("/first-admin", self.first_admin_page),
            Route("/first-admin", self.first_admin, methods=["POST"]),
            Route("/sign-out", require_form(self.sign_out, throttle=False), methods=["POST"]),
        ]

    async def sign_up_page(self, request: Request) -> Response:
        return await self._entry_page(request, "sign-up")

    async def sign_up(self, request: Request) -> Response:
        """Create an account. Response and work are the same for a new and a known address, so neither is disclosed."""
        form = await read_form(request)
        email = form.raw("email")
        try:
            await self.accounts.membership.sign_up(email, form.raw("password"), address=client_address(request))
        except AddressTaken:
            pass
        except (UsageError, AccountError) as error:
            return await self._entry_page(request, "sign-up", error, email)
        return redirect("/sign-in?done=signed-up")

    async def sign_in_page(self, request: Request) -> Response:
        return await self._entry_page(request, "sign-in", next=request.query_params.get("next", ""))

    async def sign_in(self, request: Request) -> Response:
        form = await read_form(request)
        email, next = form.raw("email"), form.raw("next")
        try:
            token = await self.accounts.membership.sign_in(email, form.raw("password"), address=client_address(request))
        except AccountError as error:
            return await self._entry_page(request, "sign-in", error, email, next)
        return await self._sign_in(request, token, own_page(request, next) or "/account")

    async def to_provider(self, request: Request) -> Response:
        """Send the browser to the provider. Changes nothing here, so it needs no form token."""
        next = own_page(request, request.query_params.get("next", ""))
        visit = AuthorizationRequest.begin(next=next)
        try:
            await self.accounts.membership.throttle_address(client_address(request))
            response = redirect(await self._provider.address(visit, self._return_address(request)))
        except AccountError as error:
            return await self._entry_page(request, "sign-in", error, next=next)
        set_visit_cookie(request, response, visit)
        return response

    async def from_provider(self, request: Request) -> Response:
        """Take the browser back from the provider: sign it in, or link the identity to the visitor's account."""
        visit, address, person = read_visit_cookie(request), client_address(request), await current_visitor(request)
        try:
            await self.accounts.membership.throttle_address(address)
            identity = await self._provider.identity(visit, request.query_params, self._return_address(request))
            assert visit is not None, "the provider returns no identity without a visit"
            if not visit.person:
                token = await self.accounts.membership.sign_in_with_identity(identity, address=address)
                response = await self._sign_in(request, token, own_page(request, visit.next) or "/account")
            elif person is None or person.id != visit.person:
                raise SignInRefused("you have signed out, or in as somebody else, in between: begin again")
            else:
                await self.accounts.membership.link_identity(person, identity, address=address)
                response = redirect("/account/settings?done=linked")
        except (UsageError, AccountError) as error:
            if person is not None:
                response = self._link_page(request, person, error)
            else:
                response = await self._entry_page(request, "sign-in", error)
        clear_visit_cookie(request, response)
        return response

    async def link(self, request: Request, person: Person, form: Form) -> Response:
        """Show the link to the provider, with which a signed-in visitor links an identity.

        A link and not a redirect: the content security policy forbids forms to lead to another site.
        """
        visit = AuthorizationRequest.begin(person=person.id)
        session, address = session_token(request), client_address(request)
        try:
            await self.accounts.membership.reauthenticate(
                person, form.raw("own_password"), address=address, session=session
            )
            provider_address = await self._provider.address(visit, self._return_address(request))
        except AccountError as error:
            return self._link_page(request, person, error)
        response = self._link_page(request, person, provider_address=provider_address)
        set_visit_cookie(request, response, visit)
        return response

    async def first_admin_page(self, request: Request) -> Response:
        return self._first_admin_page(request, request.query_params.get("invitation", ""))

    async def first_admin(self, request: Request) -> Response:
        form = await read_form(request)
        email, password, invitation = form.raw("email"), form.raw("password"), form.get("invitation")
        address = client_address(request)
        try:
            await self.accounts.membership.sign_up(email, password, address=address, invitation=invitation)
            token = await self.accounts.membership.sign_in(email, password, address=address)
        except (UsageError, AccountError) as error:
            return self._first_admin_page(request, invitation, error, email)
        return await self._sign_in(request, token, "/admin")

    async def sign_out(self, request: Request, person: Person, form: Form) -> Response:
        token, actor, now = session_token(request), Actor(person.id, client_address(request)), now_ms()
        await self.accounts.write(lambda connection: actions.sign_out(connection, actor, token, now))
        response = redirect("/sign-in?done=signed-out")
        clear_session_cookie(request, response)
        return response

    async def _entry_page(
        self, request: Request, template: str, error: UnmaskError | None = None, email: str = "", next: str = ""
    ) -> Response:
        if error is None and await current_visitor(request) is not None:
            return redirect(own_page(request, next) or "/account")
        return render_private_page(
            self.render,
            request,
            f"account/{template}.html.j2",
            error=error,
            email=email,
            next=own_page(request, next),
            free_credit=self.accounts.membership.free_credit,
            provider=self.accounts.provider.name if self.accounts.provider else "",
            shortest=people.SHORTEST_PASSWORD,
        )

    def _first_admin_page(
        self, request: Request, invitation: str, error: UnmaskError | None = None, email: str = ""
    ) -> Response:
        return render_private_page(
            self.render,
            request,
            "account/first-admin.html.j2",
            error=error,
            email=email,
            invitation=invitation[:100],
            shortest=people.SHORTEST_PASSWORD,
        )

    def _link_page(
        self, request: Request, person: Person, error: UnmaskError | None = None, provider_address: str = ""
    ) -> Response:
        name = self._provider.name
        values = {"person": person, "area": "account", "provider_address": provider_address, "provider": name}
        return render_private_page(self.render, request, "account/linking.html.j2", error=error, **values)

    @property
    def _provider(self) -> IdentityProvider:
        assert self.accounts.provider is not None, "without a provider these routes do not exist"
        return self.accounts.provider

    def _return_address(self, request: Request) -> str:
        return self.url(request) + _RETURN

    async def _sign_in(self, request: Request, token: str, path: str) -> Response:
        """Sign the browser in and send it to a page. A session that it had before ends."""
        if await current_visitor(request) is not None:
            old = session_token(request)
            await self.accounts.write(lambda connection: people.delete_session(connection, old))
        response = redirect(path)
        set_session_cookie(request, response, token)
        return response
