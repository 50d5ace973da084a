"""Build the OpenAPI 3.1 document: schemas from the msgspec types, the rest from the tables below."""

from dataclasses import dataclass
from typing import Any

import msgspec

from unmask import __version__
from unmask.accounts.tariff import TIERS
from unmask.accounts.usage import GROUPS, LONGEST_DAYS
from unmask.api.charging import TIER_NAMES
from unmask.api.dialects.schema import OPERATIONS, JinaEmbeddingRequest
from unmask.api.errors import ErrorEnvelope
from unmask.api.schema import (
    AccountInfo,
    EmbeddingRequest,
    EmbeddingResponse,
    EndpointList,
    Health,
    Index,
    KeyList,
    Model,
    ModelList,
    Readiness,
    UsageReport,
)

ERRORS = {
    400: "The request is wrong; the message names the field. Also for an API key in the URL.",
    401: "The API key is missing or wrong.",
    403: "The key is not for this, or the account is frozen.",
    404: "No such model.",
    405: "This path has other methods, see Allow.",
    408: "The body did not arrive in time.",
    409: "The request with this Idempotency-Key is still being worked on, or was repeated too often.",
    410: "The model was retired and answers no more.",
    413: "The body is larger than {body_limit} bytes.",
    415: "The body is not UTF-8 JSON, or it is compressed.",
    422: "This Idempotency-Key was used for another request.",
    429: "Too many tokens wait already, or a limit per minute is reached. Retry-After says when there will be room.",
    500: "A fault of the server.",
    502: "A provider failed, and the retry budget of the model is used up.",
    503: "The model is loading, failed to load, or the server is shutting down.",
    504: "The vectors were not ready before the request's deadline.",
}

_REFERENCE = "#/components/schemas/{name}"
_INTEGER = {"type": "integer", "minimum": 0}
_STRING = {"type": "string"}

_HEADERS: dict[str, tuple[str, dict[str, Any]]] = {
    "x-request-id": (
        "The caller's own id if it sent a plain one, else a new one; log lines have it.",
        _STRING,
    ),
    "openai-processing-ms": ("Milliseconds from the headers to the answer.", _INTEGER),
    "x-should-retry": ("Whether the same request may succeed later.", {"enum": ["true", "false"]}),
    "retry-after": (
        "Seconds to wait before trying again. Absent where trying again is useless.",
        {"type": "integer", "minimum": 1, "maximum": 120},
    ),
    "allow": ("Methods of this path.", _STRING),
    "www-authenticate": ("Bearer.", _STRING),
    "x-unmask-token-encoding": (
        "For token inputs: how the ids were read.",
        {"enum": ["cl100k_base", "o200k_base", "native"]},
    ),
    "x-unmask-truncated-inputs": (
        "How many inputs were cut; absent for none.",
        {"type": "integer", "minimum": 1},
    ),
    "x-unmask-ignored-fields": ("Fields of the request that nothing reads; absent for none.", _STRING),
    "x-unmask-provider": ("Who computed the vectors; `local` is this server.", _STRING),
    "x-unmask-attempts": ("How many providers were asked.", {"type": "integer", "minimum": 1}),
    "x-unmask-vector-space": ("Vectors of one space may be mixed in an index, and no others.", _STRING),
    "x-unmask-conformance": (
        "Precision of the provider's vectors, their worst 1 - cosine, and Unix seconds of the last right canary.",
        _STRING,
    ),
    "deprecation": ("Since when the model is deprecated, as @ and Unix seconds (RFC 9745); absent if not.", _STRING),
    "sunset": ("When a deprecated model stops answering (RFC 8594).", _STRING),
}
_LIMITS = {
    f"x-ratelimit-{what}-{kind}": (f"{text} {kind} per minute. Absent without a limit.", schema)
    for kind in ("requests", "tokens")
    for what, text, schema in (
        ("limit", "The limit of", {"type": "integer", "minimum": 1}),
        ("remaining", "What could be used at once of the", _INTEGER),
        ("reset", "When all of it could be, like 6m0s or 20ms, of the", _STRING),
    )
}
_CHARGE = {
    "x-unmask-cost-nanodollars": ("What the request costs, in billionths of a dollar.", _INTEGER),
    "x-unmask-charge": ("Id of the charge.", _STRING),
    "x-unmask-tier": ("The tier it was charged in.", {"enum": list(TIERS)}),
    "idempotent-replayed": (
        "Charged by an earlier request with this Idempotency-Key, and not again.",
        {"enum": ["true"]},
    ),
}
_ACCOUNT_REQUEST_HEADERS = {
    "X-Tier": ("`batch` for the cheaper tier, which waits behind the other.", {"enum": list(TIER_NAMES)}),
    "Idempotency-Key": (
        "A request that is repeated with it within 24 hours is charged once.",
        {"type": "string", "pattern": "^[!-~]{1,255}$"},
    ),
}

