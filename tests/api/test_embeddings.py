"""`POST /v1/embeddings` on a live server: OpenAI's contract, and the extensions to it."""

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import bpe_openai
import numpy as np
import pytest

from tests.api.live import LocalService, running
from unmask.encoder import Encoder

TEXTS = ["the first text", "another, with more words in it", "日本語の短い文です。", "a"]


def test_vectors_are_the_encoders_own(service: LocalService, encoder: Encoder):
    expected = encoder.encode(TEXTS, normalize=True)
    for encoding_format in ("float", "base64"):
        reply = service.embed(TEXTS, encoding_format=encoding_format)
        np.testing.assert_allclose(reply.vectors, expected, atol=1e-5)
        assert reply.headers["content-type"] == "application/json"
    body = reply.json
    assert {key: body[key] for key in ("object", "model")} == {"object": "list", "model": service.model}
    assert [item["index"] for item in body["data"]] == [0, 1, 2, 3]
    assert {item["object"] for item in body["data"]} == {"embedding"}
    tokens = int(encoder.count_tokens(TEXTS).sum())
    assert body["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}


def test_one_text_is_one_vector(service: LocalService, encoder: Encoder):
    np.testing.assert_allclose(service.embed(TEXTS[0]).vectors, encoder.encode(TEXTS[0], normalize=True), atol=1e-5)


def test_dimensions_are_cut_and_then_scaled(service: LocalService, encoder: Encoder):
    reply = service.embed(TEXTS, dimensions=8)
    np.testing.assert_allclose(reply.vectors, encoder.encode(TEXTS, normalize=True, dimensions=8), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(reply.vectors, axis=1), 1, atol=1e-5)


def test_more_dimensions_than_there_are_is_an_error(service: LocalService, encoder: Encoder):
    reply = service.embed("a", dimensions=encoder.dim + 1)
    assert (reply.status, reply.error["param"]) == (400, "dimensions")
    assert str(encoder.dim) in reply.error["message"]


def test_raw_vectors_on_request(service: LocalService, encoder: Encoder):
    np.testing.assert_allclose(service.embed(TEXTS, normalize=False).vectors, encoder.encode(TEXTS), rtol=1e-5)


def test_an_instruction_is_the_encoders(service: LocalService, encoder: Encoder):
    instruction = "Find what this is about:"
    expected = encoder.encode(TEXTS, instruction=instruction, normalize=True)
    np.testing.assert_allclose(service.embed(TEXTS, instruction=instruction).vectors, expected, atol=1e-5)


def test_an_input_type_takes_the_models_instruction_unless_one_is_given(service: LocalService, encoder: Encoder):
    served = service.models.find(service.model)
    assert served
    for input_type, instruction in (
        ("query", served.record.query_instruction),
        ("document", served.record.document_instruction),
    ):
        expected = encoder.encode(TEXTS, instruction=instruction, normalize=True)
        np.testing.assert_allclose(service.embed(TEXTS, input_type=input_type).vectors, expected, atol=1e-5)
        own_instruction = service.embed(TEXTS, input_type=input_type, instruction="Other:").vectors
        np.testing.assert_allclose(
            own_instruction, encoder.encode(TEXTS, instruction="Other:", normalize=True), atol=1e-5
        )


def test_a_model_name_may_say_the_use_of_a_text(tiny_llama: Path, tmp_path: Path):
    """A client that sends nothing but a model name gets the instruction of that side."""
    model = tmp_path / "tiny"
    shutil.copytree(tiny_llama, model)
    settings = {"query_instruction": "Find what answers:", "document_instruction": "A passage:"}
    (model / "llm2vec_config.json").write_text(json.dumps(settings))
    encoder = Encoder.load(model)
    with running(model, warm=()) as service:
        # The model's files say its instructions, and this request is the one that loads it.
        first = service.embed(TEXTS, {"prefer": "wait=60"}, input_type="query")
        np.testing.assert_allclose(first.vectors, encoder.encode_query(TEXTS, normalize=True), atol=1e-5)
        listed = [entry["id"] for entry in service.call("GET", "/v1/models").json["data"]]
        assert {f"{service.model}:query", f"{service.model}:document"} <= set(listed)
        for use, method in (("query", encoder.encode_query), ("document", encoder.encode_document)):
            reply = service.embed(TEXTS, model=f"{service.model}:{use}")
            np.testing.assert_allclose(reply.vectors, method(TEXTS, normalize=True), atol=1e-5)
            assert service.call("GET", f"/v1/models/{service.model}:{use}").json["id"] == f"{service.model}:{use}"
        other = service.embed(TEXTS, model=f"{service.model}:query", instruction="Other:").vectors
        np.testing.assert_allclose(other, encoder.encode(TEXTS, instruction="Other:", normalize=True), atol=1e-5)
        assert service.embed(TEXTS, model=f"{service.model}:other").status == 404
        assert service.embed(TEXTS, model="nobody:query").status == 404


@pytest.mark.parametrize("encoding", ["cl100k_base", "o200k_base"])
def test_openai_token_ids_are_read_as_text(service: LocalService, encoder: Encoder, encoding: str):
    peer = bpe_openai.get_encoding(encoding)
    ids = [peer.encode_ordinary(text) for text in TEXTS]
    expected = encoder.encode(TEXTS, normalize=True)
    many = service.embed(ids, token_encoding=encoding)
    np.testing.assert_allclose(many.vectors, expected, atol=1e-5)
    assert many.headers["x-unmask-token-encoding"] == encoding
    one = service.embed(ids[1], token_encoding=encoding)
    np.testing.assert_allclose(one.vectors, expected[1:2], atol=1e-5)


def test_token_ids_are_cl100k_unless_told(service: LocalService):
    reply = service.embed(bpe_openai.get_encoding("cl100k_base").encode_ordinary("hello"))
    assert reply.headers["x-unmask-token-encoding"] == "cl100k_base"
    assert "x-unmask-token-encoding" not in service.embed("hello").headers


def test_native_token_ids(service: LocalService, encoder: Encoder):
    ids = encoder.checkpoint.tokenizer.text.encode(TEXTS[0], add_special_tokens=False).ids
    reply = service.embed(ids, token_encoding="native")
    np.testing.assert_allclose(reply.vectors, encoder.encode(TEXTS[:1], normalize=True), atol=1e-5)
    assert reply.headers["x-unmask-token-encoding"] == "native"


@pytest.mark.parametrize("encoding", ["cl100k_base", "o200k_base", "native"])
def test_unknown_token_ids_are_refused(service: LocalService, encoding: str):
    for unknown in (10_000_000, -1, 2**31, 2**63, 2**64, 10**30, -(2**63) - 1):
        reply = service.embed([1, unknown], token_encoding=encoding)
        assert (reply.status, reply.error["param"]) == (400, "input")
        assert str(unknown) in reply.error["message"]


def test_a_flat_token_array_is_limited_by_tokens_alone(service: LocalService):
    ids = bpe_openai.get_encoding("cl100k_base").encode_ordinary("word " * 3000)
    assert len(ids) > 2048
    assert service.embed(ids, truncate=True).status == 200


def test_too_long_an_input_is_refused_in_openais_words(service: LocalService, encoder: Encoder):
    reply = service.embed(["short", "long " * 2000])
    assert reply.status == 400
    limit = encoder.max_length
    assert reply.error["message"].startswith(f"This model's maximum context length is {limit} tokens, however")
    assert {key: reply.error[key] for key in ("type", "param", "code")} == {
        "type": "invalid_request_error",
        "param": None,
        "code": None,
    }
    assert reply.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("truncate", [True, "end"])
def test_truncation_is_done_when_asked_for_and_reported(service: LocalService, encoder: Encoder, truncate: Any):
    texts = ["short", "long " * 2000, "longer " * 3000]
    reply = service.embed(texts, truncate=truncate)
    np.testing.assert_allclose(reply.vectors, encoder.encode(texts, normalize=True), atol=1e-5)
    assert reply.headers["x-unmask-truncated-inputs"] == "2"
    assert reply.json["usage"]["prompt_tokens"] == 2 * encoder.max_length + encoder.count_tokens("short").sum()
    assert "x-unmask-truncated-inputs" not in service.embed("short", truncate=truncate).headers


def test_too_many_tokens_together(service: LocalService):
    reply = service.embed([[0] * 200] * 2000)
    assert (reply.status, reply.error["type"], reply.error["code"]) == (400, *["max_tokens_per_request"] * 2)
    assert reply.error["message"] == "Requested 400000 tokens, max 300000 tokens per request"


def test_too_many_tokens_or_characters_of_text(start):
    service = start(max_request_tokens=100, max_request_characters=1000)
    assert service.embed(["some words"] * 5).status == 200
    assert service.embed(["some words"] * 60).error["code"] == "max_tokens_per_request"
    assert service.embed(["some words"] * 200).error["code"] == "max_characters_per_request"


def test_unknown_fields_are_ignored_and_named(service: LocalService):
    fields = {"tasks": "x", "provider": {"a": 1}, "wéird\r\nx-evil: 1": 1, "long" * 40: 1}
    reply = service.embed("a", None, **fields)
    assert reply.status == 200
    names = reply.headers["x-unmask-ignored-fields"].split(", ")
    assert names == ["tasks", "w?ird??x-evil??1", "long" * 10, "provider"]
    assert "x-evil" not in reply.headers
    many = service.embed("a", None, **{f"field{n}": n for n in range(1000)})
    assert len(many.headers["x-unmask-ignored-fields"]) < 300


def test_2048_inputs_are_served_and_one_more_is_not(service: LocalService, encoder: Encoder):
    texts = [f"text number {n}" for n in range(2048)]
    reply = service.embed(texts, encoding_format="base64")
    np.testing.assert_allclose(reply.vectors, encoder.encode(texts, normalize=True), atol=1e-5)
    assert service.embed([*texts, "one more"]).status == 400


def test_an_unknown_model(service: LocalService):
    reply = service.embed("a", model="no/such-model")
    assert (reply.status, reply.error["code"]) == (404, "model_not_found")
    assert reply.error["message"].startswith("The model 'no/such-model' does not exist or you do not have access")


def test_aliases_name_the_same_model(service: LocalService):
    served = service.models.find(service.model)
    assert served
    for alias in served.record.aliases:
        assert service.embed("a", model=alias).json["model"] == service.model


@pytest.mark.parametrize("headers", [{"request-deadline-ms": "1"}, {"x-stainless-read-timeout": "0.001"}])
def test_a_deadline_that_cannot_be_met(service: LocalService, headers: dict[str, str]):
    reply = service.embed(["some words " * 40] * 1000, headers)
    assert (reply.status, reply.error["code"]) == (504, "deadline_exceeded")
    assert reply.headers["x-should-retry"] == "true"


@pytest.mark.parametrize("deadline", ["0", "-1", "soon", "1.5", "9" * 20, ""])
def test_a_deadline_that_is_none_is_refused(service: LocalService, deadline: str):
    assert service.embed("a", {"request-deadline-ms": deadline}).error["param"] == "Request-Deadline-Ms"


@pytest.mark.parametrize("odd", ["0", "None", "nan", "inf", "9" * 400])
def test_an_odd_read_timeout_is_overlooked(service: LocalService, odd: str):
    assert service.embed("a", {"x-stainless-read-timeout": odd}).status == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "application/json; charset=latin-1"},
        {"content-encoding": "gzip"},
    ],
)
def test_other_media_are_refused(service: LocalService, headers: dict[str, str]):
    reply = service.embed("a", headers)
    assert (reply.status, set(reply.error)) == (415, {"message", "type", "param", "code"})


