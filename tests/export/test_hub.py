"""Hub folders: our own loader reads them to the same bits, sentence-transformers to the same vectors."""

import json
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Regex, normalizers

from tests.checkpoint.layouts import LAYOUTS, write_layout
from tests.export.tiny import FEW
from unmask import Encoder
from unmask.checkpoint import open_checkpoint
from unmask.checkpoint.hub_config import hub_config
from unmask.checkpoint.tokenizer import prompt_rule
from unmask.encoder.model.architectures import ARCHITECTURES, shape_of
from unmask.errors import CheckpointError, ExportError
from unmask.export import ExportOptions, ParityReport, run_export, run_parity
from unmask.export.runtimes import open_runtimes

QUESTION = "Given a question (of any kind), find passages that answer it:"
TEXTS = ["an ordinary text", "x", "  two blanks, and 12 numbers ", "7 lamps", "</s> typed by a user", QUESTION + " "]


def exported(model: Path, output: Path, **options: Any) -> ParityReport | None:
    lines: list[str] = []
    options.setdefault("instructions", {"query": QUESTION})
    options.setdefault("texts", FEW)
    return run_export(ExportOptions(model=str(model), target="hub", output=output, **options), lines.append)


def assert_same_bits(model: Path, folder: Path) -> None:
    source, again = Encoder.load(model, dtype="float32"), Encoder.load(folder, dtype="float32")
    np.testing.assert_array_equal(again.encode(TEXTS), source.encode(TEXTS))
    np.testing.assert_array_equal(again.encode_query(TEXTS), source.encode(TEXTS, instruction=QUESTION))


