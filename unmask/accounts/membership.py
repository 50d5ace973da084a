"""Membership: signing up and in, and the acts that only the person behind an account may do."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from sqlalchemy import Connection

from unmask.accounts import actions, people
from unmask.accounts.audit import Actor
from unmask.accounts.identity_provider import Identity, IdentityProvider
from unmask.accounts.keys import Peppers
from unmask.accounts.limits import BucketTake, Limiter, caller_network
from unmask.accounts.mail_address import normalize_email
from unmask.accounts.people import Person
from unmask.errors import AddressTaken, RateLimited, SignInRefused, UsageError
from unmask.storage.database import now_ms

T = TypeVar("T")

# Forms of all kinds that the people of one account can send in a minute.
FORMS_PER_MINUTE = 30

# Accounts without a password re-authenticate by a sign-in at most this recent.
_FRESH_MS = 10 * 60_000


class Transactions(Protocol):
    """Reads and writes of the accounts' tables, without blocking the event loop; see `Accounts`."""

    async def read(self, question: Callable[[Connection], T]) -> T: ...

    async def write(self, piece: Callable[[Connection], T]) -> T: ...


class Membership:
    """Sign-up, sign-in, and changes that need the person's password again.

    Every attempt counts against the limits of its mail address and of its IP address.

    Args:
        accounts: reads and writes the tables.
        peppers: hash mail addresses before they leave the process, and session tokens.
        limiter: counts the attempts.
        provider: an OpenID Connect provider to sign in with; None for passwords only.
        free_credit: nano-dollars for a new account.
    """

    def __init__(
        self,
        accounts: Transactions,
        peppers: Peppers,
        limiter: Limiter,
        provider: IdentityProvider | None,
        free_credit: int,
    ) -> None:
        self._accounts, self._peppers, self._limiter = accounts, peppers, limiter
        self._provider, self.free_credit = provider, free_credit

    async def sign_up(self, email: str, password: str, *, address: str, invitation: str | None = None) -> Person:
        """Create a person with an account and the free credit.

        Args:
            address: IP address of the request, whose sign-ups are counted.
            invitation: the token of the first admin.

        Raises:
            UsageError, AddressTaken, AccountError, SignInRefused, RateLimited, StorageError.
        """
        await self._throttle(address, email)
        hashed = await asyncio.to_thread(people.hash_password, password)
        now = now_ms()

        def make(connection: Connection) -> Person:
            return actions.sign_up(
                connection,
                address,
                self._peppers,
                email,
                hashed,
                now,
                free_credit=self.free_credit,
                invitation=invitation,
            )

        return await self._accounts.write(make)

    async def sign_in(self, email: str, password: str, *, address: str) -> str:
        """Sign in with a password. Returns the token of a new session.

        An unknown mail address takes as long as a wrong password, and gets the same message.

        Raises:
            SignInRefused: mail address and password do not fit.
            RateLimited: too many attempts for the mail address or from the IP address.
        """
        await self._throttle(address, email)
        stored = await self._accounts.read(lambda connection: people.stored_password(connection, email))
        good = await asyncio.to_thread(people.check_password, stored[1] if stored else None, password)
        if stored is None or not good:
            raise SignInRefused("this address and this password do not fit")
        person, hashed = stored
        now = now_ms()

        actor = Actor(person, address)
        return await self._accounts.write(
            lambda connection: actions.sign_in(connection, actor, now, credentials=(email, hashed))
        )

    async def sign_in_with_identity(self, identity: Identity, *, address: str) -> str:
        """Sign in with an identity. Returns the token of a new session. A new identity gets a new account.

        An existing account with the same mail address is not used: only `link_identity` links one.

        Raises:
            SignInRefused: the provider sends no mail address, or says that it is not verified.
            AddressTaken: an account here has the mail address.
            UsageError: the mail address is malformed.
        """
        name = self._provider.name if self._provider else identity.issuer
        now = now_ms()

        def start(connection: Connection) -> str:
            person = people.person_of_identity(connection, identity)
            if person is None:
                if not identity.email:
                    raise SignInRefused(f"no mail address came from {name}: allow it there, or sign up with a password")
                if identity.verified is False:
                    raise SignInRefused(f"your mail address is not verified at {name}: verify it there, and try again")
                try:
                    person = actions.sign_up(
                        connection,
                        address,
                        self._peppers,
                        identity.email,
                        people.NO_PASSWORD,
                        now,
                        free_credit=self.free_credit,
                        issuer=identity.issuer,
                    )
                except AddressTaken:
                    raise AddressTaken(
                        f"an account here has your mail address already: sign in to it as before, "
                        f"and link {name} on the page 'Settings'"
                    ) from None
                people.add_identity(connection, person.id, identity, now)
            return actions.sign_in(connection, Actor(person.id, address), now, issuer=identity.issuer)

        return await self._accounts.write(start)

    async def reauthenticate(self, person: Person, password: str, *, address: str, session: str = "") -> None:
        """Check again that a request is from the person: by password, or without one by a recent sign-in.

        Args:
            session: the token of their session, for those without a password.

        Raises:
            SignInRefused, RateLimited.
        """
        await self._throttle(address, person.email)
        credentials, started_at = await self._accounts.read(
            lambda connection: (
                people.stored_password(connection, person.email),
                people.session_start(connection, session),
            )
        )
        stored = credentials[1] if credentials else None
        if stored == people.NO_PASSWORD:
            if not 0 <= now_ms() - started_at <= _FRESH_MS:
                raise SignInRefused("you signed in too long ago for this: sign out and in again, and do it at once")
        elif not await asyncio.to_thread(people.check_password, stored, password):
            raise SignInRefused("the password is not right")

    async def link_identity(self, person: Person, identity: Identity, *, address: str) -> None:
        """Let a person sign in with an identity as well. Call `reauthenticate` before the redirect to the provider.

        Raises:
            AddressTaken: the identity belongs to another account.
        """
        actor, now = Actor(person.id, address), now_ms()
        await self._accounts.write(lambda connection: actions.link_identity(connection, actor, identity, now))

    async def unlink_identity(
        self, person: Person, issuer: str, password: str, *, address: str, session: str = ""
    ) -> None:
        """Unlink an identity of an issuer, which ends every session of the person.

        Raises:
            UsageError, SignInRefused, RateLimited.
        """
        await self.reauthenticate(person, password, address=address, session=session)
        actor, now = Actor(person.id, address), now_ms()
        await self._accounts.write(lambda connection: actions.unlink_identity(connection, actor, issuer, now))

    async def throttle_address(self, address: str) -> None:
        """Count an attempt to sign in before its mail address is known.

        Raises:
            RateLimited: too many attempts from the IP address.
        """
        await self._take([_from_place(address)])

    async def throttle_form(self, person: Person) -> None:
        """Count a form that a signed-in person has sent. Most forms write rows that stay when they are undone.

        Raises:
            RateLimited: too many forms of the person's account.
        """
        await self._take([BucketTake(f"forms:{person.account_id}", FORMS_PER_MINUTE, 1)])

    async def change_password(self, person: Person, old: str, new: str, *, address: str, session: str = "") -> None:
        """Set a new password, or a first one, which ends every session of the person.

        Raises:
            UsageError, SignInRefused, RateLimited.
        """
        await self.reauthenticate(person, old, address=address, session=session)
        hashed = await asyncio.to_thread(people.hash_password, new)
        actor, now = Actor(person.id, address), now_ms()
        await self._accounts.write(lambda connection: actions.set_password(connection, actor, hashed, now))

    async def close_account(self, person: Person, password: str, *, address: str, session: str = "") -> int:
        """Delete a person's account, see `people.close_account`. Returns the nano-dollars that are forfeited.

        Raises:
            SignInRefused, RateLimited, LedgerRefused.
        """
        await self.reauthenticate(person, password, address=address, session=session)
        actor, now = Actor(person.id, address), now_ms()
        return await self._accounts.write(
            lambda connection: actions.close_account(connection, actor, person.account_id, now)
        )

    async def _throttle(self, address: str, email: str) -> None:
        """Limit attempts to ten a minute per mail address, and thirty per IP address."""
        try:
            mailbox = normalize_email(email)
        except UsageError:
            mailbox = email[:254]  # not an address: the attempt counts, and is refused later
        who = self._peppers.permanent_digest(f"sign-in {mailbox}")  # the buckets may lie outside this process
        await self._take([BucketTake(f"sign-in:{who}", 10, 1), _from_place(address)])

    async def _take(self, takes: Sequence[BucketTake]) -> None:
        try:
            await self._limiter.take(takes, "requests")
        except RateLimited as refused:
            seconds = max(1, round(refused.retry_after or 1))
            raise RateLimited(f"Too many tries: wait {seconds} seconds.", "requests", refused.retry_after) from None


def _from_place(address: str) -> BucketTake:
    return BucketTake(f"sign-in-from:{caller_network(address)}", 30, 1)
