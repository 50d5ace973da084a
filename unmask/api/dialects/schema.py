"""Types of the JSON bodies of other servers' forms. The OpenAPI document is built from them, as from `api/schema.py`.

Requests name the fields that are read; the fields of `/v1/embeddings` beyond these (`instruction`, `normalize`,
`provider`) work on every path.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from unmask.api.errors import ErrorEnvelope
from unmask.api.schema import MAX_INPUTS, EmbeddingRequest, EmbeddingResponse


def _doc(description: str) -> Meta:
    return Meta(description=description)


Text = Annotated[str, Meta(min_length=1)]
Texts = Annotated[list[Text], Meta(min_length=1, max_length=MAX_INPUTS)]
Length = Annotated[int, Meta(ge=1, description="Keep the first so many numbers of each vector.")]
Vector = list[float]
VectorForm = Literal["float", "base64", "int8", "uint8", "binary", "ubinary"]


class AzureEmbeddingRequest(EmbeddingRequest, kw_only=True):
    """As `EmbeddingRequest`. The model is that of the path."""

    model: Annotated[str | None, _doc("Not read: the path names the model.")] = None  # pyright: ignore[reportIncompatibleVariableOverride]


class JinaText(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    text: Text


class JinaEmbeddingRequest(msgspec.Struct, kw_only=True):
    """Jina's fields of `/v1/embeddings`, beside those of `EmbeddingRequest`."""

    model: Text
    input: Text | Annotated[list[Text | JinaText], Meta(min_length=1, max_length=MAX_INPUTS)]
    task: Annotated[
        Literal[
            "retrieval.query", "retrieval.passage", "text-matching", "classification", "clustering", "separation", ""
        ]
        | None,
        _doc("Use the model's own instruction for queries or passages; the others use none."),
    ] = None
    embedding_type: Annotated[
        VectorForm | Annotated[list[VectorForm], Meta(min_length=1, max_length=1)] | None, _doc("As `encoding_format`.")
    ] = None
    normalized: Annotated[bool | None, _doc("As `normalize`.")] = None
    late_chunking: Annotated[Literal[False] | None, _doc("Refused if true.")] = None


class CohereEmbedRequest(msgspec.Struct, kw_only=True):
    """Body of `POST /v2/embed`."""

    model: Text
    texts: Texts
    input_type: Annotated[
        Literal["search_query", "search_document", "classification", "clustering"],
        _doc("Use the model's own instruction for queries or documents; the others use none."),
    ]
    embedding_types: (
        Annotated[list[VectorForm], Meta(min_length=1, description="Forms of the vectors. Default `float`.")]
        | UnsetType
    ) = UNSET
    output_dimension: Length | None = None
    truncate: Annotated[
        Literal["END", "NONE"] | None, _doc("`NONE` refuses texts that are too long. Default `END`.")
    ] = None


class CohereEmbedRequestV1(msgspec.Struct, kw_only=True):
    """Body of `POST /v1/embed`."""

    model: Text
    texts: Texts
    input_type: Annotated[
        Literal["search_query", "search_document", "classification", "clustering"] | None,
        _doc("Use the model's own instruction for queries or documents; the others use none."),
    ] = None
    embedding_types: Annotated[
        Annotated[list[VectorForm], Meta(min_length=1)] | None,
        _doc("Forms of the vectors. Without them the answer is an array of vectors."),
    ] = None
    truncate: Annotated[
        Literal["END", "NONE"] | None, _doc("`NONE` refuses texts that are too long. Default `END`.")
    ] = None


class CohereEmbeddings(msgspec.Struct, kw_only=True, rename=lambda name: name.removesuffix("_")):
    """The vectors, in each form that was asked for."""

    float_: list[Vector] | UnsetType = UNSET
    base64: Annotated[list[str], _doc("Little-endian float32.")] | UnsetType = UNSET
    int8: list[list[int]] | UnsetType = UNSET
    uint8: list[list[int]] | UnsetType = UNSET
    binary: list[list[int]] | UnsetType = UNSET
    ubinary: list[list[int]] | UnsetType = UNSET


class CohereVersion(msgspec.Struct, kw_only=True):
    version: Literal["1", "2"]


class CohereUnits(msgspec.Struct, kw_only=True):
    input_tokens: Annotated[int, _doc("Tokens that are charged.")]


class CohereMeta(msgspec.Struct, kw_only=True):
    api_version: CohereVersion
    billed_units: CohereUnits


class CohereEmbedResponse(msgspec.Struct, kw_only=True):
    id: str
    response_type: Literal["embeddings_by_type"]
    embeddings: CohereEmbeddings
    texts: list[str]
    meta: CohereMeta


class CohereEmbedResponseV1(msgspec.Struct, kw_only=True):
    id: str
    response_type: Literal["embeddings_floats", "embeddings_by_type"]
    embeddings: list[Vector] | CohereEmbeddings
    texts: list[str]
    meta: CohereMeta


class CohereError(msgspec.Struct, kw_only=True):
    message: str


class OllamaEmbedRequest(msgspec.Struct, kw_only=True):
    """Body of `POST /api/embed`. `keep_alive` and `options` are ignored."""

    model: Annotated[Text, _doc("The tag is `latest`, or left out.")]
    input: Text | Texts
    truncate: Annotated[bool | None, _doc("False refuses texts that are too long. Default true.")] = None
    dimensions: Length | None = None


class OllamaEmbedResponse(msgspec.Struct, kw_only=True):
    model: str
    embeddings: list[Vector]
    total_duration: Annotated[int, _doc("Nanoseconds.")]
    load_duration: int
    prompt_eval_count: Annotated[int, _doc("Tokens that are charged.")]


