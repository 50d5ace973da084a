"""Types of the JSON bodies, and their parsing. The OpenAPI document is built from these types."""

import re
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from unmask.accounts import money
from unmask.api.errors import ApiError
from unmask.catalogue import Specification, Status
from unmask.validation import validation_message

MAX_INPUTS = 2048

TokenEncoding = Literal["cl100k_base", "o200k_base", "native"]

_TOKENS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_INPUT_SCHEMA = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1, "maxItems": MAX_INPUTS},
        # OpenAI's own schema caps this one at 2048 like the others, below its limit of tokens per input.
        _TOKENS,
        {"type": "array", "items": _TOKENS, "minItems": 1, "maxItems": MAX_INPUTS},
    ]
}


def _doc(description: str) -> Meta:
    return Meta(description=description)


ProviderNames = Annotated[tuple[str, ...], Meta(max_length=64)]


class MaxPrice(msgspec.Struct, kw_only=True, frozen=True):
    """Most that a request may cost."""

    prompt: Annotated[float, Meta(ge=0, description="Dollars per million tokens.")]

    def __post_init__(self) -> None:
        # A price is an integer of nano-dollars, and 1e308 dollars are infinitely many.
        if self.prompt > money.MAX_AMOUNT // money.NANO:
            raise ValueError(f"`max_price.prompt` is at most {money.MAX_AMOUNT // money.NANO} dollars")


class ProviderOptions(msgspec.Struct, kw_only=True, frozen=True):
    """Wishes about who answers, in OpenRouter's words. Providers are listed at `/v1/models/{id}/endpoints`."""

    only: Annotated[ProviderNames, _doc("Names that may answer. `local` is this server's own engine.")] = ()
    ignore: Annotated[ProviderNames, _doc("Names that may not answer.")] = ()
    order: Annotated[ProviderNames, _doc("Names to try first, in this order.")] = ()
    allow_fallbacks: Annotated[
        bool,
        _doc("A second provider may answer. Without: the first choice alone, of `order` or by sorting or balancing."),
    ] = True
    sort: Annotated[
        Literal["price", "latency", "throughput"] | None,
        _doc("Take the best by this, in place of balancing: price, usual seconds of an answer, tokens per second."),
    ] = None
    precision: Annotated[
        tuple[Literal["float32", "float16", "bfloat16", "int8"], ...],
        _doc("Precisions that may answer beyond those of the model's vector space. Their vectors are of another one."),
    ] = ()
    data_collection: Annotated[Literal["allow", "deny"], _doc("`deny`: only providers that keep no texts.")] = "allow"
    max_price: Annotated[MaxPrice | None, _doc("Refuse the request if the model's price is higher.")] = None

    @property
    def max_nano_per_million(self) -> int | None:
        """`max_price` in nano-dollars per million tokens; None for no limit."""
        return None if self.max_price is None else round(self.max_price.prompt * money.NANO)


class EmbeddingRequest(msgspec.Struct, kw_only=True):
    """Body of `POST /v1/embeddings`. Optional fields may be left out, null or "", which all mean the same."""

    input: Annotated[
        msgspec.Raw,
        Meta(
            description="One text, many texts, or their token ids. Empty texts are refused.",
            extra_json_schema=_INPUT_SCHEMA,
        ),
    ]
    model: Annotated[str, Meta(description="Id or alias of a model, see `/v1/models`.", min_length=1)]
    encoding_format: Annotated[
        Literal["float", "base64", "int8", "uint8", "binary", "ubinary", ""] | None,
        _doc("`base64` is little-endian float32; the others are quantised numbers. Default `float`."),
    ] = None
    dimensions: Annotated[
        Annotated[int, Meta(ge=1)] | Literal[""] | None,
        _doc("Keep the first so many numbers of each vector."),
    ] = None
    user: Annotated[str | None, _doc("Accepted for OpenAI's clients; not used.")] = None
    instruction: Annotated[
        str | None, _doc("What to look for. The model reads it, and it is not averaged into the vector.")
    ] = None
    input_type: Annotated[
        Literal["query", "document", ""] | None,
        _doc("Use the model's own instruction for queries or documents. `instruction` wins over it."),
    ] = None
    truncate: Annotated[
        bool | Literal["end", ""] | None,
        _doc("Cut the end off inputs that are too long, which are refused otherwise."),
    ] = None
    normalize: Annotated[bool | Literal[""] | None, _doc("Scale vectors to length 1. Default true.")] = None
    token_encoding: Annotated[
        Literal["cl100k_base", "o200k_base", "native", ""] | None,
        _doc("What the ids of a token input are. `native`: the model's own. Default `cl100k_base`."),
    ] = None
    provider: Annotated[ProviderOptions | None, _doc("Who may answer, on a server with providers.")] = None


