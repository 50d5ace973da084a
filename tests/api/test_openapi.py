"""schemathesis compares the OpenAPI document with the answers of the server."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck
from schemathesis.checks import load_all_checks, not_a_server_error
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

from tests.api.live import KEY, Service, running
from unmask.accounts import Accounts, keys, ledger, people, tariff
from unmask.accounts.keys import KeySettings
from unmask.api.openapi import openapi_document as make_document

load_all_checks()

schema = schemathesis.openapi.from_dict(make_document(secured=True, body_limit=32 * 2**20))


def harmless(case: schemathesis.Case) -> bool:
    """Return True if a server may accept this violation of the schema.

    HTTP servers ignore header fields and query parameters that they do not know. The key, which a case may leave out,
    is always sent.
    """
    unknown_header = any(name.lower().startswith("x-schemathesis") for name in case.headers or {})
    parameters = {parameter.name for parameter in case.operation.query}
    return unknown_header or not parameters.issuperset(case.query or {})


@schema.include(tag="dialects").parametrize()
@hypothesis.settings(
    max_examples=20,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.function_scoped_fixture],
)
def test_the_dialects_keep_to_the_document(case: schemathesis.Case, service: Service):
    model = case.body.get("model") if isinstance(case.body, dict) else None
    if isinstance(case.body, dict) and isinstance(model, str) and len(model) % 4:
        case.body["model"] = service.model  # a made-up name would always stop at 404
    response = case.call_and_validate(
        base_url=service.url,
        headers={"Authorization": f"Bearer {KEY}"},
        excluded_checks=[positive_data_acceptance, *([negative_data_rejection] if harmless(case) else [])],
        timeout=30,
    )
    assert response.status_code < 500


@schema.exclude(tag="dialects").parametrize()
@hypothesis.settings(
    max_examples=40,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.function_scoped_fixture],
)
def test_the_server_keeps_to_its_document(case: schemathesis.Case, service: Service):
    model = case.body.get("model") if isinstance(case.body, dict) else None
    if isinstance(case.body, dict) and isinstance(model, str) and len(model) % 4:
        case.body["model"] = service.model  # a made-up name would always stop at 404
    response = case.call_and_validate(
        base_url=service.url,
        headers={"Authorization": f"Bearer {KEY}"},
        # A schema cannot know the model's vocabulary, its dimensions or its maximum length; and a caller who gives
        # a deadline of a millisecond gets the documented 504.
        excluded_checks=[
            positive_data_acceptance,
            not_a_server_error,
            *([negative_data_rejection] if harmless(case) else []),
        ],
        timeout=30,
    )
    assert response.status_code < 500 or response.status_code in (503, 504)


@pytest.fixture(scope="module")
def paid(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Service, str]]:
    """A server with accounts, and a key with more credit than it can spend."""
    folder = tmp_path_factory.mktemp("accounts")
    accounts = Accounts(f"sqlite:///{folder / 'accounts.sqlite'}", pepper=folder / "pepper")
    with accounts.database.begin() as connection:
        id = people.open_account(connection, "somebody", 1)
        ledger.top_up(connection, id, 10**15, "payment", 1)
        key = keys.create(connection, accounts.peppers, id, KeySettings(), 1)
        tariff.set_price(connection, tariff.TariffPrice("*", "default", 8_000_000), 1)
    with running(tiny_llama, accounts, api_keys=(), accounts_url="kept by the test") as service:
        yield service, key
    accounts.close()


with_accounts = schemathesis.openapi.from_dict(make_document(secured=False, body_limit=32 * 2**20, accounts=True))


@with_accounts.exclude(tag="dialects").parametrize()
@hypothesis.settings(
    max_examples=20,  # each path once with a key and once without; the paths of a server without accounts are above
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.function_scoped_fixture],
)
@pytest.mark.parametrize("authenticated", [True, False])
def test_with_accounts_it_keeps_to_its_document(
    case: schemathesis.Case, paid: tuple[Service, str], authenticated: bool
):
    service, key = paid
    model = case.body.get("model") if isinstance(case.body, dict) else None
    if isinstance(case.body, dict) and isinstance(model, str) and len(model) % 4:
        case.body["model"] = service.model
    response = case.call_and_validate(
        base_url=service.url,
        headers={"Authorization": f"Bearer {key if authenticated else 'um_none'}"},
        excluded_checks=[
            positive_data_acceptance,
            not_a_server_error,
            *([negative_data_rejection] if harmless(case) else []),
        ],
        timeout=30,
    )
    assert response.status_code < 500 or response.status_code in (503, 504)
    if not authenticated and case.path not in ("/health", "/ready"):
        assert response.status_code in (400, 401, 405)


@pytest.fixture(scope="module")
def document(service: Service) -> dict[str, Any]:
    return service.call("GET", "/openapi.json").json


def test_every_answer_the_code_can_give_is_documented(document: dict[str, Any]):
    responses = document["paths"]["/v1/embeddings"]["post"]["responses"]
    expected = {200, 400, 401, 404, 405, 408, 410, 413, 415, 429, 500, 502, 503, 504}
    assert {int(status) for status in responses} == expected
    for status, response in responses.items():
        assert {"x-request-id", "openai-processing-ms"} <= set(response["headers"])
        assert ("x-should-retry" in response["headers"]) == (status != "200")
        assert ("retry-after" in response["headers"]) == (status in ("429", "502", "503"))


def test_the_request_schema_is_openais_with_extensions(document: dict[str, Any]):
    request = document["components"]["schemas"]["EmbeddingRequest"]
    assert request["required"] == ["input", "model"]
    forms = request["properties"]["input"]["anyOf"]
    assert [form["type"] for form in forms] == ["string", "array", "array", "array"]
    assert {"encoding_format", "dimensions", "user"} < set(request["properties"])


def test_every_body_of_a_dialect_is_described(document: dict[str, Any]):
    """No request, answer or error is a bare object, and each refers to its part of the page /docs."""
    operations = [
        operation
        for methods in document["paths"].values()
        for operation in methods.values()
        if operation.get("tags") == ["dialects"]
    ]
    assert len(operations) == 14
    for operation in operations:
        bodies = [operation["requestBody"]] if "requestBody" in operation else []
        for body in [*bodies, *operation["responses"].values()]:
            schema = body["content"]["application/json"]["schema"]
            assert "$ref" in schema or schema["type"] == "array"
        assert operation["externalDocs"]["url"].startswith("/docs#")