def gated(report: ParityReport | None) -> Mapping[str, float]:
    assert report is not None and report.passed, report
    return {f"{row.runtime.split()[0]} {row.use} {row.batching}": row.worst for row in report.rows if row.gate}


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gemma", "tiny_llama3_instruct"])
def test_a_folder_is_read_to_the_same_bits_and_by_sentence_transformers(
    golden_dir: Path, tmp_path: Path, name: str
) -> None:
    report = exported(golden_dir / name, tmp_path / name, texts=())
    worst = gated(report)
    assert {"unmask", "sentence-transformers"} == {key.split()[0] for key in worst}
    assert {"texts", "documents", "queries"} == {key.split()[1] for key in worst}
    assert min(worst.values()) >= 0.99999
    assert_same_bits(golden_dir / name, tmp_path / name)
    card = (tmp_path / name / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: sentence-transformers\n") and "encode_query" in card
    assert f"vllm serve path/to/{name} --runner pooling --dtype float32" in card
    assert "| sentence-transformers" in card and json.loads((tmp_path / name / "parity.json").read_text())["passed"]


@pytest.mark.parametrize("name", ["tiny_llama2_chat", "tiny_mistral_instruct"])
def test_a_template_that_ends_in_words_is_refused_before_anything_is_written(
    golden_dir: Path, tmp_path: Path, name: str
) -> None:
    with pytest.raises(ExportError, match=r"--to hub cannot express this model: .*counts the end of the template"):
        exported(golden_dir / name, tmp_path / "out", allow_inexact=True)
    assert not (tmp_path / "out").exists()


def with_head(source: Path, folder: Path, bias: float, *, bos: bool = False) -> Path:
    """A tiny Llama and a linear layer behind the pooling, without BOS in its tokenizer or with it."""
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    if not bos:
        tokenizer = json.loads((folder / "tokenizer.json").read_text()) | {"post_processor": None}
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    torch.manual_seed(1)
    save_file({"weight": torch.randn(48, 64) * 0.2, "bias": torch.full((48,), bias)}, folder / "head.safetensors")
    settings = {"pooling_mode": "mean", "max_length": 64, "matryoshka": [48, 16]}
    (folder / "llm2vec_config.json").write_text(json.dumps(settings))
    return folder


def test_a_linear_head_and_matryoshka_lengths_go_along(golden_dir: Path, tmp_path: Path) -> None:
    model = with_head(golden_dir / "tiny_llama", tmp_path / "model", 0.3)
    assert min(gated(exported(model, tmp_path / "out")).values()) >= 0.99999
    assert_same_bits(model, tmp_path / "out")
    modules = json.loads((tmp_path / "out" / "modules.json").read_text())
    assert [module["path"] for module in modules] == ["", "1_Pooling", "2_Dense", "3_Normalize"]
    # vLLM reads every such file beside config.json as weights of the decoder.
    assert [file.name for file in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["matryoshka_dimensions"] == [48, 16]
    assert Encoder.load(tmp_path / "out").checkpoint.encoder_config["matryoshka"] == [48, 16]


def test_a_head_goes_along_where_bos_is_left_out_of_the_mean(golden_dir: Path, tmp_path: Path) -> None:
    model = with_head(golden_dir / "tiny_llama", tmp_path / "model", 0.3, bos=True)
    worst = gated(exported(model, tmp_path / "out", instructions={}))
    assert {"unmask", "sentence-transformers"} == {key.split()[0] for key in worst}
    assert min(worst.values()) >= 0.99999
    source, again = Encoder.load(model, dtype="float32"), Encoder.load(tmp_path / "out", dtype="float32")
    np.testing.assert_array_equal(again.encode(TEXTS), source.encode(TEXTS))
    modules = json.loads((tmp_path / "out" / "modules.json").read_text())
    kinds = ["Transformer", "WordWeights", "Pooling", "Dense", "Normalize"]
    assert [module["type"].rpartition(".")[2] for module in modules] == kinds
    # Behind an instruction sentence-transformers would be inexact, and unmask is not.
    exported(model, tmp_path / "asking", check=False, allow_inexact=True)
    assert_same_bits(model, tmp_path / "asking")


def test_files_for_other_libraries_stay_in_the_revision_of_a_folder_with_a_head(
    golden_dir: Path, tmp_path: Path
) -> None:
    exported(with_head(golden_dir / "tiny_llama", tmp_path / "model", 0.3), tmp_path / "out", check=False)
    files = [file.relative_to(tmp_path / "out").as_posix() for file in open_checkpoint(tmp_path / "out").files]
    assert files[files.index("modules.json") :] == [
        "modules.json",
        "1_Pooling/config.json",
        "2_Dense/config.json",
        "2_Dense/model.safetensors",
        "config_sentence_transformers.json",
        "sentence_bert_config.json",
    ]


def test_a_module_between_dense_layers_that_is_not_computed_is_named(golden_dir: Path, tmp_path: Path) -> None:
    exported(with_head(golden_dir / "tiny_llama", tmp_path / "model", 0.3), tmp_path / "out", check=False)
    modules = json.loads((tmp_path / "out" / "modules.json").read_text())
    modules.append({"idx": 4, "name": "4", "path": "4_LayerNorm", "type": "sentence_transformers.models.LayerNorm"})
    (tmp_path / "out" / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(CheckpointError, match="describes a module LayerNorm, which unmask does not compute"):
        open_checkpoint(tmp_path / "out")


def test_vectors_are_cut_to_a_matryoshka_length(golden_dir: Path, tmp_path: Path) -> None:
    exported(golden_dir / "tiny_llama", tmp_path / "out", dimensions=32)
    assert Encoder.load(tmp_path / "out").dim == 32
    settings = json.loads((tmp_path / "out" / "config_sentence_transformers.json").read_text())
    assert settings["truncate_dim"] == 32
    full = Encoder.load(golden_dir / "tiny_llama").encode(TEXTS)
    np.testing.assert_array_equal(Encoder.load(tmp_path / "out").encode(TEXTS), full[:, :32])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_models_of_other_makers_are_written_with_their_own_pooling(tmp_path: Path, layout: str) -> None:
    model = write_layout(tmp_path / "model", LAYOUTS[layout])
    report = exported(model, tmp_path / "out", instructions={})
    assert min(gated(report).values()) >= 0.99999


def test_a_prompt_rule_does_not_reach_our_own_loader(golden_dir: Path, tmp_path: Path) -> None:
    exported(golden_dir / "tiny_llama", tmp_path / "out", check=False)
    written = json.loads((tmp_path / "out" / "tokenizer.json").read_text())["normalizer"]["normalizers"]
    assert written == [prompt_rule(QUESTION + " ")]
    assert open_checkpoint(tmp_path / "out").tokenizer.text.normalizer is None


SPACED = st.text(st.sampled_from(" \n\r\t\x0b\x0c\x85\u2028\u2029ab"), max_size=6)


@given(SPACED, SPACED)
@settings(deadline=None)
def test_a_prompt_rule_changes_the_prompt_alone(before: str, after: str) -> None:
    """The patterns of tokenizers begin and end a line at ^ and $, so these would find a prompt inside a text."""
    rule = prompt_rule("Is it (so)? ")
    text = before + "Is it (so)? " + after
    changed = normalizers.Replace(Regex(rule["pattern"]["Regex"]), rule["content"]).normalize_str(text)
    assert changed == (text if before or after else "Is it (so)?")


def damage(folder: Path, file: str, **values: Any) -> None:
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(content | values))


def remove_module(folder: Path, kind: str) -> None:
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps([m for m in modules if not m["type"].endswith(kind)]))


FAULTS = {
    "causal": "keeps the causal mask",
    "another pooling": "pools the last token; the model pools the mean",
    "BOS in the mean": "pools the mean of all tokens; the model leaves out BOS, template and instruction",
    "not normalised": "does not scale vectors to length 1",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_that_is_wrong_fails_with_the_sentence_that_names_it(
    golden_dir: Path, tmp_path: Path, fault: str
) -> None:
    folder = tmp_path / "out"
    exported(golden_dir / "tiny_llama", folder, check=False, instructions={})
    (folder / "llm2vec_config.json").unlink()  # unmask would read its own settings
    if fault == "causal":
        damage(folder, "config.json", is_causal=True, use_bidirectional_attention=False)
    elif fault == "another pooling":
        damage(folder, "1_Pooling/config.json", pooling_mode_mean_tokens=False, pooling_mode_lasttoken=True)
    else:
        remove_module(folder, "WordWeights" if fault == "BOS in the mean" else "Normalize")
    report = run_parity(str(golden_dir / "tiny_llama"), str(folder), texts=FEW)
    assert not report.passed
    assert FAULTS[fault] in report.faults[0]


def test_other_weights_are_another_model(golden_dir: Path, tmp_path: Path) -> None:
    exported(golden_dir / "tiny_llama", tmp_path / "out", check=False, instructions={})
    weights = load_file(tmp_path / "out" / "model.safetensors")
    torch.manual_seed(0)
    save_file({k: w + 0.5 * torch.randn_like(w) for k, w in weights.items()}, tmp_path / "out" / "model.safetensors")
    report = run_parity(str(golden_dir / "tiny_llama"), str(tmp_path / "out"), texts=FEW)
    assert len(report.faults) == 2 and all("is another model" in fault for fault in report.faults)


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_every_family_has_the_keys_that_runtimes_read(family: str) -> None:
    sizes = {"vocab_size": 90, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    source = {"model_type": family, **sizes, "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 16}
    written = hub_config(source, causal=False)
    assert written["use_bidirectional_attention"] is True
    assert ("is_causal" in written) == (family != "gemma3_text")  # together they set transformers' window off by one
    assert written["architectures"] and "rope_parameters" not in written
    shapes = shape_of(source), shape_of(written)
    assert shapes[0] == shapes[1]  # the same windows, whatever key states them
    for key in ("hidden_act", "rms_norm_eps", "initializer_range", "attention_bias", "rope_theta"):
        assert written[key] is not None  # TEI has no default
    causal = hub_config(written, causal=True)
    assert causal["is_causal"] is True and "use_bidirectional_attention" not in causal
    assert causal.get("sliding_window") == 16


def test_an_unknown_target_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(Exception, match=r"holds no modules\.json"):
        open_runtimes(str(tmp_path / "empty"), {})


@pytest.mark.parametrize(("dtype", "least"), [("float16", 0.999), ("bfloat16", 0.995)])
def test_fewer_bits_keep_their_gate(golden_dir: Path, tmp_path: Path, dtype: str, least: float) -> None:
    report = exported(golden_dir / "tiny_llama", tmp_path / "out", dtype=dtype)
    assert min(gated(report).values()) >= least
    assert report is not None and {row.dtype for row in report.rows} == {dtype}


def test_the_commands_print_the_verdict_first_and_end_with_their_code(
    golden_dir: Path, tmp_path: Path, unmask: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("an ordinary text\n7 lamps\n")
    model, folder = str(golden_dir / "tiny_llama"), str(tmp_path / "out")
    done = unmask("export", model, "--to", "hub", "--output", folder, "--no-check")
    assert done.returncode == 0 and done.stderr.startswith("hub: exact\n")
    same = unmask("parity", model, folder, "--texts", str(texts))
    assert same.returncode == 0 and "sentence-transformers" in same.stdout
    damage(tmp_path / "out", "1_Pooling/config.json", pooling_mode_mean_tokens=False, pooling_mode_lasttoken=True)
    other = unmask("parity", model, folder, "--texts", str(texts))
    assert other.returncode == 1 and "pools the last token; the model pools the mean" in other.stderr
    refused = unmask("export", model, "--to", "gguf", "--output", str(tmp_path / "gguf"))
    assert refused.returncode == 1 and "BOS is not pooled" in refused.stderr
