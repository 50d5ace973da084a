"""Adapters trained after `resize_token_embeddings`: the same weights as PEFT, and the adapter's own tokenizer."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer
from transformers import AutoModel, AutoModelForCausalLM

from unmask import Encoder
from unmask.checkpoint import open_checkpoint
from unmask.errors import AdapterMismatch, CheckpointError
from unmask.training.merging import merge_adapters

ADDED = ["<|cite|>", "zorkmid", "[PAD]", "unmasked"]
PLAIN = "an ordinary text"
NEW = "a zorkmid is unmasked"


def rows_of(base: Path) -> int:
    return json.loads((base / "config.json").read_text())["vocab_size"]


def resized(model_class: Any, base: Path, target: Path, rows: int, save: Any = "auto", **settings: Any) -> PeftModel:
    """Save with PEFT an adapter of a model whose embedding was given `rows`, with every trained parameter random."""
    torch.manual_seed(5)
    model = model_class.from_pretrained(base)
    model.resize_token_embeddings(rows)
    peft = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], **settings}))
    for name, parameter in peft.named_parameters():
        if "magnitude" in name:
            torch.nn.init.uniform_(parameter, 0.5, 2.0)
        elif parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    peft.save_pretrained(str(target), save_embedding_layers=save)
    return peft


def write_tokenizer(base: Path, target: Path) -> Tokenizer:
    """Write the base's tokenizer with four added tokens, the first of them a control token."""
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken(token, special=token == ADDED[0], normalized=False) for token in ADDED])
    tokenizer.save(str(target / "tokenizer.json"))
    shutil.copy(base / "tokenizer_config.json", target)
    return tokenizer


