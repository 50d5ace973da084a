"""LoRA adapters: merged as PEFT would, refused by name where that is not possible."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from unmask import Encoder
from unmask.checkpoint import open_checkpoint
from unmask.checkpoint.adapter_config import LORA_FIELDS
from unmask.errors import AdapterMismatch, CheckpointError

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def made_by_peft(model_class: Any, base: Path, target: Path, **settings: Any) -> dict[str, torch.Tensor]:
    """Save a random adapter with PEFT itself; return PEFT's own merged weights by innermost name."""
    torch.manual_seed(3)
    model = get_peft_model(model_class.from_pretrained(base), LoraConfig(**{"target_modules": TARGETS, **settings}))
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            torch.nn.init.uniform_(parameter, 0.5, 2.0)
        elif parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(str(target))
    merged = model.merge_and_unload().state_dict()
    return {name.removeprefix("model."): value for name, value in merged.items()}


@pytest.mark.parametrize("model_class", [AutoModel, AutoModelForCausalLM], ids=["inner model", "causal lm"])
@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 8},
        {"r": 4, "lora_alpha": 8, "use_rslora": True},
        {"r": 4, "lora_alpha": 8, "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 3}},
        {"r": 4, "lora_alpha": 8, "alpha_pattern": {"down_proj": 1.5}},
        {"r": 4, "lora_alpha": 8, "use_dora": True},
        {"r": 4, "lora_alpha": 8, "use_dora": True, "target_modules": [*TARGETS, "embed_tokens"]},
        {"r": 4, "lora_alpha": 8, "modules_to_save": ["embed_tokens", "norm"]},
        {"r": 4, "lora_alpha": 8, "trainable_token_indices": [5, 3, 700]},
        {"r": 4, "lora_alpha": 8, "target_modules": [*TARGETS, "embed_tokens"]},
        {"r": 4, "lora_alpha": 8, "init_lora_weights": "orthogonal"},
        {"r": 4, "lora_alpha": 8, "init_lora_weights": "gaussian"},
        {"r": 4, "lora_alpha": 8, "layers_to_transform": [0, 2], "layers_pattern": "layers"},
        {"r": 4, "lora_alpha": 8, "exclude_modules": ["layers.1.mlp.up_proj"]},
        {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
        {"r": 4, "lora_alpha": 8, "target_modules": r".*layers\.[02]\..*(q|up)_proj"},
    ],
    ids=lambda settings: " ".join(sorted(settings.keys() - {"r", "lora_alpha"})) or "plain",
)
def test_merged_as_peft_merges(golden_dir: Path, tmp_path: Path, model_class: Any, settings: dict[str, Any]) -> None:
    base = golden_dir / "tiny_llama"
    theirs = made_by_peft(model_class, base, tmp_path / "adapter", **settings)
    ours = open_checkpoint(base, [tmp_path / "adapter"]).tensors
    for name in ours.names():
        torch.testing.assert_close(ours.read(name).float(), theirs[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("init", ["eva", "orthogonal", "gaussian", True, False])
def test_an_accepted_initialisation_leaves_the_base_alone(golden_dir: Path, tmp_path: Path, init: str | bool) -> None:
    base = golden_dir / "tiny_llama"
    torch.manual_seed(4)
    options: dict[str, Any] = {"eva_config": EvaConfig(rho=2.0)} if init == "eva" else {}
    config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, **options, init_lora_weights=init)  # pyright: ignore[reportArgumentType]: parametrised
    untouched = AutoModel.from_pretrained(base).state_dict()
    model = get_peft_model(AutoModel.from_pretrained(base), config)
    if init == "eva":
        batches = [{"input_ids": torch.randint(9, 800, (4, 12)), "attention_mask": torch.ones(4, 12)} for _ in range(8)]
        for batch in batches:
            batch["attention_mask"] = batch["attention_mask"].long()
        initialize_lora_eva_weights(model, batches, show_progress_bar=False)
        assert config.rank_pattern  # ranks by layer, which we must follow
    for name, weight in model.get_base_model().state_dict().items():
        if "lora_" not in name:
            assert torch.equal(weight, untouched[name.replace(".base_layer.", ".")])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)  # as if trained
    model.save_pretrained(str(tmp_path / "adapter"))
    merged = model.merge_and_unload().state_dict()
    ours = open_checkpoint(base, [tmp_path / "adapter"]).tensors
    for name in ours.names():
        torch.testing.assert_close(ours.read(name).float(), merged[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("missing", ["embed_tokens", "layers.1.mlp.up_proj"])
def test_every_target_needs_its_tensors(golden_dir: Path, tmp_path: Path, missing: str) -> None:
    base = golden_dir / "tiny_llama"
    made_by_peft(AutoModel, base, tmp_path / "adapter", r=2, lora_alpha=4, target_modules=[*TARGETS, "embed_tokens"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor for name, tensor in tensors.items() if f".{missing}." not in name}, file)
    with pytest.raises(AdapterMismatch, match=f"lacks the tensors of 1 modules.*{missing}"):
        open_checkpoint(base, [tmp_path / "adapter"])


def test_order_does_not_change_a_sum_but_every_adapter_counts(golden_dir: Path, tmp_path: Path) -> None:
    base = golden_dir / "tiny_llama"
    made_by_peft(AutoModel, base, tmp_path / "one", r=2, lora_alpha=4)
    made_by_peft(AutoModel, base, tmp_path / "two", r=3, lora_alpha=9)
    name = "layers.1.self_attn.q_proj.weight"
    zero, one, two, both = (
        open_checkpoint(base, [tmp_path / folder for folder in folders]).tensors.read(name)
        for folders in ((), ("one",), ("two",), ("one", "two"))
    )
    torch.testing.assert_close(both, one + two - zero, rtol=0, atol=1e-5)


def test_pickled_adapter(golden_dir: Path, tmp_path: Path) -> None:
    base = golden_dir / "tiny_llama"
    made_by_peft(AutoModel, base, tmp_path / "adapter", r=2, lora_alpha=4)
    expected = Encoder.load(base, adapters=[tmp_path / "adapter"]).encode("text")
    safe = tmp_path / "adapter" / "adapter_model.safetensors"
    torch.save(load_file(safe), tmp_path / "adapter" / "adapter_model.bin")
    safe.unlink()
    np.testing.assert_array_equal(Encoder.load(base, adapters=[tmp_path / "adapter"]).encode("text"), expected)


@pytest.fixture
def adapter(golden_dir: Path, tmp_path: Path) -> Path:
    made_by_peft(AutoModel, golden_dir / "tiny_llama", tmp_path / "adapter", r=2, lora_alpha=4)
    return tmp_path / "adapter"


def change(adapter: Path, **fields: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, "use_dora the magnitude"),
        ({"bias": "all"}, "biases"),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        *(
            ({"init_lora_weights": init}, f"init_lora_weights='{init}'")
            for init in ("pissa", "pissa_niter_4", "olora", "loftq", "corda", "lora_ga", "mica", "of next year")
        ),
        *(({name: {"x": 1}}, name) for name, (treatment, _) in LORA_FIELDS.items() if treatment == "refused"),
        ({"bend_lora": True}, "unknown setting bend_lora"),
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"r": 3}, "do not fit rank 3"),
        ({"r": 0}, "at least 1"),
        ({"r": "many"}, "not a usable adapter configuration"),
        ({"lora_alpha": None}, "not a usable adapter configuration"),
        ({"r": 2.5}, r"r=2\.5 is no whole number"),
        ({"rank_pattern": {"q_proj": 1.7}}, r"rank_pattern=1\.7 is no whole number"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan is no number"),
        ({"alpha_pattern": {"q_proj": float("inf")}}, "alpha_pattern=inf is no number"),
        ({"layers_to_transform": ["1"]}, "layers_to_transform='1' is no whole number"),
        ({"trainable_token_indices": [1.5]}, r"trainable_token_indices=1\.5 is no whole number"),
        ({"modules_to_save": "norm"}, "modules_to_save='norm' is no list of names"),
        *(({name: {"(": 1}}, "not a usable adapter") for name in ("rank_pattern", "alpha_pattern")),
        *(({name: "("}, "not a usable adapter") for name in ("target_modules", "exclude_modules")),
        # Weights that PEFT would leave out, since the configuration does not name their modules.
        ({"target_modules": ["q_proj"]}, r"holds LoRA weights of layers\.0\.mlp\.down_proj"),
        ({"target_modules": None}, r"holds LoRA weights of layers\.0"),
        ({"exclude_modules": ["layers.1.mlp.up_proj"]}, r"holds LoRA weights of layers\.1\.mlp\.up_proj"),
        ({"layers_to_transform": [0], "layers_pattern": "layers"}, r"holds LoRA weights of layers\.1"),
    ],
)
def test_what_cannot_be_merged_is_refused_by_name(
    golden_dir: Path, adapter: Path, fields: dict[str, Any], message: str
) -> None:
    change(adapter, **fields)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(golden_dir / "tiny_llama", [adapter])


