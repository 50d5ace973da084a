"""Map every exception to its HTTP answer. The only place where OpenAI's error body is built."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import msgspec
from starlette.responses import Response

from unmask import errors

INVALID = "invalid_request_error"
SERVER = "server_error"
QUOTA = "insufficient_quota"


class ErrorBody(msgspec.Struct, kw_only=True):
    """The error object that OpenAI's clients read; all four keys are always present."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorEnvelope(msgspec.Struct, kw_only=True):
    error: ErrorBody


class ApiError(errors.UnmaskError):
    """An error that is the answer to a request.

    Args:
        status: the HTTP status.
        message: one sentence for the client's log.
        type, param, code: as in OpenAI's error object.
        retry_after: seconds after which the same request may succeed; None if it never will.
        headers: further response headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after
        self.headers = dict(headers or {})
        self.body = ErrorBody(message=message, type=type, param=param, code=code)


class _Answer(NamedTuple):
    status: int
    type: str = INVALID
    code: str | None = None
    param: str | None = None
    retry_after: float | None = None  # for errors without one of their own
    headers: Mapping[str, str] = {}


# The first matching row counts. Where OpenAI has no such error, the status is chosen by the behaviour of its clients:
# they repeat 408, 409, 429 and 5xx unless `x-should-retry` forbids it.
_ANSWERS: tuple[tuple[type[errors.UnmaskError], _Answer], ...] = (
    (errors.TextTooLong, _Answer(400)),
    (errors.InstructionTooLong, _Answer(400, param="instruction")),
    (errors.InputError, _Answer(400, param="input")),
    # Admission is by tokens in the queue, hence "tokens" and not "requests".
    (errors.Overloaded, _Answer(429, "tokens", "rate_limit_exceeded", retry_after=1)),
    (errors.ModelLoading, _Answer(503, SERVER, "model_loading", retry_after=5)),
    # Not 408: the request arrived in time, and the server was late.
    (errors.DeadlineExceeded, _Answer(504, SERVER, "deadline_exceeded", retry_after=1)),
    (errors.EngineStopped, _Answer(503, SERVER, "server_stopping", retry_after=1)),
    (errors.ClusterLost, _Answer(503, SERVER, "cluster_lost")),
    (errors.NoProvider, _Answer(503, SERVER, "no_provider")),
    (errors.NoConformingProvider, _Answer(503, SERVER, "no_conforming_provider")),
    # The budget for repeated requests is used up, so a client must not repeat it by itself: openai-python does twice.
    (errors.ProviderRefused, _Answer(502, SERVER, "provider_failed", headers={"x-should-retry": "false"})),
    (errors.EngineError, _Answer(503, SERVER, "engine_unavailable", retry_after=1)),
    (errors.KeyRefused, _Answer(401, code="invalid_api_key")),
    (errors.SignInRefused, _Answer(401, code="not_signed_in")),
    (errors.ProviderUnavailable, _Answer(503, SERVER, "provider_unavailable", retry_after=5)),
    (errors.Forbidden, _Answer(403, code="permission_denied")),
    # OpenAI's status, which its clients do not repeat because `x-should-retry` says so; 402 is a setting.
    (errors.InsufficientCredit, _Answer(429, QUOTA, QUOTA)),
    (errors.SpendLimitReached, _Answer(429, QUOTA, QUOTA)),
    (errors.RateLimited, _Answer(429, "requests", "rate_limit_exceeded")),
    (errors.StatisticsBusy, _Answer(503, SERVER, "statistics_busy")),
    (errors.RequestInProgress, _Answer(409, code="request_in_progress", param="Idempotency-Key", retry_after=1)),
    (errors.ReplayLimitReached, _Answer(409, code="idempotency_key_exhausted", param="Idempotency-Key")),
    (errors.KeyReused, _Answer(422, code="idempotency_key_reused", param="Idempotency-Key")),
    (errors.NoPrice, _Answer(503, SERVER, "model_not_priced")),
    (errors.LedgerRefused, _Answer(409, code="ledger_refused")),
    (errors.AccountError, _Answer(400)),
)


def api_error(error: errors.UnmaskError) -> ApiError:
    """Return the answer to an error of any package."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, errors.CheckpointError):
        # Its message names files of this machine. They concern the operator only, and are in the log.
        return ApiError(
            503,
            "This model could not be loaded; the server's log says why.",
            type=SERVER,
            code="model_unavailable",
        )
    if isinstance(error, errors.StorageError):
        return ApiError(
            503,
            "The server cannot reach what it keeps its accounts in; its log says why.",
            type=SERVER,
            code="storage_unavailable",
            retry_after=5,
        )
    for kind, answer in _ANSWERS:
        if isinstance(error, kind):
            return ApiError(
                answer.status,
                str(error),
                type=getattr(error, "kind", answer.type),
                param=answer.param,
                code=answer.code,
                retry_after=getattr(error, "retry_after", answer.retry_after),
                headers=answer.headers,
            )
    return internal_error()


def internal_error() -> ApiError:
    """Return the answer to a bug of ours, without any detail."""
    return ApiError(
        500,
        "The server had an error while processing your request.",
        type=SERVER,
        code="internal_error",
        retry_after=1,
    )


def error_response(error: ApiError, content: object = None) -> Response:
    """Build the response that OpenAI's clients expect, with headers that say if and when to try again.

    Args:
        content: body of a dialect, in place of OpenAI's envelope.
    """
    headers = {"x-should-retry": "false" if error.retry_after is None else "true", **error.headers}
    if error.retry_after is not None and error.status in (409, 429, 502, 503):
        # openai-python does not repeat a request that has to wait longer than 120 seconds.
        headers["retry-after"] = str(min(max(math.ceil(error.retry_after), 1), 120))
    encoded = msgspec.json.encode(ErrorEnvelope(error=error.body) if content is None else content)
    return Response(encoded, error.status, headers, media_type="application/json")
