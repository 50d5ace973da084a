"""Specifications open the right model with the right options, or are refused with a reason."""

import base64
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.external_data_helper import set_external_data
from sentence_transformers import SentenceTransformer

from unmask import Encoder
from unmask.errors import CheckpointError, EngineError, UsageError
from unmask.evaluate.cache import CachedModel
from unmask.evaluate.models import open_model
from unmask.evaluate.models.embedding_model import EmbeddingModel
from unmask.evaluate.models.onnx_file import _external_files
from unmask.export import ExportOptions, run_export

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


def test_an_onnx_file_with_the_prompts_of_its_export(tiny: str, tmp_path: Path) -> None:
    instructions = {"query": "Find it:"}
    options = ExportOptions(
        model=tiny, target="onnx", output=tmp_path / "out", instructions=instructions, dimensions=32, check=False
    )
    run_export(options, lambda line: None)
    file = tmp_path / "out" / "onnx" / "model.onnx"
    model, encoder = open_model(f"{file}?name=graph"), Encoder.load(tiny, dtype="float32")
    assert (model.name, model.kind, model.dimensions, model.takes_instructions) == ("graph", "onnxruntime", 32, True)
    assert open_model(str(file)).revision == model.revision
    texts = [*TEXTS, "a longer text of many words " * 8, *TEXTS[:2] * 8]
    for task_instruction, instruction in (("", ""), ("Any instruction of a task", "Find it:")):
        expected = encoder.encode(texts, instruction=instruction)[:, :32]
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
        np.testing.assert_allclose(model.encode(texts, task_instruction), expected, atol=1e-6)
        assert model.count_tokens(TEXTS, task_instruction) == encoder.count_tokens(TEXTS, instruction=instruction).sum()
    assert model.encode([]).shape == (0, 32)


def test_weights_beside_an_onnx_graph_are_in_its_revision(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unmask.export.onnx_writer._MAX_MESSAGE", 100_000)
    run_export(ExportOptions(model=tiny, target="onnx", output=tmp_path / "out", check=False), lambda line: None)
    file = tmp_path / "out" / "onnx" / "model.onnx"
    before = open_model(str(file))
    vectors, data = before.encode(TEXTS), file.with_name("model.onnx.data")
    numbers = np.fromfile(data, dtype="<f4")
    (numbers * 1.5).tofile(data)
    other = open_model(str(file))
    assert not np.allclose(other.encode(TEXTS), vectors)
    assert other.revision != before.revision
    numbers.tofile(data)
    assert open_model(str(file)).revision == before.revision


def test_weights_of_an_onnx_branch_are_in_its_revision(tmp_path: Path) -> None:
    def tensor(name: str) -> onnx.TensorProto:
        values = onnx.numpy_helper.from_array(np.ones(4, dtype=np.float32), name)
        set_external_data(values, location=f"{name}.data")
        return values

    def branch(name: str) -> onnx.GraphProto:
        node = onnx.helper.make_node("Identity", [name], ["out"])
        return onnx.helper.make_graph([node], name, [], [output], [tensor(name)])

    output = onnx.helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, [4])
    nodes = [
        onnx.helper.make_node("Constant", [], ["constant"], value=tensor("constant")),
        onnx.helper.make_node("If", ["condition"], ["chosen"], then_branch=branch("then"), else_branch=branch("else")),
    ]
    graph = onnx.helper.make_graph(nodes, "graph", [], [output], [tensor("outer"), tensor("outer")])
    file = tmp_path / "model.onnx"
    file.write_bytes(onnx.helper.make_model(graph).SerializeToString())
    assert [path.name for path in _external_files(file)] == ["constant.data", "else.data", "outer.data", "then.data"]


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_sentence_transformers_folder_in_other_precisions(published: Callable[[str], Path], dtype: str) -> None:
    folder = published("Qwen/Qwen3-Embedding-0.6B")
    full = open_model(f"st:{folder}", {"dtype": "bfloat16"})  # the run's precision is that of our own models
    narrow = open_model(f"st:{folder}?dtype={dtype}")
    assert full.revision == open_model(f"st:{folder}").revision
    assert narrow.revision.startswith(f"{full.revision}-{dtype}")
    assert narrow.encode(TEXTS).dtype == np.float32
    assert 0 < np.abs(narrow.encode(TEXTS) - full.encode(TEXTS)).max() < 0.02


