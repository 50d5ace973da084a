"""Check access and rate limits of a request, and charge it once or not at all. Without accounts, do nothing."""

import asyncio
import hashlib
import re
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.requests import Request

from unmask.accounts import Accounts, BillableRequest, Caller, HeldCredit
from unmask.accounts.costs import AttemptRecord
from unmask.accounts.limits import RateLimitStatus
from unmask.accounts.money import format_dollars
from unmask.accounts.tariff import TIERS
from unmask.api.context import RequestContext, context_of
from unmask.api.errors import QUOTA, ApiError
from unmask.errors import DeadlineExceeded, InsufficientCredit, RateLimited, SpendLimitReached

# Values of the header X-Tier, and the price tier of each. Lists of prices call the default tier standard.
TIER_NAMES = {"standard": "default"} | {tier: tier for tier in TIERS}


@dataclass(eq=False)
class Charge:
    """The cost of one request: held first, then settled or released."""

    accounts: Accounts | None = None
    held: HeldCredit | None = None
    settled: bool = False
    _num_booked: int = 0

    @property
    def cost(self) -> int | None:
        """Nano-dollars; None without accounts."""
        return None if self.held is None else self.held.amount

    @property
    def is_replay(self) -> bool:
        """True if an earlier request has paid for it."""
        return self.held is not None and self.held.replayed

    async def settle(self, provider: str | None = None, attempts: Sequence[AttemptRecord] = ()) -> None:
        """Book the charge, before the answer goes out. A second call books another answer for the same charge.

        Args:
            provider: name of the provider that computed the vectors; None for this server's own engine.
            attempts: all those of the request so far.

        Raises:
            StorageError, InsufficientCredit: it was not booked, so there must be no answer.
        """
        if self.accounts is not None and self.held is not None and not self.held.replayed:
            if self.settled:
                await self.accounts.move_answer(self.held.id, provider, attempts[self._num_booked :])
            else:
                await self.accounts.settle(self.held.id, provider, attempts)
            self._num_booked = len(attempts)
        else:
            self.record(attempts)
        self.settled = True

    def record(self, attempts: Sequence[AttemptRecord]) -> None:
        """Write those attempts of the request that are in the books of no charge. Without accounts, do nothing."""
        if self.accounts is not None:
            self.accounts.record_attempts(attempts[self._num_booked :])
        self._num_booked = len(attempts)


