"""`RequestContext`: the data of one request that middlewares, routes and pages share."""

import time
from dataclasses import dataclass, field

from starlette.requests import Request
from starlette.types import Scope

from unmask.accounts import Caller

CLIENT_CLOSED_REQUEST = 499  # nginx's status for a client that did not wait; only logs and counters see it

_KEY = "context"


@dataclass(frozen=True)
class Principal:
    """An authenticated caller.

    Attributes:
        share: identifies whose fair share of an engine the work takes: an account, a key or an address.
        caller: the account and its key; None on a server without accounts and on paths that need no key.
    """

    share: str
    caller: Caller | None = None


@dataclass(eq=False)
class RequestContext:
    """Data of one request.

    Attributes:
        request_id: the caller's own id if it is plain, else a new one.
        started: `time.perf_counter()` when the headers had arrived.
        response_headers: headers that routes add to the answer, errors included.
        principal: the caller; None until `AuthenticationMiddleware` has run.
        status: HTTP status of the answer; 0 until it starts.
        tokens: tokens computed for the request, for the access log.
    """

    request_id: str
    started: float = field(default_factory=time.perf_counter)
    response_headers: dict[str, str] = field(default_factory=dict)
    principal: Principal | None = None
    status: int = 0
    tokens: int = 0

    @property
    def caller(self) -> Caller | None:
        """The account and key that call; None without accounts."""
        return None if self.principal is None else self.principal.caller

    @property
    def share(self) -> str:
        """The fair share that the work takes; see `Principal`."""
        assert self.principal is not None, "routes run behind AuthenticationMiddleware"
        return self.principal.share

    def elapsed_s(self) -> float:
        """Return the seconds since the headers had arrived."""
        return time.perf_counter() - self.started

    def elapsed_ms(self) -> int:
        """Return the same in whole milliseconds."""
        return round(self.elapsed_s() * 1000)


def set_context(scope: Scope, context: RequestContext) -> None:
    """Attach a new context to an ASGI scope."""
    scope.setdefault("state", {})[_KEY] = context


def context_of(source: Request | Scope) -> RequestContext:
    """Return the context of a request or of its ASGI scope."""
    scope = source.scope if isinstance(source, Request) else source
    return scope["state"][_KEY]
