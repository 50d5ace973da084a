"""Pages of a visitor's API keys: list, new key, settings, rotation and revocation.

A key is always looked up among the visitor's own: an id in an address finds no key of anybody else.
"""

from dataclasses import dataclass

from sqlalchemy import Connection
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from unmask.accounts import Accounts, actions, keys
from unmask.accounts.audit import Actor
from unmask.accounts.keys import Key
from unmask.accounts.people import Person
from unmask.api.errors import ApiError
from unmask.errors import AccountError, KeyRefused, UnmaskError, UsageError
from unmask.router import ModelRegistry
from unmask.storage.database import now_ms
from unmask.web.account.key_fields import KeyFields
from unmask.web.forms import Form
from unmask.web.page_shell import RenderPage, render_private_page
from unmask.web.sessions import client_address, redirect, require_form, require_person

OVERLAPS = {"0": "at once", "1": "in an hour", "24": "in a day", "168": "in a week"}  # by hours


@dataclass(frozen=True, eq=False)
class KeyPages:
    """The pages. `render` is `Site.render`."""

    accounts: Accounts
    models: ModelRegistry
    render: RenderPage

    def routes(self) -> list[Route]:
        return [
            Route("/account/keys", require_person(self.list_keys)),
            Route("/account/keys", require_form(self.create_key), methods=["POST"]),
            Route("/account/keys/{id}", require_person(self.show_key)),
            Route("/account/keys/{id}", require_form(self.change_key), methods=["POST"]),
            Route("/account/keys/{id}/rotate", require_form(self.rotate_key), methods=["POST"]),
            Route("/account/keys/{id}/revoke", require_form(self.revoke_key), methods=["POST"]),
        ]

    async def list_keys(self, request: Request, person: Person) -> Response:
        return await self._list_page(request, person)

    async def create_key(self, request: Request, person: Person, form: Form) -> Response:
        fields, now, actor = KeyFields.from_form(form), now_ms(), _actor(request, person)

        def create(connection: Connection) -> str:
            return actions.create_key(connection, actor, self.accounts.peppers, person.account_id, settings, now)

        try:
            settings = fields.to_settings(now, self._model_ids())
            secret = await self.accounts.write(create)
        except (UsageError, AccountError) as error:
            return await self._list_page(request, person, fields, error)
        return self._secret_page(request, person, secret, settings.name)

    async def show_key(self, request: Request, person: Person) -> Response:
        return self._key_page(request, person, await self._own_key(request, person))

    async def change_key(self, request: Request, person: Person, form: Form) -> Response:
        key = await self._own_key(request, person)
        fields, now, actor = KeyFields.from_form(form), now_ms(), _actor(request, person)

        def change(connection: Connection) -> None:
            actions.change_key(connection, actor, person.account_id, key.id, settings, now)

        try:
            settings = fields.to_settings(now, self._model_ids(key), key.settings)
            await self.accounts.write(change)
        except (UsageError, AccountError) as error:
            return self._key_page(request, person, key, fields, error)
        return redirect(f"/account/keys/{key.id}?done=changed")

    async def rotate_key(self, request: Request, person: Person, form: Form) -> Response:
        key = await self._own_key(request, person)
        now, actor, hours = now_ms(), _actor(request, person), form.get("hours")

        def rotate(connection: Connection) -> str:
            account, overlap = person.account_id, int(hours) * 3_600_000
            return actions.rotate_key(
                connection, actor, self.accounts.peppers, account, key.id, now, overlap_ms=overlap
            )

        try:
            if hours not in OVERLAPS:
                raise UsageError("choose when the old key ends out of the list")
            secret = await self.accounts.write(rotate)
        except (UsageError, AccountError) as error:
            return self._key_page(request, person, key, error=error)
        return self._secret_page(request, person, secret, key.settings.name, ends=OVERLAPS[hours])

    async def revoke_key(self, request: Request, person: Person, form: Form) -> Response:
        key = await self._own_key(request, person)
        now, actor = now_ms(), _actor(request, person)

        def revoke(connection: Connection) -> None:
            actions.revoke_key(connection, actor, person.account_id, key.id, now)

        await self.accounts.write(revoke)
        return redirect(f"/account/keys/{key.id}?done=revoked")

    def _render(
        self, request: Request, person: Person, template: str, error: UnmaskError | None = None, **values: object
    ) -> Response:
        values |= {"person": person, "area": "account", "now": now_ms()}
        return render_private_page(self.render, request, template, error=error, **values)

    async def _list_page(
        self, request: Request, person: Person, fields: KeyFields | None = None, error: UnmaskError | None = None
    ) -> Response:
        now = now_ms()
        own = await self.accounts.read(lambda connection: keys.list_keys(connection, person.account_id, now))
        return self._render(
            request,
            person,
            "account/keys.html.j2",
            error,
            keys=[key for key in own if key.state(now) == "active"],
            ended=[key for key in own if key.state(now) != "active"],
            fields=fields or KeyFields(),
            models=self._model_ids(),
        )

    def _key_page(
        self,
        request: Request,
        person: Person,
        key: Key,
        fields: KeyFields | None = None,
        error: UnmaskError | None = None,
    ) -> Response:
        return self._render(
            request,
            person,
            "account/key.html.j2",
            error,
            key=key,
            fields=fields or KeyFields.from_settings(key.settings),
            models=self._model_ids(key),
            overlaps=OVERLAPS,
        )

    def _secret_page(self, request: Request, person: Person, secret: str, name: str, ends: str = "") -> Response:
        """Show a new key, for the only time. `ends` says when the key that it replaces ends."""
        served = self.models.list()
        return self._render(
            request,
            person,
            "account/new-key.html.j2",
            secret=secret,
            id=keys.key_id(secret),
            name=name,
            ends=ends,
            model=served[0].record.id if served else "MODEL",
        )

    async def _own_key(self, request: Request, person: Person) -> Key:
        """Return the key that the address names.

        Raises:
            ApiError: 404, the visitor has no such key.
        """
        id, now = request.path_params["id"], now_ms()
        try:
            return await self.accounts.read(lambda connection: keys.get(connection, person.account_id, id, now))
        except KeyRefused:
            raise ApiError(404, f"You have no key {id[:40]!r}: see your keys.", code="not_found") from None

    def _model_ids(self, key: Key | None = None) -> list[str]:
        """Return the ids to which a key may be limited: the served models, and those it is limited to already."""
        served = [served.record.id for served in self.models.list()]
        return [*dict.fromkeys([*served, *((key.settings.models if key else None) or ())])]


def _actor(request: Request, person: Person) -> Actor:
    return Actor(person.id, client_address(request))
