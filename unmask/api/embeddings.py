"""`POST /v1/embeddings` and its dialects: from the bytes of the body to the bytes of the answer."""

import asyncio
import base64
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from datetime import time as time_of_day
from email.utils import format_datetime

import numpy as np
import orjson
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response

from unmask.accounts.money import format_dollars
from unmask.api import tokens
from unmask.api.body import read_body
from unmask.api.charging import Charge, Charging, read_tier
from unmask.api.context import context_of
from unmask.api.disconnect import cancel_on_disconnect
from unmask.api.errors import ApiError
from unmask.api.jina_fields import translate_jina_fields
from unmask.api.large_bodies import parse_body
from unmask.api.metrics import Metrics
from unmask.api.quantisation import QUANTISED, quantise_vectors
from unmask.api.schema import (
    EmbeddingRequest,
    Fields,
    ProviderOptions,
    TokenEncoding,
    read_fields,
    read_input,
    request_of,
)
from unmask.api.settings import ServeSettings
from unmask.catalogue import Record
from unmask.conformance.references import PRECISION_CLASSES
from unmask.encoder import Prompt
from unmask.encoder.encoder import postprocess
from unmask.router import (
    EmbeddingWork,
    ModelRegistry,
    ModelRoute,
    ProviderPool,
    ProviderPreferences,
    ServedModel,
    find_route,
)
from unmask.router.embedding_work import RoutedVectors

MAX_WAIT_S = 60  # for a cold model, by `Prefer: wait`
MAX_DEADLINE_S = 3600

# All requests of the batch tier together have the share of one caller, so that they never hold up the default tier.
_BATCH_SHARE = "tier batch"

# Largest answer, in floats, that is written without a thread. It takes about a millisecond, less than starting one.
_SMALL_ANSWER = 65_536


# Uses of a text that may end a model's name, as in NAME:query.
USES = ("query", "document")


@dataclass(frozen=True, eq=False)
class EmbeddingResult:
    """Vectors of a request, and everything that an answer says about them.

    Attributes:
        rows: float32 [inputs, dimensions], normalised and cut as the request wants.
        model: id of the model.
        num_tokens: tokens that the model processed.
        cost: nano-dollars; None without accounts.
        seconds: time since the headers of the request had arrived.
        request_id: id of the request.
    """

    rows: np.ndarray
    model: str
    num_tokens: int
    cost: int | None
    seconds: float
    request_id: str


@dataclass(frozen=True)
class Dialect:
    """Form of requests and answers on some paths. Vectors, keys, limits and charges are those of `/v1/embeddings`.

    Attributes:
        read: translates the fields of a body to those of `/v1/embeddings`; raises ApiError.
        write: writes the answer's JSON; gets the fields of the body as well.
    """

    read: Callable[[Request, Fields], Fields]
    write: Callable[[EmbeddingResult, EmbeddingRequest, Fields], bytes]


