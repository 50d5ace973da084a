"""`Accounts`: the service that a server uses, without blocking its event loop."""

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

from unmask.accounts import actions, costs, keys, ledger, money, people, tariff
from unmask.accounts.audit import Actor
from unmask.accounts.identity_provider import Identity, IdentityProvider
from unmask.accounts.keys import Caller, Peppers
from unmask.accounts.ledger import HeldCredit, Hold
from unmask.accounts.limits import BucketTake, Limiter, LocalLimiter, RateLimitStatus
from unmask.accounts.mail_address import normalize_email
from unmask.accounts.people import Person
from unmask.accounts.provider_settings import IdentityProviderSettings
from unmask.errors import AddressTaken, RateLimited, SignInRefused, UnmaskError, UsageError
from unmask.storage.database import Database, default_url, now_ms
from unmask.storage.writer import Writer

log = logging.getLogger("unmask")

T = TypeVar("T")

# Time between the deadline of a request and the expiry of its hold. Shorter, and the sweeper could expire a hold
# whose settlement is slow; longer, and credit is tied up after a crash of a server.
HOLD_MARGIN_MS = 60_000

# Accounts without a password re-authenticate by a sign-in at most this recent.
_FRESH_MS = 10 * 60_000

_SWEEP_S = 5.0

# Interval of checkpoints of SQLite's write-ahead log: often, so that each takes a few milliseconds.
_TIDY_S = 0.2
_READERS = 4
_PRICE_S = 5.0  # age up to which a cached price is used

# Age up to which a cached key is used, in case another process changed it. Spending does not rely on it: the
# statement that takes the credit also tests that account and key are still active.
_KEY_MS = 1000


