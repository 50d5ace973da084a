"""Every exception that a caller of unmask can meet.

UnmaskError
├── UsageError                 an argument, option or file name is wrong
│   ├── MissingDatabase        the file of a SQLite database does not exist
│   ├── MissingPackages        an optional feature needs packages that are not installed
│   └── TableError             a file of rows is damaged
├── CheckpointError            a model's files cannot be used
│   ├── ModelNotFound
│   ├── UnsupportedArchitecture
│   └── AdapterMismatch
├── InputError                 a text cannot be encoded
│   ├── EmptyText
│   ├── TextTooLong
│   └── InstructionTooLong
├── EngineError                the model is fine, but not now
│   ├── Overloaded             carries retry_after, in seconds
│   ├── ModelLoading           carries retry_after, in seconds
│   ├── DeadlineExceeded
│   ├── EngineStopped
│   ├── ClusterLost            replicas cannot be reached; carries retry_after, in seconds
│   ├── NoProvider             providers with right vectors cannot answer now; carries retry_after, in seconds
│   ├── NoConformingProvider   no provider's vectors are known to be right; carries retry_after, in seconds
│   └── ProviderRefused        a provider failed, and nobody else was asked; carries retry_after, in seconds
├── AccountError               an account, a key or its limits do not allow it
│   ├── KeyRefused             the key is unknown, mistyped, revoked or out of date
│   ├── SignInRefused          wrong address or password, or nobody is signed in
│   ├── ProviderUnavailable    the OpenID Connect provider does not answer
│   ├── AddressTaken           the mail address belongs to an account already
│   ├── Forbidden              the key is known, but not for this
│   ├── InsufficientCredit     the account's credit does not cover the cost
│   ├── SpendLimitReached      the key's own limit does not cover the cost
│   ├── RateLimited            carries retry_after, in seconds
│   ├── StatisticsBusy         too many reports are being read; carries retry_after, in seconds
│   ├── RequestInProgress      a request with the same Idempotency-Key is running
│   ├── ReplayLimitReached     the charge behind the Idempotency-Key was answered often enough
│   ├── KeyReused              the same Idempotency-Key came with another request
│   ├── NoPrice                the model has no price yet
│   └── LedgerRefused          a booking that would break the ledger's rules
├── ClusterError               a Ray cluster cannot be reached, refuses, or lost its workers
├── ExportError                a model cannot be exported to a format, or its exported files give other vectors
├── GateFailed                 a model did not pass a gate on its way to live
├── TrainingError              a run cannot go on: the loss is not a number, memory is out
└── StorageError               the disk is full or cannot be written

Each message names the thing, the value seen and what to do. The command line prints it as one line; the API
maps the class to a status in `unmask.api.errors`, and nowhere else.

Exceptions that one package raises and catches itself are defined there: `AttemptFailed` in the router, `HandLost` in
the engine, and `TransientError` in the storage, which a caller meets as the `StorageError` that it is.
"""

import re
from importlib.metadata import PackageNotFoundError, requires


class UnmaskError(Exception):
    """Root of the tree. `str(error)` is one sentence meant for a person."""


class UsageError(UnmaskError):
    """An argument, an option or a file name is wrong."""


class MissingDatabase(UsageError):
    """The file of a SQLite database does not exist."""


class MissingPackages(UsageError):
    """An optional feature needs packages that are not installed.

    The message names the packages themselves and not `unmask[extra]`, since unmask is on no package index.

    Args:
        feature: the feature with its verb, such as "limits in Redis need".
        extra: name of the optional dependencies in pyproject.toml.
    """

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(f"{feature} packages that are not installed: pip install {_requirements(extra)}")


def _requirements(extra: str) -> str:
    """Requirements of one extra as arguments for pip, read from the metadata of the installed package."""
    try:
        lines = requires("unmask") or []
    except PackageNotFoundError:  # imported from a clone that is not installed
        return f"'.[{extra}]'"
    marker = re.compile(rf"""^(.+?) *; *extra == ['"]{re.escape(extra)}['"]$""")
    return " ".join(f"'{match[1]}'" for line in lines if (match := marker.match(line)))


class TableError(UsageError):
    """A file that is damaged as a whole: truncated, not gzip, not parquet."""


class CheckpointError(UnmaskError):
    """The files of a model or adapter cannot be used."""