@dataclass(frozen=True, eq=False)
class EmbeddingsRoute:
    """The route `/v1/embeddings`. Immutable: a request's data is in local variables and its `RequestContext`."""

    models: ModelRegistry
    settings: ServeSettings
    metrics: Metrics
    charging: Charging

    async def answer(self, request: Request) -> Response:
        """Answer one request in OpenAI's form."""
        return await self._answer(request, OPENAI)

    def endpoint(self, dialect: Dialect) -> Callable[[Request], Awaitable[Response]]:
        """Return an endpoint that answers requests of a dialect."""

        async def answer(request: Request) -> Response:
            return await self._answer(request, dialect)

        return answer

    async def _answer(self, request: Request, dialect: Dialect) -> Response:
        """Answer one request; its work is cancelled if the client disconnects.

        Raises:
            ApiError, InputError, EngineError, CheckpointError, AccountError, StorageError: `unmask.api.errors` has the
                status of each.
        """
        arrived = time.monotonic()
        _require_json(request.headers)
        timeout = _timeout(request.headers, self.settings.request_timeout_s)
        body = await read_body(request, self.settings.body_limit_bytes, self.settings.receive_timeout_s)
        return await cancel_on_disconnect(self._embed(request, dialect, body, arrived + timeout), request)

    async def _embed(self, request: Request, dialect: Dialect, body: bytes, deadline: float) -> Response:
        context = context_of(request)

        def parse() -> tuple[Fields, EmbeddingRequest, list[str], list[str] | list[list[int]]]:
            fields = read_fields(body)
            parsed, ignored = request_of(dialect.read(request, dict(fields)))
            return fields, parsed, ignored, read_input(parsed.input)

        fields, parsed, ignored, inputs = await parse_body(body, self.settings.max_request_tokens, parse)
        if parsed.provider is not None and self.models.providers is None:  # this process alone computes vectors
            ignored = [*(field for field in ignored if not field.startswith("provider.")), "provider"]
        if dialect is not OPENAI:
            body = f"{request.scope['path']}\n".encode() + body  # the path may name the model
        name, use = split_use(self.models, parsed.model)
        served = find_model(self.models, name)
        model = served.record.id
        context.response_headers |= deprecation_headers(served.record)
        tier = read_tier(request.headers)
        await self.charging.check_access(request, model, tier)
        _require_known_provider(parsed.provider, self.models.providers)
        wait = max(0.0, min(_preferred_wait(request.headers), deadline - time.monotonic()))
        is_native = parsed.token_encoding == "native" and not isinstance(inputs[0], str)
        preferences, is_raw = _provider_preferences(parsed.provider), parsed.normalize is False
        route = await find_route(served, self.models.providers, wait, preferences.precision, local=is_native or is_raw)
        with route.lease():
            if parsed.dimensions and parsed.dimensions > route.dim:
                message = f"dimensions={parsed.dimensions}: this model's vectors have {route.dim} numbers."
                raise ApiError(400, message, param="dimensions")
            texts, encoding = await self._decode_inputs(inputs, parsed)
            instruction = _instruction(parsed, route.record, use)  # a cold model's is known now
            prompts = await route.prepare(texts, instruction=instruction, truncate=bool(parsed.truncate))
            num_tokens = sum(len(prompt.ids) for prompt in prompts)
            self.check_tokens(num_tokens)
            max_price = parsed.provider.max_nano_per_million if parsed.provider else None
            async with self.charging.charge(request, model, tier, num_tokens, body, deadline, max_price) as charge:
                work = EmbeddingWork(
                    texts=None if is_native else [text for text in texts if isinstance(text, str)],
                    prompts=prompts,
                    instruction=instruction,
                    raw=is_raw,
                    deadline=deadline,
                    share=context.share if tier == "default" else _BATCH_SHARE,
                    preferences=self.models.public_names.real_preferences(preferences),
                    precision=route.precision,
                    income=charge.cost,
                    is_replay=charge.is_replay,
                    hedged=tier == "default" and not charge.is_replay,
                    by_price_alone=tier == "batch",
                )

                def write(vectors: np.ndarray) -> bytes:
                    rows, seconds = _rows(vectors, parsed), context.elapsed_s()
                    result = EmbeddingResult(rows, model, num_tokens, charge.cost, seconds, context.request_id)
                    return dialect.write(result, parsed, fields)

                content, routed = await _book_answer(route, work, charge, write)
            context.tokens = num_tokens
            self.metrics.count_embedding(model, num_tokens, context.elapsed_s())
            headers = route.headers(routed) | _input_headers(encoding, prompts, ignored)
            return Response(content, headers=headers, media_type="application/json")

    async def _decode_inputs(
        self, inputs: list[str] | list[list[int]], parsed: EmbeddingRequest
    ) -> tuple[Sequence[str] | Sequence[Sequence[int]], TokenEncoding | None]:
        """Return the inputs to encode, and for token arrays the encoding by which their ids were decoded."""
        if isinstance(inputs[0], str):
            texts: list[str] = inputs  # pyright: ignore[reportAssignmentType] - all items are of the first one's type
            encoding = None
        else:
            sequences: list[list[int]] = inputs  # pyright: ignore[reportAssignmentType]
            encoding = parsed.token_encoding or "cl100k_base"
            self.check_tokens(sum(map(len, sequences)))
            if encoding == "native":
                return sequences, encoding
            texts = await asyncio.to_thread(tokens.decode, sequences, encoding)
        self.check_characters(texts)
        return texts, encoding

    def check_characters(self, texts: Sequence[str]) -> None:
        """Refuse texts that would take too long to tokenise.

        Raises:
            ApiError: 400.
        """
        characters = sum(map(len, texts))
        if characters > self.settings.max_request_characters:
            raise ApiError(
                400,
                f"Requested {characters} characters, max {self.settings.max_request_characters} per request.",
                type="max_characters_per_request",
                code="max_characters_per_request",
            )

    def check_tokens(self, count: int, *, more: bool = False) -> None:
        """Refuse a request of too many tokens.

        Args:
            count: number of its tokens.
            more: True if counting stopped at `count`, and the request has more tokens.

        Raises:
            ApiError: 400.
        """
        most = self.settings.max_request_tokens
        if count > most:
            raise ApiError(
                400,
                f"Requested {'at least ' if more else ''}{count} tokens, max {most} tokens per request",
                type="max_tokens_per_request",
                code="max_tokens_per_request",
            )


