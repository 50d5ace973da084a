"""`Accounts`: the service that a server uses, without blocking its event loop."""

import asyncio
import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from sqlalchemy import Connection

from unmask.accounts import costs, idempotency, keys, ledger, money, people, tariff
from unmask.accounts.identity_provider import IdentityProvider
from unmask.accounts.keys import Caller, Peppers
from unmask.accounts.ledger import HeldCredit, Hold
from unmask.accounts.limits import BucketTake, Limiter, LocalLimiter, RateLimitStatus
from unmask.accounts.membership import Membership
from unmask.accounts.provider_settings import IdentityProviderSettings
from unmask.errors import AccountError, StatisticsBusy, UnmaskError
from unmask.storage.database import Database, default_url, now_ms
from unmask.storage.writer import Writer

log = logging.getLogger("unmask")

T = TypeVar("T")

# Time between the deadline of a request and the expiry of its hold. With a shorter time, the sweeper could expire a
# hold before a slow settlement; with a longer one, credit stays on hold after a crash of a server.
HOLD_MARGIN_MS = 60_000

_SWEEP_S = 5.0

# Each sweep repeats the refunds that failed. A refund is tried _REFUND_TRIES times, which takes more than an hour, and
# at most _MAX_FAILED_REFUNDS charges wait for another try.
_REFUND_TRIES = 1000
_MAX_FAILED_REFUNDS = 10_000

# Batches of old attempts that a sweep deletes: after an update there may be months of them, and holds must not wait.
_MAX_FORGET_BATCHES = 20

# Interval of checkpoints of SQLite's write-ahead log: often, so that each takes a few milliseconds.
_CHECKPOINT_S = 0.2
_READERS = 4