class Embedding(msgspec.Struct, kw_only=True):
    object: Literal["embedding"]
    index: int
    embedding: Annotated[list[float] | str, _doc("Numbers, or base64 of little-endian float32.")]


class Usage(msgspec.Struct, kw_only=True):
    """Tokens that the model processed: instruction and template included, what was cut off not."""

    prompt_tokens: int
    total_tokens: int
    cost: Annotated[float | msgspec.UnsetType, _doc("Dollars, to the last of nine decimals. Only with accounts.")] = (
        msgspec.UNSET
    )


class EmbeddingResponse(msgspec.Struct, kw_only=True):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: Usage


Precision = Literal["auto", "float32", "bfloat16", "float16", "int8"]
ModelStatus = Literal["cold", "loading", "ready", "failed", "remote"]


class ModelPrice(msgspec.Struct, kw_only=True, frozen=True):
    """Price of a million tokens, in whole billionths of a dollar."""

    tier: Annotated[str, _doc("standard; another one only where it costs something else, for X-Tier.")]
    nanodollars_per_million_tokens: Annotated[int, Meta(ge=0)]
    estimated: Annotated[bool, _doc("Proposed, and not yet charged to anybody.")]


class Model(Specification, kw_only=True, frozen=True):
    """A model, in the shape of OpenAI's model object: its catalogue record, and its state on this server."""

    object: Literal["model"] = "model"
    status: Annotated[
        ModelStatus, _doc("A cold model loads with its first request; providers alone answer for a remote one.")
    ]
    precision: Annotated[
        Precision,
        _doc("Of the weights on this server; vectors are float32 in any case. auto: chosen when the model loads."),
    ]
    precision_reason: Annotated[
        str, _doc("The measurement by which this server chose the precision. Empty: it was not asked to choose.")
    ] = ""
    prices: Annotated[
        tuple[ModelPrice, ...], _doc("What a million tokens cost here. Empty: no price is set, or nobody is charged.")
    ] = ()
    lifecycle: Annotated[Status | None, _doc("Where its catalogue record stands; null for none.")] = None
    shutdown_date: Annotated[str | None, _doc("Last day on which a deprecated model answers.")] = None
    vector_space: Annotated[
        str | None,
        _doc("Vectors of one space may be mixed in an index, and no others. Null while it is not known."),
    ] = None


class PercentileInfo(msgspec.Struct, kw_only=True):
    p50: float
    p75: float
    p90: float
    p99: float


class ConformanceInfo(msgspec.Struct, kw_only=True):
    """The last full run of the canaries: 1 - cosine to the right vectors."""

    worst: float
    mean: float
    noise: Annotated[float, _doc("Between two answers to the same request.")]
    set: Annotated[str, _doc("Version of the canary texts.")]
    checked: Annotated[int, _doc("Unix seconds of the last right canary of either kind of run; 0 for never.")]
    finding: Annotated[str, _doc("What is wrong, in a sentence; empty if nothing is.")]


class EndpointInfo(msgspec.Struct, kw_only=True):
    """A provider of a model. `local` is this server's own engine."""

    name: str
    kind: Annotated[
        Literal["local", "unmask", "openai", "tei", "remote"], _doc("remote: this server does not say which kind.")
    ]
    status: Literal[
        "unchecked", "admitted", "probation", "quarantined", "open", "held", "spent", "cold", "loading", "failed"
    ]
    precision: Annotated[str | None, _doc("exact, float16, bfloat16 or int8, as measured; null before the first run.")]
    vector_space: Annotated[
        str | None, _doc("Of its vectors. Where it is not the model's, only requests that name its precision go there.")
    ] = None
    max_inputs: Annotated[
        int | None, _doc("Most texts of one request there. More are sent in several; null for this server's engine.")
    ] = None
    max_tokens: Annotated[int | None, _doc("Longest text that is sent there.")] = None
    priority: int = 0
    data: Annotated[Literal["none", "30d", "trains"], _doc("What it keeps of texts.")] = "none"
    country: str | None = None
    latency_last_30m: Annotated[PercentileInfo | None, _doc("Seconds of a request, as this process saw it.")] = None
    throughput_last_30m: Annotated[PercentileInfo | None, _doc("Tokens per second of a request.")] = None
    uptime_last_5m: Annotated[float | None, _doc("Null for fewer than 100 requests.")] = None
    uptime_last_30m: float | None = None
    uptime_last_1d: float | None = None
    conformance: ConformanceInfo | None = None


