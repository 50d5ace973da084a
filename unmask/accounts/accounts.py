"""`Accounts`: what a server asks of this room, without waiting on its event loop."""

import asyncio
import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from sqlalchemy import Connection

from unmask.accounts import actions, keys, ledger, money, people, tariff
from unmask.accounts.audit import Actor
from unmask.accounts.identity_provider import Identity, IdentityProvider, IdentityProviderSettings
from unmask.accounts.keys import Caller, Peppers
from unmask.accounts.ledger import HeldCredit, Hold
from unmask.accounts.limits import BucketTake, Limiter, LocalLimiter, RateLimitStatus
from unmask.accounts.people import Person
from unmask.errors import AddressTaken, RateLimited, SignInRefused, UnmaskError
from unmask.storage.database import Database, default_url, now_ms
from unmask.storage.writer import Writer

log = logging.getLogger("unmask")

T = TypeVar("T")

# How long a hold outlives its request's deadline before it counts as its dead server's. Shorter than this, and a
# slow settlement would meet the sweeper; longer, and credit is tied up after a crash.
HOLD_MARGIN_MS = 60_000

# Whoever has no password proves to be there still by having signed in so lately.
_FRESH_MS = 10 * 60_000

_SWEEP_S = 5.0

# SQLite's log is copied into the file so often that it is a matter of a few milliseconds.
_TIDY_S = 0.2
_READERS = 4
_PRICE_S = 5.0  # how long a price is believed without looking

# How long a key that was good is believed without looking, where it was changed by another process. Spending looks in
# any case: the statement that takes the credit also asks whether account and key are still good.
_KEY_MS = 1000


@dataclass(frozen=True, kw_only=True)
class BillableRequest:
    """A request that is about to be done.

    Attributes:
        request: its id, for people.
        model, tier: what is asked of whom.
        tokens: how many.
        seconds: until its deadline.
        idempotency_key, body: digests, see `Hold`.
    """

    request: str
    model: str
    tier: str
    tokens: int
    seconds: float
    idempotency_key: str | None = None
    body: str = ""


