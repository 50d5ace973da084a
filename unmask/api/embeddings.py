"""`POST /v1/embeddings`: from the body's bytes to the answer's bytes."""

import asyncio
import base64
import re
import time
from collections.abc import Sequence
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
from unmask.api.charging import Charging, tier
from unmask.api.errors import ApiError
from unmask.api.metrics import Metrics
from unmask.api.middleware import read_body, unless_gone
from unmask.api.schema import EmbeddingRequest, TokenEncoding, read_input, read_request
from unmask.api.settings import ServeSettings
from unmask.catalogue import Record
from unmask.encoder.encoder import finish
from unmask.router import Models, ServedModel

LONGEST_WAIT_S = 60  # for a cold model, by `Prefer: wait`
LONGEST_DEADLINE_S = 3600

# All batch work together has the share of one caller: it never holds up those who pay for being quick.
_BATCH_SHARE = "tier batch"

# Numbers below which an answer is written in about a millisecond, so that a thread is not worth its start.
_SMALL_ANSWER = 65_536


@dataclass(frozen=True, eq=False)
class Embeddings:
    """The route. Its state is only what it was made with."""

    models: Models
    settings: ServeSettings
    metrics: Metrics
    charging: Charging

    async def answer(self, request: Request) -> Response:
        """Vectors for a request; the work stops when the caller leaves.

        Raises:
            ApiError, InputError, EngineError, CheckpointError, AccountError, StorageError: each becomes an answer in
                `unmask.api.errors`.
        """
        arrived = time.monotonic()
        _require_json(request.headers)
        timeout = _timeout(request.headers, self.settings.request_timeout_s)
        body = await read_body(request, self.settings.body_limit_bytes, self.settings.receive_timeout_s)
        return await unless_gone(self._embed(request, body, arrived, arrived + timeout), request)

    async def _embed(self, request: Request, body: bytes, arrived: float, deadline: float) -> Response:
        asked, ignored = read_request(body)
        inputs = read_input(asked.input)
        served = find_model(self.models, asked.model)
        model = served.record.id
        request.state.headers |= deprecation(served.record)
        await self.charging.enter(request, model)
        instruction = _instruction(asked, served.record)
        wait = min(_preferred_wait(request.headers), deadline - time.monotonic())
        engine = await served.engine(max(wait, 0.0))
        if asked.dimensions and asked.dimensions > engine.encoder.dim:
            message = f"dimensions={asked.dimensions}: this model's vectors have {engine.encoder.dim} numbers."
            raise ApiError(400, message, param="dimensions")
        texts, encoding = await self._texts(inputs, asked)
        prompts = await engine.prepare(texts, instruction=instruction, truncate=bool(asked.truncate))
        used = sum(len(prompt.ids) for prompt in prompts)
        self._limit_tokens(used)
        share = request.state.admitted.share if tier(request.headers) == "default" else _BATCH_SHARE
        async with self.charging.charge(request, model, used, body, deadline) as charge:
            vectors = await engine.run(prompts, deadline=deadline, caller=share)
            if vectors.size > _SMALL_ANSWER:
                content = await asyncio.to_thread(_write, vectors, asked, model, used, charge.cost)
            else:
                content = _write(vectors, asked, model, used, charge.cost)
            await charge.settle()
        request.state.tokens = used
        self.metrics.embedded(model, used, time.monotonic() - arrived)
        headers = {}
        if encoding:
            headers["x-unmask-token-encoding"] = encoding
        if truncated := sum(prompt.truncated for prompt in prompts):
            headers["x-unmask-truncated-inputs"] = str(truncated)
        if ignored:
            headers["x-unmask-ignored-fields"] = _names(ignored)
        return Response(content, headers=headers, media_type="application/json")

    async def _texts(
        self, inputs: list[str] | list[list[int]], asked: EmbeddingRequest
    ) -> tuple[Sequence[str] | Sequence[Sequence[int]], TokenEncoding | None]:
        """What to encode, and for token arrays how they were read."""
        if isinstance(inputs[0], str):
            texts: list[str] = inputs  # pyright: ignore[reportAssignmentType] - all items are of the first one's type
            encoding = None
        else:
            sequences: list[list[int]] = inputs  # pyright: ignore[reportAssignmentType]
            encoding = asked.token_encoding or "cl100k_base"
            self._limit_tokens(sum(map(len, sequences)))
            if encoding == "native":
                return sequences, encoding
            texts = await asyncio.to_thread(tokens.decode, sequences, encoding)
        characters = sum(map(len, texts))
        if characters > self.settings.max_request_characters:
            raise ApiError(
                400,
                f"Requested {characters} characters, max {self.settings.max_request_characters} per request.",
                type="max_characters_per_request",
                code="max_characters_per_request",
            )
        return texts, encoding

    def _limit_tokens(self, count: int) -> None:
        if count > self.settings.max_request_tokens:
            raise ApiError(
                400,
                f"Requested {count} tokens, max {self.settings.max_request_tokens} tokens per request",
                type="max_tokens_per_request",
                code="max_tokens_per_request",
            )