@dataclass(frozen=True, eq=False)
class Charging:
    """Checks and charges requests against the accounts.

    Args:
        accounts: None for a server without them.
        credit_status: HTTP status of a request that the credit does not cover.
    """

    accounts: Accounts | None
    credit_status: int = 429

    async def check_access(self, request: Request, model: str, tier: str) -> None:
        """Check that the key may use the model, and count the request against requests per minute.

        Raises:
            Forbidden, RateLimited.
        """
        context = context_of(request)
        accounts, caller = self.accounts, context.caller
        if accounts is None or caller is None:
            return
        caller.require("embeddings", model)
        _add_limit_headers(context, "tokens", await accounts.limit(caller, "tokens", 0))
        await self._take(context, caller, "requests", 1)

    async def check_account_access(self, request: Request) -> Caller:
        """Return the caller, whose key may read its account. Count the request against requests per minute.

        Raises:
            Forbidden, RateLimited.
        """
        context = context_of(request)
        caller = context.caller
        assert caller is not None, "these routes exist only on servers with accounts"
        caller.require("account")
        await self._take(context, caller, "requests", 1)
        return caller

    @asynccontextmanager
    async def charge(
        self,
        request: Request,
        model: str,
        tier: str,
        tokens: int,
        body: bytes,
        deadline: float,
        max_price: int | None = None,
    ) -> AsyncIterator[Charge]:
        """Hold the price of `tokens` while the block runs. A block that does not settle, or fails, costs nothing.

        Args:
            body: body of the request, to tell a repetition from another request.
            deadline: `time.monotonic()` by which the caller wants its answer.
            max_price: nano-dollars per million tokens that the caller pays at most; None for any price.

        Raises:
            RateLimited: too many tokens this minute.
            ApiError: the model's price is higher; the credit or the key's limit does not cover it; a header is wrong.
            NoPrice, Forbidden, RequestInProgress, ReplayLimitReached, KeyReused, StorageError: as `Accounts.hold`.
            DeadlineExceeded: the ledger did not answer in time.
        """
        context = context_of(request)
        accounts, caller = self.accounts, context.caller
        if accounts is None or caller is None:
            yield Charge()
            return
        if max_price is not None and (price := await accounts.price(model, tier)) > max_price:
            raise ApiError(
                400,
                f"A million tokens of {model} cost {format_dollars(price)} dollars, more than provider.max_price.",
                param="provider",
                code="max_price_exceeded",
            )
        await self._take(context, caller, "tokens", tokens)
        seconds = max(0.0, deadline - time.monotonic())
        key = _idempotency_key(request.headers)
        work = BillableRequest(
            request=context.request_id,
            model=model,
            tier=tier,
            tokens=tokens,
            seconds=seconds,
            idempotency_key=key,
            body=hashlib.sha256(f"{tier}\n".encode() + body).hexdigest() if key else "",
        )
        try:
            async with asyncio.timeout(seconds):
                held = await accounts.hold(caller, work)
        except (InsufficientCredit, SpendLimitReached) as refusal:
            raise self._not_covered(refusal) from None
        except TimeoutError:
            raise DeadlineExceeded(seconds, "its cost was set aside") from None
        charge = Charge(accounts, held)
        context.response_headers["x-unmask-charge"] = held.id
        context.response_headers["x-unmask-tier"] = tier
        try:
            yield charge
        except InsufficientCredit as refusal:
            raise self._not_covered(refusal) from None
        except BaseException:
            if charge.settled and not held.replayed:
                accounts.give_back(held.id)
            raise
        finally:
            # Safe if the client or the database went away during the settlement: releasing a settled charge is a no-op.
            if not charge.settled and not held.replayed:
                accounts.release(held.id)
        context.response_headers["x-unmask-cost-nanodollars"] = str(held.amount)
        if held.replayed:
            context.response_headers["idempotent-replayed"] = "true"

    async def _take(self, context: RequestContext, caller: Caller, kind: str, amount: int) -> None:
        """Take an amount from the caller's rate limit of one kind, and add the limit's headers."""
        accounts = self.accounts
        assert accounts is not None
        try:
            status = await accounts.limit(caller, kind, amount)
        except RateLimited:
            _add_limit_headers(context, kind, await accounts.limit(caller, kind, 0))
            raise
        _add_limit_headers(context, kind, status)

    def _not_covered(self, refusal: InsufficientCredit | SpendLimitReached) -> ApiError:
        return ApiError(self.credit_status, str(refusal), type=QUOTA, code=QUOTA)


def read_tier(headers: Headers) -> str:
    """Return the price tier that the header `X-Tier` names: `standard`, as in the list of models, is `default`.

    Raises:
        ApiError: there is no such tier.
    """
    name = headers.get("x-tier", "default").strip().lower()
    if name not in TIER_NAMES:
        raise ApiError(400, f"The header X-Tier must be one of {', '.join(TIER_NAMES)}.", param="X-Tier")
    return TIER_NAMES[name]


def go_duration(seconds: float) -> str:
    """Format seconds as OpenAI's headers do, which is Go's format: "20ms", "1s", "6m0s"."""
    milliseconds = round(seconds * 1000)
    if milliseconds < 1000:
        return f"{milliseconds}ms" if milliseconds else "0s"
    minutes, rest = divmod(milliseconds, 60_000)
    seconds_text = f"{rest / 1000:.3f}".rstrip("0").rstrip(".")
    return f"{minutes}m{seconds_text}s" if minutes else f"{seconds_text}s"


def _add_limit_headers(context: RequestContext, kind: str, status: RateLimitStatus | None) -> None:
    if status is None:
        return
    context.response_headers |= {
        f"x-ratelimit-limit-{kind}": str(status.limit),
        f"x-ratelimit-remaining-{kind}": str(status.remaining),
        f"x-ratelimit-reset-{kind}": go_duration(status.reset_s),
    }


def _idempotency_key(headers: Headers) -> str | None:
    key = headers.get("idempotency-key")
    if key is None:
        return None
    if not re.fullmatch(r"[\x21-\x7e]{1,255}", key):
        message = "The header Idempotency-Key must have 1 to 255 printable ASCII characters and no blanks."
        raise ApiError(400, message, param="Idempotency-Key")
    return hashlib.sha256(key.encode()).hexdigest()
