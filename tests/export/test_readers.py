"""fastembed and transformers.js read ONNX folders of all golden templates to the model's vectors, queries included."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from parity_readers import fastembed_runtime, transformers_js_runtime

from tests.conftest import model_cache
from tests.export.tiny import FEW, GOLDEN, tiny_model, tokenizer_with_digits
from unmask import Encoder
from unmask.errors import CheckpointError
from unmask.export import ExportOptions, ParityReport, run_export
from unmask.export.capabilities import describe_model
from unmask.export.parity import compare_runtimes, prompt_texts
from unmask.export.runtimes import OtherRuntime

QUESTION = "Given a question (of any kind), find passages that answer it:"
FILES = {"float32": "onnx/model.onnx", "q8": "onnx/model_quantized.onnx"}
# The ids of control tokens are in the vocabulary of these models: a reader that looks for them in texts would differ.
TEXTS = [*FEW, "<bos> or <|eot_id|> inside a text"]


def exported(model: Path, output: Path, dtype: str = "float32") -> Path:
    """Export a model with a query instruction; return the graph's file."""
    instructions = {"query": QUESTION}
    run_export(
        ExportOptions(
            model=str(model), target="onnx", output=output, dtype=dtype, instructions=instructions, check=False
        ),
        lambda line: None,
    )
    return output / FILES[dtype]


def compared(model: Path, open_runtime: Callable[[dict], OtherRuntime], texts: Sequence[str] = TEXTS) -> ParityReport:
    encoder = Encoder.load(model, dtype="float32")
    described = describe_model(encoder.checkpoint, {"query": QUESTION})
    return compare_runtimes(encoder, described, [open_runtime(prompt_texts(described))], texts=texts)


def assert_exact(report: ParityReport, least: float = 0.999999) -> None:
    assert report.passed, report.faults
    assert {row.use for row in report.rows} >= {"texts", "documents", "queries"}
    assert {row.batching for row in report.rows} == {"alone", "in a batch"}
    assert min(row.worst for row in report.rows if row.gate) >= least


@pytest.mark.parametrize("name", GOLDEN)
def test_fastembed_reads_every_golden_template(golden_dir: Path, tmp_path: Path, name: str) -> None:
    file = exported(golden_dir / name, tmp_path / "out")
    report = compared(golden_dir / name, lambda before: fastembed_runtime(file, 64, before, model_cache()))
    assert_exact(report)


@pytest.mark.parity
@pytest.mark.parametrize("dtype", FILES)
@pytest.mark.parametrize("name", GOLDEN)
def test_transformers_js_reads_every_golden_template(golden_dir: Path, tmp_path: Path, name: str, dtype: str) -> None:
    file = exported(golden_dir / name, tmp_path / "out", dtype)
    report = compared(golden_dir / name, lambda before: transformers_js_runtime(file, before, model_cache()))
    assert_exact(report, 0.999999 if dtype == "float32" else 0.995)


@pytest.mark.parity
@pytest.mark.parametrize("individual", [True, False])
def test_transformers_js_reads_every_number_of_unicode(tmp_path: Path, individual: bool) -> None:
    model = tiny_model(tmp_path / "model", "llama", lambda: tokenizer_with_digits(individual))
    file = exported(model, tmp_path / "out")
    texts = ["½ cup and 12³ m²", "①②③ or ⅣⅤ", "٣٤ and ४५ and 二十", "a½b1½2"]
    report = compared(model, lambda before: transformers_js_runtime(file, before, model_cache()), texts)
    assert_exact(report)


def test_a_reader_that_ends_is_named_with_its_last_words(tmp_path: Path) -> None:
    (tmp_path / "onnx").mkdir()
    file = tmp_path / "onnx" / "model.onnx"
    file.write_bytes(b"no graph")
    with pytest.raises(CheckpointError, match="fastembed_reader"):
        fastembed_runtime(file, 64, {}, model_cache())
