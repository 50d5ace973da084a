"""Clients of other servers against ours: the vectors of `/v1/embeddings` to the bit, its keys, limits and charges."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cohere
import httpx
import msgspec
import numpy as np
import ollama
import openai
import pytest
from huggingface_hub import InferenceClient
from langchain_ollama import OllamaEmbeddings
from langchain_openai import AzureOpenAIEmbeddings
from pydantic import SecretStr

from tests.api.live import KEY, LocalService, as_vector, running
from unmask.accounts import Accounts, keys, ledger, people, tariff
from unmask.accounts.keys import KeySettings
from unmask.api import ServeSettings
from unmask.api.charging import Charging
from unmask.api.dialects.tei import write_token_lists
from unmask.api.embeddings import EmbeddingsRoute
from unmask.api.errors import ApiError
from unmask.api.metrics import Metrics
from unmask.api.quantisation import quantise_vectors
from unmask.encoder import Encoder
from unmask.router import ModelRegistry
from unmask.storage.database import now_ms
from unmask.web import website

TEXTS = ["the first text", "another, with more words in it", "日本語の短い文です。"]

# Path, body without the model, and where the vectors are in the answer.
EMBEDDING_PATHS: list[tuple[str, dict[str, Any], Any]] = [
    ("/embeddings", {"input": TEXTS}, lambda reply: [item["embedding"] for item in reply["data"]]),
    ("/embeddings/", {"input": TEXTS}, lambda reply: [item["embedding"] for item in reply["data"]]),
    ("/v1/embeddings/", {"input": TEXTS}, lambda reply: [item["embedding"] for item in reply["data"]]),
    ("/openai/v1/embeddings", {"input": TEXTS}, lambda reply: [item["embedding"] for item in reply["data"]]),
    (
        "/openai/deployments/tiny_llama/embeddings?api-version=2024-02-01",
        {"input": TEXTS},
        lambda reply: [item["embedding"] for item in reply["data"]],
    ),
    ("/api/embed", {"input": TEXTS}, lambda reply: reply["embeddings"]),
    ("/api/embeddings", {"prompt": TEXTS[0]}, lambda reply: [reply["embedding"]]),
    ("/embed", {"inputs": TEXTS}, lambda reply: reply),
    ("/", {"inputs": TEXTS}, lambda reply: reply),
    ("/v1/embed", {"texts": TEXTS}, lambda reply: reply["embeddings"]),
    (
        "/v2/embed",
        {"texts": TEXTS, "input_type": "clustering"},
        lambda reply: reply["embeddings"]["float"],
    ),
]
TEI, COHERE = ("/", "/embed"), ("/v1/embed", "/v2/embed")
PATHS = pytest.mark.parametrize(("path", "body", "vectors"), EMBEDDING_PATHS, ids=[row[0] for row in EMBEDDING_PATHS])


def expected_vectors(service: LocalService, texts: list[str] = TEXTS, **fields: Any) -> np.ndarray:
    return service.embed(texts, **fields).vectors


@PATHS
@pytest.mark.parametrize("fields", [{}, {"dimensions": 16}], ids=["whole", "cut"])
def test_vectors_are_equal_to_the_bit(
    service: LocalService, path: str, body: dict[str, Any], vectors: Any, fields: dict[str, Any]
):
    names = {"dimensions": "output_dimension"} if path in COHERE else {}
    sent = {"model": service.model, **body} | {names.get(name, name): value for name, value in fields.items()}
    reply = service.call("POST", path, sent)
    assert reply.status == 200, reply.body
    answer = np.array(vectors(reply.json), dtype=np.float32)
    np.testing.assert_array_equal(answer, expected_vectors(service, **fields)[: len(answer)])


@PATHS
@pytest.mark.parametrize(
    ("change", "headers", "status"),
    [
        ({}, {"authorization": "Bearer wrong"}, 401),
        ({}, {"content-type": "text/plain"}, 415),
        ({"dimensions": 0}, {}, 400),
        ({"input": None, "inputs": None, "prompt": None, "texts": None}, {}, 400),
        ({"input": "", "inputs": "", "prompt": "", "texts": [""]}, {}, 400),
        ({"input": {}, "inputs": {}, "prompt": {}, "texts": {}}, {}, 400),
        ({"model": "no/such"}, {}, 404),
    ],
)
def test_errors_have_the_form_of_the_dialect(
    service: LocalService,
    path: str,
    body: dict[str, Any],
    vectors: Any,
    change: dict[str, Any],
    headers: dict[str, str],
    status: int,
):
    sent = {"model": service.model, **body} | {k: v for k, v in change.items() if k in ("model", "dimensions", *body)}
    reply = service.call("POST", path, sent, headers)
    if "model" in change and (path in TEI or "deployments" in path):
        assert reply.status == 200  # the body's model is not read
        return
    assert reply.status == status, reply.body
    assert reply.headers["x-request-id"]
    if path.startswith("/api/"):
        assert set(reply.json) == {"error"}
    elif path in TEI:
        assert set(reply.json) == {"error", "error_type"}
    elif path in COHERE:
        assert set(reply.json) == {"message"}
    else:
        assert set(reply.error) == {"message", "type", "param", "code"}


# Fields that each path reads. Until then they are bytes as the caller sent them.
READ_FIELDS = {
    "/v1/embeddings": ("model", "input", "task", "late_chunking", "embedding_type", "normalized", "input_type"),
    "/openai/deployments/tiny_llama/embeddings": ("input", "task", "encoding_format"),
    "/api/embed": ("model", "name", "input", "truncate"),
    "/api/embeddings": ("model", "prompt"),
    "/api/show": ("model", "name"),
    "/embed": ("inputs", "truncation_direction", "prompt_name", "truncate"),
    "/": ("inputs", "prompt_name"),
    "/tokenize": ("inputs", "add_special_tokens", "prompt_name"),
    "/v1/embed": ("model", "texts", "embedding_types", "input_type", "truncate"),
    "/v2/embed": ("model", "texts", "embedding_types", "input_type", "images", "output_dimension"),
}
TEXT_FIELDS = {"input": TEXTS, "inputs": TEXTS, "prompt": TEXTS[0], "texts": TEXTS}


@pytest.mark.parametrize(
    "content",
    [
        b'"\xff"',
        b'["\xff"]',
        b'[{"text":"\xff"}]',
        b'{"\xff":1}',
        b"[" * 5_000 + b"]" * 5_000,
        b'[{"text":' * 5_000 + b"1" + b"}]" * 5_000,
    ],
    ids=["text", "texts", "objects", "name", "arrays", "deep objects"],
)
@pytest.mark.parametrize("path", READ_FIELDS)
def test_bytes_that_are_no_text_are_a_mistake_of_the_caller(service: LocalService, path: str, content: bytes):
    texts = next((name for name in READ_FIELDS[path] if name in TEXT_FIELDS), "model")
    for name in READ_FIELDS[path]:
        others = {"model": service.model, texts: TEXT_FIELDS.get(texts, service.model)}
        if path == "/v2/embed":
            others["input_type"] = "clustering"
        if name == "name":
            del others["model"]
        fields = {key: msgspec.Raw(msgspec.json.encode(value)) for key, value in others.items()}
        sent = msgspec.json.encode(fields | {name: msgspec.Raw(content)})
        reply = service.call("POST", path, sent)
        assert reply.status == 400, (name, reply.body[:200])
        assert reply.headers.get("x-should-retry") != "true"


@PATHS
def test_other_methods_are_refused_and_nothing_redirects(
    service: LocalService, path: str, body: dict[str, Any], vectors: Any
):
    assert service.call("GET", path).status == (200 if path == "/" else 405)
    refusal = service.call("PUT", path)
    assert (refusal.status, "POST" in refusal.headers["allow"]) == (405, True)
    assert ("GET" in refusal.headers["allow"]) == (path == "/")


def test_azure(service: LocalService):
    with openai.AzureOpenAI(azure_endpoint=service.url, api_key=KEY, api_version="2024-02-01") as client:
        response = client.embeddings.create(model=service.model, input=TEXTS, encoding_format="float")
        answer = np.array([item.embedding for item in response.data], dtype=np.float32)
        np.testing.assert_array_equal(answer, expected_vectors(service))
        with pytest.raises(openai.NotFoundError) as caught:
            client.embeddings.create(model="no/such", input="a")
        assert caught.value.code == "model_not_found"
    with (
        openai.AzureOpenAI(azure_endpoint=service.url, api_key="wrong", api_version="1") as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.embeddings.create(model=service.model, input="a")


def test_langchain_for_azure(service: LocalService):
    with openai.DefaultHttpxClient() as http:
        embeddings = AzureOpenAIEmbeddings(
            azure_endpoint=service.url,
            api_key=SecretStr(KEY),
            api_version="2024-10-21",
            azure_deployment=service.model,
            model=service.model,
            http_client=http,
            check_embedding_ctx_length=False,
        )
        answer = np.array(embeddings.embed_documents(TEXTS), dtype=np.float32)
        np.testing.assert_array_equal(answer, expected_vectors(service))
        np.testing.assert_array_equal(np.array(embeddings.embed_query(TEXTS[0]), dtype=np.float32), answer[0])


def test_langchain_for_ollama(service: LocalService):
    headers = {"headers": {"Authorization": f"Bearer {KEY}"}}
    embeddings = OllamaEmbeddings(model=service.model, base_url=service.url, client_kwargs=headers)
    try:
        answer = np.array(embeddings.embed_documents(TEXTS), dtype=np.float32)
        np.testing.assert_array_equal(answer, expected_vectors(service))
        np.testing.assert_array_equal(np.array(embeddings.embed_query(TEXTS[0]), dtype=np.float32), answer[0])
    finally:
        assert embeddings._client is not None
        embeddings._client._client.close()  # LangChain leaves it open


@pytest.mark.parametrize("path", ["/v1/models", "/v1/embeddings", "/api/tags", "/info"])
def test_the_header_api_key_is_a_key_and_no_way_round_one(service: LocalService, path: str):
    method, body = ("POST", {"model": service.model, "input": "a"}) if "embeddings" in path else ("GET", None)
    for headers, status in (
        ({"api-key": KEY}, 200),
        ({"api-key": "wrong"}, 401),
        ({"api-key": ""}, 401),
        ({"api-key": KEY, "authorization": "Bearer wrong"}, 401),
        ({"api-key": "wrong", "authorization": f"Bearer {KEY}"}, 200),
        ({}, 401),
    ):
        assert service.call(method, path, body, headers, key=None).status == status


@pytest.fixture
def ollama_client(service: LocalService) -> Iterator[ollama.Client]:
    with ollama.Client(service.url, headers={"Authorization": f"Bearer {KEY}"}) as client:
        yield client


def test_ollama(service: LocalService, ollama_client: ollama.Client):
    for name in (service.model, f"{service.model}:latest"):
        response = ollama_client.embed(name, TEXTS)
        np.testing.assert_array_equal(np.array(response.embeddings, dtype=np.float32), expected_vectors(service))
        assert response.model == service.model
        assert response.prompt_eval_count == service.embed(TEXTS).json["usage"]["total_tokens"]
    older = ollama_client.embeddings(service.model, TEXTS[0])
    np.testing.assert_array_equal(np.array(older.embedding, dtype=np.float32), expected_vectors(service)[0])


def test_ollama_truncates_unless_told_otherwise(service: LocalService, ollama_client: ollama.Client):
    long_text = "long " * 3000
    expected = expected_vectors(service, [long_text], truncate=True)
    answer = ollama_client.embed(service.model, long_text).embeddings
    np.testing.assert_array_equal(np.array(answer, dtype=np.float32), expected)
    with pytest.raises(ollama.ResponseError) as caught:
        ollama_client.embed(service.model, long_text, truncate=False)
    assert caught.value.status_code == 400
    with pytest.raises(ollama.ResponseError) as caught:
        ollama_client.embed("no/such", "a")
    assert caught.value.status_code == 404
    assert "no/such" in caught.value.error


def test_ollama_lists_and_shows_models(service: LocalService, ollama_client: ollama.Client):
    (entry,) = ollama_client.list().models
    assert entry.model == f"{service.model}:latest"
    details = ollama_client.show(f"{service.model}:latest")
    assert details.capabilities == ["embedding"]
    assert details.details is not None
    with pytest.raises(ollama.ResponseError) as caught:
        ollama_client.show("no/such")
    assert caught.value.status_code == 404


@pytest.mark.parametrize("body", [{}, {"model": 3}, [], {"name": ["a"]}])
def test_ollama_show_refuses_other_bodies(service: LocalService, body: Any):
    reply = service.call("POST", "/api/show", body)
    assert (reply.status, set(reply.json)) == (400, {"error"})


def test_posting_to_the_front_page_needs_a_key(tiny_llama: Path):
    """A browser may see the page without a key; a POST is an embedding, whatever it accepts."""
    with running(tiny_llama, None, website) as service:
        page = service.call("GET", "/", headers={"accept": "text/html"}, key=None)
        assert (page.status, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
        for accepted in ("text/html", "*/*", "application/json"):
            reply = service.call("POST", "/", {"inputs": "a"}, {"accept": accepted}, key=None)
            assert (reply.status, set(reply.json)) == (401, {"error", "error_type"})
        assert service.call("POST", "/", {"inputs": "a"}, {"accept": "text/html"}).status == 200


def test_text_embeddings_inference(service: LocalService):
    client = InferenceClient(f"{service.url}/embed", token=KEY)
    for text, expected in zip(TEXTS, expected_vectors(service), strict=True):
        np.testing.assert_array_equal(np.array(client.feature_extraction(text), dtype=np.float32)[0], expected)
    assert service.call("GET", "/info").json["model_id"] == service.model


@pytest.mark.parametrize(
    "fields",
    [
        {"truncation_direction": "Left"},
        {"prompt_name": "other"},
        {"inputs": [1, 2]},
        {"inputs": [[1]]},
        {"truncate": 3},
    ],
)
def test_text_embeddings_inference_refuses_by_name(service: LocalService, fields: dict[str, Any]):
    reply = service.call("POST", "/embed", {"inputs": "a", **fields})
    assert reply.status == 400
    assert next(iter(fields)) in reply.json["error"]


def test_tokens_are_those_that_the_model_reads(service: LocalService, encoder: Encoder):
    tokens = service.call("POST", "/tokenize", {"inputs": TEXTS}).json
    for text, own in zip(TEXTS, tokens, strict=True):
        assert [token["id"] for token in own] == encoder.prompts.build([text])[0].ids.tolist()
        plain = [token for token in own if not token["special"]]
        assert all(token["text"] == text[token["start"] : token["stop"]] for token in plain)
        assert [token["start"] for token in own if token["special"]] == [None] * (len(own) - len(plain))
    bare = service.call("POST", "/tokenize", {"inputs": TEXTS[0], "add_special_tokens": False}).json
    assert bare == [[token for token in tokens[0] if not token["special"]]]


def test_more_tokens_than_a_request_may_have_are_not_listed(start: Callable[..., LocalService]):
    service = start(max_request_tokens=3_000)
    listed = service.call("POST", "/tokenize", {"inputs": ["a" + " a" * 1_000, "b", " a" * 1_400]})
    assert (listed.status, [len(tokens) > 1_000 for tokens in listed.json]) == (200, [True, False, True])
    for text in (" a" * 3_000, " a" * 100_000):
        reply = service.call("POST", "/tokenize", {"inputs": text, "add_special_tokens": True})
        refused = service.call("POST", "/v1/embeddings", {"model": service.model, "input": [" a" * 500] * 7})
        assert (reply.status, refused.error["code"]) == (400, "max_tokens_per_request")
        assert reply.json["error"].endswith("max 3000 tokens per request") and reply.json["error_type"] == "Validation"


class ReadTokenizer:
    """Counts the characters that a tokenizer reads, one token each."""

    prefix, suffix, characters = (), (), 0

    @property
    def plain(self) -> "ReadTokenizer":
        return self

    def encode_batch(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        self.characters += sum(map(len, texts))
        return [[7] * len(text) for text in texts]

    encode_batch_fast = encode_batch


def test_a_text_of_far_too_many_tokens_is_not_read_to_its_end():
    tokenizer: Any = ReadTokenizer()
    embeddings = EmbeddingsRoute(ModelRegistry([]), ServeSettings(), Metrics(), Charging(None))
    with pytest.raises(ApiError, match=r"Requested at least \d+ tokens"):
        write_token_lists(tokenizer, ["x" * 8_000_000], True, embeddings)
    assert 300_000 < tokenizer.characters < 400_000


@pytest.mark.parametrize(
    "fields",
    [{"inputs": [1]}, {"inputs": ""}, {"inputs": None}, {"add_special_tokens": 1}, {"prompt_name": "query"}],
)
def test_tokenize_refuses_by_name(service: LocalService, fields: dict[str, Any]):
    reply = service.call("POST", "/tokenize", {"inputs": "a", **fields})
    assert (reply.status, set(reply.json)) == (400, {"error", "error_type"})
    assert next(iter(fields)).removesuffix("s") in reply.json["error"]


@pytest.mark.parametrize(
    ("jina", "ours"),
    [
        ({"task": "retrieval.query"}, {"input_type": "query"}),
        ({"task": "retrieval.passage", "late_chunking": False}, {"input_type": "document"}),
        ({"task": "text-matching", "normalized": True}, {}),
        ({"task": None, "late_chunking": None, "embedding_type": None}, {}),
        ({"embedding_type": ["float"], "normalized": False}, {"normalize": False}),
        ({"embedding_type": "int8", "dimensions": 16}, {"encoding_format": "int8", "dimensions": 16}),
        ({"input": [{"text": text} for text in TEXTS]}, {}),
    ],
)
def test_jina_fields(service: LocalService, jina: dict[str, Any], ours: dict[str, Any]):
    sent = service.call("POST", "/v1/embeddings", {"model": service.model, "input": TEXTS, **jina})
    expected = service.call("POST", "/v1/embeddings", {"model": service.model, "input": TEXTS, **ours})
    assert (sent.status, sent.json) == (200, expected.json)
    assert "x-unmask-ignored-fields" not in sent.headers


@pytest.mark.parametrize(
    "fields",
    [
        {"late_chunking": True},
        {"late_chunking": "yes"},
        {"task": "code.query"},
        {"task": 3},
        {"task": "retrieval.query", "input_type": "document"},
        {"embedding_type": ["float", "binary"]},
        {"embedding_type": "float", "encoding_format": "base64"},
        {"normalized": True, "normalize": False},
        {"input": [{"image": "https://example.org/a.png"}]},
        {"input": [{"text": "a", "title": "b"}]},
        {"input": [{"text": 3}]},
    ],
)
def test_jina_fields_that_are_refused_by_name(service: LocalService, fields: dict[str, Any]):
    reply = service.call("POST", "/v1/embeddings", {"model": service.model, "input": TEXTS, **fields})
    assert reply.status == 400
    assert reply.error["param"] == next(iter(fields))


def test_models_are_listed_with_a_slash_at_the_end_too(service: LocalService):
    assert service.call("GET", "/v1/models/").json == service.call("GET", "/v1/models").json


def test_every_route_is_in_the_description(service: LocalService):
    described = service.call("GET", "/openapi.json").json["paths"]
    # Base URLs with a slash at the end need no line of their own.
    routes = {route.path.replace(":path", "") for route in service.routes} - {""}
    assert {path for path in routes if path == "/" or not path.endswith("/")} == set(described)


@pytest.fixture
def cohere_client(service: LocalService) -> Iterator[cohere.ClientV2]:
    with httpx.Client(timeout=30) as http:
        yield cohere.ClientV2(KEY, base_url=service.url, httpx_client=http)


@pytest.mark.parametrize(("input_type", "side"), [("search_query", "query"), ("search_document", "document")])
def test_cohere(service: LocalService, cohere_client: cohere.ClientV2, input_type: Any, side: str):
    response = cohere_client.embed(
        model=service.model,
        texts=TEXTS,
        input_type=input_type,
        embedding_types=["float", "int8", "uint8", "binary", "ubinary", "base64"],
    )
    expected = expected_vectors(service, input_type=side)
    answer = response.embeddings
    np.testing.assert_array_equal(np.array(answer.float_, dtype=np.float32), expected)
    assert answer.base64 is not None
    np.testing.assert_array_equal(np.stack([as_vector(row) for row in answer.base64]), expected)
    for kind in ("int8", "uint8", "binary", "ubinary"):
        np.testing.assert_array_equal(np.array(getattr(answer, kind)), quantise_vectors(expected, kind))
    assert response.texts == TEXTS
    usage = service.embed(TEXTS, input_type=side).json["usage"]["total_tokens"]
    assert response.meta is not None and response.meta.billed_units is not None
    assert response.meta.billed_units.input_tokens == usage


@pytest.mark.parametrize("input_type", [None, "search_query", "search_document"])
def test_cohere_version_1(service: LocalService, input_type: Any):
    """The forms of version 1, which the installed `cohere.Client` uses and LangChain's class as well."""
    side = {"search_query": "query", "search_document": "document"}.get(input_type)
    expected = expected_vectors(service, input_type=side)
    body = {"model": service.model, "texts": TEXTS, "input_type": input_type, "truncate": None}
    plain = service.call("POST", "/v1/embed", {**body, "embedding_types": None}).json
    assert plain["response_type"] == "embeddings_floats"
    np.testing.assert_array_equal(np.array(plain["embeddings"], dtype=np.float32), expected)
    typed = service.call("POST", "/v1/embed", {**body, "embedding_types": ["float", "int8"]}).json
    assert typed["response_type"] == "embeddings_by_type"
    np.testing.assert_array_equal(np.array(typed["embeddings"]["float"], dtype=np.float32), expected)
    np.testing.assert_array_equal(np.array(typed["embeddings"]["int8"]), quantise_vectors(expected, "int8"))
    assert plain["texts"] == typed["texts"] == TEXTS
    assert plain["meta"]["api_version"] == typed["meta"]["api_version"] == {"version": "1"}
    with httpx.Client(timeout=30) as http:
        client = cohere.Client(KEY, base_url=service.url, httpx_client=http)
        response = client.embed(texts=TEXTS, model=service.model, input_type=input_type)
    np.testing.assert_array_equal(np.array(response.embeddings, dtype=np.float32), expected)


