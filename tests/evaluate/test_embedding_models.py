"""Specifications open the right model with the right options, or are refused with a reason."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unmask.errors import CheckpointError, EngineError, UsageError
from unmask.evaluate.models import open_model

TEXTS = ["a text", "another, somewhat longer text", "a text"]


@pytest.fixture
def tiny(golden_dir: Path) -> str:
    return str(golden_dir / "tiny_llama")


def test_a_decoder(tiny: str) -> None:
    model = open_model(tiny)
    vectors = model.encode(TEXTS)
    assert (model.name, model.kind) == ("tiny_llama", "unmask")
    assert vectors.shape == (3, model.dimensions) and vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors[0], vectors[2])
    assert model.takes_instructions
    assert not np.allclose(vectors, model.encode(TEXTS, "Find it:"))
    plain, instructed = model.count_tokens(TEXTS), model.count_tokens(TEXTS, "Find it:")
    assert plain is not None and instructed is not None and plain < instructed


def test_everything_that_decides_a_vector_is_in_the_revision(tiny: str) -> None:
    options = ("", "?causal", "?pooling=weighted_mean", "?dtype=bfloat16", "?max_length=64", "?compat=reference")
    revisions = {open_model(tiny + option).revision for option in options}
    assert len(revisions) == len(options)
    assert open_model(tiny + "?causal=false&name=other").revision == open_model(tiny).revision


def test_another_way_to_8_bits_is_another_revision(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_model(tiny + "?dtype=int8").revision
    monkeypatch.setattr("unmask.encoder.encoder.INT8_PRECISION", "int8, in another way")
    assert open_model(tiny + "?dtype=int8").revision != before


def test_a_cut_keeps_the_first_numbers(tiny: str) -> None:
    whole, cut = open_model(tiny), open_model(tiny + "?dimensions=8&name=short")
    assert (cut.name, cut.kind, cut.dimensions, cut.parameters) == ("short", "unmask", 8, whole.parameters)
    np.testing.assert_array_equal(cut.encode(TEXTS), whole.encode(TEXTS)[:, :8])
    assert cut.revision != whole.revision
    assert cut.count_tokens(TEXTS) == whole.count_tokens(TEXTS)


def test_causal_means_causal(tiny: str) -> None:
    bidirectional, causal = open_model(tiny), open_model(tiny + "?causal&name=uni")
    assert causal.name == "uni"
    assert not np.allclose(bidirectional.encode(TEXTS), causal.encode(TEXTS))


def test_defaults_are_for_the_kinds_that_know_them(tiny: str) -> None:
    defaults = {"dtype": "bfloat16", "device": "cpu"}
    assert open_model(tiny, defaults).revision == open_model(tiny + "?dtype=bfloat16").revision
    assert open_model("wordllama:default", defaults).kind == "static"


def test_the_static_model_comes_with_its_package() -> None:
    model = open_model("wordllama:default")
    vectors = model.encode(TEXTS)
    assert vectors.shape == (3, 256) and model.parameters == 32000 * 256
    small = open_model("wordllama:default?dim=64")
    np.testing.assert_allclose(small.encode(TEXTS), vectors[:, :64], atol=1e-6)
    assert small.revision != model.revision


@pytest.mark.parametrize(
    ("specification", "error", "message"),
    [
        ("", UsageError, "names no model"),
        ("?name=x", UsageError, "names no model"),
        ("magic:model", UsageError, "no kind of model is called 'magic'"),
        ("wordllama:nothing", UsageError, "cannot be loaded"),
        ("wordllama:default?causal", UsageError, "has no option 'causal'"),
        ("wordllama:default?dim=x", UsageError, "expected a whole number"),
        ("wordllama:default?dim=16&dim=32", UsageError, "given 2 times"),
        ("wordllama:default?dimensions=0", UsageError, "its vectors have 1 to"),
        ("wordllama:default?dimensions=100000", UsageError, "its vectors have 1 to"),
        ("http://127.0.0.1:1/v1", UsageError, "write http://127.0.0.1:1/v1#model"),
        ("http://me:secret@127.0.0.1/v1#m", UsageError, "a key does not belong into the address"),
        ("http://127.0.0.1:1/v1#m?key=NO_SUCH_VARIABLE", UsageError, "not set"),
        ("st:.", CheckpointError, "no modules.json"),
    ],
)
def test_bad_specifications_are_refused(specification: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        open_model(specification)


class Server(BaseHTTPRequestHandler):
    """An endpoint with vectors of three numbers, which refuses every other request once."""

    bodies: list[dict[str, Any]]
    keys: list[str | None]
    status = 200

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).bodies.append(body)
        type(self).keys.append(self.headers.get("Authorization"))
        status = 503 if len(self.bodies) % 2 and self.status == 200 else self.status
        rows = [np.array([len(text), 1, 2], dtype="<f4").tobytes() for text in body["input"]]
        data = [{"index": i, "embedding": base64.b64encode(row).decode()} for i, row in enumerate(rows)]
        answer = json.dumps({"data": data[::-1]}).encode()
        self.send_response(status)
        self.send_header("Retry-After", "0")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: object) -> None:
        return


@pytest.fixture
def server() -> Iterator[HTTPServer]:
    Server.bodies, Server.keys, Server.status = [], [], 200
    running = HTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    yield running
    running.shutdown()
    thread.join()
    running.server_close()


def test_an_endpoint(server: HTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "sk-secret")
    target = f"http://127.0.0.1:{server.server_port}/v1#model"
    model = open_model(f"{target}?key=SOME_KEY&instructions")
    many = ["x" * i for i in range(1, 131)]
    vectors = model.encode(many, "Find it:")
    assert model.dimensions == 3 and model.kind == "endpoint"
    np.testing.assert_array_equal(vectors[:, 0], range(1, 131))  # in order, whatever the order of the answer
    assert set(Server.keys) == {"Bearer sk-secret"}
    assert Server.bodies[-1]["instruction"] == "Find it:" and Server.bodies[-1]["model"] == "model"
    assert "as-of-" in model.revision and "secret" not in model.name + model.revision
    assert model.count_tokens(many) is None


def test_an_endpoint_that_refuses(server: HTTPServer) -> None:
    Server.status = 401
    with pytest.raises(EngineError, match="HTTP 401"):
        open_model(f"http://127.0.0.1:{server.server_port}/v1#model")
    assert len(Server.bodies) == 1
