"""The installed clients openai and langchain-openai against a live server."""

import asyncio
import gzip
import hashlib
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import bpe_openai
import numpy as np
import openai
import pytest
from langchain_openai import OpenAIEmbeddings
from pydantic import SecretStr

from tests.api.live import KEY, Service
from unmask.encoder import Encoder

TEXTS = ["the first text", "another, with more words in it", "日本語の短い文です。"]

# Where tiktoken would download it from; the name of its cached copy is this URL's SHA-1.
CL100K_URL = "https://openaipublic.blob.core.windows.net/encodings/cl100k_base.tiktoken"


@pytest.fixture
def client(service: Service) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def vectors(response: Any) -> np.ndarray:
    return np.array([item.embedding for item in response.data], dtype=np.float32)


@pytest.mark.parametrize("options", [{}, {"encoding_format": "float"}, {"encoding_format": "base64"}])
def test_openai_in_every_format(client: openai.OpenAI, service: Service, encoder: Encoder, options: dict[str, Any]):
    response = client.embeddings.create(model=service.model, input=TEXTS, **options)
    if options.get("encoding_format") == "base64":  # asked for by name, the client leaves it as it is
        assert all(isinstance(item.embedding, str) for item in response.data)
    else:
        np.testing.assert_allclose(vectors(response), encoder.encode(TEXTS, normalize=True), atol=1e-5)
    assert response.usage.total_tokens == encoder.count_tokens(TEXTS).sum()


def test_openai_dimensions_and_token_arrays(client: openai.OpenAI, service: Service, encoder: Encoder):
    ids = [bpe_openai.get_encoding("cl100k_base").encode_ordinary(text) for text in TEXTS]
    expected = encoder.encode(TEXTS, normalize=True, dimensions=16)
    many = client.embeddings.create(model=service.model, input=ids, dimensions=16)
    np.testing.assert_allclose(vectors(many), expected, atol=1e-5)
    one = client.embeddings.create(model=service.model, input=ids[0], dimensions=16)
    np.testing.assert_allclose(vectors(one), expected[:1], atol=1e-5)


def test_openai_async(service: Service, encoder: Encoder):
    async def ask() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key=KEY) as client:
            calls = (client.embeddings.create(model=service.model, input=text) for text in TEXTS)
            return await asyncio.gather(*calls)

    for response, expected in zip(asyncio.run(ask()), encoder.encode(TEXTS, normalize=True), strict=True):
        np.testing.assert_allclose(vectors(response)[0], expected, atol=1e-5)


def test_openai_models(client: openai.OpenAI, service: Service):
    assert service.model in [model.id for model in client.models.list()]
    model = client.models.retrieve(service.model)
    assert (model.id, model.object) == (service.model, "model")


@pytest.mark.parametrize(
    ("kind", "request_", "param", "code"),
    [
        (openai.NotFoundError, {"model": "no/such"}, None, "model_not_found"),
        (openai.BadRequestError, {"input": ""}, "input", None),
        (openai.BadRequestError, {"dimensions": 0}, "dimensions", None),
        (openai.BadRequestError, {"input": "long " * 3000}, None, None),
    ],
)
def test_openai_errors(
    client: openai.OpenAI,
    service: Service,
    kind: type[openai.APIStatusError],
    request_: dict[str, Any],
    param: str | None,
    code: str | None,
):
    with pytest.raises(kind) as caught:
        fields: dict[str, Any] = {"model": service.model, "input": "a"} | request_
        client.embeddings.create(**fields)
    error = caught.value
    assert (error.type, error.param, error.code) == ("invalid_request_error", param, code)
    assert isinstance(error.body, dict)
    assert set(error.body) == {"message", "type", "param", "code"}
    assert error.request_id


def test_openai_when_too_much_waits(start: Callable[..., Service]):
    service = start(queue_tokens=1000)
    with (
        openai.OpenAI(base_url=f"{service.url}/v1", api_key=KEY, max_retries=0) as client,
        service.busy(),
        pytest.raises(openai.RateLimitError) as caught,
    ):
        client.embeddings.create(model=service.model, input=["some words " * 40] * 10)
    assert (caught.value.type, caught.value.code, caught.value.param) == ("tokens", "rate_limit_exceeded", None)
    headers = caught.value.response.headers
    assert headers["x-should-retry"] == "true"
    assert 1 <= int(headers["retry-after"]) <= 120


def test_openai_with_a_wrong_key(service: Service):
    wrong_key = "sk-wrong-0123456789abcdef"
    with (
        openai.OpenAI(base_url=f"{service.url}/v1", api_key=wrong_key) as client,
        pytest.raises(openai.AuthenticationError) as caught,
    ):
        client.embeddings.create(model=service.model, input="a")
    assert caught.value.code == "invalid_api_key"
    assert wrong_key not in str(caught.value)


@pytest.fixture
def cl100k(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tiktoken's cache with the vocabulary that LangChain uses for models it does not know."""
    packed = resources.files("bpe_openai").joinpath("data/cl100k_base.tiktoken.gz").read_bytes()
    (tmp_path / hashlib.sha1(CL100K_URL.encode()).hexdigest()).write_bytes(gzip.decompress(packed))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))


def langchain(service: Service, **options: Any) -> OpenAIEmbeddings:
    return OpenAIEmbeddings(model=service.model, base_url=f"{service.url}/v1", api_key=SecretStr(KEY), **options)


@pytest.mark.usefixtures("cl100k")
def test_langchain_with_its_defaults_sends_cl100k_ids(service: Service, encoder: Encoder):
    expected = encoder.encode(TEXTS, normalize=True)
    with openai.DefaultHttpxClient() as http:
        embeddings = langchain(service, http_client=http)
        assert embeddings.check_embedding_ctx_length
        np.testing.assert_allclose(embeddings.embed_documents(TEXTS), expected, atol=1e-5)
        np.testing.assert_allclose(embeddings.embed_query(TEXTS[0]), expected[0], atol=1e-5)


@pytest.mark.usefixtures("cl100k")
def test_langchain_async(service: Service, encoder: Encoder):
    async def ask() -> list[list[float]]:
        async with openai.DefaultAsyncHttpxClient() as http:
            with openai.DefaultHttpxClient() as unused:
                embeddings = langchain(service, http_async_client=http, http_client=unused)
                return await embeddings.aembed_documents(TEXTS)

    np.testing.assert_allclose(asyncio.run(ask()), encoder.encode(TEXTS, normalize=True), atol=1e-5)


def test_langchain_sending_text(service: Service, encoder: Encoder):
    with openai.DefaultHttpxClient() as http:
        embeddings = langchain(service, http_client=http, check_embedding_ctx_length=False)
        np.testing.assert_allclose(embeddings.embed_documents(TEXTS), encoder.encode(TEXTS, normalize=True), atol=1e-5)
