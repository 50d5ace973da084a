"""The table of signals: consequences of an attempt's outcome for further attempts and for the provider's breaker."""

from typing import Literal, NamedTuple

from unmask.errors import UnmaskError

SignalName = Literal[
    "unreachable", "cut_off", "timeout", "rate_limited", "no_access", "rejected", "failed", "malformed", "cancelled"
]


class Signal(NamedTuple):
    """The consequences of an outcome.

    Attributes:
        meaning: what happened, in words.
        another: another provider may be tried.
        breaker: "failure" counts in the run of failures and in the rate, "rate" in the rate only, "open" opens it until
            a canary is answered again, "none" leaves it alone.
        check: a full run of the canaries is due.
        price: share of the request's tokens that another attempt takes from the retry budget.
    """

    meaning: str
    another: bool
    breaker: Literal["failure", "rate", "open", "none"]
    check: bool = False
    price: float = 1.0


# A connection that was kept alive and closed before the first byte of the answer is not in the table: `outbound.py`
# sends the request once more over a new one, and it is no attempt of its own.
SIGNALS: dict[SignalName, Signal] = {
    # refused, no such host, TLS handshake failed: no byte of the request was sent
    "unreachable": Signal("cannot be connected to", another=True, breaker="failure", price=0.5),
    "cut_off": Signal("closed the connection", another=True, breaker="failure"),
    # within the time that this server gives one attempt, or within ample time before the caller's own deadline
    "timeout": Signal("did not answer in time", another=True, breaker="failure"),
    # it is healthy and busy: it must lose traffic, not be declared dead
    "rate_limited": Signal("has too many requests", another=True, breaker="rate"),
    # 401, 402, 403, 404, and 429 for want of credit: our account or configuration there
    "no_access": Signal("refuses this server's key, credit or model name", another=True, breaker="open"),
    # 400, 413, 422: the request was checked here, so the provider's limits are not as described, or it has a bug.
    # Another provider is tried even if its limits are said to be no wider: what is said was wrong just now, providers
    # answer 400 to mistakes of their own as well, and a caller with a valid request is owed an answer. A request that
    # all reject costs one attempt more, within the budget.
    "rejected": Signal("rejected a valid request", another=True, breaker="none"),
    # 408, 5xx and whatever else is no answer, such as an HTML page or a redirect
    "failed": Signal("answered with an error", another=True, breaker="failure"),
    # 200 with vectors that cannot be right
    "malformed": Signal("answered with unusable vectors", another=True, breaker="failure", check=True),
    # the caller's own deadline came soon, or the caller is gone: says nothing about the provider
    "cancelled": Signal("was not waited for", another=False, breaker="none"),
}

_BY_STATUS: dict[int, SignalName] = {
    400: "rejected",
    401: "no_access",
    402: "no_access",
    403: "no_access",
    404: "no_access",
    413: "rejected",
    422: "rejected",
    429: "rate_limited",
}


def signal_of_status(status: int, *, quota: bool = False) -> SignalName:
    """Return the signal of an HTTP status other than 200.

    Args:
        quota: the error's code says that the credit is used up, which providers send with 429.
    """
    return "no_access" if quota and status == 429 else _BY_STATUS.get(status, "failed")


class AttemptFailed(UnmaskError):
    """One attempt at one provider failed. Never shown to a caller; its message quotes nothing that the provider wrote.

    Args:
        provider: its name.
        signal: the outcome.
        detail: a few words of ours, such as "status 503, text/html, 512 bytes".
        status: HTTP status; None where there was none.
        retry_after: seconds that the provider asked to wait; None if it did not.
    """

    def __init__(
        self,
        provider: str,
        signal: SignalName,
        detail: str = "",
        *,
        status: int | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(f"{provider} {SIGNALS[signal].meaning}" + (f": {detail}" if detail else ""))
        self.provider = provider
        self.signal: SignalName = signal
        self.detail = detail
        self.status = status
        self.retry_after = retry_after