def test_a_precision_that_a_folder_cannot_have(published: Callable[[str], Path]) -> None:
    folder = published("Qwen/Qwen3-Embedding-0.6B")
    with pytest.raises(UsageError, match="dtype='int4'; write float32, bfloat16 or int8"):
        open_model(f"st:{folder}?dtype=int4")
    with pytest.raises(UsageError, match="dtype=int8 computes on a CPU"):
        open_model(f"st:{folder}?dtype=int8&device=cuda")


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_folder_in_16_bits_computes_in_the_precision_that_is_asked_for(
    published: Callable[[str], Path], tmp_path: Path, dtype: str
) -> None:
    """transformers would compute in the precision of the file."""
    folder = published("Qwen/Qwen3-Embedding-0.6B")
    SentenceTransformer(str(folder)).bfloat16().save(str(tmp_path / "half"))
    wide = SentenceTransformer(str(tmp_path / "half")).float()
    expected = wide.encode(list(TEXTS), normalize_embeddings=True)
    vectors = open_model(f"st:{tmp_path / 'half'}?dtype={dtype}").encode(TEXTS)
    np.testing.assert_allclose(vectors, expected, atol=1e-6 if dtype == "float32" else 0.02)


def test_everything_that_decides_a_vector_is_in_the_revision(tiny: str) -> None:
    options = ("", "?causal", "?pooling=weighted_mean", "?dtype=bfloat16", "?max_length=64", "?compat=reference")
    revisions = {open_model(tiny + option).revision for option in options}
    assert len(revisions) == len(options)
    assert open_model(tiny + "?causal=false&name=other").revision == open_model(tiny).revision


