"""A run that cannot do what its recipe says is refused by the dry run and by the run, with the field's name."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from tests.training.tiny import GOLDEN, WORDS, recipe_of, write_decoder, write_pairs
from unmask.errors import UnmaskError, UsageError
from unmask.training.checks import check_run
from unmask.training.lora import write_adapter
from unmask.training.plan import plan_run
from unmask.training.recipe import Lora, Recipe
from unmask.training.recipe_file import read_recipe
from unmask.training.train import load_data, run_training

# Parameters of the tiny decoder: query and output, key and value, and three products of the MLP in a layer.
LAYER = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48
EMBEDDING = 800 * 32
PAIRS = {"name": "pairs", "path": "pairs.tsv", "query": "query", "positive": "positive"}
ONE = {"batch": {"size": 1}}
TEACHER = {"teacher": str(GOLDEN / "tiny_llama")}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data folder with pairs, and files from which little can be learnt."""
    write_pairs(tmp_path, 20)
    (tmp_path / "one_answer.tsv").write_text("query\tpositive\n" + "".join(f"{word}\tyes\n" for word in WORDS))
    (tmp_path / "mirrored.tsv").write_text("query\tpositive\none\ttwo\ntwo\tone\n")
    (tmp_path / "copies.tsv").write_text("query\tpositive\tnegative\n" + "one\ttwo\ttwo\n" * 8)
    (tmp_path / "label.tsv").write_text("text\tlabel\n" + "".join(f"{word}\tx\n" for word in WORDS))
    (tmp_path / "same.txt").write_text("same\n" * 8)
    (tmp_path / "letters.txt").write_text("a\nb\n")
    (tmp_path / "dev.tsv").write_text("x\ty\ts\none\ttwo\t1\n")
    return tmp_path


def source(path: str = "pairs.tsv", **fields: Any) -> dict[str, Any]:
    columns = {"text": "text"} if path.endswith(".txt") else {"text": "text", "label": "label"}
    columns = columns if path in ("label.tsv", "same.txt", "letters.txt") else PAIRS
    return {**columns, "name": "set", "path": path, **fields}


def refused(recipe: Recipe, folder: Path, message: str) -> None:
    """Both the dry run and the run refuse the recipe with one sentence, and nothing is written."""
    for start in (
        lambda: plan_run(recipe, folder, lambda _: None),
        lambda: run_training(recipe, data=folder, output=folder / "run"),
    ):
        with pytest.raises(UnmaskError, match=message) as caught:
            start()
        assert "\n" not in str(caught.value)
    assert not (folder / "run").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (ONE, "data 'set': batch.size = 1 gives one pair a step and there are no hard negatives"),
        ({"data": [source(batch=1)]}, "batch = 1 gives one pair a step"),
        ({**ONE, "data": [source(negatives=["negative"])], "contrastive": {"hard_negatives": 0}}, "one pair a step"),
        ({**ONE, "data": [source("copies.tsv", negatives=["negative"])]}, "no hard negative that differs"),
        ({**ONE, "data": [source("label.tsv")]}, "gives one pair a step"),
        ({**ONE, "data": [source(stream=True, weight=1.0)]}, "gives one pair a step"),
        (
            {"batch": {"size": 2, "sets": 2}, "data": [source(), {**PAIRS, "name": "other"}]},
            "batch.size = 2 and batch.sets = 2 gives one pair a step",
        ),
        ({"data": [source("one_answer.tsv")]}, "no pair has a positive that could be another's negative"),
        ({"data": [source("mirrored.tsv")]}, "no pair has a positive"),
        ({"data": [source("copies.tsv")]}, "no pair has a positive"),
        ({"data": [source("label.tsv")]}, "all its texts have the label 'x'"),
        ({"objective": "simcse", "data": [source("same.txt")]}, "all its texts are the same"),
        ({**ONE, "objective": "simcse", "data": [source("letters.txt")]}, "batch.size = 1 gives one text"),
        (
            {"distillation": TEACHER, "data": [source("letters.txt")], "batch": {"size": 2}},
            "batch.size = 2 gives 2 texts a step, and the distillation compares 3 texts or more",
        ),
        (
            {**ONE, "distillation": {**TEACHER, "weight": 0, "similarity_weight": 1}, "data": [source("letters.txt")]},
            "batch.size = 1 gives 1 texts a step, and the distillation compares 2",
        ),
        ({"distillation": TEACHER, "data": [source(use_labels=False)], **ONE}, "gives 2 texts a step"),
    ],
)  # fmt: skip
def test_a_run_that_cannot_learn(fields: dict[str, Any], message: str, folder: Path) -> None:
    refused(recipe_of(**{"data": [source()], **fields}), folder, message)


