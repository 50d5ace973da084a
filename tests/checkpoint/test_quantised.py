"""Weights that are stored in few bits: unmask's own int8 rows load, every other format is refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.checkpoint.layouts import LAST, Layout, qwen, write_layout
from unmask import Encoder
from unmask.checkpoint import open_checkpoint
from unmask.errors import CheckpointError
from unmask.training.model_folder import int8_rows

Store = Callable[[str, Tensor], dict[str, Tensor]]


def requantise(folder: Path, store: Store) -> None:
    """Replace each linear layer's weight by what `store` makes of its name and numbers."""
    file = folder / "model.safetensors"
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(file).items():
        tensors |= store(name, tensor) if name.endswith("proj.weight") else {name: tensor}
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("columns", [(), (1,)], ids=str)
def test_int8_rows_load(copied, columns: tuple[int, ...]) -> None:
    def rows(name: str, weight: Tensor) -> dict[str, Tensor]:
        steps, sizes = int8_rows(weight)
        return {name: steps, f"{name}_scale": sizes.reshape(len(sizes), *columns)}

    folder = copied("tiny_llama")
    before = Encoder.load(folder).encode("one text", normalize=True)
    requantise(folder, rows)
    assert (Encoder.load(folder).encode("one text", normalize=True) * before).sum() > 0.999


@pytest.mark.parametrize("shape", ["column", "one", "none", "blocks"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.float32], ids=str)
def test_scales_of_other_formats_are_refused_by_name(copied, dtype: torch.dtype, shape: str) -> None:
    def scaled(name: str, weight: Tensor) -> dict[str, Tensor]:
        sizes = {
            "column": torch.ones(len(weight), 1),
            "one": torch.ones(1),
            "none": torch.ones(()),
            "blocks": torch.ones(len(weight), 2),
        }
        return {name: weight.to(dtype), f"{name}_scale": sizes[shape]}

    folder = copied("tiny_llama")
    requantise(folder, scaled)
    if (dtype, shape) == (torch.int8, "column"):
        Encoder.load(folder)
        return
    message = r"proj\.weight_scale \[.* one scale per row alone\. Use the unquantised checkpoint"
    with pytest.raises(CheckpointError, match=message):
        Encoder.load(folder)


def test_a_scale_without_its_weight_is_refused(copied) -> None:
    folder = copied("tiny_llama")
    requantise(folder, lambda name, weight: {f"{name}_packed": weight, f"{name}_scale": weight[:, 0].clone()})
    with pytest.raises(CheckpointError, match=r"weight_scale .* belongs to no weight"):
        Encoder.load(folder)


def float8(name: str, weight: Tensor) -> dict[str, Tensor]:
    """As DeepSeek, Ministral 3 and transformers' own fine-grained float8."""
    size = weight.abs().max() / 448
    return {name: (weight / size).to(torch.float8_e4m3fn), f"{name}_scale_inv": size.reshape(1, 1)}


def bitsandbytes_int8(name: str, weight: Tensor) -> dict[str, Tensor]:
    steps, sizes = int8_rows(weight)
    prefix = name.removesuffix("weight")
    return {name: steps, f"{prefix}SCB": sizes * 127, f"{prefix}weight_format": torch.tensor(0, dtype=torch.uint8)}


def bare_float8(name: str, weight: Tensor) -> dict[str, Tensor]:
    return {name: weight.to(torch.float8_e5m2)}


def packed(name: str, weight: Tensor) -> dict[str, Tensor]:
    return {name: weight.to(torch.int32)}


STORES = (float8, bitsandbytes_int8, bare_float8, packed)


@pytest.fixture(scope="module")
def granite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder that runs through transformers."""
    layout = Layout({"model_type": "granite"}, qwen, LAST, {})
    return write_layout(tmp_path_factory.mktemp("granite") / "granite", layout)


@pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("name", ["tiny_llama", "granite"])
def test_stored_steps_are_refused_by_name(name: str, store: Store, form: str, granite: Path, tmp_path: Path) -> None:
    source = granite if name == "granite" else Path(__file__).parent.parent / "golden" / name
    folder = Path(shutil.copytree(source, tmp_path / name))
    requantise(folder, store)
    if form.endswith(".bin"):
        torch.save(load_file(folder / "model.safetensors"), folder / form)
        (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"layers\..*proj.*Use the unquantised checkpoint"):
        Encoder.load(folder)


def test_left_over_tensors_of_layers_are_refused_in_any_decoder(granite: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(granite, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    file = folder / "model.safetensors"
    save_file({**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, file)
    Encoder.load(folder)  # an old file's
    save_file({**tensors, "model.layers.0.mlp.up_proj.scales": torch.ones(4)}, file)
    with pytest.raises(CheckpointError, match=r"no place for, for example 'layers\.0\.mlp\.up_proj\.scales'"):
        Encoder.load(folder)


@pytest.mark.parametrize("key", ["quantization_config", "compression_config", "quantization"])
def test_a_config_that_says_quantised_is_refused(copied, key: str) -> None:
    folder = copied("tiny_llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: {"quant_method": "bitnet"}}))
    with pytest.raises(CheckpointError, match=f"{key} says that the weights are quantised .*bitnet"):
        Encoder.load(folder)
    assert open_checkpoint(folder, weights=False).tokenizer.eos_id is not None  # texts alone do not depend on it
    (folder / "config.json").write_text(json.dumps({**config, key: None}))
    Encoder.load(folder)


def test_an_adapter_that_is_quantised_is_refused(copied) -> None:
    base, adapter = copied("tiny_llama"), copied("adapter_mntp")
    file = adapter / "adapter_model.safetensors"
    save_file({name: tensor.to(torch.float8_e4m3fn) for name, tensor in load_file(file).items()}, file)
    with pytest.raises(CheckpointError, match="is stored as float8_e4m3fn"):
        Encoder.load(base, adapters=[adapter])