# Reports sum up to a year of charges and may take seconds. They have threads of their own, so that no key and no price
# waits for them, and few wait for one of these threads.
_REPORTERS = 2
MOST_REPORTS = 16  # running and waiting
_REPORT_RETRY_S = 2.0
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
        self._limiter = limiter or LocalLimiter()
        self.membership = Membership(self, self.peppers, self._limiter, self.provider, free_credit)
        self._writer = Writer(self.database, flushed=flush_charges)
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="unmask-accounts")
        self._reporters = ThreadPoolExecutor(_REPORTERS, thread_name_prefix="unmask-reports")
        self._free_reports = threading.Semaphore(MOST_REPORTS)
        self._uses: dict[str, int] = {}
        self._prices: dict[tuple[str, str], tuple[int, int]] = {}
        self._tariff: tuple[int, list[tariff.TariffPrice]] = (0, [])
        self._callers: dict[str, tuple[int, Caller]] = {}  # by the key's digest
        self._failed_refunds: dict[str, int] = {}  # tries so far, by charge
        self._stop = threading.Event()
        self._sweeper = threading.Thread(target=self._sweep_often, name="unmask-sweeper", daemon=True)
        self._sweeper.start()

    async def read(self, question: Callable[[Connection], T]) -> T:
        """Return the result of a query, which sees one state of the tables."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, self._ask, question)

    async def read_report(self, question: Callable[[Connection], T], *, patient: bool = False) -> T:
        """Return the result of a query over many rows, or of one that callers may repeat as fast as they like.

        Args:
            question: the query.
            patient: wait behind any number of reports, for a further part of an answer that has begun.

        Raises:
            StatisticsBusy: too many reports are being read or wait.
        """
        if patient:
            return await asyncio.get_running_loop().run_in_executor(self._reporters, self._ask, question)
        if not self._free_reports.acquire(blocking=False):
            raise StatisticsBusy("Too many reports are being read: try again in a moment.", _REPORT_RETRY_S)
        try:
            report = self._reporters.submit(self._ask, question)
        except BaseException:
            self._free_reports.release()
            raise
        # Also once it is cancelled, because its client has left. One that runs by then counts until it ends.
        report.add_done_callback(lambda _: self._free_reports.release())
        return await asyncio.wrap_future(report)

    def _ask(self, question: Callable[[Connection], T]) -> T:
        with self.database.read() as connection:
            return question(connection)

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
            RateLimited: the limit does not allow the amount now.
        """
        settings = caller.key.settings
        if kind == "requests":
            limits = caller.plan_requests_per_minute, settings.requests_per_minute
        else:
            limits = caller.plan_tokens_per_minute, settings.tokens_per_minute
        owners = f"account:{caller.account_id}", f"key:{caller.key.id}"
        takes = [
            BucketTake(f"{owner}:{kind}", limit, amount) for owner, limit in zip(owners, limits, strict=True) if limit
        ]
        if not takes:
            return None
        statuses = await self._limiter.take(takes, kind)
        return min(statuses, key=lambda status: status.remaining)

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

    async def move_answer(self, charge: str, provider: str | None, attempts: Sequence[costs.AttemptRecord]) -> None:
        """Let another provider have answered a settled charge, see `costs.move_answer`.

        Raises:
            StorageError: it could not be written.
        """
        await asyncio.shield(self._book(lambda connection: costs.move_answer(connection, charge, provider, attempts)))

    def record_attempts(self, attempts: Sequence[costs.AttemptRecord]) -> None:
        """Write attempts that no charge settles, without waiting: canaries, and those of requests that failed."""
        if not attempts:
            return

        def on_failure(error: BaseException) -> None:
            log.warning("%d attempts at providers are not in the books: %s", len(attempts), _reason(error))

        self._submit_unwatched(lambda connection: costs.add_attempts(connection, attempts), on_failure)

    def release(self, charge: str) -> None:
        """Give a held amount back, without waiting. If it fails, the sweeper does it."""

        def on_failure(error: BaseException) -> None:
            log.warning("charge %s stays held until its time is up: %s", charge, _reason(error))

        self._submit_unwatched(lambda connection: ledger.release(connection, charge, now_ms()), on_failure)

    def give_back(self, charge: str) -> None:
        """Refund a charge whose answer was withheld, without waiting. A sweep repeats a refund that failed."""
        self._refund(charge, 1)

    def _refund(self, charge: str, tries: int) -> Future[bool] | None:
        note = "the answer was withheld: its provider was taken out of traffic"

        def on_failure(error: BaseException) -> None:
            is_final = isinstance(error, AccountError) or tries >= _REFUND_TRIES or self._stop.is_set()
            if is_final or len(self._failed_refunds) >= _MAX_FAILED_REFUNDS:
                log.error(
                    "charge %s had no answer and is not refunded: %s. Refund it with 'unmask accounts refund %s'",
                    charge,
                    _reason(error),
                    charge,
                )
                return
            self._failed_refunds[charge] = tries
            if tries == 1:
                log.warning(
                    "charge %s had no answer and is not refunded yet, it is tried again: %s", charge, _reason(error)
                )

        return self._submit_unwatched(
            lambda connection: ledger.refund(connection, charge, now_ms(), note=note), on_failure
        )

    def _repeat_refunds(self) -> None:
        tried = [self._refund(charge, self._failed_refunds.pop(charge) + 1) for charge in list(self._failed_refunds)]
        wait([future for future in tried if future is not None])

    def _submit_unwatched(
        self, piece: Callable[[Connection], T], on_failure: Callable[[BaseException], None]
    ) -> Future[T] | None:
        """Queue a piece without waiting for its result.

        Args:
            piece: as for `Writer.submit`.
            on_failure: gets the error of a piece that was not written, in this thread or the writer's.

        Returns:
            The piece's future; None if it was not even queued.
        """

        def on_end(future: Future[T]) -> None:
            if (error := future.exception()) is not None:
                on_failure(error)

        try:
            future = self._writer.submit(piece)
        except UnmaskError as error:
            on_failure(error)
            return None
        future.add_done_callback(on_end)
        return future

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
        if seen is None or not 0 <= now - seen[0] <= _PRICE_S * 1000:
            price = await self.read(lambda connection: tariff.find_price(connection, model, tier))
            seen = self._prices[model, tier] = (now, price)
        return seen[1]

    def sweep(self) -> int:
        """Repeat failed refunds, expire holds whose server died, book costs, record uses of keys, and delete old
        sessions, replays and attempts at providers.

        Returns:
            The number of holds that expired.

        Raises:
            StorageError: the database failed.
        """
        now = now_ms()
        self._callers = {}
        self._repeat_refunds()
        with self.database.read() as connection:
            late = ledger.expired_holds(connection, now)
        # One transaction each: a sweep that locks many charges could deadlock with a settlement.
        ended = [self._writer.submit(lambda connection, id=id: ledger.expire(connection, id, now)) for id in late]
        count = sum(future.result() for future in ended)
        uses, self._uses = self._uses, {}
        if uses:
            self._writer.submit(lambda connection: keys.record_uses(connection, uses)).result()

        def forget(connection: Connection) -> None:
            idempotency.forget_replays(connection, now)
            people.delete_expired_sessions(connection, now)

        self._writer.submit(forget).result()
        self._book_costs()
        self._forget_attempts(now)
        self._writer.checkpoint_wal()
        return count

    def _book_costs(self) -> None:
        while self._writer.submit(lambda connection: costs.book_costs(connection, now_ms())).result():
            pass

    def _forget_attempts(self, now: int) -> None:
        for _ in range(_MAX_FORGET_BATCHES):
            if not self._writer.submit(lambda connection: costs.forget_free_attempts(connection, now)).result():
                break

    def _sweep_often(self) -> None:
        swept = time.monotonic()
        while not self._stop.wait(_CHECKPOINT_S):
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
        self._reporters.shutdown()
        self._limiter.close()
        self.database.close()


def _reason(error: BaseException) -> str:
    """Return an error as the log may have it: a message of SQLAlchemy's own holds the values of the statement."""
    return str(error) if isinstance(error, UnmaskError) else type(error).__name__