async def _book_answer(
    route: ModelRoute, work: EmbeddingWork, charge: Charge, write: Callable[[np.ndarray], bytes]
) -> tuple[bytes, RoutedVectors]:
    """Compute the vectors, write the answer and book the charge, in this order.

    Booking takes a moment. If the provider is taken out of traffic in it, the answer is thrown away, and another
    provider answers for the same charge.

    Args:
        route, work, charge: of the request.
        write: writes vectors as the body of an answer.
    """
    while True:
        try:
            routed = await route.run(work)
        except BaseException:
            charge.record(work.attempts)
            raise
        vectors = routed.vectors
        content = await asyncio.to_thread(write, vectors) if vectors.size > _SMALL_ANSWER else write(vectors)
        await charge.settle(routed.endpoint.provider.name if routed.endpoint else None, work.attempts)
        if routed.may_be_used():
            return content, routed


def find_model(models: ModelRegistry, name: str) -> ServedModel:
    """Return the served model with this id or alias.

    Raises:
        ApiError: 404, in OpenAI's words; 410 for a retired model.
    """
    served = models.find(name)
    if served is None:
        entry = models.catalogue.get(name)
        if entry is not None and entry.record.status == "retired":
            day = entry.record.history[-1].on
            message = f"The model '{entry.record.id}' was retired on {day} and answers no more. See /v1/models."
            raise ApiError(410, message, param="model", code="model_retired")
        short = name if len(name) <= 200 else name[:200] + "…"
        message = f"The model '{short}' does not exist or you do not have access to it. See /v1/models."
        raise ApiError(404, message, code="model_not_found")
    return served


def deprecation_headers(record: Record) -> dict[str, str]:
    """Return the headers Deprecation (RFC 9745) and Sunset (RFC 8594) of a deprecated model; none for others.

    Days are in UTC. The model still answers on its last day.
    """
    step = record.history[-1] if record.history else None
    if step is None or step.until is None:
        return {}
    since = datetime.combine(step.on, time_of_day(), UTC)
    end = datetime.combine(step.until + timedelta(days=1), time_of_day(), UTC)
    return {"deprecation": f"@{since.timestamp():.0f}", "sunset": format_datetime(end, usegmt=True)}


def _require_json(headers: Headers) -> None:
    coding = headers.get("content-encoding", "identity").strip().lower()
    if coding != "identity":
        raise ApiError(415, f"Content-Encoding {coding[:40]!r} is not supported: send the body as it is.")
    media, _, parameters = headers.get("content-type", "").partition(";")
    charset = re.search(r"charset\s*=\s*\"?([\w.-]+)", parameters)
    if media.strip().lower() != "application/json" or (charset and charset[1].lower() not in ("utf-8", "utf8")):
        raise ApiError(415, "Send the body as UTF-8 JSON, with 'Content-Type: application/json'.")


def _timeout(headers: Headers, default: float) -> float:
    """Return the seconds that the caller waits: from its own header, or from openai-python's read timeout."""
    milliseconds = headers.get("request-deadline-ms")
    if milliseconds is not None:
        # Nine digits are eleven days. More digits could only be meant to be slow to parse.
        if not re.fullmatch(r"0*[1-9][0-9]{0,8}", milliseconds, re.ASCII):
            message = "The header Request-Deadline-Ms must be a whole number of milliseconds greater than 0."
            raise ApiError(400, message, param="Request-Deadline-Ms")
        return min(int(milliseconds) / 1000, MAX_DEADLINE_S)
    stainless = headers.get("x-stainless-read-timeout", "")
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", stainless, re.ASCII) and float(stainless) > 0:
        return min(float(stainless), MAX_DEADLINE_S)
    return default


def _preferred_wait(headers: Headers) -> float:
    """Return the seconds of `Prefer: wait=N` (RFC 7240)."""
    wait = re.search(r"(?i)(?:^|[,;\s])wait\s*=\s*\"?([0-9]{1,9})", headers.get("prefer", ""))
    return min(float(wait[1]), MAX_WAIT_S) if wait else 0.0


