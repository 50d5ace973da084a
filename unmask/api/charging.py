"""Between a request and the accounts: its limits, its cost, and that it is charged once or not at all.

Without accounts each function here does nothing.
"""

import asyncio
import hashlib
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.requests import Request

from unmask.accounts import Accounts, Caller, Held, Work
from unmask.accounts.limits import Level
from unmask.accounts.tariff import TIERS
from unmask.api.errors import QUOTA, ApiError
from unmask.errors import DeadlineExceeded, InsufficientCredit, RateLimited, SpendLimitReached


@dataclass(eq=False)
class Charge:
    """What a request costs, set aside."""

    accounts: Accounts | None = None
    held: Held | None = None
    settled: bool = False

    @property
    def cost(self) -> int | None:
        """Nano-dollars; None without accounts."""
        return None if self.held is None else self.held.amount

    async def settle(self) -> None:
        """Make it final, before the answer goes out.

        Raises:
            StorageError, InsufficientCredit: it was not charged, so there may be no answer.
        """
        if self.accounts is not None and self.held is not None and not self.held.replayed:
            await self.accounts.settle(self.held.id)
        self.settled = True


@dataclass(frozen=True, eq=False)
class Charging:
    """The API's way into the accounts.

    Args:
        accounts: None where there are none.
        credit_status: HTTP status of a request that the credit does not cover.
    """

    accounts: Accounts | None
    credit_status: int = 429

    async def enter(self, request: Request, model: str) -> None:
        """Let a request in that is to use a model: by its key's scope and models, and by requests per minute.

        Raises:
            Forbidden, RateLimited.
            ApiError: the tier is unknown.
        """
        tier(request.headers)
        accounts, caller = self.accounts, _caller(request)
        if accounts is None or caller is None:
            return
        caller.require("embeddings", model)
        _tell(request, "tokens", await accounts.limit(caller, "tokens", 0))
        await self._draw(request, caller, "requests", 1)

    @asynccontextmanager
    async def charge(
        self, request: Request, model: str, tokens: int, body: bytes, deadline: float
    ) -> AsyncIterator[Charge]:
        """Set aside what the tokens cost while the block works. A block that does not settle gives it back.

        Args:
            body: of the request, to tell a repetition from another request.
            deadline: `time.monotonic()` by which the caller wants its answer.

        Raises:
            RateLimited: too many tokens this minute.
            ApiError: the credit or the key's limit does not cover it; a header is wrong.
            NoPrice, Forbidden, RequestInProgress, KeyReused, StorageError: as `Accounts.hold`.
            DeadlineExceeded: the ledger did not answer in time.
        """
        accounts, caller = self.accounts, _caller(request)
        if accounts is None or caller is None:
            yield Charge()
            return
        chosen = tier(request.headers)
        await self._draw(request, caller, "tokens", tokens)
        seconds = max(0.0, deadline - time.monotonic())
        key = _idempotency_key(request.headers)
        work = Work(
            request=request.state.request_id,
            model=model,
            tier=chosen,
            tokens=tokens,
            seconds=seconds,
            idempotency_key=key,
            body=hashlib.sha256(f"{chosen}\n".encode() + body).hexdigest() if key else "",
        )
        try:
            async with asyncio.timeout(seconds):
                held = await accounts.hold(caller, work)
        except (InsufficientCredit, SpendLimitReached) as refused:
            raise self._unpaid(refused) from None
        except TimeoutError:
            raise DeadlineExceeded("the deadline passed before the cost could be set aside") from None
        charge = Charge(accounts, held)
        request.state.headers["x-unmask-charge"] = held.id
        request.state.headers["x-unmask-tier"] = chosen
        try:
            yield charge
        except InsufficientCredit as refused:
            raise self._unpaid(refused) from None
        finally:
            # If the caller left during the settlement, or the database did, this changes nothing after a settlement.
            if not charge.settled and not held.replayed:
                accounts.release(held.id)
        request.state.headers["x-unmask-cost-nanodollars"] = str(held.amount)
        if held.replayed:
            request.state.headers["idempotent-replayed"] = "true"

    async def _draw(self, request: Request, caller: Caller, kind: str, amount: int) -> None:
        accounts = self.accounts
        assert accounts is not None
        try:
            level = await accounts.limit(caller, kind, amount)
        except RateLimited:
            _tell(request, kind, await accounts.limit(caller, kind, 0))
            raise
        _tell(request, kind, level)

    def _unpaid(self, refused: InsufficientCredit | SpendLimitReached) -> ApiError:
        return ApiError(self.credit_status, str(refused), type=QUOTA, code=QUOTA)


def tier(headers: Headers) -> str:
    """The tier that `X-Tier` asks for.

    Raises:
        ApiError: there is no such tier.
    """
    given = headers.get("x-tier", "").strip().lower() or "default"
    if given not in TIERS:
        raise ApiError(400, f"The header X-Tier must be one of {', '.join(TIERS)}.", param="X-Tier")
    return given


def go_duration(seconds: float) -> str:
    """Seconds in the way of OpenAI's headers, which is Go's: "20ms", "1s", "6m0s"."""
    milliseconds = round(seconds * 1000)
    if milliseconds < 1000:
        return f"{milliseconds}ms" if milliseconds else "0s"
    minutes, rest = divmod(milliseconds, 60_000)
    shown = f"{rest / 1000:.3f}".rstrip("0").rstrip(".")
    return f"{minutes}m{shown}s" if minutes else f"{shown}s"


def _tell(request: Request, kind: str, level: Level | None) -> None:
    if level is None:
        return
    request.state.headers |= {
        f"x-ratelimit-limit-{kind}": str(level.limit),
        f"x-ratelimit-remaining-{kind}": str(level.remaining),
        f"x-ratelimit-reset-{kind}": go_duration(level.reset_s),
    }


def _caller(request: Request) -> Caller | None:
    return request.state.admitted.caller


def _idempotency_key(headers: Headers) -> str | None:
    given = headers.get("idempotency-key")
    if given is None:
        return None
    if not re.fullmatch(r"[\x21-\x7e]{1,255}", given):
        message = "The header Idempotency-Key must have 1 to 255 printable ASCII characters and no blanks."
        raise ApiError(400, message, param="Idempotency-Key")
    return hashlib.sha256(given.encode()).hexdigest()
