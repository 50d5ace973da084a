"""LangChain's classes for Hugging Face and Cohere against a live server.

They need huggingface_hub below 2 and cohere below 6. So pip installs what `langchain.txt` pins to a folder of its own,
once, and a Python without this environment's packages runs `langchain_clients.py` over it.
"""

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from package_folders import isolated_python, python_packages

from tests.api.live import KEY, LocalService
from tests.conftest import model_cache
from unmask.api.quantisation import quantise_vectors

HERE = Path(__file__).parent
TEXTS = ["the first text", "another, with more words in it", "日本語の短い文です。"]


@pytest.fixture(scope="module")
def answers(service: LocalService) -> dict[str, Any]:
    """Everything that `langchain_clients.py` got from the server."""
    request = {"url": service.url, "key": KEY, "model": service.model, "texts": TEXTS}
    packages = python_packages(HERE / "langchain.txt", model_cache())
    command, environment = isolated_python([packages], str(HERE / "langchain_clients.py"))
    finished = subprocess.run(
        command,
        input=json.dumps(request),
        env=environment,
        stdout=subprocess.PIPE,
        check=True,
        text=True,
        timeout=300,
    )
    return json.loads(finished.stdout)


@pytest.mark.parametrize(
    ("name", "documents", "query"),
    [
        ("hugging face", {}, {}),
        ("hugging face /embed", {}, {}),
        ("hugging face raw", {"normalize": False}, {"normalize": False}),
        ("cohere", {"input_type": "document"}, {"input_type": "query"}),
    ],
)
def test_langchain_gets_the_vectors_of_v1_to_the_bit(
    service: LocalService, answers: dict[str, Any], name: str, documents: dict[str, Any], query: dict[str, Any]
):
    rows = service.embed(TEXTS, **documents).vectors
    row = service.embed(TEXTS[0], **query).vectors[0]
    for prefix in ("", "async "):
        np.testing.assert_array_equal(np.array(answers[name][f"{prefix}documents"], dtype=np.float32), rows)
        np.testing.assert_array_equal(np.array(answers[name][f"{prefix}query"], dtype=np.float32), row)


def test_langchain_gets_quantised_vectors_of_cohere(service: LocalService, answers: dict[str, Any]):
    expected = quantise_vectors(service.embed(TEXTS).vectors, "int8")
    np.testing.assert_array_equal(np.array(answers["cohere int8"]["documents"]), expected)


def test_langchain_raises_the_errors_of_its_clients(answers: dict[str, Any]):
    assert answers["hugging face error"].startswith("HfHubHTTPError: ")
    assert "401" in answers["hugging face error"]
    assert answers["cohere error"].startswith("UnauthorizedError: ")
    assert answers["cohere error of a model"].startswith("NotFoundError: ")
    assert "no/such" in answers["cohere error of a model"]