def test_another_way_to_8_bits_is_another_revision(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_model(tiny + "?dtype=int8").revision
    monkeypatch.setattr("unmask.encoder.loading.INT8_PRECISION", "int8, in another way")
    assert open_model(tiny + "?dtype=int8").revision != before


def test_a_cut_keeps_the_direction_of_the_first_numbers_and_the_length(tiny: str, tmp_path: Path) -> None:
    whole, cut = open_model(tiny), open_model(tiny + "?dimensions=8&name=short")
    assert (cut.name, cut.kind, cut.dimensions, cut.parameters) == ("short", "unmask", 8, whole.parameters)
    vectors, first = whole.encode(TEXTS), whole.encode(TEXTS)[:, :8]
    assert cut.encode(TEXTS).dtype == np.float32
    norms = [np.linalg.norm(each, axis=1, keepdims=True) for each in (vectors, first)]
    np.testing.assert_allclose(cut.encode(TEXTS), first * norms[0] / norms[1], rtol=1e-6)
    np.testing.assert_array_equal(CachedModel(cut, tmp_path).encode(TEXTS), cut.encode(TEXTS))  # as tasks read it
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
        ("no/such.onnx", CheckpointError, "there is no file no/such.onnx"),
        ("x.onnx?dtype=int8", UsageError, "has no option 'dtype'"),
        ("st:.?dtype=int4", UsageError, "write float32, bfloat16 or int8"),
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
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
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


class ForeignServer(Server):
    """An endpoint that answers its first request with two numbers, and then with `content`."""

    content = b""
    headers_sent: tuple[tuple[str, str], ...] = ()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        type(self).bodies.append({})
        first = len(self.bodies) == 1
        content = vectors_answer([1.0, 2.0]) if first else self.content
        self.send_response(200 if first else self.status)
        for name, value in () if first else self.headers_sent:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def foreign(server: HTTPServer) -> tuple[HTTPServer, EmbeddingModel]:
    server.RequestHandlerClass = ForeignServer
    ForeignServer.bodies, ForeignServer.status, ForeignServer.headers_sent = [], 200, ()
    return server, open_model(f"http://127.0.0.1:{server.server_port}/v1#model")


def vectors_answer(*vectors: object, indices: Sequence[object] | None = None) -> bytes:
    """An answer of OpenAI's form with these embeddings, and these values as their indices."""
    indices = range(len(vectors)) if indices is None else indices
    return json.dumps({"data": [{"index": i, "embedding": v} for i, v in zip(indices, vectors, strict=True)]}).encode()


def packed(*numbers: float, kind: str = "<f4") -> str:
    return base64.b64encode(np.array(numbers, dtype=kind).tobytes()).decode()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"<html><body>Bad\x1b[31m gateway</body></html>", "no JSON: <html><body>Bad"),
        (b"", r"no JSON: \(nothing\)"),
        (b"\xff\xfe", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b"null", "no list of vectors: null"),
        (b"[1, 2]", "no list of vectors"),
        (b'{"error": {"message": "quota\\nused up"}}', "no list of vectors: .*quota"),
        (b'{"data": null}', "no list of vectors"),
        (b'{"data": {"index": 0}}', "no list of vectors"),
        (b'{"data": []}', "0 vectors for 2 texts"),
        (vectors_answer([1, 2]), "1 vectors for 2 texts"),
        (vectors_answer([1, 2], [1, 2], [1, 2]), "3 vectors for 2 texts"),
        (b'{"data": [null, null]}', "index is not each of 0 to 1 once"),
        (b'{"data": [{"embedding": [1, 2]}, {"embedding": [1, 2]}]}', "index is not each of 0 to 1 once: None"),
        (vectors_answer([1, 2], [1, 2], indices=[0, 0]), "index is not each of 0 to 1 once: 0"),
        (vectors_answer([1, 2], [1, 2], indices=[1, 2]), "index is not each of 0 to 1 once: 2"),
        (vectors_answer([1, 2], [1, 2], indices=[0, True]), "index is not each of 0 to 1 once: True"),
        (vectors_answer([1, 2], [1, 2], indices=["0", "1"]), "index is not each"),
        (vectors_answer([1, 2], None), "no vector for text 2 of 2: null found where"),
        (vectors_answer([1, 2], {"values": [1]}), "text 2 of 2: object found where"),
        (vectors_answer([1, 2], [1, None]), "text 2 of 2: a list that holds something else than numbers"),
        (vectors_answer([1, 2], [[1, 2]]), "a list that holds something else than numbers"),
        (vectors_answer([1, 2], ["1", "2"]), "a list that holds something else than numbers"),
        (vectors_answer([1, 2], [True, False]), "a list that holds something else than numbers"),
        (vectors_answer([1, 2], []), "it has no numbers"),
        (vectors_answer([1, 2], ""), "it has no numbers"),
        (vectors_answer([1, 2], [1, 2, 3]), "vectors of 3 and of 2 numbers"),
        (vectors_answer([1, 2], [1]), "vectors of 1 and of 2 numbers"),
        (vectors_answer([1, 2, 3], [1, 2, 3]), "vectors of 3 and of 2 numbers"),
        (vectors_answer([1, 2], packed(1, 2, kind="<f8")), "vectors of 4 and of 2 numbers"),
        (vectors_answer([1, 2], [1, float("nan")]), "text 2 of 2: a number that is not finite"),
        (vectors_answer([1, 2], [1, float("inf")]), "a number that is not finite"),
        (vectors_answer([1, 2], [1, 1e300]), "a number that is not finite"),
        (vectors_answer([1, 2], [1, 10**400]), "a number that is not finite"),
        (vectors_answer([1, 2], packed(1, float("nan"))), "a number that is not finite"),
        (vectors_answer([1, 2], [0, 0]), "all its numbers are 0"),
        (vectors_answer([1, 2], "AAAA!AAA"), "text 2 of 2: "),
        (vectors_answer([1, 2], "AAAAAAA="), "text 2 of 2: "),
    ],
)  # fmt: skip
def test_an_answer_that_is_no_vectors_is_one_sentence(
    foreign: tuple[HTTPServer, EmbeddingModel], content: bytes, problem: str
) -> None:
    server, model = foreign
    ForeignServer.content = content
    with pytest.raises(EngineError, match=problem) as caught:
        model.encode(["one", "two"])
    message = str(caught.value)
    assert f"127.0.0.1:{server.server_port}" in message and "model" in message
    assert message.isprintable() and len(message) < 500
    assert len(ForeignServer.bodies) == 2, "an answer that came is not asked for again"


