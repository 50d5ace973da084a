"""GGUF files: llama.cpp gives the model's vectors, and our own reader the tensors and ids that were written."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.checkpoint.layouts import LAYOUTS, write_layout
from tests.export.tiny import FAMILIES, FEW, tiny_model, tokenizer_without_bos
from unmask import Encoder
from unmask.checkpoint.gguf import open_gguf, tensor_types
from unmask.errors import ExportError
from unmask.export import ExportOptions, ParityReport, run_export, run_parity
from unmask.export.parity import parity_texts

TEXTS = ["an ordinary text", "x", "  two blanks, and 12 numbers ", "東京 été"]


def exported(model: Path, output: Path, **options: Any) -> ParityReport | None:
    options.setdefault("texts", FEW)
    return run_export(ExportOptions(model=str(model), target="gguf", output=output, **options), lambda line: None)


def worst(report: ParityReport | None) -> float:
    assert report is not None and report.passed, report
    return min(row.worst for row in report.rows if row.gate)


def only_gguf(folder: Path) -> Path:
    (file,) = folder.glob("*.gguf")
    return file


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_gives_the_vectors_of_every_family(tmp_path: Path, family: str) -> None:
    model = tiny_model(tmp_path / "model", family)
    assert worst(exported(model, tmp_path / "out")) >= 0.9999
    source, again = Encoder.load(model, dtype="float32"), Encoder.load(only_gguf(tmp_path / "out"), dtype="float32")
    # llama.cpp's file says all that we need: unmask reads the same vectors from it.
    np.testing.assert_allclose(again.encode(TEXTS), source.encode(TEXTS, normalize=True), atol=2e-6)
    assert (tmp_path / "out" / "Modelfile").read_text().startswith(f"FROM ./{only_gguf(tmp_path / 'out').name}\n")


@pytest.mark.parametrize(("dtype", "kinds"), [("float16", {"F16"}), ("q8", {"F16", "Q8_0"})])
def test_fewer_bits_are_as_near_as_the_gate(tmp_path: Path, dtype: str, kinds: set[str]) -> None:
    model = tiny_model(tmp_path / "model", "llama")
    report = exported(model, tmp_path / "out", dtype=dtype)
    assert worst(report) >= 0.995
    assert tensor_types(only_gguf(tmp_path / "out")) == kinds


def with_head(folder: Path, family: str, outputs: int, steps: Sequence[dict[str, Any]], **options: Any) -> Path:
    """A tiny model with a linear layer behind the mean, whose states have 32 numbers."""
    model = tiny_model(folder, family, head=steps, **options)
    generator = torch.Generator().manual_seed(7)
    weight, bias = (torch.randn(*size, generator=generator) * 0.3 for size in ((outputs, 32), (outputs,)))
    save_file({"weight": weight, "bias": bias}, model / "head.safetensors")
    return model


LINEAR = {"kind": "dense", "activation": "identity"}


@pytest.mark.parametrize("steps", [[LINEAR], [LINEAR, {"kind": "normalize"}]])
@pytest.mark.parametrize("family", ["llama", "llama3 rope", "mistral", "qwen2"])
def test_a_linear_layer_behind_the_mean_becomes_a_layer_of_the_decoder(
    tmp_path: Path, family: str, steps: list[dict[str, Any]]
) -> None:
    model = with_head(tmp_path / "model", family, 32, steps)
    assert worst(exported(model, tmp_path / "out")) >= 0.9999
    source, again = Encoder.load(model, dtype="float32"), Encoder.load(only_gguf(tmp_path / "out"), dtype="float32")
    assert again.checkpoint.config["num_hidden_layers"] == source.checkpoint.config["num_hidden_layers"] + 1
    np.testing.assert_allclose(again.encode(TEXTS), source.encode(TEXTS, normalize=True), atol=2e-6)


@pytest.mark.parametrize("dtype", ["float16", "q8"])
def test_the_layer_of_a_head_keeps_its_bits(tmp_path: Path, dtype: str) -> None:
    model = with_head(tmp_path / "model", "llama", 32, [LINEAR])
    assert worst(exported(model, tmp_path / "out", dtype=dtype)) >= 0.995
    assert "F32" in tensor_types(only_gguf(tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert ("do not quantise the file again" in card) == (dtype == "float16")


@pytest.mark.parametrize(
    ("family", "outputs", "steps", "options"),
    [
        ("llama", 24, [LINEAR], {}),
        ("llama", 32, [{"kind": "dense", "activation": "tanh"}], {}),
        ("llama", 32, [LINEAR], {"causal": True}),
        ("llama", 32, [LINEAR], {"pooling_mode": "last_token"}),
        ("qwen3", 32, [LINEAR], {}),
        ("gemma2", 32, [LINEAR], {}),
    ],
)
def test_other_layers_behind_the_pooling_are_refused(
    tmp_path: Path, family: str, outputs: int, steps: list[dict[str, Any]], options: dict[str, Any]
) -> None:
    model = with_head(tmp_path / "model", family, outputs, steps, **options)
    with pytest.raises(ExportError, match=r"a place for one linear layer behind a mean.*use --to hub or --to onnx"):
        exported(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def refusals(*pairs: tuple[str, str]) -> Sequence[tuple[str, str]]:
    return pairs


@pytest.mark.parametrize(
    ("name", "reason"),
    refusals(
        ("tiny_llama", "llama.cpp pools every token, BOS too"),
        ("tiny_gemma", "llama.cpp pools every token, BOS too"),
        ("tiny_llama3_instruct", "adds no template"),
    ),
)
def test_models_whose_bos_or_template_is_not_pooled_are_refused(
    golden_dir: Path, tmp_path: Path, name: str, reason: str
) -> None:
    with pytest.raises(ExportError, match=reason):
        exported(golden_dir / name, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_instruction_is_refused_and_written_with_its_loss_where_that_is_allowed(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", "llama", query_instruction="Find what answers it:")
    with pytest.raises(ExportError, match="pools the instruction of a query"):
        exported(model, tmp_path / "out")
    report = exported(model, tmp_path / "out", allow_inexact=True)
    assert report is not None and not report.passed
    by_use = {row.use: row.worst for row in report.rows}
    assert by_use["queries"] < 0.99 < 0.9999 <= by_use["texts"]
    assert "pools the mean of all tokens; the model leaves out BOS, template and instruction" in report.faults[0]


def test_a_window_that_looks_back_only_is_refused(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", "gemma2", max_length=300)
    with pytest.raises(ExportError, match="looks back only"):
        exported(model, tmp_path / "out")


WINDOWED = {"sliding_window": 20, "use_sliding_window": True, "max_window_layers": 0}


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "gemma2", "gemma3"])
def test_a_causal_window_is_written_where_llama_cpp_applies_it(tmp_path: Path, family: str) -> None:
    kind = FAMILIES[family]["model_type"]
    layout = replace(
        LAYOUTS["codefuse-ai/F2LLM-0.6B"],
        config={**FAMILIES[family], **WINDOWED, "layer_types": None},
        tokenizer=tokenizer_without_bos,
        prompts={},
        lengths={"max_seq_length": 200},
    )
    model = write_layout(tmp_path / "model", layout)
    longer = [*FEW, "the river runs under an old stone bridge " * 9]
    if kind.startswith("gemma"):
        assert worst(exported(model, tmp_path / "out", texts=longer)) >= 0.9999
        return
    with pytest.raises(ExportError, match=r"a window shorter than a text: llama\.cpp has no window for this family"):
        exported(model, tmp_path / "out", texts=longer)
    within = write_layout(tmp_path / "within", replace(layout, lengths={"max_seq_length": 20}))
    assert worst(exported(within, tmp_path / "out")) >= 0.9999


@pytest.mark.parametrize(("max_length", "longest"), [(4000, 2612), (2300, 2300), (2100, 2048)])
def test_one_text_of_parity_goes_beyond_a_window(tmp_path: Path, max_length: int, longest: int) -> None:
    layout = replace(
        LAYOUTS["codefuse-ai/F2LLM-0.6B"],
        config={"model_type": "mistral", "sliding_window": 2100, "max_position_embeddings": 4096},
        lengths={"max_seq_length": max_length},
    )
    encoder = Encoder.load(write_layout(tmp_path / "model", layout))
    lengths = encoder.count_tokens([text.text for text in parity_texts(encoder, truncating=False)])
    assert longest - 12 < max(lengths) <= longest


@pytest.mark.parametrize("layout", LAYOUTS)
def test_models_of_other_makers_are_written_or_refused_with_the_reason(tmp_path: Path, layout: str) -> None:
    model = write_layout(tmp_path / "model", LAYOUTS[layout])
    try:
        report = exported(model, tmp_path / "out")
    except ExportError as error:
        assert "--to gguf" in str(error) and not (tmp_path / "out").exists()
        windowed = "a window shorter than a text" in str(error)
        assert windowed == (LAYOUTS[layout].config["model_type"] == "mistral")
        assert layout == "google/embeddinggemma-300m" or windowed or "tokenizer" in str(error)
    else:
        assert worst(report) >= 0.9999


def test_a_gguf_file_is_written_again_with_its_own_tokenizer(tmp_path: Path) -> None:
    first = tiny_model(tmp_path / "model", "qwen3")
    exported(first, tmp_path / "a", check=False)
    source = only_gguf(tmp_path / "a")
    assert worst(exported(source, tmp_path / "b")) >= 0.9999
    fields = [open_gguf(only_gguf(tmp_path / name))[2].text.get_vocab() for name in "ab"]
    assert fields[0] == fields[1]


def test_a_causal_file_is_named(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", "llama")
    causal = tiny_model(tmp_path / "causal", "llama", causal=True)
    exported(causal, tmp_path / "out", check=False)
    report = run_parity(str(model), str(only_gguf(tmp_path / "out")), texts=FEW)
    assert "keeps the causal mask" in report.faults[0]
