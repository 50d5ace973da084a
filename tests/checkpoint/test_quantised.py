"""Weights that are stored in few bits: unmask's own int8 rows load, every other format is refused by name."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from unmask import Encoder
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
    with pytest.raises(CheckpointError, match="weight_scale .* belongs to no weight"):
        Encoder.load(folder)
