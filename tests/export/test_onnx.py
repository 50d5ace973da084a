"""ONNX folders: ONNX Runtime gives the model's vectors with nothing but tokenizer and graph."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tests.checkpoint.layouts import LAYOUTS, write_layout
from tests.export.tiny import FAMILIES, FEW, GOLDEN, WINDOW, tiny_model, tokenizer_with_digits
from unmask import Encoder
from unmask.export import ExportOptions, ParityReport, run_export, run_parity
from unmask.export.onnx_weights import block_steps, hadamard
from unmask.export.onnx_writer import _varint

QUESTION = "Given a question (of any kind), find passages that answer it:"


def exported(model: Path, output: Path, **options: Any) -> ParityReport | None:
    options.setdefault("instructions", {"query": QUESTION})
    options.setdefault("texts", FEW)
    return run_export(ExportOptions(model=str(model), target="onnx", output=output, **options), lambda line: None)


def worst(report: ParityReport | None, use: str = "") -> float:
    assert report is not None and report.passed, report
    return min(row.worst for row in report.rows if row.gate and row.use.startswith(use))


@pytest.mark.parametrize("name", GOLDEN)
def test_all_golden_templates_are_exact_queries_included(golden_dir: Path, tmp_path: Path, name: str) -> None:
    report = exported(golden_dir / name, tmp_path / "out")
    assert worst(report, "queries") >= 0.999999 and worst(report) >= 0.999999
    assert report is not None and not [row for row in report.rows if "joining space" in row.use]
    onnx.checker.check_model(str(tmp_path / "out" / "onnx" / "model.onnx"), full_check=True)
    # transformers.js drops what follows a long text, here the end of a chat template
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("shorten such texts first" in card) == name.endswith(("chat", "instruct"))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_exact_beyond_its_window_too(tmp_path: Path, family: str) -> None:
    model = tiny_model(tmp_path / "model", family)
    assert worst(exported(model, tmp_path / "out")) >= 0.999999
    assert WINDOW < 96  # the length of the longest texts


@pytest.mark.parametrize("pooling", ["weighted_mean", "last_token", "eos_token", "first_token", "bos_token"])
def test_every_pooling_is_in_the_graph(golden_dir: Path, tmp_path: Path, pooling: str) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in (golden_dir / "tiny_llama").iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    (model / "llm2vec_config.json").write_text(json.dumps({"pooling_mode": pooling, "max_length": 64}))
    assert worst(exported(model, tmp_path / "out")) >= 0.999999


@pytest.mark.parametrize("layout", LAYOUTS)
def test_models_of_other_makers_are_exact(tmp_path: Path, layout: str) -> None:
    model = write_layout(tmp_path / "model", LAYOUTS[layout])
    assert worst(exported(model, tmp_path / "out", instructions={})) >= 0.999999


@pytest.mark.parametrize(("dtype", "least"), [("float16", 0.999), ("q8", 0.995)])
def test_fewer_bits_keep_the_gate_alone_and_in_a_batch(tmp_path: Path, dtype: str, least: float) -> None:
    model = tiny_model(tmp_path / "model", "llama")
    report = exported(model, tmp_path / "out", dtype=dtype)
    assert worst(report) >= least
    assert report is not None
    alone, batch = (
        {row.use: row.worst for row in report.rows if row.batching == batching} for batching in ("alone", "in a batch")
    )
    assert alone.keys() == batch.keys() and all(abs(alone[use] - batch[use]) < 1e-4 for use in alone)
    (file,) = (tmp_path / "out" / "onnx").glob("*.onnx")
    card = (tmp_path / "out" / "README.md").read_text()
    assert f'InferenceSession("out/onnx/{file.name}")' in card and f'model_file="onnx/{file.name}"' in card
    assert f'dtype: "{"fp16" if dtype == "float16" else dtype}"' in card


def test_a_plain_mean_of_the_token_output_is_exact_too(golden_dir: Path, tmp_path: Path) -> None:
    """Consumers that know nothing but "mean over the attention mask, then normalise" get the same vectors."""
    exported(golden_dir / "tiny_llama", tmp_path / "out", check=False)
    assert (
        "text-embeddings-router --model-id path/to/out --pooling mean" in (tmp_path / "out" / "README.md").read_text()
    )
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "onnx" / "model.onnx"))
    assert [output.name for output in session.get_outputs()] == ["last_hidden_state", "sentence_embedding"]
    assert [value.name for value in session.get_inputs()] == ["input_ids", "attention_mask"]
    encoder = Encoder.load(golden_dir / "tiny_llama", dtype="float32")
    prompts = encoder.prompts.build(["a text", "another, longer text"], QUESTION)
    longest = max(len(prompt.ids) for prompt in prompts)
    ids = np.stack([np.pad(prompt.ids, (0, longest - len(prompt.ids))) for prompt in prompts])
    mask = np.stack([np.arange(longest) < len(prompt.ids) for prompt in prompts]).astype(np.int64)
    states, vectors = map(np.asarray, session.run(None, {"input_ids": ids, "attention_mask": mask}))
    mean = (states * mask[:, :, None]).sum(1) / mask.sum(1, keepdims=True)
    mean /= np.linalg.norm(mean, axis=1, keepdims=True)
    ours = encoder.encode(["a text", "another, longer text"], instruction=QUESTION, normalize=True)
    np.testing.assert_allclose(mean, ours, atol=1e-6)
    np.testing.assert_allclose(vectors, ours, atol=1e-6)


def test_a_cut_is_in_the_graph_and_scaled_again(golden_dir: Path, tmp_path: Path) -> None:
    assert worst(exported(golden_dir / "tiny_llama", tmp_path / "out", dimensions=32)) >= 0.999999
    assert "call the model, and take `sentence_embedding`" in (tmp_path / "out" / "README.md").read_text()
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "onnx" / "model.onnx"))
    feed = {"input_ids": np.array([[1, 20, 30]]), "attention_mask": np.ones((1, 3), np.int64)}
    (vector,) = map(np.asarray, session.run(["sentence_embedding"], feed))
    assert vector.shape == (1, 32) and abs(np.linalg.norm(vector) - 1) < 1e-6


def test_weights_go_to_a_file_of_their_own_where_a_message_ends(
    golden_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unmask.export.onnx_writer._MAX_MESSAGE", 100_000)
    assert worst(exported(golden_dir / "tiny_llama", tmp_path / "out")) >= 0.999999
    assert (tmp_path / "out" / "onnx" / "model.onnx.data").stat().st_size > 600_000


def test_a_causal_graph_is_named(tmp_path: Path) -> None:
    model, causal = tiny_model(tmp_path / "model", "llama"), tiny_model(tmp_path / "causal", "llama", causal=True)
    exported(causal, tmp_path / "out", check=False)
    report = run_parity(str(model), str(tmp_path / "out" / "onnx" / "model.onnx"), texts=FEW)
    assert "keeps the causal mask" in report.faults[0]


@given(st.integers(0, 2**63 - 1))
def test_a_varint_is_read_back_by_protobuf(value: int) -> None:
    tensor = onnx.TensorProto()
    tensor.ParseFromString(bytes([1 << 3]) + _varint(value))  # field 1 is `dims`
    assert list(tensor.dims) == [value]


@settings(max_examples=20)
@given(st.integers(1, 5), st.integers(1, 100), st.integers(0, 1000))
def test_block_steps_are_within_half_a_step(rows: int, columns: int, seed: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).numpy()
    steps, sizes = block_steps(weight)
    restored = (steps.astype(np.float32) - 128) * sizes.reshape(rows, -1, 1)
    off = np.abs(restored.reshape(rows, -1)[:, :columns] - weight)
    assert (off <= np.repeat(sizes.reshape(rows, -1), 32, axis=1)[:, :columns] * 0.501 + 1e-7).all()


def test_the_hadamard_matrix_is_its_own_inverse() -> None:
    np.testing.assert_allclose(hadamard(64) @ hadamard(64), np.eye(64), atol=1e-6)


@pytest.fixture(scope="module", params=[True, False], ids=["each digit", "digits in a row"])
def two_tokenizers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A model's own tokenizer, and the one of its ONNX folder."""
    folder = tmp_path_factory.mktemp("digits")
    model = tiny_model(folder / "model", "llama", lambda: tokenizer_with_digits(request.param))
    exported(model, folder / "out", check=False)
    own, written = (Tokenizer.from_file(str(folder / name / "tokenizer.json")) for name in ("model", "out"))
    assert "Digits" in own.to_str() and "Digits" not in written.to_str()  # transformers.js reads 0 to 9 alone
    return own, written


@given(st.text(st.characters(exclude_categories=["Cs"]) | st.characters(categories=["Nd", "Nl", "No"]), max_size=40))
@settings(deadline=None)
def test_numbers_of_unicode_keep_their_tokens(two_tokenizers: tuple[Any, Any], text: str) -> None:
    own, written = (tokenizer.encode(text, add_special_tokens=False).ids for tokenizer in two_tokenizers)
    assert own == written
