"""Azure OpenAI's path, and OpenAI's path as clients with another base URL build it. Errors have OpenAI's envelope.

https://learn.microsoft.com/azure/ai-services/openai/reference#embeddings
"""

import msgspec
from starlette.requests import Request
from starlette.routing import Route

from unmask.api.embeddings import OPENAI, Dialect, EmbeddingsRoute
from unmask.api.schema import Fields

# Base URLs without /v1, with a slash at the end, or of Azure's newer API.
_OTHER_PATHS = ("/embeddings", "/embeddings/", "/v1/embeddings/", "/openai/v1/embeddings")


def routes(embeddings: EmbeddingsRoute) -> list[Route]:
    """Return the routes; the query, with Azure's api-version, is not read."""
    deployment = embeddings.endpoint(Dialect(read=_read, write=OPENAI.write))
    return [
        Route("/openai/deployments/{model:path}/embeddings", deployment, methods=["POST"]),
        *(Route(path, embeddings.answer, methods=["POST"]) for path in _OTHER_PATHS),
    ]


def _read(request: Request, fields: Fields) -> Fields:
    """Take the model from the path: Azure ignores that of the body, and its older clients send none."""
    return OPENAI.read(request, fields) | {"model": msgspec.Raw(msgspec.json.encode(request.path_params["model"]))}