@pytest.mark.parametrize(
    "fields",
    [
        {"batch": {"size": 1}, "data": [source(negatives=["negative"])]},
        {"batch": {"size": 2}},
        {"batch": {"size": 2, "sets": 2}},
        {"batch": {"size": 1}, "distillation": {**TEACHER, "vector_weight": 1.0}},
        {"batch": {"size": 1}, "distillation": {**TEACHER, "weight": 0, "similarity_weight": 1.0}},
        {"objective": "simcse", "data": [source("letters.txt")], "batch": {"size": 2}},
        {"matryoshka": [64, 8, 32]},
    ],
)
def test_a_run_that_can_learn_passes(fields: dict[str, Any], folder: Path) -> None:
    recipe = recipe_of(**{"data": [source()], **fields})
    sets, _ = load_data(recipe, folder, lambda _: None)
    assert check_run(recipe, folder, sets) == 64


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"matryoshka": [8, 65]}, "matryoshka: 65 is longer than the 64 numbers of a vector that .*tiny_llama gives"),
        ({"matryoshka": [32], "head": {"dimensions": 16}}, "matryoshka: 32 is longer than the 16 .* the recipe's head"),
        ({"save": {"matryoshka": [65]}, "lora": None}, "save.matryoshka: 65 is longer than the 64 numbers"),
        ({"save": {"max_length": 10**6}, "lora": None}, "save.max_length = 1000000: .* has [0-9]+ positions"),
        ({"head": {"dimensions": 65}}, "head.dimensions = 65 is more than the decoder's 64"),
        ({"layers": 9, "lora": None}, "layers 9: .* has 3 layers"),
        (
            {"exits": [{"layers": 3}], "head": {"dimensions": 8}, "lora": None},
            "exits: 3 layers, but the model has 3",
        ),
        (
            {"distillation": {**TEACHER, "vector_weight": 1.0, "dimensions": 32}},
            "distillation.dimensions = 32, but vectors have 64 numbers",
        ),
        ({"objective": "mntp", "data": [source("letters.txt")], "mntp": {"mask_token": "no token"}}, "mntp.mask_token"),
        ({"objective": "mntp", "data": [source("letters.txt")], "mntp": {"block": 1}}, "mntp.block = 1"),
        ({"data": [source(instruction="word " * 80)]}, "data 'set': max_length = 64 is too short: the instruction"),
        ({"data": [source(instruction="a b c", max_length=2)]}, "data 'set': max_length = 2 is too short"),
        ({"data": [source("none.tsv", stream=True, weight=1.0)]}, "no training data at .*none.tsv"),
        ({"data": [source(query="q", stream=True, weight=1.0)]}, "pairs.tsv has no column 'q'"),
        ({"dev": [{"name": "d", "path": "dev.tsv", "first": "x", "second": "z", "score": "s"}]}, "no column 'z'"),
        ({"dev": [{"name": "d", "path": "dev.tsv", "first": "x", "second": "y", "score": "s"}]}, "all scores"),
        ({"pooling": "eos_token", "base": "no_eos"}, "pooling='eos_token' needs an end-of-sequence token"),
    ],
)
def test_a_recipe_that_contradicts_its_model_or_files(fields: dict[str, Any], message: str, folder: Path) -> None:
    if fields.get("base") == "no_eos":
        base = write_decoder(folder / "no_eos", eos_token_id=None)
        (base / "tokenizer_config.json").write_text("{}")
        (base / "special_tokens_map.json").unlink()
        fields = {**fields, "base": str(base)}
    refused(recipe_of(**{"data": [source()], **fields}), folder, message)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank": 8}, "lora.init_from: .* has rank 4, but lora.rank = 8"),
        ({"rank": 4, "targets": ["q_proj", "v_proj"]}, "lora.targets are q_proj, v_proj"),
    ],
)
def test_an_initial_adapter_of_another_shape(lora: dict[str, Any], message: str, folder: Path) -> None:
    base = str(GOLDEN / "tiny_llama")
    halves = {
        f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{half}.weight": torch.ones(shape)
        for layer in range(2)
        for half, shape in (("A", (4, 64)), ("B", (64, 4)))
    }
    write_adapter(folder / "adapter", halves, Lora(rank=4, targets=["q_proj"]), base, torch.float32)
    lora = {"targets": ["q_proj"], **lora, "init_from": str(folder / "adapter")}
    refused(recipe_of(data=[source()], lora=lora), folder, message)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("matryoshka = [0]", r"`int` >= 1 - at `\$.matryoshka"),
        ("matryoshka = [-8]", r"`int` >= 1 - at `\$.matryoshka"),
        ('matryoshka = ["8"]', r"Expected `int`, got `str` - at `\$.matryoshka"),
        ("matryoshka = [8, 8]", r"matryoshka = \[8, 8\]: each length once"),
        ('objective = "mntp"\nmatryoshka = [8]', "matryoshka: mntp does not train it"),
        ('objective = "mntp"\nhead = { dimensions = 8 }', "head: mntp does not train it"),
        ('objective = "simcse"\ndistillation = { teacher = "t" }', "distillation: simcse does not train it"),
        ("distillation = { teacher = 't', weight = 0.0 }", "weight, vector_weight and similarity_weight are all 0"),
        ("lora = { dropout = 1.0 }", r"`\$.lora.dropout"),
        ("simcse = { attention_dropout = 1.0 }", r"`\$.simcse.attention_dropout"),
        ("contrastive = { false_negative_margin = 2.0 }", r"`\$.contrastive.false_negative_margin"),
        ("contrastive = { temperature = nan }", r"got nan - at `\$.contrastive.temperature`"),
        ("optimiser = { lr = inf }", r"got inf - at `\$.optimiser.lr`"),
        ("optimiser = { betas = [1.5, 0.9] }", r"optimiser.betas = \[1.5, 0.9\]"),
        ("optimiser = { total_steps = 2 }", "optimiser.total_steps = 2 is below steps = 6"),
        (
            'dev = [{ name = "d", path = "p", first = "a", second = "b", score = "s" }, '
            '{ name = "d", path = "q", first = "a", second = "b", score = "s" }]',
            "dev: the name 'd' is given twice",
        ),
    ],
)
def test_a_recipe_that_contradicts_itself(lines: str, message: str, tmp_path: Path) -> None:
    objective = "" if lines.startswith("objective") else 'objective = "supervised"\n'
    text = f'base = "b"\nsteps = 6\n{objective}{lines}\n[[data]]\nname = "d"\npath = "d.tsv"\n'
    columns = 'text = "t"\n' if lines.startswith("objective") else 'query = "q"\npositive = "p"\n'
    (tmp_path / "r.toml").write_text(text + columns)
    with pytest.raises(UsageError, match=message):
        read_recipe(tmp_path / "r.toml")