_END = ("deprecation", "sunset")
_ON_ALL = ("x-request-id", "openai-processing-ms")
_RETRY_AFTER = ("retry-after",)
_ON_ERROR = {401: ("www-authenticate",), 405: ("allow",), 429: _RETRY_AFTER, 502: _RETRY_AFTER, 503: _RETRY_AFTER}

_REQUEST_HEADERS = {
    "Prefer": ("`wait=N` holds the request up to N seconds (60 at most) while a cold model loads.", _STRING),
    "Request-Deadline-Ms": (
        "Milliseconds after which an answer is of no use. Left out: what x-stainless-read-timeout says.",
        {"type": "integer", "minimum": 1, "maximum": 999_999_999},
    ),
    "x-request-id": ("An id for this request, up to 128 letters, digits and `._:-`.", _STRING),
}


def openapi_document(*, secured: bool, body_limit: int, accounts: bool = False) -> dict[str, Any]:
    """Build the OpenAPI document of one app.

    Args:
        secured: the app asks for API keys.
        body_limit: size of its largest body, in bytes.
        accounts: the app has accounts, and asks for their keys.
    """
    app = _AppTraits(secured or accounts, body_limit, accounts)
    types = [
        EmbeddingRequest,
        EmbeddingResponse,
        Model,
        ModelList,
        EndpointList,
        Readiness,
        Health,
        Index,
        ErrorEnvelope,
    ]
    types += [AccountInfo, UsageReport, KeyList] if accounts else []
    types += [JinaEmbeddingRequest, *_dialect_types()]
    _, schemas = msgspec.json.schema_components(types, ref_template=_REFERENCE)
    paths = _embedding_paths(app) | _model_paths(app) | _service_paths(app)
    for path, operations in _dialect_paths(app).items():
        paths[path] = paths.get(path, {}) | operations
    if accounts:
        paths |= _account_paths(app)
    security: dict[str, Any] = {"security": [{"key": []}]} if app.secured else {}
    scheme = {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}} if app.secured else {}
    headers = {
        name: {"description": text, "schema": schema} for name, (text, schema) in (_HEADERS | _LIMITS | _CHARGE).items()
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "unmask",
            "version": __version__,
            "description": "Text embeddings behind OpenAI's API. Errors have OpenAI's envelope.",
        },
        **security,
        "paths": paths,
        "components": {"schemas": schemas, "headers": headers, **scheme},
    }


@dataclass(frozen=True)
class _AppTraits:
    """The traits of an app that decide which statuses its operations can have."""

    secured: bool
    body_limit: int
    accounts: bool

    def operation(
        self, id: str, summary: str, answer: dict[str, Any], errors: tuple[int, ...] = (), **more: Any
    ) -> Any:
        """Build an operation object.

        Args:
            id, summary: as in the document.
            answer: the response with status 200.
            errors: statuses besides those that every operation can have.
            more: further fields of the operation; `responses` are added to the others.
        """
        public = id in ("health", "ready")
        statuses = {400, 405, 500, *errors} | ({401} if self.secured and not public else set())
        statuses |= {403, 503} if self.accounts and not public else set()
        responses = {"200": answer} | {
            str(status): _response(
                ERRORS[status].format(body_limit=self.body_limit),
                _json("ErrorEnvelope"),
                (*_ON_ALL, "x-should-retry", *_ON_ERROR.get(status, ())),
            )
            for status in sorted(statuses)
        }
        security = {"security": []} if self.secured and public else {}
        more["responses"] = responses | more.get("responses", {})
        return {"operationId": id, "summary": summary, **security, **more}


def _embedding_paths(app: _AppTraits) -> dict[str, Any]:
    account_headers = (*_LIMITS, *_CHARGE) if app.accounts else ()
    request_headers = _REQUEST_HEADERS | (_ACCOUNT_REQUEST_HEADERS if app.accounts else {})
    vectors = _response(
        "One vector per input, in order.",
        _json("EmbeddingResponse"),
        (
            *_ON_ALL,
            "x-unmask-token-encoding",
            "x-unmask-truncated-inputs",
            "x-unmask-ignored-fields",
            "x-unmask-provider",
            "x-unmask-attempts",
            "x-unmask-vector-space",
            "x-unmask-conformance",
            *_END,
            *account_headers,
        ),
    )
    return {
        "/v1/embeddings": {
            "post": app.operation(
                "createEmbedding",
                "Vectors of texts",
                vectors,
                (404, 408, 410, 413, 415, 429, 502, 503, 504, *((409, 422) if app.accounts else ())),
                parameters=_parameters("header", request_headers),
                requestBody={"required": True, "content": _either("EmbeddingRequest", "JinaEmbeddingRequest")},
            )
        }
    }


