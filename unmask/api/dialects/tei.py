"""Text Embeddings Inference's API: https://huggingface.github.io/text-embeddings-inference/

Requests name no model: the first model of the server answers.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import msgspec
import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from unmask import __version__
from unmask.api.body import read_body
from unmask.api.embeddings import Dialect, EmbeddingResult, EmbeddingsRoute, float_row
from unmask.api.errors import ApiError
from unmask.api.large_bodies import parse_body
from unmask.api.schema import MAX_INPUTS, EmbeddingRequest, Fields, holds_texts, read_fields, read_input
from unmask.checkpoint.tokenizer import TextTokenizer
from unmask.router.route import find_tokenizer

PATHS = ("/embed", "/info", "/tokenize")  # and POST /

_ERROR_TYPES = {429: "Overloaded", 503: "Unhealthy"}
_INPUT_TYPES = {b'"query"': b'"query"', b'"document"': b'"document"', b'"passage"': b'"document"', b"null": b"null"}


def embed_endpoint(embeddings: EmbeddingsRoute) -> Callable[[Request], Awaitable[Response]]:
    """Return the endpoint of `POST /embed`. TEI has it at `POST /` too, for clients that know the address alone."""

    def read(request: Request, fields: Fields) -> Fields:
        model = embeddings.models.list()[0].record.id
        return _read(fields) | {"model": msgspec.Raw(msgspec.json.encode(model))}

    return embeddings.endpoint(Dialect(read, _write))


def routes(embeddings: EmbeddingsRoute) -> list[Route]:
    """Return the routes."""

    async def info(request: Request) -> Response:
        served = embeddings.models.list()[0]
        content = {
            "model_id": served.record.id,
            "model_sha": served.record.revision,
            "model_dtype": served.dtype,
            "model_type": {"embedding": {"pooling": served.record.pooling or "mean"}},
            "max_concurrent_requests": 512,
            "max_input_length": served.record.max_tokens,
            "max_batch_tokens": embeddings.settings.max_request_tokens,
            "max_client_batch_size": MAX_INPUTS,
            "auto_truncate": False,
            "version": __version__,
        }
        return Response(orjson.dumps(content), media_type="application/json")

    async def tokenize(request: Request) -> Response:
        settings, served = embeddings.settings, embeddings.models.list()[0]
        body = await read_body(request, settings.body_limit_bytes, settings.receive_timeout_s)
        texts, special = await parse_body(body, settings.max_request_tokens, lambda: _read_tokenize(read_fields(body)))
        embeddings.check_characters(texts)
        await embeddings.charging.check_access(request, served.record.id, "default")
        tokenizer = await find_tokenizer(served, embeddings.models.providers)
        tokens = await asyncio.to_thread(_tokens, tokenizer, texts, special)
        return Response(orjson.dumps(tokens), media_type="application/json")

    return [
        Route("/embed", embed_endpoint(embeddings), methods=["POST"]),
        Route("/info", info),
        Route("/tokenize", tokenize, methods=["POST"]),
    ]


def error_body(error: ApiError) -> dict[str, str]:
    """Return TEI's error object."""
    fallback = "Validation" if error.status < 500 else "Backend"
    return {"error": error.body.message, "error_type": _ERROR_TYPES.get(error.status, fallback)}


def _read(fields: Fields) -> Fields:
    translated = dict(fields)
    inputs = translated.pop("inputs", None)
    if inputs is None or not holds_texts(inputs):
        raise ApiError(400, "The field 'inputs' is required: one text, or an array of texts.", param="inputs")
    direction = bytes(translated.pop("truncation_direction", msgspec.Raw(b"null"))).lower()
    if direction not in (b'"right"', b"null"):
        raise ApiError(400, "truncation_direction: only Right is supported.", param="truncation_direction")
    prompt = bytes(translated.pop("prompt_name", msgspec.Raw(b"null")))
    if prompt not in _INPUT_TYPES:
        raise ApiError(400, "prompt_name: choose query, document or passage.", param="prompt_name")
    return translated | {"input": inputs, "input_type": msgspec.Raw(_INPUT_TYPES[prompt])}


def _read_tokenize(fields: Fields) -> tuple[list[str], bool]:
    """Return the texts of a request for tokens, and whether it wants the special ones around them."""
    inputs = fields.get("inputs")
    if inputs is None or not holds_texts(inputs):
        raise ApiError(400, "The field 'inputs' is required: one text, or an array of texts.", param="inputs")
    special = bytes(fields.get("add_special_tokens", msgspec.Raw(b"true")))
    if special not in (b"true", b"false"):
        raise ApiError(400, "The field 'add_special_tokens' must be true or false.", param="add_special_tokens")
    if bytes(fields.get("prompt_name", msgspec.Raw(b"null"))) != b"null":
        raise ApiError(400, "prompt_name: tokens of a prompt are not given; leave it out.", param="prompt_name")
    texts: list[str] = read_input(inputs)  # pyright: ignore[reportAssignmentType] - no ids, as `holds_texts` has found
    return texts, special == b"true"


def _tokens(tokenizer: TextTokenizer, texts: list[str], special: bool) -> list[list[dict[str, object]]]:
    """Return the tokens of each text as TEI describes them; `start` and `stop` count characters."""

    def around(ids: Sequence[int]) -> list[dict[str, object]]:
        return [
            {"id": id, "text": tokenizer.text.id_to_token(id), "special": True, "start": None, "stop": None}
            for id in (ids if special else ())
        ]

    encodings = tokenizer.plain.encode_batch(texts, add_special_tokens=False)
    return [
        [
            *around(tokenizer.prefix),
            *(
                {"id": id, "text": text[start:stop], "special": False, "start": start, "stop": stop}
                for id, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True)
            ),
            *around(tokenizer.suffix),
        ]
        for text, encoding in zip(texts, encodings, strict=True)
    ]


def _write(result: EmbeddingResult, parsed: EmbeddingRequest, fields: Fields) -> bytes:
    return b"[%b]" % b",".join([float_row(row) for row in result.rows])
