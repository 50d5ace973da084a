"""Text Embeddings Inference's API: https://huggingface.github.io/text-embeddings-inference/

Requests name no model: the first model of the server answers.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import msgspec
import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from tokenizers import Encoding

from unmask import __version__
from unmask.api.body import read_body
from unmask.api.disconnect import cancel_on_disconnect
from unmask.api.embeddings import Dialect, EmbeddingResult, EmbeddingsRoute, float_row
from unmask.api.errors import ApiError
from unmask.api.large_bodies import parse_body
from unmask.api.schema import MAX_INPUTS, EmbeddingRequest, Fields, holds_texts, read_fields, read_input
from unmask.checkpoint.tokenizer import TextTokenizer
from unmask.router.route import find_tokenizer

PATHS = ("/embed", "/info", "/tokenize")  # and POST /

# Characters that are tokenised at a time to find texts of far too many tokens, each of which takes 500 bytes. A
# character is up to eighteen tokens.
_PIECE_CHARACTERS = 16_384
# Tokens by which a cut can raise the count: the word that it divides, and a blank that some tokenizers put in front.
_CUT_TOKENS = 64
# Tokens that are written at a time: one call into C, after which other threads run.
_WRITTEN_TOKENS = 1_000

# Two, so that lists of tokens take neither all processors nor memory without a limit.
_THREADS = ThreadPoolExecutor(2, thread_name_prefix="token-list")

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

        def write() -> bytes:
            return write_token_lists(tokenizer, texts, special, embeddings)

        async def wait() -> bytes:
            return await asyncio.get_running_loop().run_in_executor(_THREADS, write)

        return Response(await cancel_on_disconnect(wait(), request), media_type="application/json")

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


def write_token_lists(
    tokenizer: TextTokenizer, texts: Sequence[str], special: bool, embeddings: EmbeddingsRoute
) -> bytes:
    """Write the tokens of each text as JSON, as TEI describes them.

    Args:
        tokenizer, texts: of the model, and of the request.
        special: with the tokens that the model reads around each text.
        embeddings: refuses too many tokens.

    Raises:
        ApiError: 400, the texts have more tokens than a request may have.
    """
    around = (tokenizer.prefix, tokenizer.suffix) if special else ((), ())
    _check_pieces(tokenizer, texts, embeddings)
    encodings = tokenizer.plain.encode_batch(list(texts), add_special_tokens=False)
    # The length of an encoding makes no list of its tokens.
    embeddings.check_tokens(sum(map(len, encodings)) + len(texts) * sum(map(len, around)))
    lists: list[bytes] = []
    for text, encoding in zip(texts, encodings, strict=True):
        tokens = _tokens(tokenizer, text, encoding, around)
        pieces = iter(lambda tokens=tokens: list(islice(tokens, _WRITTEN_TOKENS)), [])
        lists.append(b"[%b]" % b",".join([orjson.dumps(piece)[1:-1] for piece in pieces]))
    return b"[%b]" % b",".join(lists)


def _check_pieces(tokenizer: TextTokenizer, texts: Sequence[str], embeddings: EmbeddingsRoute) -> None:
    """Refuse texts that have far too many tokens, before all of them are in memory.

    No bound on characters does that alone: a token can have a hundred of them, or be a quarter of one.
    """
    if sum(map(len, texts)) <= _PIECE_CHARACTERS:
        return
    count = 0
    for text in texts:
        for start in range(0, len(text), _PIECE_CHARACTERS):
            piece = text[start : start + _PIECE_CHARACTERS]
            count += len(tokenizer.plain.encode_batch_fast([piece], add_special_tokens=False)[0])
            count -= _CUT_TOKENS if start else 0
            embeddings.check_tokens(count, more=True)


def _tokens(
    tokenizer: TextTokenizer, text: str, encoding: Encoding, around: tuple[Sequence[int], Sequence[int]]
) -> Iterator[dict[str, object]]:
    """Yield the tokens of a text; `start` and `stop` count characters."""

    def added(ids: Sequence[int]) -> Iterator[dict[str, object]]:
        for id in ids:
            yield {"id": id, "text": tokenizer.text.id_to_token(id), "special": True, "start": None, "stop": None}

    yield from added(around[0])
    for id, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
        yield {"id": id, "text": text[start:stop], "special": False, "start": start, "stop": stop}
    yield from added(around[1])


def _write(result: EmbeddingResult, parsed: EmbeddingRequest, fields: Fields) -> bytes:
    return b"[%b]" % b",".join([float_row(row) for row in result.rows])