@pytest.mark.parametrize(
    "fields",
    [{"truncate": "START"}, {"input_type": "query"}, {"embedding_types": []}, {"images": ["data:"]}, {"texts": "a"}],
)
def test_cohere_version_1_refuses_by_name(service: LocalService, fields: dict[str, Any]):
    reply = service.call("POST", "/v1/embed", {"model": service.model, "texts": ["a"]} | fields)
    assert (reply.status, set(reply.json)) == (400, {"message"})
    assert next(iter(fields)) in reply.json["message"]


def test_cohere_cuts_vectors_and_texts(service: LocalService, cohere_client: cohere.ClientV2):
    long_texts = ["long " * 3000]
    options: dict[str, Any] = {"model": service.model, "texts": long_texts, "input_type": "clustering"}
    response = cohere_client.embed(output_dimension=16, **options)
    expected = expected_vectors(service, long_texts, truncate=True, dimensions=16)
    np.testing.assert_array_equal(np.array(response.embeddings.float_, dtype=np.float32), expected)
    with pytest.raises(cohere.BadRequestError):
        cohere_client.embed(truncate="NONE", **options)


@pytest.mark.parametrize(
    "fields",
    [
        {"truncate": "START"},
        {"input_type": None},
        {"input_type": "query"},
        {"embedding_types": []},
        {"embedding_types": ["int4"]},
        {"embedding_types": "float"},
        {"images": ["data:"]},
        {"inputs": [{}]},
        {"max_tokens": 5},
        {"texts": "a"},
        {"texts": [1]},
        {"output_dimension": 0},
    ],
)
def test_cohere_refuses_by_name(service: LocalService, fields: dict[str, Any]):
    body = {"model": service.model, "texts": ["a"], "input_type": "clustering"} | fields
    reply = service.call("POST", "/v2/embed", body)
    assert (reply.status, set(reply.json)) == (400, {"message"})
    if "output_dimension" not in fields:
        assert next(iter(fields)) in reply.json["message"]