class EndpointList(msgspec.Struct, kw_only=True):
    object: Literal["list"] = "list"
    model: str
    vector_space: str | None
    prices: Annotated[
        tuple[ModelPrice, ...], _doc("What a million tokens cost here, whoever answers. Empty: nobody is charged.")
    ] = ()
    data: list[EndpointInfo]


class ModelList(msgspec.Struct, kw_only=True):
    object: Literal["list"] = "list"
    data: list[Model]


class Health(msgspec.Struct, kw_only=True):
    status: Literal["ok"] = "ok"


class Readiness(msgspec.Struct, kw_only=True):
    """Readiness of the server, with the verdict of each warm or loaded model."""

    status: Literal["ready", "not ready", "stopping"]
    models: dict[str, str]


Dollars = Annotated[str, Meta(description="US dollars as an exact decimal.", pattern=r"^-?[0-9]+\.[0-9]{2,9}$")]


class Minute(msgspec.Struct, kw_only=True):
    """Limits per minute. Null: no limit."""

    requests: int | None
    tokens: int | None


class KeyInfo(msgspec.Struct, kw_only=True):
    """An API key without its secret, which is shown once and never again."""

    object: Literal["api_key"] = "api_key"
    id: str
    name: str
    status: Literal["active", "expired", "revoked"]
    scopes: list[str]
    models: Annotated[list[str] | None, _doc("Null: all.")]
    networks: Annotated[list[str] | None, _doc("Null: any.")]
    per_minute: Minute
    spend_limit: Dollars | None
    spend_window: Annotated[Literal["day", "week", "month"] | None, _doc("In UTC. Null: the limit never resets.")]
    spent: Annotated[Dollars, _doc("In this window, requests in flight included.")]
    created: Annotated[int, _doc("Unix seconds.")]
    expires: int | None
    last_used: int | None


class KeyList(msgspec.Struct, kw_only=True):
    object: Literal["list"] = "list"
    data: list[KeyInfo]


class AccountInfo(msgspec.Struct, kw_only=True):
    """The account of the key that asks, and that key."""

    object: Literal["account"] = "account"
    id: str
    name: str
    status: Literal["active", "frozen", "closed"]
    plan: str
    per_minute: Minute
    currency: Literal["USD"] = "USD"
    balance: Dollars
    held: Annotated[Dollars, _doc("Set aside for requests in flight.")]
    available: Dollars
    key: KeyInfo


class UsageRow(msgspec.Struct, kw_only=True):
    """Requests that were charged. What was not grouped by is null."""

    day: Annotated[str | None, _doc("In UTC, as 2026-01-31.")]
    model: str | None
    key: Annotated[str | None, _doc("Id of the API key.")]
    tier: str | None
    requests: int
    tokens: int
    cost: Dollars
    provider: Annotated[str | None, _doc("Who computed the vectors; `local` is this server.")] = None


class TaintedUsage(msgspec.Struct, kw_only=True):
    """Requests whose vectors may be wrong: a provider gave them between its last right canary and its quarantine."""

    provider: str
    model: str
    key: str | None
    requests: int
    tokens: int
    first: Annotated[str, _doc("Time of the first one, RFC 3339 in UTC.")]
    last: Annotated[str, _doc("Time of the last one.")]


class UsageReport(msgspec.Struct, kw_only=True):
    object: Literal["list"] = "list"
    start: str
    end: str
    data: list[UsageRow]
    tainted: Annotated[list[TaintedUsage], _doc("Of quarantines since `start`. Embed these texts again.")]


class Index(msgspec.Struct, kw_only=True):
    """The paths of the API, by purpose."""

    name: str
    version: str
    embeddings: str
    models: str
    health: str
    ready: str
    metrics: str
    openapi: str


Fields = dict[str, msgspec.Raw]

_OPTIONAL = {field.name: field.type for field in msgspec.structs.fields(EmbeddingRequest) if not field.required}
_DECODERS = {name: msgspec.json.Decoder(type_) for name, type_ in _OPTIONAL.items()}
_FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])
_TEXT = msgspec.json.Decoder(str)
_TEXTS = msgspec.json.Decoder(list[str])
_IDS = msgspec.json.Decoder(list[int])
_SEQUENCES = msgspec.json.Decoder(list[list[int]])


def read_fields(body: bytes) -> Fields:
    """Parse a body to its fields, whose values stay JSON.

    Raises:
        ApiError: 400.
    """
    return decode_field(_FIELDS, body, None)


def read_request(body: bytes) -> tuple[EmbeddingRequest, list[str]]:
    """Parse the body of an embeddings request. Return it with the names of its unknown fields.

    Raises:
        ApiError: 400.
    """
    return request_of(read_fields(body))