def test_json_with_its_charset_is_accepted(service: LocalService):
    assert service.embed("a", {"content-type": 'Application/JSON; charset="UTF-8"'}).status == 200


def test_callers_of_all_sizes_at_once_get_their_own_vectors(service: LocalService, encoder: Encoder):
    batches = [[f"caller {n} text {m} " * (1 + n % 7) for m in range(1 + n * n % 50)] for n in range(40)]
    with ThreadPoolExecutor(16) as pool:
        replies = list(pool.map(lambda batch: service.embed(batch, encoding_format="base64"), batches))
    for batch, reply in zip(batches, replies, strict=True):
        np.testing.assert_allclose(reply.vectors, encoder.encode(batch, normalize=True), atol=1e-5)


def test_an_embedder_of_another_maker_is_served_with_its_own_prompts(published: Callable[[str], Path]) -> None:
    folder = published("google/embeddinggemma-300m")
    encoder = Encoder.load(folder)
    with running(folder) as service:
        for input_type, encode in (("query", encoder.encode_query), ("document", encoder.encode_document)):
            reply = service.embed(["river stone", "!"], input_type=input_type)
            assert np.abs(reply.vectors - encode(["river stone", "!"])).max() <= 1e-6
        exact = "task: similarity | "
        reply = service.embed(["river stone"], instruction=exact)
        assert np.abs(reply.vectors - encoder.encode("river stone", instruction=exact)).max() <= 1e-6