class Accounts:
    """The room's state in one process: database, peppers, limits, the line of writes, and a sweeper.

    Args:
        url: of the database; its tables are brought up to date.
        pepper: file of the peppers; left out, it is in `UNMASK_HOME/accounts`.
        limiter: where requests and tokens per minute are counted, and tries to sign in. Closed with this.
        free_credit: nano-dollars for whoever signs up.
        flush_charges: on SQLite, whether a request waits until its charge is on the disk. Without, a power cut may
            forget the charges of the last moments; a killed process forgets nothing in either case.
        provider: an OpenID Connect provider whose people may sign in; None for passwords alone.

    Raises:
        UsageError, StorageError: the database or the pepper cannot be used, or the provider's library is missing.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        pepper: Path | None = None,
        limiter: Limiter | None = None,
        free_credit: int = 0,
        flush_charges: bool = False,
        provider: IdentityProviderSettings | None = None,
    ) -> None:
        self.peppers = Peppers(pepper)
        self.provider = IdentityProvider(provider, self.peppers) if provider else None
        self.database = Database(url or default_url())
        self.database.migrate()
        self.free_credit = free_credit
        self._limiter = limiter or LocalLimiter()
        self._writer = Writer(self.database, flushed=flush_charges)
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="unmask-accounts")
        self._uses: dict[str, int] = {}
        self._prices: dict[tuple[str, str], tuple[int, int]] = {}
        self._tariff: tuple[int, list[tariff.TariffPrice]] = (0, [])
        self._callers: dict[str, tuple[int, Caller]] = {}  # by the key's digest
        self._stop = threading.Event()
        self._sweeper = threading.Thread(target=self._sweep_often, name="unmask-sweeper", daemon=True)
        self._sweeper.start()

    async def read(self, question: Callable[[Connection], T]) -> T:
        """The answer to a question, from one state of the tables."""

        def ask() -> T:
            with self.database.read() as connection:
                return question(connection)

        return await asyncio.get_running_loop().run_in_executor(self._readers, ask)

    async def write(self, piece: Callable[[Connection], T]) -> T:
        """The result of a piece of work, once it is written for good. It may run more than once."""
        try:
            return await self._book(piece)
        finally:
            # It may have been about one of them.
            self._callers, self._prices, self._tariff = {}, {}, (0, [])

    async def _book(self, piece: Callable[[Connection], T]) -> T:
        """As `write`, for the short pieces of every request."""
        future = self._writer.try_inline(piece)
        return future.result() if future is not None else await asyncio.wrap_future(self._writer.submit(piece))

    async def authenticate(self, key: str, address: str) -> Caller:
        """Whose key this is.

        Raises:
            KeyRefused, Forbidden: as `keys.authenticate`.
        """
        now = now_ms()
        digest = self.peppers.digest(key)
        at, caller = self._callers.get(digest, (0, None))
        if caller is None or not 0 <= now - at < _KEY_MS:
            caller = await self.read(lambda connection: keys.authenticate(connection, self.peppers, key, address, now))
            self._callers[digest] = now, caller
        else:
            caller.check(address, now)
        self._uses[caller.key.id] = now
        return caller

    async def limit(self, caller: Caller, kind: str, amount: int) -> RateLimitStatus | None:
        """Take requests or tokens from the account's and the key's minute, both or neither.

        Args:
            kind: "requests" or "tokens".
            amount: how many; 0 only looks.

        Returns:
            The tighter of the two, or None if nothing limits them.

        Raises:
            RateLimited: the minute does not hold so much.
        """
        settings = caller.key.settings
        if kind == "requests":
            limits = caller.plan_requests_per_minute, settings.requests_per_minute
        else:
            limits = caller.plan_tokens_per_minute, settings.tokens_per_minute
        owners = f"account:{caller.account_id}", f"key:{caller.key.id}"
        draws = [
            BucketTake(f"{owner}:{kind}", limit, amount) for owner, limit in zip(owners, limits, strict=True) if limit
        ]
        if not draws:
            return None
        levels = await self._limiter.take(draws, kind)
        return min(levels, key=lambda level: level.remaining)

    async def hold(self, caller: Caller, work: BillableRequest) -> HeldCredit:
        """Set aside what a request costs, before it is done.

        Raises:
            NoPrice: nobody has said what the model costs.
            and as `ledger.hold`.
        """
        price = await self._price(work.model, work.tier)
        now = now_ms()
        wanted = Hold(
            id=f"chg_{secrets.token_hex(12)}",
            account_id=caller.account_id,
            key_id=caller.key.id,
            request=work.request,
            model=work.model,
            tier=work.tier,
            tokens=work.tokens,
            amount=money.cost(work.tokens, price),
            expires_at=now + int(work.seconds * 1000) + HOLD_MARGIN_MS,
            spend_window=caller.key.settings.spend_window,
            idempotency_key=work.idempotency_key,
            body=work.body,
        )
        try:
            return await self._book(lambda connection: ledger.hold(connection, wanted, now))
        except asyncio.CancelledError:
            # It may be on its way into the tables. If this comes before it, the sweeper finds it.
            self.release(wanted.id)
            raise

    async def settle(self, charge: str) -> None:
        """Charge what was held. Once begun it goes through, whoever stops waiting for it.

        Raises:
            StorageError: it could not be written; the charge is then held until its time is up.
            InsufficientCredit, LedgerRefused: as `ledger.settle`.
        """
        await asyncio.shield(self._book(lambda connection: ledger.settle(connection, charge, now_ms())))

    def release(self, charge: str) -> None:
        """Give back what was held. Not waited for: if it fails, the sweeper does it."""
        try:
            self._writer.submit(lambda connection: ledger.release(connection, charge, now_ms()))
        except UnmaskError as error:
            log.warning("charge %s stays held until its time is up: %s", charge, error)

    async def prices(self) -> list[tariff.TariffPrice]:
        """Every price that was set, as it was at most five seconds ago.

        Raises:
            StorageError: the database failed.
        """
        now = now_ms()
        if not 0 <= now - self._tariff[0] <= _PRICE_S * 1000:
            self._tariff = now, await self.read(tariff.all_prices)
        return self._tariff[1]

    async def _price(self, model: str, tier: str) -> int:
        now = now_ms()
        seen = self._prices.get((model, tier))
        if seen is None or now - seen[0] > _PRICE_S * 1000:
            found = await self.read(lambda connection: tariff.find_price(connection, model, tier))
            seen = self._prices[model, tier] = (now, found)
        return seen[1]

    async def sign_up(self, email: str, password: str, *, address: str, invitation: str | None = None) -> Person:
        """Make a person with an account and the free credit.

        Args:
            address: where the request comes from, whose sign-ups are counted.
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
                self.peppers,
                email,
                hashed,
                now,
                free_credit=self.free_credit,
                invitation=invitation,
            )

        return await self.write(make)

    async def sign_in(self, email: str, password: str, *, address: str) -> str:
        """A new session's token.

        An address that is not known takes as long as a wrong password, and gets the same words.

        Raises:
            SignInRefused: they do not fit.
            RateLimited: too many tries for the address or from the place.
        """
        await self._throttle(address, email)
        found = await self.read(lambda connection: people.stored_password(connection, email))
        good = await asyncio.to_thread(people.check_password, found[1] if found else None, password)
        if found is None or not good:
            raise SignInRefused("this address and this password do not fit")
        person, hashed = found
        now = now_ms()

        actor = Actor(person, address)
        return await self.write(lambda connection: actions.sign_in(connection, actor, now, credentials=(email, hashed)))

    async def sign_in_with_identity(self, identity: Identity, *, address: str) -> str:
        """A new session's token for whomever a provider vouches for, who gets an account if this is the first time.

        An account that has the same address already stays its owner's: it is linked by `link` alone.

        Raises:
            SignInRefused: there is no address, or the provider says that it is not verified.
            AddressTaken: an account here has the address.
            UsageError: the address is none.
        """
        name = self.provider.name if self.provider else identity.issuer
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
                        self.peppers,
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

        return await self.write(start)

    async def reauthenticate(self, person: Person, password: str, *, address: str, session: str = "") -> None:
        """Whether it is still the person who has signed in: they know the password, or have just signed in without.

        Args:
            session: the token of their session, for those without a password.

        Raises:
            SignInRefused, RateLimited.
        """
        await self._throttle(address, person.email)
        found, began = await self.read(
            lambda connection: (
                people.stored_password(connection, person.email),
                people.session_start(connection, session),
            )
        )
        stored = found[1] if found else None
        if stored == people.NO_PASSWORD:
            if now_ms() - began > _FRESH_MS:
                raise SignInRefused("you signed in too long ago for this: sign out and in again, and do it at once")
        elif not await asyncio.to_thread(people.check_password, stored, password):
            raise SignInRefused("the password is not right")

    async def link_identity(self, person: Person, identity: Identity, *, address: str) -> None:
        """Let a person sign in with an identity as well. `confirm` is to be asked before the way to the provider.

        Raises:
            AddressTaken: the identity is another account's.
        """
        actor, now = Actor(person.id, address), now_ms()
        await self.write(lambda connection: actions.link_identity(connection, actor, identity, now))

    async def unlink_identity(
        self, person: Person, issuer: str, password: str, *, address: str, session: str = ""
    ) -> None:
        """End signing in with an issuer's identity, and every session of the person.

        Raises:
            UsageError, SignInRefused, RateLimited.
        """
        await self.reauthenticate(person, password, address=address, session=session)
        actor, now = Actor(person.id, address), now_ms()
        await self.write(lambda connection: actions.unlink_identity(connection, actor, issuer, now))

    async def throttle_address(self, address: str) -> None:
        """Count a try to sign in that names nobody yet.

        Raises:
            RateLimited: too many from the place.
        """
        await self._draw([_from_place(address)])

    async def change_password(self, person: Person, old: str, new: str, *, address: str, session: str = "") -> None:
        """Another password, or a first one, which ends every session of the person.

        Raises:
            UsageError, SignInRefused, RateLimited.
        """
        await self.reauthenticate(person, old, address=address, session=session)
        hashed = await asyncio.to_thread(people.hash_password, new)
        actor, now = Actor(person.id, address), now_ms()
        await self.write(lambda connection: actions.set_password(connection, actor, hashed, now))

    async def close_account(self, person: Person, password: str, *, address: str, session: str = "") -> int:
        """Delete a person's account, see `people.close_account`. Returns the nano-dollars given up.

        Raises:
            SignInRefused, RateLimited, LedgerRefused.
        """
        await self.reauthenticate(person, password, address=address, session=session)
        actor, now = Actor(person.id, address), now_ms()
        return await self.write(lambda connection: actions.close_account(connection, actor, person.account_id, now))

    async def _throttle(self, address: str, email: str) -> None:
        """Ten tries a minute for one mail address, thirty from one place."""
        who = self.peppers.permanent_digest(
            f"sign-in {email.strip().lower()[:254]}"
        )  # the buckets may lie outside this process
        await self._draw([BucketTake(f"sign-in:{who}", 10, 1), _from_place(address)])

    async def _draw(self, draws: Sequence[BucketTake]) -> None:
        try:
            await self._limiter.take(draws, "requests")
        except RateLimited as refused:
            seconds = max(1, round(refused.retry_after or 1))
            raise RateLimited(f"Too many tries: wait {seconds} seconds.", "requests", refused.retry_after) from None

    def sweep(self) -> int:
        """Give back holds whose server died, note when keys were used, drop what is too old. How many holds.

        Raises:
            StorageError: the database failed.
        """
        now = now_ms()
        self._callers = {}
        with self.database.read() as connection:
            late = ledger.expired_holds(connection, now)
        # One transaction each: a sweep that locked many charges could wait for a settlement that waits for it.
        ended = [self._writer.submit(lambda connection, id=id: ledger.expire(connection, id, now)) for id in late]
        count = sum(future.result() for future in ended)
        uses, self._uses = self._uses, {}
        if uses:
            self._writer.submit(lambda connection: keys.record_uses(connection, uses)).result()

        def forget(connection: Connection) -> None:
            ledger.forget_replays(connection, now)
            people.delete_expired_sessions(connection, now)

        self._writer.submit(forget).result()
        self._writer.checkpoint_wal()
        return count

    def _sweep_often(self) -> None:
        swept = time.monotonic()
        while not self._stop.wait(_TIDY_S):
            try:
                if time.monotonic() - swept < _SWEEP_S:
                    self._writer.checkpoint_wal()
                    continue
                swept = time.monotonic()
                self._limiter.heartbeat()
                if count := self.sweep():
                    log.warning("gave back %d holds of requests that nobody ended", count)
            except UnmaskError as error:
                log.error("sweeping the ledger failed, it is tried again: %s", error)
            except Exception:
                log.exception("sweeping the ledger failed, it is tried again")

    def close(self) -> None:
        """Write what is in line, and end. No request may be on its way any more."""
        self._stop.set()
        self._sweeper.join()
        try:
            self.sweep()
        except UnmaskError as error:
            log.error("the last sweep of the ledger failed: %s", error)
        self._writer.close()
        self._readers.shutdown()
        self._limiter.close()
        self.database.close()


def _from_place(address: str) -> BucketTake:
    return BucketTake(f"sign-in-from:{address}", 30, 1)