class ModelNotFound(CheckpointError):
    """No model is known, stored or downloadable under the given name."""


class UnsupportedArchitecture(CheckpointError):
    """The checkpoint is sound, but no code here can run it."""


class AdapterMismatch(CheckpointError):
    """An adapter does not fit the model it was to be merged into."""


class InputError(UnmaskError, ValueError):
    """A text cannot be encoded. `index` is its position in the call, where there is one."""

    def __init__(self, message: str, index: int | None = None) -> None:
        super().__init__(message)
        self.index = index


class EmptyText(InputError):
    """The text has no token of its own, so there is nothing to average."""


class TextTooLong(InputError):
    """The text does not fit the model's maximum length and truncation was not asked for."""


class InstructionTooLong(InputError):
    """The instruction alone fills the model's maximum length."""


class EngineError(UnmaskError):
    """The request was sound; the engine could not serve it now."""


class Overloaded(EngineError):
    """Admitting the request would break a deadline. Try again after `retry_after` seconds."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ModelLoading(EngineError):
    """The model is being read from disk. Try again after `retry_after` seconds."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineExceeded(EngineError):
    """The caller's deadline passed before its vectors were ready.

    Args:
        seconds: that the request waited.
        event: what it waited for, with its verb.
    """

    def __init__(self, seconds: float, event: str = "the vectors were ready") -> None:
        super().__init__(
            f"the deadline passed after {seconds:,.2f} s, before {event}: allow more time, or send fewer texts at once"
        )


class EngineStopped(EngineError):
    """The engine is shutting down."""


class ClusterLost(EngineError):
    """The cluster that computes for a model does not answer. Try again after `retry_after` seconds."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class NoProvider(EngineError):
    """The providers whose vectors are right cannot answer now. Try again after `retry_after` seconds."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class NoConformingProvider(EngineError):
    """No provider of the model is known to give the right vectors. Try again after `retry_after` seconds."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ProviderRefused(EngineError):
    """A provider failed, and repeating at once would make matters worse. Try again after `retry_after` seconds."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class AccountError(UnmaskError):
    """An account, a key or its limits do not allow it."""


class KeyRefused(AccountError):
    """The API key is unknown, mistyped, revoked or expired. Which of them, only the owner's pages say."""


class SignInRefused(AccountError):
    """Wrong address or password, or the session is over."""


class ProviderUnavailable(AccountError):
    """The OpenID Connect provider does not answer, or its answer breaks the standard."""


class AddressTaken(AccountError):
    """The mail address belongs to an account already. Do not show this to a visitor: it reveals who has one."""


class Forbidden(AccountError):
    """The key is good, but not for this model, this route or from this address; or the account is frozen."""


class InsufficientCredit(AccountError):
    """The account's free credit does not cover the cost."""


class SpendLimitReached(AccountError):
    """The key's spend limit for the current window does not cover the cost."""


class RateLimited(AccountError):
    """Too many requests or tokens per minute.

    Attributes:
        kind: "requests" or "tokens".
        retry_after: seconds until it would be admitted; None if it never will be.
    """

    def __init__(self, message: str, kind: str, retry_after: float | None) -> None:
        super().__init__(message)
        self.kind = kind
        self.retry_after = retry_after


class StatisticsBusy(AccountError):
    """Too many reports of accounts are being read. Try again after `retry_after` seconds."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class RequestInProgress(AccountError):
    """A request with the same Idempotency-Key has not ended yet."""


class ReplayLimitReached(AccountError):
    """A request was repeated with its Idempotency-Key as often as one charge allows."""


class KeyReused(AccountError):
    """An Idempotency-Key was used before, for another request."""


class NoPrice(AccountError):
    """The operator has set no price for the model, so nobody can be charged for it."""


class LedgerRefused(AccountError):
    """A booking that breaks a rule: a reference used twice, more than the balance, a charge that is not open."""


class ClusterError(UnmaskError):
    """A Ray cluster cannot be reached, refuses, has no room, or lost its workers over a piece of work."""


class ExportError(UnmaskError):
    """A format cannot express a model, or the files that were written do not give the model's vectors."""


class GateFailed(UnmaskError):
    """A model did not pass a gate on its way to live."""


class TrainingError(UnmaskError):
    """A training run cannot continue. Its last checkpoint is kept."""


class StorageError(UnmaskError):
    """Something could not be written: no space, no permission."""
