"""Exports stream: a model larger than the bound on memory is exported within it."""

import shutil
from pathlib import Path

import pytest
from export_memory import SHAPES, measure_export, tensor_shapes, write_random_model

from unmask.checkpoint import open_checkpoint

SHAPE = SHAPES["230m"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory):
    folder = write_random_model(tmp_path_factory.mktemp("large") / "model", SHAPE)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize(("target", "dtype"), [("hub", "float32"), ("gguf", "float32")])
def test_an_export_keeps_within_the_bound(model: Path, tmp_path: Path, target: str, dtype: str) -> None:
    cost = measure_export(model, SHAPE, target, dtype, tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    assert cost.peak <= cost.bound < cost.written


def test_the_random_model_is_whole(model: Path) -> None:
    tensors = open_checkpoint(model).tensors
    sizes = {name: size for shard in tensor_shapes(SHAPE) for name, size in shard.items()}
    assert {name: tensors.shape(name) for name in tensors.names()} == sizes
    assert tensors.read("layers.13.mlp.up_proj.weight").float().std() == pytest.approx(0.02, rel=0.05)
