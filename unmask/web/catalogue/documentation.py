"""Tables of the documentation page, made from the settings and tables that the server itself uses."""

from dataclasses import dataclass

from unmask.api.openapi import ERRORS
from unmask.api.schema import MAX_INPUTS
from unmask.api.settings import ServeSettings

# Status -> (codes, advice to the caller). The API's own table says when a status is sent.
_ADVICE: dict[int, tuple[str, str]] = {
    400: (
        "max_tokens_per_request, key_in_url",
        "Correct the field that param names; the same request fails again.",
    ),
    401: ("invalid_api_key", "Send a key as Authorization: Bearer KEY."),
    403: (
        "permission_denied",
        "Use a key that has the scope and the model; only the operator thaws an account.",
    ),
    404: ("model_not_found", "Take an id from the list of models."),
    405: ("", "Use a method that the header Allow names."),
    408: ("request_timeout", "Send the body faster, or less of it."),
    409: (
        "request_in_progress, idempotency_key_exhausted",
        "Wait as long as Retry-After says: the first request is not over yet. Without it, send a new Idempotency-Key.",
    ),
    410: ("model_retired", "Take another model from the list."),
    413: ("too_large", "Send fewer texts at a time."),
    415: ("", "Send UTF-8 JSON with Content-Type: application/json, not compressed."),
    422: ("idempotency_key_reused", "Send a new Idempotency-Key with each new request."),
    429: (
        "rate_limit_exceeded, insufficient_quota",
        "Wait as long as Retry-After says, as OpenAI's clients do by themselves. Without it, add credit.",
    ),
    500: ("internal_error", "Try again once; report it with the x-request-id if it stays."),
    502: ("provider_failed", "Send fewer requests: a provider is failing, and repeating them makes it worse."),
    503: (
        "model_loading, model_unavailable, model_not_priced, cluster_lost, no_provider, no_conforming_provider",
        "Wait as long as Retry-After says, or send Prefer: wait=30.",
    ),
    504: ("deadline_exceeded", "Send less at a time, or allow more time with Request-Deadline-Ms."),
}


@dataclass(frozen=True)
class ErrorRow:
    """One HTTP status: when it is sent, its codes, and advice to the caller."""

    status: int
    when: str
    codes: str
    advice: str


def error_rows(settings: ServeSettings) -> list[ErrorRow]:
    """List every status that the API sends, besides 200."""
    rows = []
    for status, when in ERRORS.items():
        codes, advice = _ADVICE[status]
        rows.append(ErrorRow(status, when.format(body_limit=f"{settings.body_limit_bytes:,}"), codes, advice))
    return rows


def limit_rows(settings: ServeSettings) -> list[tuple[str, str]]:
    """List the limits of a request as (limit, value)."""
    return [
        ("Texts per request", f"{MAX_INPUTS:,}"),
        ("Tokens per request, all texts together", f"{settings.max_request_tokens:,}"),
        ("Tokens per text", "see the model's page; longer texts are refused, or cut with truncate"),
        ("Size of a body", f"{settings.body_limit_bytes / 1e6:,.0f} MB, within {settings.receive_timeout_s:g} seconds"),
        ("Time for an answer", f"{settings.request_timeout_s:g} seconds, unless the request sets its own deadline"),
        ("Tokens that may wait per model", f"{settings.queue_tokens:,}; further requests are refused at once"),
    ]
