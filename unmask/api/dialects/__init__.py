"""Paths, requests and errors of other servers, so that their clients need only another address.

Each module translates one server's requests to those of `/v1/embeddings` and writes answers in that server's form.
"""

from collections.abc import Callable

from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Scope

from unmask.api.dialects import azure, cohere, ollama, tei
from unmask.api.embeddings import EmbeddingsRoute
from unmask.api.errors import ApiError, error_response

_ERROR_BODIES: dict[str, Callable[[ApiError], object]] = {
    **dict.fromkeys(cohere.PATHS, cohere.error_body),
    **dict.fromkeys(ollama.PATHS, ollama.error_body),
    **dict.fromkeys(tei.PATHS, tei.error_body),
}


def dialect_routes(embeddings: EmbeddingsRoute) -> list[Route]:
    """Return the routes of all dialects."""
    return [*azure.routes(embeddings), *cohere.routes(embeddings), *ollama.routes(embeddings), *tei.routes(embeddings)]


def dialect_error(scope: Scope, error: ApiError) -> Response | None:
    """Return an error in the form of the dialect whose path a request has; None for other paths."""
    is_embed = scope["path"] == "/" and scope["method"] == "POST"  # the other methods of / are our own
    body = tei.error_body if is_embed else _ERROR_BODIES.get(scope["path"])
    return None if body is None else error_response(error, body(error))