def request_of(fields: Fields) -> tuple[EmbeddingRequest, list[str]]:
    """Parse the fields of an embeddings request. Return it with the names of its unknown fields.

    Parses field by field, so that an error names its field and unknown fields are known.

    Raises:
        ApiError: 400.
    """
    missing = next((name for name in ("input", "model") if name not in fields), None)
    if missing is not None:
        raise ApiError(400, f"The field '{missing}' is required.", param=missing)
    if "models" in fields:
        message = "A list of 'models' to fall back on is refused: vectors of another model cannot be mixed with these."
        raise ApiError(400, message, param="models")
    model = decode_field(_TEXT, fields["model"], "model")
    if not model:
        raise ApiError(400, "The field 'model' is empty: name a model, see /v1/models.", param="model")
    options = {name: _option(name, fields[name]) for name in _OPTIONAL if name in fields}
    ignored = [name for name in fields if name not in _OPTIONAL and name not in ("input", "model")]
    if options.get("provider") is not None:
        preferences = decode_field(_FIELDS, fields["provider"], "provider")
        ignored += [f"provider.{name}" for name in preferences if name not in ProviderOptions.__struct_fields__]
    return EmbeddingRequest(input=fields["input"], model=model, **options), ignored


def _option(name: str, raw: msgspec.Raw) -> Any:
    content = bytes(raw)
    if name == "truncate" and content[:8].lower() in (b'"start"', b'"left"'):
        message = 'truncate="start" is not supported, only the end can be cut: use true or "end".'
        raise ApiError(400, message, param=name)
    value = decode_field(_DECODERS[name], content, name)
    return None if value == "" else value


def read_input(raw: msgspec.Raw) -> list[str] | list[list[int]]:
    """Parse the field `input`, in any of OpenAI's four forms, to texts or token sequences.

    Raises:
        ApiError: 400 for another form, for no input and for too many.
    """
    content = bytes(raw)
    first = content[:1]
    inputs: list[str] | list[list[int]]
    if first == b'"':
        inputs = [decode_field(_TEXT, content, "input")]
    elif first != b"[":
        raise ApiError(400, "The field 'input' must be a string, an array of strings, or token ids.", param="input")
    else:
        inside = content[1:64].lstrip()[:1] or content[1:].lstrip()[:1]
        # Counted before parsing: a million one-letter strings take twenty times the memory of their JSON.
        if inside == b"[":
            _check_count(content.count(b"[") - 1)
            inputs = decode_field(_SEQUENCES, content, "input")
        elif inside == b'"':
            # A lower bound: a quote after a backslash may or may not end a text.
            _check_count((content.count(b'"') - content.count(b'\\"')) // 2)
            inputs = decode_field(_TEXTS, content, "input")
        else:
            inputs = [decode_field(_IDS, content, "input")]
    _check_count(len(inputs))
    if inputs == [[]]:
        raise ApiError(400, "The field 'input' is an empty array: send at least one text.", param="input")
    empty = next((index for index, item in enumerate(inputs) if not item), None)
    if empty is not None:
        raise ApiError(400, f"input {empty} is empty: it has no token to make a vector from.", param="input")
    return inputs


def holds_texts(raw: msgspec.Raw) -> bool:
    """True for a text or an array of texts: ids would be OpenAI's here, and the model's own on another server."""
    content = bytes(raw)
    first = content[:1] if content[:1] != b"[" else content[1:].lstrip()[:1]
    return first in (b'"', b"]")


def _check_count(count: int) -> None:
    if count > MAX_INPUTS:
        raise ApiError(400, f"The field 'input' has more than {MAX_INPUTS} inputs, which is the most.", param="input")


def decode_field(decoder: msgspec.json.Decoder[Any], content: bytes | msgspec.Raw, field: str | None) -> Any:
    """Parse a part of a body. Every part is parsed here: a field stays unchecked JSON until then, UTF-8 or not.

    Args:
        decoder: for the expected type.
        content: the JSON.
        field: its name; None for the body as a whole.

    Raises:
        ApiError: 400, it is of another type, not JSON, not UTF-8, or nested too deeply.
    """
    try:
        return decoder.decode(content)
    except (RecursionError, UnicodeDecodeError, msgspec.DecodeError) as error:
        reason = _reason(error, decoder.type)
    if field is None:
        raise ApiError(400, f"The body is not a JSON object: {reason}.")
    raise ApiError(400, f"The field '{field}' is wrong: {reason}.", param=field)


def _reason(error: RecursionError | UnicodeDecodeError | msgspec.DecodeError, type_: Any) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8"
    # Of the caller's text, msgspec quotes only an unknown choice; more than its beginning is of no use.
    return re.sub(r"^(.{300}).*", r"\1…", validation_message(error, type_), flags=re.DOTALL).rstrip(".")