def test_adapter_of_another_model(golden_dir: Path, adapter: Path) -> None:
    with pytest.raises(AdapterMismatch, match=r"changes layers\.0\.self_attn\.k_proj by a \(64, 64\) matrix"):
        open_checkpoint(golden_dir / "tiny_mistral_instruct", [adapter])


def test_adapter_that_matches_nothing(golden_dir: Path, adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file({key.replace("layers.", "blocks."): value for key, value in load_file(file).items()}, file)
    with pytest.raises(AdapterMismatch, match="no tensor of the adapter"):
        open_checkpoint(golden_dir / "tiny_llama", [adapter])


def test_adapter_that_matches_in_part(golden_dir: Path, adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file({key.replace("layers.2.", "layers.7."): value for key, value in load_file(file).items()}, file)
    with pytest.raises(AdapterMismatch, match=r"7 of 21 modules .*'layers\.7\."):
        open_checkpoint(golden_dir / "tiny_llama", [adapter])


def test_one_half_alone(golden_dir: Path, adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "layers.1.mlp.up_proj.lora_B" not in k}, file)
    with pytest.raises(AdapterMismatch, match="both A and B"):
        open_checkpoint(golden_dir / "tiny_llama", [adapter])


@pytest.mark.parametrize("keep", [0, 7, 100, 2000])
def test_truncated_adapter(golden_dir: Path, adapter: Path, keep: int) -> None:
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="damaged or truncated"):
        open_checkpoint(golden_dir / "tiny_llama", [adapter])


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("half", ["lora_A", "lora_B"])
def test_an_adapter_that_diverged_is_refused_by_name(golden_dir: Path, adapter: Path, number: float, half: str) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(key for key in tensors if half in key and "layers.1.mlp.up_proj" in key)
    tensors[name][0, 0] = number
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=rf"{half}.weight holds NaN or infinity"):
        open_checkpoint(golden_dir / "tiny_llama", [adapter])