def find_model(models: Models, name: str) -> ServedModel:
    """The model with this id or alias.

    Raises:
        ApiError: 404, in OpenAI's words; 410 if it did answer once.
    """
    served = models.find(name)
    if served is None:
        entry = models.catalogue.get(name)
        if entry is not None and entry.record.status == "retired":
            day = entry.record.history[-1].on
            message = f"The model '{entry.record.id}' was retired on {day} and answers no more. See /v1/models."
            raise ApiError(410, message, param="model", code="model_retired")
        shown = name if len(name) <= 200 else name[:200] + "…"
        message = f"The model '{shown}' does not exist or you do not have access to it. See /v1/models."
        raise ApiError(404, message, code="model_not_found")
    return served


def deprecation(record: Record) -> dict[str, str]:
    """Headers that tell of a model's end: since when it is deprecated (RFC 9745), when it stops answering (RFC 8594).

    Days are UTC's, and it still answers on the last one.
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
    """Seconds until the caller stops waiting: as it says, or as openai-python's read timeout tells."""
    given = headers.get("request-deadline-ms")
    if given is not None:
        # Nine digits are eleven days; more would only be there to be slow to parse.
        if not re.fullmatch(r"0*[1-9][0-9]{0,8}", given, re.ASCII):
            message = "The header Request-Deadline-Ms must be a whole number of milliseconds greater than 0."
            raise ApiError(400, message, param="Request-Deadline-Ms")
        return min(int(given) / 1000, LONGEST_DEADLINE_S)
    stainless = headers.get("x-stainless-read-timeout", "")
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", stainless, re.ASCII) and float(stainless) > 0:
        return min(float(stainless), LONGEST_DEADLINE_S)
    return default


def _preferred_wait(headers: Headers) -> float:
    """Seconds of `Prefer: wait=N` (RFC 7240)."""
    found = re.search(r"(?i)(?:^|[,;\s])wait\s*=\s*\"?([0-9]{1,9})", headers.get("prefer", ""))
    return min(float(found[1]), LONGEST_WAIT_S) if found else 0.0


def _instruction(asked: EmbeddingRequest, record: Record) -> str:
    if asked.instruction:
        return asked.instruction
    return {"query": record.query_instruction, "document": record.document_instruction}.get(asked.input_type or "", "")


def _names(fields: Sequence[str]) -> str:
    """Field names that a caller made up, fit for a header."""
    shown = [re.sub(r"[^A-Za-z0-9_.-]", "?", name[:40]) for name in fields[:16]]
    return ", ".join(shown + ["..."] * (len(fields) > 16))


def _write(vectors: np.ndarray, asked: EmbeddingRequest, model: str, used: int, cost: int | None) -> bytes:
    """The answer's JSON, row by row: each is one call into C, and between two others get their turn."""
    normalize = asked.normalize is not False
    rows = np.ascontiguousarray(finish(vectors, normalize=normalize, dimensions=asked.dimensions or None), dtype="<f4")
    write = _base64_row if asked.encoding_format == "base64" else _float_row
    data = b",".join(
        [b'{"object":"embedding","index":%d,"embedding":%b}' % (index, write(row)) for index, row in enumerate(rows)]
    )
    # Dollars in full decimals: a float would round them.
    price = b"" if cost is None else b',"cost":%b' % format_dollars(cost).encode()
    usage = b'{"prompt_tokens":%d,"total_tokens":%d%b}' % (used, used, price)
    return b'{"object":"list","data":[%b],"model":%b,"usage":%b}' % (data, orjson.dumps(model), usage)


def _float_row(row: np.ndarray) -> bytes:
    return orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY)


def _base64_row(row: np.ndarray) -> bytes:
    return b'"%b"' % base64.b64encode(row.tobytes())
