"""Embed texts by LangChain's classes for Hugging Face and Cohere, in a Python that has these packages and no others.

`test_langchain_clients.py` runs it: a JSON object with `url`, `key`, `model` and `texts` on standard input, the vectors
by name of the call on standard output, and the class of the error for a wrong key.
"""

import asyncio
import json
import sys
from collections.abc import Sequence
from typing import Any

from huggingface_hub import AsyncInferenceClient, InferenceClient
from langchain_cohere import CohereEmbeddings  # pyright: ignore[reportMissingImports]: not in this environment
from langchain_huggingface import HuggingFaceEndpointEmbeddings  # pyright: ignore[reportMissingImports]


def hugging_face(address: str, key: str, **options: Any) -> Any:
    """Return the class with the clients of another address.

    It refuses an address as `model` since 1.2.2, so its clients are replaced, as its users do for their own servers.
    """
    embeddings = HuggingFaceEndpointEmbeddings(model="any/model", huggingfacehub_api_token=key, **options)
    embeddings.client = InferenceClient(address, token=key)
    embeddings.async_client = AsyncInferenceClient(address, token=key)
    return embeddings


def cohere(url: str, key: str, model: str, **options: Any) -> Any:
    return CohereEmbeddings(model=model, cohere_api_key=key, base_url=url, max_retries=1, **options)


def vectors(embeddings: Any, texts: Sequence[str]) -> dict[str, Any]:
    """Return the vectors of every method of LangChain's interface."""

    async def ask() -> tuple[Any, Any]:
        return await embeddings.aembed_documents(texts), await embeddings.aembed_query(texts[0])

    documents, query = asyncio.run(ask())
    return {
        "documents": embeddings.embed_documents(texts),
        "query": embeddings.embed_query(texts[0]),
        "async documents": documents,
        "async query": query,
    }


def error(embeddings: Any) -> str:
    """Return class and message of the error of a request that the server refuses."""
    try:
        embeddings.embed_documents(["a"])
    except Exception as raised:  # noqa: BLE001 - the test names the class
        return f"{type(raised).__name__}: {raised}"
    return "no error"


def main() -> None:
    request = json.load(sys.stdin)
    url, key, model, texts = (request[name] for name in ("url", "key", "model", "texts"))
    json.dump(
        {
            "hugging face": vectors(hugging_face(url, key), texts),
            "hugging face /embed": vectors(hugging_face(f"{url}/embed", key), texts),
            "hugging face raw": vectors(hugging_face(url, key, model_kwargs={"normalize": False}), texts),
            "cohere": vectors(cohere(url, key, model), texts),
            "cohere int8": vectors(cohere(url, key, model, embedding_types=["int8"]), texts),
            "hugging face error": error(hugging_face(url, "wrong")),
            "cohere error": error(cohere(url, "wrong", model)),
            "cohere error of a model": error(cohere(url, key, "no/such")),
        },
        sys.stdout,
    )


main()