SETTINGS: list[dict[str, Any]] = [
    {},
    {"modules_to_save": ["embed_tokens"]},
    {"target_modules": ["q_proj", "embed_tokens"]},
    {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    {"trainable_token_indices": [5, 802, 803]},
    {"trainable_token_indices": [3, 800, 801, 802, 803], "save": False},
    {"modules_to_save": ["embed_tokens", "lm_head"]},
]
CASES = [
    pytest.param(
        model_class,
        settings,
        id=f"{kind}, {' '.join(f'{name}={value}' for name, value in settings.items()) or 'LoRA alone'}",
    )
    for kind, model_class in (("inner model", AutoModel), ("causal lm", AutoModelForCausalLM))
    for settings in SETTINGS
    if kind == "causal lm" or "lm_head" not in str(settings)  # an inner model has no head to adapt
]


@pytest.mark.parametrize(("model_class", "settings"), CASES)
def test_merged_as_peft_merges(golden_dir: Path, tmp_path: Path, model_class: Any, settings: dict[str, Any]) -> None:
    base = golden_dir / "tiny_llama"
    if model_class is AutoModelForCausalLM:
        base = with_head(base, tmp_path / "base")
    peft = resized(model_class, base, tmp_path / "adapter", 804, **settings)
    theirs = {name.removeprefix("model."): value for name, value in peft.merge_and_unload().state_dict().items()}
    ours = open_checkpoint(base, [tmp_path / "adapter"])
    assert ours.config["vocab_size"] == 804
    assert "embed_tokens.weight" in ours.tensors.names()
    for name in ours.tensors.names():
        torch.testing.assert_close(ours.tensors.read(name).float(), theirs[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("rows", "keeps_head"), [(800, True), (804, False)])
def test_a_head_of_another_vocabulary_is_left_out(
    golden_dir: Path, tmp_path: Path, rows: int, keeps_head: bool
) -> None:
    base = with_head(golden_dir / "tiny_llama", tmp_path / "base")
    resized(AutoModel, base, tmp_path / "adapter", rows, modules_to_save=["embed_tokens"])
    assert ("lm_head.weight" in open_checkpoint(base, [tmp_path / "adapter"]).tensors.names()) == keeps_head


def with_head(base: Path, target: Path) -> Path:
    """Write the base with a language head that is not its embedding."""
    torch.manual_seed(6)
    shutil.copytree(base, target)
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(target)
    return target


@pytest.fixture
def adapter(golden_dir: Path, tmp_path: Path) -> Path:
    """An adapter over 804 tokens with the tokenizer that produces them."""
    base = golden_dir / "tiny_llama"
    resized(AutoModel, base, tmp_path / "adapter", 804, modules_to_save=["embed_tokens"])
    write_tokenizer(base, tmp_path / "adapter")
    return tmp_path / "adapter"


def test_the_adapters_tokenizer_reads_the_added_tokens(adapter: Path) -> None:
    encoder = Encoder.load(adapter)
    ids = encoder.checkpoint.tokenizer.text.encode(NEW, add_special_tokens=False).ids
    assert {801, 803} <= set(ids)
    peft = PeftModel.from_pretrained(resized_base(adapter), str(adapter)).merge_and_unload()
    tokens = torch.tensor([[encoder.checkpoint.tokenizer.bos_id, *ids]])
    states = bidirectional_states(peft, tokens)
    np.testing.assert_allclose(encoder.encode(NEW)[0], states[0, 1:].mean(0).numpy(), atol=2e-6)


def resized_base(adapter: Path) -> Any:
    model = AutoModel.from_pretrained(
        json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    )
    model.resize_token_embeddings(804)
    return model


def bidirectional_states(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    model.config.is_causal = False
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False
    with torch.no_grad():
        return model(input_ids=tokens).last_hidden_state


def test_the_tokenizer_belongs_to_the_revision(adapter: Path) -> None:
    before = open_checkpoint(adapter).revision
    file = adapter / "tokenizer.json"
    file.write_text(file.read_text().replace("zorkmid", "florin"))
    assert open_checkpoint(adapter).revision != before


def test_a_copy_of_the_bases_tokenizer_changes_nothing(golden_dir: Path, tmp_path: Path) -> None:
    """Published LLM2Vec adapters come with one; its post-processor and its layout do not count."""
    base = golden_dir / "tiny_llama"
    resized(AutoModel, base, tmp_path, 800)
    before = open_checkpoint(tmp_path).revision
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.revision == before
    assert checkpoint.tokenizer_folder == base


def test_a_merged_folder_carries_tokens_and_rows(adapter: Path, tmp_path: Path) -> None:
    expected = Encoder.load(adapter).encode([PLAIN, NEW])
    merge_adapters(str(adapter), [], tmp_path / "merged")
    np.testing.assert_allclose(Encoder.load(tmp_path / "merged").encode([PLAIN, NEW]), expected, atol=1e-6)
    assert AutoModel.from_pretrained(tmp_path / "merged").get_input_embeddings().weight.shape == (804, 64)


def test_a_second_adapter_goes_on_top(adapter: Path, tmp_path: Path) -> None:
    merge_adapters(str(adapter), [], tmp_path / "merged")
    resized(AutoModel, tmp_path / "merged", tmp_path / "second", 804, target_modules=["v_proj"])
    config = tmp_path / "second" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(adapter)}))
    both = Encoder.load(tmp_path / "second").encode([PLAIN, NEW])
    expected = Encoder.load(tmp_path / "merged", adapters=[tmp_path / "second"]).encode([PLAIN, NEW])
    np.testing.assert_allclose(both, expected, atol=1e-6)


def test_rows_that_nobody_saved_are_refused(golden_dir: Path, tmp_path: Path) -> None:
    base = golden_dir / "tiny_llama"
    resized(AutoModel, base, tmp_path, 804, save=False, trainable_token_indices=[801, 803])
    with pytest.raises(
        AdapterMismatch, match=r"row 803 of embed_tokens .* has 800 rows and the adapter none for token 800"
    ):
        open_checkpoint(base, [tmp_path])


def test_an_embedding_without_rows_for_the_tokenizer_is_refused(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file({name: t[:802].clone() if "embed_tokens" in name else t for name, t in load_file(file).items()}, file)
    with pytest.raises(CheckpointError, match="ids up to 803, but the embedding has 802 rows"):
        open_checkpoint(adapter)


def test_an_embedding_of_another_width_is_refused(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file({name: t[:, :32].clone() if "embed_tokens" in name else t for name, t in load_file(file).items()}, file)
    with pytest.raises(AdapterMismatch, match=r"embed_tokens.weight whole \(modules_to_save\)"):
        open_checkpoint(adapter)
