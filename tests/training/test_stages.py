"""Tests of several stages in one recipe file."""

from pathlib import Path

import numpy as np
import pytest

from tests.training.tiny import texts_of, write_decoder, write_pairs
from unmask.cli import build_app
from unmask.encoder import Encoder
from unmask.errors import UsageError
from unmask.training.recipe import Recipe
from unmask.training.recipe_file import read_recipe
from unmask.training.stages import merge_tables, read_stages, result_of, train_stages

FILE = """
base = "{base}"
objective = "supervised"
layers = 2
lora = false
precision = "float32"
device = "cpu"
steps = 2

[optimiser]
lr = 1e-3
warmup = 1

[[data]]
name = "pairs"
path = "pairs.tsv"
query = "query"
positive = "positive"

[[stages]]
name = "wide"

[[stages]]
name = "narrow"
steps = 3
optimiser = {{ lr = 1e-4 }}

[stages.lora]
rank = 2
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_pairs(tmp_path, 20)
    base = write_decoder(tmp_path / "base", num_hidden_layers=3)
    path = tmp_path / "recipe.toml"
    path.write_text(FILE.format(base=base).replace("\nlayers = 2", ""), encoding="utf-8")
    return path


def run(*arguments: str | Path) -> int:
    return build_app("*")([str(argument) for argument in arguments], exit_on_error=False, result_action="return_value")


def test_a_stage_says_only_what_differs(file: Path) -> None:
    wide, narrow = read_stages(file)
    assert (wide.name, wide.steps, wide.optimiser.lr, wide.lora) == ("wide", 2, 1e-3, None)
    assert (narrow.name, narrow.steps, narrow.optimiser.lr, narrow.optimiser.warmup) == ("narrow", 3, 1e-4, 1)
    assert narrow.lora is not None
    assert narrow.lora.rank == 2


def test_overrides_are_for_all_stages_or_for_one(file: Path) -> None:
    wide, narrow = read_stages(file, ["seed=7", "stages.narrow.optimiser.lr=0.5"])
    assert (wide.seed, narrow.seed) == (7, 7)
    assert (wide.optimiser.lr, narrow.optimiser.lr) == (1e-3, 0.5)
    with pytest.raises(UsageError, match=r"--set stages.wiide.steps=1: the stages of .* are wide, narrow"):
        read_stages(file, ["stages.wiide.steps=1"])


@pytest.mark.parametrize("name", ['""', "1", '"wide"', '"../up"'], ids=["empty", "number", "taken", "path"])
def test_a_stage_needs_a_name_of_its_own(name: str, file: Path) -> None:
    file.write_text(file.read_text().replace('"narrow"', name), encoding="utf-8")
    with pytest.raises(UsageError, match="give each stage a name of its own"):
        read_stages(file)


def test_a_wrong_value_names_file_and_stage(file: Path) -> None:
    file.write_text(file.read_text().replace("steps = 3", "steps = 0"), encoding="utf-8")
    with pytest.raises(UsageError, match=r"recipe\.toml, stage narrow: .*steps"):
        read_stages(file)


def test_a_file_without_stages_is_one(file: Path) -> None:
    file.write_text(file.read_text().split("[[stages]]")[0], encoding="utf-8")
    assert read_stages(file) == [read_recipe(file)]


def test_what_reads_one_recipe_refuses_stages(file: Path) -> None:
    with pytest.raises(UsageError, match="has stages"):
        read_recipe(file)


def test_each_stage_begins_with_the_one_before_and_ended_ones_are_not_done_again(file: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert run("train", file, "--output", output) == 0
    first, second = output / "1-wide" / "model", output / "2-narrow" / "adapter"
    assert not np.allclose(Encoder.load(first).encode(texts_of(3)), Encoder.load(second).encode(texts_of(3)))
    assert Encoder.load(second).checkpoint.files[0].parent == first
    done: list[str] = []

    def train(recipe: Recipe, folder: Path, resumed: bool) -> Path:
        done.append(recipe.name)
        assert recipe.base == str(first)
        return folder / "adapter"

    recipes = read_stages(file)
    assert train_stages(recipes, output, True, train) == [first, second]
    assert done == []
    second.rename(tmp_path / "gone")
    train_stages(recipes, output, True, train)
    assert done == ["narrow"]
    assert result_of(output / "2-narrow", recipes[1]) is None


def test_layers_and_an_adapter_are_refused_together(file: Path) -> None:
    with pytest.raises(UsageError, match=r"layers goes with lora = false"):
        read_stages(file, ["layers=2"])


def test_lists_are_replaced_whole() -> None:
    assert merge_tables({"a": [1, 2], "b": {"c": 1}}, {"a": [3]}) == {"a": [3], "b": {"c": 1}}