class OllamaEmbeddingsRequest(msgspec.Struct, kw_only=True):
    """Body of `POST /api/embeddings`, the older form: one text."""

    model: Text
    prompt: Text


class OllamaEmbeddingsResponse(msgspec.Struct, kw_only=True):
    embedding: Vector


class OllamaShowRequest(msgspec.Struct, kw_only=True):
    model: Text


class OllamaModelDetails(msgspec.Struct, kw_only=True):
    parent_model: str
    format: str
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str


class OllamaModel(msgspec.Struct, kw_only=True):
    name: str
    model: str
    modified_at: str
    size: Annotated[int, _doc("0: the size of a model's files is not known here.")]
    digest: str
    details: OllamaModelDetails


class OllamaTags(msgspec.Struct, kw_only=True):
    models: list[OllamaModel]


class OllamaShowResponse(msgspec.Struct, kw_only=True):
    license: str
    modified_at: str
    details: OllamaModelDetails
    model_info: dict[str, Any]
    capabilities: list[Literal["embedding"]]


class OllamaVersion(msgspec.Struct, kw_only=True):
    version: str


class OllamaError(msgspec.Struct, kw_only=True):
    error: str


class TeiEmbedRequest(msgspec.Struct, kw_only=True):
    """Body of `POST /embed` and `POST /`."""

    inputs: Text | Texts
    normalize: Annotated[bool | None, _doc("Scale vectors to length 1. Default true.")] = None
    truncate: Annotated[bool | None, _doc("Cut texts that are too long, which are refused otherwise.")] = None
    dimensions: Length | None = None
    prompt_name: Literal["query", "document", "passage"] | None = None
    truncation_direction: Literal["Right", "right"] | None = None


class TeiPooling(msgspec.Struct, kw_only=True):
    pooling: str


class TeiModelType(msgspec.Struct, kw_only=True):
    embedding: TeiPooling


class TeiInfo(msgspec.Struct, kw_only=True):
    """The first model of the server, and limits."""

    model_id: str
    model_sha: str | None
    model_dtype: str
    model_type: TeiModelType
    max_concurrent_requests: int
    max_input_length: int | None
    max_batch_tokens: int
    max_client_batch_size: int
    auto_truncate: bool
    version: str


class TeiTokenizeRequest(msgspec.Struct, kw_only=True):
    inputs: Text | Texts
    add_special_tokens: bool = True


class TeiToken(msgspec.Struct, kw_only=True):
    """A token; `start` and `stop` count characters of the text, and are null for a special token."""

    id: int
    text: str | None
    special: bool
    start: int | None
    stop: int | None


class TeiError(msgspec.Struct, kw_only=True):
    error: str
    error_type: Literal["Validation", "Overloaded", "Unhealthy", "Backend"]


class DialectOperation(msgspec.Struct, frozen=True):
    """A route of a dialect, as the OpenAPI document describes it.

    Attributes:
        id, summary: of the operation.
        page: the dialect's part of the page `/docs`.
        request: type of the body; None for a GET.
        response, error: types of the answers.
    """

    id: str
    summary: str
    page: str
    request: Any
    response: Any
    error: Any = ErrorEnvelope


OPERATIONS = {
    "/openai/deployments/{model}/embeddings": DialectOperation(
        "azureEmbeddings", "Vectors, as Azure OpenAI", "azure", AzureEmbeddingRequest, EmbeddingResponse
    ),
    "/openai/v1/embeddings": DialectOperation(
        "azureEmbeddingsV1", "Vectors, as Azure OpenAI's newer API", "azure", EmbeddingRequest, EmbeddingResponse
    ),
    "/embeddings": DialectOperation(
        "createEmbeddingWithoutV1", "Vectors, for base URLs without /v1", "azure", EmbeddingRequest, EmbeddingResponse
    ),
    "/v1/embed": DialectOperation(
        "cohereEmbedV1",
        "Vectors, as Cohere's version 1",
        "cohere",
        CohereEmbedRequestV1,
        CohereEmbedResponseV1,
        CohereError,
    ),
    "/v2/embed": DialectOperation(
        "cohereEmbed", "Vectors, as Cohere", "cohere", CohereEmbedRequest, CohereEmbedResponse, CohereError
    ),
    "/api/embed": DialectOperation(
        "ollamaEmbed", "Vectors, as Ollama", "ollama", OllamaEmbedRequest, OllamaEmbedResponse, OllamaError
    ),
    "/api/embeddings": DialectOperation(
        "ollamaEmbeddings",
        "The vector of one text, as Ollama",
        "ollama",
        OllamaEmbeddingsRequest,
        OllamaEmbeddingsResponse,
        OllamaError,
    ),
    "/api/tags": DialectOperation("ollamaTags", "The models, as Ollama", "ollama", None, OllamaTags, OllamaError),
    "/api/show": DialectOperation(
        "ollamaShow", "One model, as Ollama", "ollama", OllamaShowRequest, OllamaShowResponse, OllamaError
    ),
    "/api/version": DialectOperation(
        "ollamaVersion", "The version, as Ollama", "ollama", None, OllamaVersion, OllamaError
    ),
    "/embed": DialectOperation(
        "teiEmbed", "Vectors, as Text Embeddings Inference", "tei", TeiEmbedRequest, list[Vector], TeiError
    ),
    "/": DialectOperation("teiEmbedRoot", "As POST /embed", "tei", TeiEmbedRequest, list[Vector], TeiError),
    "/info": DialectOperation(
        "teiInfo", "The first model, as Text Embeddings Inference", "tei", None, TeiInfo, TeiError
    ),
    "/tokenize": DialectOperation(
        "teiTokenize",
        "Tokens of texts, as Text Embeddings Inference",
        "tei",
        TeiTokenizeRequest,
        list[list[TeiToken]],
        TeiError,
    ),
}
