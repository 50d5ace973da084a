"""Ollama's API: https://github.com/ollama/ollama/blob/main/docs/api.md"""

from datetime import UTC, datetime
from typing import Any

import msgspec
import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from unmask import __version__
from unmask.api.body import read_body
from unmask.api.embeddings import Dialect, EmbeddingResult, EmbeddingsRoute, find_model, float_row
from unmask.api.errors import ApiError
from unmask.api.large_bodies import parse_body
from unmask.api.schema import EmbeddingRequest, Fields, decode_field, holds_texts, read_fields
from unmask.router import ServedModel

PATHS = ("/api/embed", "/api/embeddings", "/api/tags", "/api/show", "/api/version")

_NAME = msgspec.json.Decoder(str)


def routes(embeddings: EmbeddingsRoute) -> list[Route]:
    """Return the routes of Ollama that concern embedding models."""

    async def tags(request: Request) -> Response:
        return _json({"models": [_model_entry(served) for served in embeddings.models.list()]})

    async def show(request: Request) -> Response:
        settings = embeddings.settings
        body = await read_body(request, settings.body_limit_bytes, settings.receive_timeout_s)
        fields = await parse_body(body, settings.max_request_tokens, lambda: _with_model(read_fields(body)))
        if "model" not in fields:
            raise ApiError(400, "The field 'model' is required.", param="model")
        return _json(_model_details(find_model(embeddings.models, decode_field(_NAME, fields["model"], "model"))))

    async def version(request: Request) -> Response:
        return _json({"version": __version__})

    return [
        Route("/api/embed", embeddings.endpoint(Dialect(_read_embed, _write_embed)), methods=["POST"]),
        Route("/api/embeddings", embeddings.endpoint(Dialect(_read_prompt, _write_prompt)), methods=["POST"]),
        Route("/api/tags", tags),
        Route("/api/show", show, methods=["POST"]),
        Route("/api/version", version),
    ]


def error_body(error: ApiError) -> dict[str, str]:
    """Return Ollama's error object."""
    return {"error": error.body.message}


def _read_embed(request: Request, fields: Fields) -> Fields:
    """Truncate by default, as Ollama does, which takes no token ids."""
    if (inputs := fields.get("input")) is not None and not holds_texts(inputs):
        raise ApiError(400, "The field 'input' must be one text, or an array of texts.", param="input")
    truncate = fields.get("truncate")
    if truncate is None or bytes(truncate) == b"null":
        fields = fields | {"truncate": msgspec.Raw(b"true")}
    return _with_model(fields)


def _read_prompt(request: Request, fields: Fields) -> Fields:
    """Read the older form: one text, in the field prompt."""
    prompt = fields.pop("prompt", None)
    if prompt is None or not bytes(prompt).startswith(b'"'):
        raise ApiError(400, "The field 'prompt' is required, and must be a string.", param="prompt")
    return _read_embed(request, fields | {"input": prompt})


def _with_model(fields: Fields) -> Fields:
    """Read the name of a model, whose tag is always latest here."""
    name = fields.get("model", fields.get("name"))
    if name is None:
        return fields
    text = decode_field(_NAME, name, "model").removesuffix(":latest")
    return fields | {"model": msgspec.Raw(msgspec.json.encode(text))}


def _write_embed(result: EmbeddingResult, parsed: EmbeddingRequest, fields: Fields) -> bytes:
    rows = b",".join([float_row(row) for row in result.rows])
    return b'{"model":%b,"embeddings":[%b],"total_duration":%d,"load_duration":0,"prompt_eval_count":%d}' % (
        orjson.dumps(result.model),
        rows,
        round(result.seconds * 1e9),
        result.num_tokens,
    )


def _write_prompt(result: EmbeddingResult, parsed: EmbeddingRequest, fields: Fields) -> bytes:
    return b'{"embedding":%b}' % float_row(result.rows[0])


def _model_entry(served: ServedModel) -> dict[str, Any]:
    """Describe a model as `ollama list` shows it. The size of its files is not known here, and 0."""
    record = served.record
    return {
        "name": f"{record.id}:latest",
        "model": f"{record.id}:latest",
        "modified_at": datetime.fromtimestamp(record.created, UTC).isoformat(),
        "size": 0,
        "digest": record.revision or "",
        "details": _details(served),
    }


def _model_details(served: ServedModel) -> dict[str, Any]:
    record = served.record
    family = record.architecture or "unknown"
    facts = {
        "general.architecture": family,
        "general.parameter_count": record.parameters,
        f"{family}.embedding_length": record.dimensions,
        f"{family}.context_length": record.max_tokens,
    }
    return {
        "license": record.licence or "",
        "modified_at": datetime.fromtimestamp(record.created, UTC).isoformat(),
        "details": _details(served),
        "model_info": {name: value for name, value in facts.items() if value is not None},
        "capabilities": ["embedding"],
    }


def _details(served: ServedModel) -> dict[str, Any]:
    record = served.record
    family = record.architecture or "unknown"
    return {
        "parent_model": record.base or "",
        "format": "safetensors",
        "family": family,
        "families": [family],
        "parameter_size": f"{record.parameters / 1e6:.0f}M" if record.parameters else "",
        "quantization_level": served.dtype,
    }


def _json(content: object) -> Response:
    return Response(orjson.dumps(content), media_type="application/json")