def test_every_field_of_peft_is_honoured_harmless_or_refused() -> None:
    assert set(LoraConfig.__dataclass_fields__) == set(LORA_FIELDS)


def test_every_targeted_module_without_tensors_is_named(golden_dir: Path, adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    modules = sorted({key.rpartition(".lora_")[0] for key in tensors})
    for module in modules[::5]:
        save_file({key: value for key, value in tensors.items() if not key.startswith(f"{module}.lora_")}, file)
        with pytest.raises(AdapterMismatch, match=rf"lacks the tensors of 1 modules .*{module.split('model.')[-1]}"):
            open_checkpoint(golden_dir / "tiny_llama", [adapter])


def test_lora_on_the_language_head_changes_no_encoder(golden_dir: Path, tmp_path: Path) -> None:
    """It is merged where the base's file has a head, and left out where an encoder has none."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    torch.manual_seed(7)
    AutoModelForCausalLM.from_pretrained(golden_dir / "tiny_llama").save_pretrained(base)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (base / file).write_bytes((golden_dir / "tiny_llama" / file).read_bytes())
    theirs = made_by_peft(AutoModelForCausalLM, base, adapter, r=2, target_modules=["q_proj", "lm_head"])
    ours = open_checkpoint(base, [adapter]).tensors
    torch.testing.assert_close(ours.read("lm_head.weight"), theirs["lm_head.weight"], rtol=0, atol=1e-6)
    headless = open_checkpoint(golden_dir / "tiny_llama", [adapter]).tensors
    assert "lm_head.weight" not in headless.names()
    name = "layers.2.self_attn.q_proj.weight"
    torch.testing.assert_close(headless.read(name), theirs[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["layers.0.self_attn.q_proj.weight", "norm.weight", "extra"])
def test_a_whole_tensor_that_nothing_declares_is_refused(golden_dir: Path, adapter: Path, name: str) -> None:
    """PEFT leaves it out with a warning; it writes embeddings whole undeclared, and nothing else."""
    file = adapter / "adapter_model.safetensors"
    save_file({**load_file(file), f"base_model.model.{name}": torch.ones(64)}, file)
    with pytest.raises(AdapterMismatch, match=f"holds '{name}', .* modules_to_save names"):
        open_checkpoint(golden_dir / "tiny_llama", [adapter])
