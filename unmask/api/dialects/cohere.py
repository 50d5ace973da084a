"""Cohere's embed API: https://docs.cohere.com/reference/embed

LangChain's CohereEmbeddings and `cohere.Client` use its version 1 (https://docs.cohere.com/v1/reference/embed), where
`input_type` and `embedding_types` may be left out.
"""

import base64

import msgspec
import orjson
from starlette.requests import Request
from starlette.routing import Route

from unmask.api.embeddings import Dialect, EmbeddingResult, EmbeddingsRoute, float_row
from unmask.api.errors import ApiError
from unmask.api.quantisation import QUANTISED, quantise_vectors
from unmask.api.schema import EmbeddingRequest, Fields, decode_field

PATHS = ("/v1/embed", "/v2/embed")

_TYPES = msgspec.json.Decoder(list[str])
_INPUT_TYPES = {
    b'"search_query"': b'"query"',
    b'"search_document"': b'"document"',
    b'"classification"': b"null",
    b'"clustering"': b"null",
}
_INPUT_TYPES_V1 = {**_INPUT_TYPES, b"null": b"null"}
_TRUNCATIONS = {b'"END"': b"true", b'"NONE"': b"false", b"null": b"true"}


def routes(embeddings: EmbeddingsRoute) -> list[Route]:
    """Return the routes."""
    return [
        Route("/v1/embed", embeddings.endpoint(Dialect(_read_v1, _write_v1)), methods=["POST"]),
        Route("/v2/embed", embeddings.endpoint(Dialect(_read, _write)), methods=["POST"]),
    ]


def error_body(error: ApiError) -> dict[str, str]:
    """Return Cohere's error object."""
    return {"message": error.body.message}


def _read(request: Request, fields: Fields) -> Fields:
    return _translate(fields, _INPUT_TYPES)


def _read_v1(request: Request, fields: Fields) -> Fields:
    if _wants_plain_floats(fields):
        fields = {name: value for name, value in fields.items() if name != "embedding_types"}
    return _translate(fields, _INPUT_TYPES_V1)


def _wants_plain_floats(fields: Fields) -> bool:
    """True for a request of version 1 without `embedding_types`, whose answer is an array of vectors."""
    return bytes(fields.get("embedding_types", msgspec.Raw(b"null"))) == b"null"


def _translate(fields: Fields, input_types: dict[bytes, bytes]) -> Fields:
    for name in ("images", "inputs"):
        if bytes(fields.get(name, msgspec.Raw(b"null"))) != b"null":
            raise ApiError(400, f"The field '{name}' is not supported: send texts.", param=name)
    texts = fields.get("texts")
    if texts is None or bytes(texts)[:1] != b"[" or bytes(texts)[1:].lstrip()[:1] not in (b'"', b"]"):
        raise ApiError(400, "The field 'texts' is required: an array of texts.", param="texts")
    if bytes(fields.get("max_tokens", msgspec.Raw(b"null"))) != b"null":
        raise ApiError(400, "The field 'max_tokens' is not supported: leave it out.", param="max_tokens")
    _embedding_types(fields)
    translated = {name: value for name, value in fields.items() if name not in ("texts", "embedding_types")}
    translated["input"] = texts
    translated["input_type"] = _choice(fields, "input_type", input_types)
    translated["truncate"] = _choice(fields, "truncate", _TRUNCATIONS)
    if (length := translated.pop("output_dimension", None)) is not None:
        translated["dimensions"] = length
    return translated


def _choice(fields: Fields, name: str, choices: dict[bytes, bytes]) -> msgspec.Raw:
    value = bytes(fields.get(name, msgspec.Raw(b"null")))
    if value not in choices:
        allowed = ", ".join(choice.decode().strip('"') for choice in choices if choice != b"null")
        raise ApiError(400, f"The field '{name}' must be one of {allowed}.", param=name)
    return msgspec.Raw(choices[value])


def _embedding_types(fields: Fields) -> list[str]:
    """Return the types that a request asks for, each once; float by default."""
    try:
        raw = fields.get("embedding_types", msgspec.Raw(b'["float"]'))
        types: list[str] = list(dict.fromkeys(decode_field(_TYPES, raw, "embedding_types")))
    except ApiError:
        types = []
    allowed = ("float", "base64", *QUANTISED)
    if not types or not set(types) <= set(allowed):
        message = f"The field 'embedding_types' must be an array of {', '.join(allowed)}."
        raise ApiError(400, message, param="embedding_types")
    return types


def _write(result: EmbeddingResult, parsed: EmbeddingRequest, fields: Fields) -> bytes:
    return _answer(result, fields, "embeddings_by_type", _by_type(result, fields), "2")


def _write_v1(result: EmbeddingResult, parsed: EmbeddingRequest, fields: Fields) -> bytes:
    if _wants_plain_floats(fields):
        return _answer(result, fields, "embeddings_floats", b"[%b]" % _rows(result, "float"), "1")
    return _answer(result, fields, "embeddings_by_type", _by_type(result, fields), "1")


def _by_type(result: EmbeddingResult, fields: Fields) -> bytes:
    forms = (b'"%b":[%b]' % (kind.encode(), _rows(result, kind)) for kind in _embedding_types(fields))
    return b"{%b}" % b",".join(forms)


def _answer(result: EmbeddingResult, fields: Fields, response_type: str, vectors: bytes, version: str) -> bytes:
    meta = {"api_version": {"version": version}, "billed_units": {"input_tokens": result.num_tokens}}
    return b'{"id":%b,"response_type":%b,"embeddings":%b,"texts":%b,"meta":%b}' % (
        orjson.dumps(result.request_id),
        orjson.dumps(response_type),
        vectors,
        bytes(fields["texts"]),
        orjson.dumps(meta),
    )


def _rows(result: EmbeddingResult, kind: str) -> bytes:
    if kind == "base64":
        return b",".join(b'"%b"' % base64.b64encode(row.tobytes()) for row in result.rows)
    rows = result.rows if kind == "float" else quantise_vectors(result.rows, kind)
    return b",".join(float_row(row) for row in rows)