def split_use(models: ModelRegistry, name: str) -> tuple[str, str]:
    """Split NAME:query or NAME:document into the model's name and its use; "" for a name without one.

    A client that can send nothing but a model name asks right with these. A model of that very name comes first.
    """
    base, colon, use = name.rpartition(":")
    if not colon or use not in USES or models.find(name) is not None or models.catalogue.get(name) is not None:
        return name, ""
    return base, use


def _instruction(parsed: EmbeddingRequest, record: Record, use: str) -> str:
    """Instruction of a request: its own field, else that of its `input_type`, else that of the model's name."""
    if parsed.instruction:
        return parsed.instruction
    own = {"query": record.query_instruction, "document": record.document_instruction}
    return own.get(parsed.input_type or use, "")


def _input_headers(encoding: TokenEncoding | None, prompts: Sequence[Prompt], ignored: Sequence[str]) -> dict[str, str]:
    """Return the headers that say what became of the inputs and of fields that are not known."""
    headers = {"x-unmask-token-encoding": encoding} if encoding else {}
    if truncated := sum(prompt.truncated for prompt in prompts):
        headers["x-unmask-truncated-inputs"] = str(truncated)
    if ignored:
        headers["x-unmask-ignored-fields"] = _names(ignored)
    return headers


def _require_known_provider(options: ProviderOptions | None, pool: ProviderPool | None) -> None:
    """Refuse a request that only providers may answer whose names nobody has: a later attempt would fail as well.

    Unknown names beside a known one, and in `ignore` and `order`, change nothing and are allowed.

    Raises:
        ApiError: 400.
    """
    if options is None or pool is None or not options.only or any(map(pool.public_names.is_known, options.only)):
        return
    there = "" if pool.public_names.hides else f": it has {', '.join(pool.public_names.for_callers)}"
    message = f"provider.only={_names(options.only)}: this server has no provider of this name{there}."
    raise ApiError(400, f"{message} See /v1/models/{{id}}/endpoints.", param="provider.only")


def _provider_preferences(options: ProviderOptions | None) -> ProviderPreferences:
    """Translate the field `provider` to the router's words."""
    if options is None:
        return ProviderPreferences()
    return ProviderPreferences(
        only=options.only,
        ignore=options.ignore,
        order=options.order,
        allow_fallbacks=options.allow_fallbacks,
        sort=options.sort,
        precision=tuple(PRECISION_CLASSES[name] for name in options.precision),
        data_collection=options.data_collection,
    )


def _names(fields: Sequence[str]) -> str:
    """Join field names that a caller made up, fit for a header."""
    names = [re.sub(r"[^A-Za-z0-9_.-]", "?", name[:40]) for name in fields[:16]]
    return ", ".join(names + ["..."] * (len(fields) > 16))


def _rows(vectors: np.ndarray, parsed: EmbeddingRequest) -> np.ndarray:
    """Normalise and cut vectors as the request wants."""
    rows = postprocess(vectors, normalize=parsed.normalize is not False, dimensions=parsed.dimensions or None)
    return np.ascontiguousarray(rows, dtype="<f4")


def _write_openai(result: EmbeddingResult, parsed: EmbeddingRequest, fields: Fields) -> bytes:
    """Write the answer's JSON row by row: each row is one call into C, and other threads run between two rows."""
    write = _base64_row if parsed.encoding_format == "base64" else float_row
    rows = result.rows
    if parsed.encoding_format in QUANTISED:
        rows = quantise_vectors(rows, parsed.encoding_format)
    data = b",".join(
        [b'{"object":"embedding","index":%d,"embedding":%b}' % (index, write(row)) for index, row in enumerate(rows)]
    )
    # Dollars in full decimals: a float would round them.
    price = b"" if result.cost is None else b',"cost":%b' % format_dollars(result.cost).encode()
    usage = b'{"prompt_tokens":%d,"total_tokens":%d%b}' % (result.num_tokens, result.num_tokens, price)
    return b'{"object":"list","data":[%b],"model":%b,"usage":%b}' % (data, orjson.dumps(result.model), usage)


def float_row(row: np.ndarray) -> bytes:
    """Write a vector as a JSON array."""
    return orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY)


def _base64_row(row: np.ndarray) -> bytes:
    return b'"%b"' % base64.b64encode(row.tobytes())


OPENAI = Dialect(read=lambda request, fields: translate_jina_fields(fields), write=_write_openai)