def _dialect_paths(app: _AppTraits) -> dict[str, Any]:
    """Describe the paths of other servers' clients, with bodies and errors of their own forms."""
    errors = (404, 408, 410, 413, 415, 429, 503, 504, *((409, 422) if app.accounts else ()))
    schemas = _dialect_schemas()
    paths: dict[str, Any] = {}
    for path, dialect in OPERATIONS.items():
        more: dict[str, Any] = {
            "tags": ["dialects"],
            "externalDocs": {
                "description": "Fields, and differences to the original.",
                "url": f"/docs#{dialect.page}",
            },
        }
        if "{" in path:
            more["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": _STRING}]
        if dialect.request is not None:
            more["requestBody"] = {"required": True, "content": schemas[dialect.request]}
        answer = _response("In that server's form.", schemas[dialect.response], _ON_ALL)
        operation = app.operation(dialect.id, dialect.summary, answer, errors, **more)
        for status, response in operation["responses"].items():
            if status != "200":
                response["content"] = schemas[dialect.error]
        paths[path] = {"get" if dialect.request is None else "post": operation}
    return paths


def _dialect_types() -> list[Any]:
    """Types of all bodies of dialects, each once."""
    bodies = (body for row in OPERATIONS.values() for body in (row.request, row.response, row.error))
    return list(dict.fromkeys(body for body in bodies if body is not None))


def _dialect_schemas() -> dict[Any, dict[str, Any]]:
    """Map the types of bodies to contents with their schemas."""
    types = _dialect_types()
    schemas, _ = msgspec.json.schema_components(types, ref_template=_REFERENCE)
    return {type_: {"application/json": {"schema": schema}} for type_, schema in zip(types, schemas, strict=True)}


_MODEL_ID = {
    "name": "id",
    "in": "path",
    "required": True,
    "description": "An id or alias; slashes are part of it.",
    "schema": {"type": "string", "minLength": 1},
}


def _model_paths(app: _AppTraits) -> dict[str, Any]:
    return {
        "/v1/models": {
            "get": app.operation("listModels", "The models served", _json_response("All of them.", "ModelList"))
        },
        "/v1/models/{id}": {
            "get": app.operation(
                "retrieveModel",
                "One model",
                _response("Its catalogue record and status.", _json("Model"), (*_ON_ALL, *_END)),
                (404, 410),
                parameters=[_MODEL_ID],
            )
        },
        "/v1/models/{id}/endpoints": {
            "get": app.operation(
                "listEndpoints",
                "Who answers for a model, and how well",
                _json_response("This server's own engine, and the providers.", "EndpointList"),
                (404, 410),
                parameters=[_MODEL_ID],
            )
        },
    }


def _service_paths(app: _AppTraits) -> dict[str, Any]:
    return {
        "/health": {"get": app.operation("health", "Whether the process lives", _json_response("It does.", "Health"))},
        "/ready": {
            "get": app.operation(
                "ready",
                "Whether to send requests here",
                _json_response("Every warmed model gives its canary's vector.", "Readiness"),
                responses={"503": _json_response("Not yet, not any more, or not rightly.", "Readiness")},
            )
        },
        "/metrics": {
            "get": app.operation(
                "metrics",
                "Counters for Prometheus",
                _response("Prometheus' text format.", {"text/plain": {"schema": _STRING}}, _ON_ALL),
            )
        },
        "/openapi.json": {
            "get": app.operation(
                "openapi",
                "This document",
                _response("OpenAPI 3.1.", {"application/json": {"schema": {"type": "object"}}}, _ON_ALL),
            )
        },
        "/": {"get": app.operation("index", "Where things are", _json_response("Paths by purpose.", "Index"))},
    }


def _account_paths(app: _AppTraits) -> dict[str, Any]:
    day = {"type": "string", "format": "date"}
    query = {
        "start": (f"First day, UTC. 30 days by default, {LONGEST_DAYS} at most.", day),
        "end": ("Last day. Today by default.", day),
        "group_by": (f"Out of {', '.join(GROUPS)}, joined by commas. All but provider by default.", _STRING),
        "format": ("", {"enum": ["json", "csv"]}),
    }
    report = _json_response("One row per group.", "UsageReport")
    report["content"]["text/csv"] = {"schema": _STRING}
    return {
        "/v1/account": {
            "get": app.operation(
                "account", "Balance and limits", _json_response("Of this key's account.", "AccountInfo"), (429,)
            )
        },
        "/v1/usage": {
            "get": app.operation(
                "usage", "What was used, and what it cost", report, (429,), parameters=_parameters("query", query)
            )
        },
        "/v1/keys": {
            "get": app.operation("keys", "The account's keys", _json_response("Newest first.", "KeyList"), (429,))
        },
    }


def _parameters(place: str, table: dict[str, tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    return [
        {"name": name, "in": place, "description": text, "schema": schema} for name, (text, schema) in table.items()
    ]


def _json_response(text: str, schema: str) -> dict[str, Any]:
    return _response(text, _json(schema), _ON_ALL)


def _json(schema: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": _REFERENCE.format(name=schema)}}}


def _either(*schemas: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"anyOf": [{"$ref": _REFERENCE.format(name=name)} for name in schemas]}}}


def _response(text: str, content: dict[str, Any], headers: tuple[str, ...]) -> dict[str, Any]:
    refs = {name: {"$ref": f"#/components/headers/{name}"} for name in headers}
    return {"description": text, "headers": refs, "content": content}