@dataclass(frozen=True, kw_only=True)
class BillableRequest:
    """A request before its computation.

    Attributes:
        request: its id, for people.
        model, tier: model id and price tier.
        tokens: number of tokens to charge.
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
    """The accounts of one server process: database, peppers, limits, the writer, caches, and a sweeper thread.

    Args:
        url: of the database; its tables are migrated.
        pepper: file of the peppers; left out, it is in `UNMASK_HOME/accounts`.
        limiter: counts requests and tokens per minute, and attempts to sign in. Closed with this.
        free_credit: nano-dollars for a new account.
        flush_charges: on SQLite, let a request wait until its charge is on the disk. Without, a power cut may lose
            the charges of the last moments. A killed process loses nothing in either case.
        provider: an OpenID Connect provider to sign in with; None for passwords only.

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
        """Return the result of a query, which sees one state of the tables."""

        def ask() -> T:
            with self.database.read() as connection:
                return question(connection)

        return await asyncio.get_running_loop().run_in_executor(self._readers, ask)

    async def write(self, piece: Callable[[Connection], T]) -> T:
        """Run a function that changes tables, and return its result once it is committed. It may run more than once."""
        try:
            return await self._book(piece)
        finally:
            # The change may concern a cached key or price.
            self._callers, self._prices, self._tariff = {}, {}, (0, [])

    async def _book(self, piece: Callable[[Connection], T]) -> T:
        """Write as `write` does, for the short transactions of every request: without clearing the caches."""
        future = self._writer.try_inline(piece)
        return future.result() if future is not None else await asyncio.wrap_future(self._writer.submit(piece))

    async def authenticate(self, key: str, address: str) -> Caller:
        """Return the caller that a key belongs to.

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
            amount: how many; 0 only reads the status.

        Returns:
            The status of the tighter limit, or None if there is no limit.

        Raises:
            RateLimited: the limit does not allow so much now.
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
        """Hold the cost of a request, before its computation.

        Raises:
            NoPrice: the operator has set no price for the model.
            and as `ledger.hold`.
        """
        price = await self.price(work.model, work.tier)
        now = now_ms()
        new_hold = Hold(
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
            return await self._book(lambda connection: ledger.hold(connection, new_hold, now))
        except asyncio.CancelledError:
            # The hold may still be queued. If the release runs before it, the sweeper gives it back.
            self.release(new_hold.id)
            raise

    async def settle(
        self, charge: str, provider: str | None = None, attempts: Sequence[costs.AttemptRecord] = ()
    ) -> None:
        """Charge a held amount. Continues if the caller is cancelled.

        Args:
            charge: id of the charge.
            provider: name of the provider that computed the vectors; None for this server's own engine.
            attempts: at providers, written in the same transaction.

        Raises:
            StorageError: it could not be written; the charge is then held until it expires.
            InsufficientCredit, LedgerRefused: as `ledger.settle`.
        """

        def book(connection: Connection) -> bool:
            return costs.settle_with_attempts(connection, charge, now_ms(), provider, attempts)

        await asyncio.shield(self._book(book))

    def record_attempts(self, attempts: Sequence[costs.AttemptRecord]) -> None:
        """Write attempts that no charge settles, without waiting: canaries, and those of requests that failed."""
        if not attempts:
            return
        try:
            self._writer.submit(lambda connection: costs.add_attempts(connection, attempts))
        except UnmaskError as error:
            log.warning("%d attempts at providers are not in the books: %s", len(attempts), error)

    def release(self, charge: str) -> None:
        """Give a held amount back, without waiting. If it fails, the sweeper does it."""
        try:
            self._writer.submit(lambda connection: ledger.release(connection, charge, now_ms()))
        except UnmaskError as error:
            log.warning("charge %s stays held until its time is up: %s", charge, error)

    async def prices(self) -> list[tariff.TariffPrice]:
        """Return all prices that the operator has set, at most five seconds old.

        Raises:
            StorageError: the database failed.
        """
        now = now_ms()
        if not 0 <= now - self._tariff[0] <= _PRICE_S * 1000:
            self._tariff = now, await self.read(tariff.all_prices)
        return self._tariff[1]

    async def price(self, model: str, tier: str) -> int:
        """Return nano-dollars per million tokens, at most five seconds old.

        Raises:
            NoPrice: the operator has set none.
            StorageError: the database failed.
        """
        now = now_ms()
        seen = self._prices.get((model, tier))
        if seen is None or now - seen[0] > _PRICE_S * 1000:
            price = await self.read(lambda connection: tariff.find_price(connection, model, tier))
            seen = self._prices[model, tier] = (now, price)
        return seen[1]

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
                self.peppers,
                email,
                hashed,
                now,
                free_credit=self.free_credit,
                invitation=invitation,
            )

        return await self.write(make)

    async def sign_in(self, email: str, password: str, *, address: str) -> str:
        """Sign in with a password. Returns the token of a new session.

        An unknown mail address takes as long as a wrong password, and gets the same message.

        Raises:
            SignInRefused: mail address and password do not fit.
            RateLimited: too many attempts for the mail address or from the IP address.
        """
        await self._throttle(address, email)
        stored = await self.read(lambda connection: people.stored_password(connection, email))
        good = await asyncio.to_thread(people.check_password, stored[1] if stored else None, password)
        if stored is None or not good:
            raise SignInRefused("this address and this password do not fit")
        person, hashed = stored
        now = now_ms()

        actor = Actor(person, address)
        return await self.write(lambda connection: actions.sign_in(connection, actor, now, credentials=(email, hashed)))

    async def sign_in_with_identity(self, identity: Identity, *, address: str) -> str:
        """Sign in with an identity. Returns the token of a new session. A new identity gets a new account.

        An existing account with the same mail address is not used: only `link_identity` links one.

        Raises:
            SignInRefused: the provider sends no mail address, or says that it is not verified.
            AddressTaken: an account here has the mail address.
            UsageError: the mail address is malformed.
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
        """Check again that a request is from the person: by password, or without one by a recent sign-in.

        Args:
            session: the token of their session, for those without a password.

        Raises:
            SignInRefused, RateLimited.
        """
        await self._throttle(address, person.email)
        credentials, started_at = await self.read(
            lambda connection: (
                people.stored_password(connection, person.email),
                people.session_start(connection, session),
            )
        )
        stored = credentials[1] if credentials else None
        if stored == people.NO_PASSWORD:
            if now_ms() - started_at > _FRESH_MS:
                raise SignInRefused("you signed in too long ago for this: sign out and in again, and do it at once")
        elif not await asyncio.to_thread(people.check_password, stored, password):
            raise SignInRefused("the password is not right")

    async def link_identity(self, person: Person, identity: Identity, *, address: str) -> None:
        """Let a person sign in with an identity as well. Call `reauthenticate` before the redirect to the provider.

        Raises:
            AddressTaken: the identity belongs to another account.
        """
        actor, now = Actor(person.id, address), now_ms()
        await self.write(lambda connection: actions.link_identity(connection, actor, identity, now))

    async def unlink_identity(
        self, person: Person, issuer: str, password: str, *, address: str, session: str = ""
    ) -> None:
        """Unlink an identity of an issuer, which ends every session of the person.

        Raises:
            UsageError, SignInRefused, RateLimited.
        """
        await self.reauthenticate(person, password, address=address, session=session)
        actor, now = Actor(person.id, address), now_ms()
        await self.write(lambda connection: actions.unlink_identity(connection, actor, issuer, now))

    async def throttle_address(self, address: str) -> None:
        """Count an attempt to sign in before its mail address is known.

        Raises:
            RateLimited: too many attempts from the IP address.
        """
        await self._draw([_from_place(address)])

    async def change_password(self, person: Person, old: str, new: str, *, address: str, session: str = "") -> None:
        """Set a new password, or a first one, which ends every session of the person.

        Raises:
            UsageError, SignInRefused, RateLimited.
        """
        await self.reauthenticate(person, old, address=address, session=session)
        hashed = await asyncio.to_thread(people.hash_password, new)
        actor, now = Actor(person.id, address), now_ms()
        await self.write(lambda connection: actions.set_password(connection, actor, hashed, now))

    async def close_account(self, person: Person, password: str, *, address: str, session: str = "") -> int:
        """Delete a person's account, see `people.close_account`. Returns the nano-dollars that are forfeited.

        Raises:
            SignInRefused, RateLimited, LedgerRefused.
        """
        await self.reauthenticate(person, password, address=address, session=session)
        actor, now = Actor(person.id, address), now_ms()
        return await self.write(lambda connection: actions.close_account(connection, actor, person.account_id, now))

    async def _throttle(self, address: str, email: str) -> None:
        """Limit attempts to ten a minute per mail address, and thirty per IP address."""
        try:
            mailbox = normalize_email(email)
        except UsageError:
            mailbox = email[:254]  # nobody's, and refused after it was counted
        who = self.peppers.permanent_digest(f"sign-in {mailbox}")  # the buckets may lie outside this process
        await self._draw([BucketTake(f"sign-in:{who}", 10, 1), _from_place(address)])

    async def _draw(self, draws: Sequence[BucketTake]) -> None:
        try:
            await self._limiter.take(draws, "requests")
        except RateLimited as refused:
            seconds = max(1, round(refused.retry_after or 1))
            raise RateLimited(f"Too many tries: wait {seconds} seconds.", "requests", refused.retry_after) from None

    def sweep(self) -> int:
        """Expire holds whose server died, book costs, record uses of keys, and delete old sessions and replays.

        Returns:
            The number of holds that expired.

        Raises:
            StorageError: the database failed.
        """
        now = now_ms()
        self._callers = {}
        with self.database.read() as connection:
            late = ledger.expired_holds(connection, now)
        # One transaction each: a sweep that locks many charges could deadlock with a settlement.
        ended = [self._writer.submit(lambda connection, id=id: ledger.expire(connection, id, now)) for id in late]
        count = sum(future.result() for future in ended)
        uses, self._uses = self._uses, {}
        if uses:
            self._writer.submit(lambda connection: keys.record_uses(connection, uses)).result()

        def forget(connection: Connection) -> None:
            ledger.forget_replays(connection, now)
            people.delete_expired_sessions(connection, now)

        self._writer.submit(forget).result()
        self._book_costs()
        self._writer.checkpoint_wal()
        return count

    def _book_costs(self) -> None:
        while self._writer.submit(lambda connection: costs.book_costs(connection, now_ms())).result():
            pass

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
        """Write everything that is queued, and stop. No request may be in flight."""
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