@pytest.fixture(scope="module")
def paid(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LocalService, Accounts, str]]:
    folder = tmp_path_factory.mktemp("dialects")
    accounts = Accounts(f"sqlite:///{folder / 'accounts.sqlite'}", pepper=folder / "pepper")
    try:
        with running(tiny_llama, accounts, api_keys=(), accounts_url="kept by the test") as service:
            with accounts.database.begin() as connection:
                tariff.set_price(connection, tariff.TariffPrice("tiny_llama", "default", 8_000_000), now_ms())
                account = people.open_account(connection, "dialects", now_ms())
                ledger.top_up(connection, account, 10**9, "payment", now_ms())
                key = keys.create(connection, accounts.peppers, account, KeySettings(), now_ms())
            yield service, accounts, key
    finally:
        accounts.close()


@PATHS
def test_each_request_is_charged_once_and_as_v1(
    paid: tuple[LocalService, Accounts, str], path: str, body: dict[str, Any], vectors: Any
):
    service, _, key = paid

    def usage() -> tuple[int, int]:
        rows = service.call("GET", "/v1/usage", key=key).json["data"]
        return sum(row["requests"] for row in rows), sum(row["tokens"] for row in rows)

    texts = body.get("input") or body.get("inputs") or body.get("texts") or body["prompt"]
    start = usage()
    plain = service.call("POST", "/v1/embeddings", {"model": service.model, "input": texts}, key=key)
    middle = usage()
    reply = service.call("POST", path, {"model": service.model, **body}, key=key)
    end = usage()
    assert (plain.status, reply.status) == (200, 200)
    cost = "x-unmask-cost-nanodollars"
    assert reply.headers[cost] == plain.headers[cost]
    assert middle[0] - start[0] == end[0] - middle[0] == 1
    assert middle[1] - start[1] == end[1] - middle[1] > 0


@pytest.mark.parametrize(("path", "field"), [("/api/embed", "input"), ("/embed", "inputs"), ("/v2/embed", "texts")])
@pytest.mark.parametrize("ids", [[1, 2], [[1, 2], [3]]])
def test_token_ids_are_openais_alone(service: LocalService, path: str, field: str, ids: list[Any]):
    """Other servers would read them as the model's own, so they are refused and not read as OpenAI's."""
    reply = service.call("POST", path, {"model": service.model, field: ids, "input_type": "clustering"})
    assert reply.status == 400 and f"'{field}'" in str(reply.json)
