"""The routes that only read, and models that are not there yet."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.api.live import LocalService, running
from unmask.api.authentication import Authenticator
from unmask.encoder import Encoder


def test_models_carry_their_records(service: LocalService, encoder: Encoder):
    listed = service.call("GET", "/v1/models").json
    assert listed["object"] == "list"
    model = service.call("GET", f"/v1/models/{service.model}").json
    assert model in listed["data"]
    assert {key: model[key] for key in ("id", "object", "status", "dimensions", "max_tokens")} == {
        "id": service.model,
        "object": "model",
        "status": "ready",
        "dimensions": encoder.dim,
        "max_tokens": encoder.max_length,
    }
    assert isinstance(model["created"], int)
    assert isinstance(model["owned_by"], str)


def test_every_model_is_listed_under_a_name_with_embed_in_it(service: LocalService):
    for model in service.call("GET", "/v1/models").json["data"]:
        assert "embed" in model["id"] or any("embed" in alias for alias in model["aliases"])
    listed = [model["id"] for model in service.call("GET", "/v1/models").json["data"]]
    assert any("embed" in id for id in listed)
    for id in listed:
        assert service.call("GET", f"/v1/models/{id}").json["id"] == service.model


def test_the_index_points_at_pages_that_are_there(service: LocalService):
    index = service.call("GET", "/").json
    for purpose in ("models", "health", "ready", "metrics", "openapi"):
        assert service.call("GET", index[purpose]).status == 200


def test_metrics_count_requests_and_tokens(start: Callable[..., LocalService]):
    service = start()
    before = service.metric(f'unmask_tokens_total{{model="{service.model}"}}')
    used = service.embed(["a", "some more text"]).json["usage"]["total_tokens"]
    service.embed("a", model="no/such")
    service.call("GET", "/no/such/page")
    assert service.metric(f'unmask_tokens_total{{model="{service.model}"}}') == before + used
    assert service.metric('unmask_requests_total{route="/v1/embeddings",status="200"}') == 2
    assert service.metric('unmask_requests_total{route="/v1/embeddings",status="404"}') == 1
    assert service.metric('unmask_requests_total{route="unmatched",status="404"}') == 1
    assert service.metric('unmask_request_seconds_count{route="/v1/embeddings"}') == 3
    assert service.metric(f'unmask_waiting_tokens{{model="{service.model}"}}') == 0


def test_ready_once_the_canary_is_right(service: LocalService):
    reply = service.call("GET", "/ready", key=None)
    assert (reply.status, reply.json) == (200, {"status": "ready", "models": {service.model: "ok"}})


def test_not_ready_with_a_wrong_vector(start: Callable[..., LocalService]):
    service = start()
    served = service.models.find(service.model)
    assert served

    async def spoil() -> None:
        encoder = (await served.engine()).encoder
        assert isinstance(encoder, Encoder)
        for parameter in encoder.trainable_decoder().parameters():
            parameter.data = parameter.data.flip(0)

    asyncio.run(spoil())
    reply = service.call("GET", "/ready")
    assert (reply.status, reply.json["status"]) == (503, "not ready")
    assert "cosine" in reply.json["models"][service.model]


def test_a_cold_model_loads_with_its_first_request(start: Callable[..., LocalService], encoder: Encoder):
    service = start(warm=())
    assert service.call("GET", "/v1/models").json["data"][0]["status"] == "cold"
    reply = service.embed("a")
    assert (reply.status, reply.error["code"]) == (503, "model_loading")
    assert 1 <= int(reply.headers["retry-after"]) <= 120
    assert reply.headers["x-should-retry"] == "true"
    waited = service.embed("a", {"prefer": "respond-async, wait=30"})
    np.testing.assert_allclose(waited.vectors, encoder.encode("a", normalize=True), atol=1e-5)
    assert service.call("GET", "/v1/models").json["data"][0]["status"] == "ready"


def test_a_model_that_cannot_be_loaded(copied: Callable[[str], Path]):
    folder = copied("tiny_llama")
    (folder / "model.safetensors").write_bytes(b"no weights")
    with running(folder, warm=()) as service:
        reply = service.embed("a", {"prefer": "wait=30"})
        assert (reply.status, reply.error["code"]) == (503, "model_unavailable")
        assert reply.headers["x-should-retry"] == "false"
        assert "retry-after" not in reply.headers
        ready = service.call("GET", "/ready")
        assert ready.status == 503
        assert service.call("GET", "/v1/models").json["data"][0]["status"] == "failed"
        for answer in (reply, ready):
            assert str(folder) not in answer.body.decode()


@pytest.mark.parametrize("path", ["/ready", "/health"])
def test_head_has_no_body(service: LocalService, path: str):
    reply = service.call("HEAD", path)
    assert (reply.status, reply.body) == (200, b"")


async def test_callers_without_keys_have_a_share_per_network() -> None:
    authenticator = Authenticator(())

    async def share(address: str) -> str:
        scope = {"type": "http", "path": "/v1/embeddings", "query_string": b"", "headers": [], "client": (address, 1)}
        return (await authenticator.authenticate(scope)).share

    assert await share("2001:db8::1") == await share("2001:db8::2") != await share("2001:db8:0:1::1")
    assert await share("::ffff:192.0.2.1") == await share("192.0.2.1") != await share("192.0.2.2")