def test_a_stage_has_the_vectors_of_the_stage_before(folder: Path) -> None:
    recipe = recipe_of(data=[source()], matryoshka=[32])
    plan = plan_run(msgspec.structs.replace(recipe, matryoshka=[]), folder, lambda _: None, base_dimensions=16)
    assert plan.dimensions == 16
    with pytest.raises(UsageError, match="matryoshka: 32 is longer than the 16"):
        plan_run(recipe, folder, lambda _: None, base_dimensions=16)


@pytest.mark.parametrize(
    ("changes", "trained"),
    [
        ({}, 2 * LAYER + EMBEDDING),
        ({"layers": 1}, LAYER + EMBEDDING),
        ({"layers": 1, "freeze_embedding": True}, LAYER),
        ({"layers": 1, "freeze_embedding": True, "head": {"dimensions": 8}}, LAYER + 8 * 32),
        ({"layers": 1, "freeze_embedding": True, "head": {"dimensions": 8, "trained": False}}, LAYER),
    ],
)
def test_the_plan_counts_what_is_trained(folder: Path, changes: dict[str, Any], trained: int) -> None:
    write_decoder(folder / "decoder")
    recipe = recipe_of(data=[source()], base=str(folder / "decoder"), lora=None, **changes)
    assert plan_run(recipe, folder, lambda _: None).trained == trained


def test_both_orders_of_lengths_give_the_same_loss(folder: Path) -> None:
    losses = []
    for lengths in ([8, 32], [32, 8]):
        recipe = recipe_of(data=[source()], matryoshka=lengths, steps=1)
        run_training(recipe, data=folder, output=folder / str(lengths[0]))
        losses.append(msgspec.json.decode((folder / str(lengths[0]) / "metrics.jsonl").read_bytes().splitlines()[0]))
    assert losses[0]["loss"] == pytest.approx(losses[1]["loss"], abs=1e-5)