def test_vectors_in_any_order_and_form_are_read(foreign: tuple[HTTPServer, EmbeddingModel]) -> None:
    _, model = foreign
    ForeignServer.content = vectors_answer([3, 4.5], packed(1, 2), indices=[1, 0])
    np.testing.assert_array_equal(model.encode(["one", "two"]), [[1, 2], [3, 4.5]])


@pytest.mark.parametrize(
    ("status", "headers", "problem", "tries"),
    [
        (302, (("Location", "http://elsewhere.example/"),), r"HTTP 302 \(to http://elsewhere.example/\)", 1),
        (404, (), "HTTP 404: a body over two lines", 1),
        (503, (("Retry-After", "-5"),), "HTTP 503", 6),
        (503, (("Retry-After", "nan"),), "HTTP 503", 6),
        (200, (("Content-Encoding", "gzip"),), "DecodingError", 6),
    ],
)
def test_another_status_is_one_sentence(
    foreign: tuple[HTTPServer, EmbeddingModel],
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    headers: tuple[tuple[str, str], ...],
    problem: str,
    tries: int,
) -> None:
    _, model = foreign
    ForeignServer.status, ForeignServer.headers_sent, ForeignServer.content = status, headers, b"a body\nover two lines"
    waits: list[float] = []
    monkeypatch.setattr("unmask.evaluate.models.endpoint.time.sleep", waits.append)
    with pytest.raises(EngineError, match=problem) as caught:
        model.encode(["one"])
    assert str(caught.value).isprintable()
    assert len(ForeignServer.bodies) == 1 + tries
    assert all(0 <= wait <= 60 for wait in waits)


def test_an_answer_without_end_is_cut(
    foreign: tuple[HTTPServer, EmbeddingModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model = foreign
    ForeignServer.content = b" " * 5000
    monkeypatch.setattr("unmask.evaluate.models.endpoint._MAX_ANSWER_BYTES", 4000)
    with pytest.raises(EngineError, match="gave more than 0 MiB"):
        model.encode(["one"])
    monkeypatch.setattr("unmask.evaluate.models.endpoint._ANSWER_S", -1.0)
    ForeignServer.content = b" " * 50
    with pytest.raises(EngineError, match="an answer that has not ended"):
        model.encode(["one"])


@pytest.mark.parametrize(
    ("url", "key"), [("http://127.0.0.1:port/v1", "sk"), ("http://127.0.0.1:9/v1", "sk-schl\u00fcssel")]
)
def test_an_endpoint_that_cannot_be_called_is_a_usage_error(
    monkeypatch: pytest.MonkeyPatch, url: str, key: str
) -> None:
    monkeypatch.setenv("SOME_KEY", key)
    with pytest.raises(UsageError, match="cannot be called") as caught:
        open_model(f"{url}#model?key=SOME_KEY")
    assert key not in str(caught.value) or key == "sk"


@pytest.mark.parametrize("name", ["google/embeddinggemma-300m", "Qwen/Qwen3-Embedding-0.6B"])
def test_an_embedder_of_another_maker_is_evaluated_as_its_library_does(
    name: str, published: Callable[[str], Path]
) -> None:
    folder = str(published(name))
    ours, theirs = open_model(f"unmask:{folder}"), open_model(folder)
    assert (ours.kind, theirs.kind) == ("unmask", "sentence-transformers")
    assert ours.takes_instructions and ours.dimensions == theirs.dimensions
    for instruction in ("", "Given a question, find answers:"):
        assert np.abs(ours.encode(TEXTS, instruction) - theirs.encode(TEXTS, instruction)).max() <= 1e-5
        assert ours.count_tokens(TEXTS, instruction) == theirs.count_tokens(TEXTS, instruction)
