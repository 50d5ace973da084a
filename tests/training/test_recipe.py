"""Tests of reading recipes: fields, overrides, refused values, and every recipe that ships."""

import json
from pathlib import Path

import msgspec
import pytest

from unmask.errors import UsageError
from unmask.training.recipe import ALL_LINEAR, Recipe
from unmask.training.recipe_file import read_recipe, read_toml

REPOSITORY = Path(__file__).parents[2]
RECIPES = REPOSITORY / "recipes"
RUNS = [file for folder in ("recipes", "unmask") for file in sorted((REPOSITORY / folder).rglob("run*.json"))]
GOOD = """
base = "a/b"
objective = "supervised"
steps = 10
[optimiser]
lr = 1e-4
[[data]]
name = "nli"
path = "nli.tsv"
query = "q"
positive = "p"
[[data]]
name = "two words"
path = "b.tsv"
text = "t"
label = "l"
"""


def read(folder: Path, text: str = GOOD, *overrides: str) -> Recipe:
    (folder / "recipe.toml").write_text(text, encoding="utf-8")
    return read_recipe(folder / "recipe.toml", overrides)


@pytest.mark.parametrize("file", sorted(RECIPES.rglob("*.toml")), ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_every_recipe_that_ships_can_be_read(file: Path) -> None:
    assert read_recipe(file).data


@pytest.mark.parametrize("file", RUNS, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_the_run_of_every_model_that_ships_can_be_read(file: Path) -> None:
    run = json.loads(file.read_text(encoding="utf-8"))
    for stage in filter(None, (run, run.get("first_stage"))):
        assert msgspec.convert(stage["recipe"], Recipe).data


def test_what_is_left_out_is_llm2vecs_choice(tmp_path: Path) -> None:
    recipe = read(tmp_path)
    assert recipe.lora is not None
    assert (recipe.lora.rank, recipe.lora.alpha, recipe.lora.dropout) == (16, 32.0, 0.05)
    assert recipe.lora.targets == list(ALL_LINEAR)
    assert (recipe.contrastive.temperature, recipe.max_length, recipe.mntp.mask_token) == (0.02, 512, "_")
    assert (recipe.simcse.attention_dropout, recipe.simcse.temperature) == (0.3, 0.05)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["stesp=3"], "stesp"),
        (["steps=0"], r"\$.steps"),
        (["steps=ten"], r"\$.steps"),
        (["optimiser.lr=0"], r"\$.optimiser.lr"),
        (["optimiser.lr=nan"], r"\$.optimiser.lr"),
        (["optimiser.schedule=step"], r"'step', expected 'constant', 'cosine', .* - at `\$.optimiser.schedule"),
        (["optimiser.betas=[0.9]"], r"\$.optimiser.betas"),
        (["optimiser.lrr=1"], r"lrr.*\$.optimiser"),
        (["lora.rank=-1"], r"\$.lora.rank"),
        (["lora.dropout=1.5"], r"\$.lora.dropout"),
        (["lora.targets=['q_proj', 'wq']"], r"lora.targets: \['wq'\]; choose from q_proj"),
        (["lora.targets=[]"], r"lora.targets: \[\]"),
        (["lora=true"], r"\$.lora"),
        (["batch.size=0"], r"\$.batch.size"),
        (["seed=-1"], r"\$.seed"),
        (["max_bad_rows=2"], r"\$.max_bad_rows"),
        (["max_epochs=0"], r"\$.max_epochs"),
        (["data.nli.limit=none"], r"\$.data\[0\].limit"),
        (["data.nli.text=t"], "data 'nli': name either query and positive, or text"),
        (["data.nli.label=t"], "data 'nli': label goes with text"),
        (["data.two words.negatives=['n']"], "data 'two words': negatives go with query"),
        (["data.nli.stream=true"], "data 'nli': stream needs a weight"),
        (["data.nli.name=two words"], "data: the name 'two words' is given twice"),
        (["data=[]"], r"\$.data"),
        (["objective=mntp"], "data 'nli': mntp learns from texts; name a text column"),
        (["data.nli.use_labels=false"], "data 'nli' teaches nothing"),
        (["contrastive.weight=0"], "data 'nli' teaches nothing"),
        (["data.nli.stream=true", "data.nli.weight=1", "max_epochs=1"], "max_epochs: data 'nli' is streamed"),
        (["distillation.teachr=x"], "teachr"),
        (["matryoshka=[0]"], r"\$.matryoshka\[0\]"),
        (["dev=[{name='a'}]"], r"\$.dev\[0\]"),
    ],
)
def test_an_error_names_the_field(overrides: list[str], named: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=named) as caught:
        read(tmp_path, GOOD, *overrides)
    assert "recipe.toml" in str(caught.value)


def test_a_text_without_a_label_needs_a_teacher(tmp_path: Path) -> None:
    plain = GOOD.replace('label = "l"', "")
    with pytest.raises(UsageError, match="'two words' has no positives, and there is no distillation"):
        read(tmp_path, plain)
    taught = read(tmp_path, plain, "distillation.teacher=t")
    assert taught.distillation is not None
    with pytest.raises(UsageError, match="'two words' has no positives"):
        read(tmp_path, plain, "distillation.teacher=t", "data.two words.use_teacher=false")


def test_overrides_reach_every_depth(tmp_path: Path) -> None:
    recipe = read(
        tmp_path,
        GOOD,
        "optimiser.lr=2e-3",
        "base=some/model",
        "data.nli.limit=7",
        "data.two words.only={l = ['x']}",
        "batch.size=3",
        "matryoshka=[64, 32]",
        "name=a = b",
    )
    assert (recipe.optimiser.lr, recipe.base, recipe.batch.size) == (2e-3, "some/model", 3)
    assert (recipe.data[0].limit, recipe.data[1].only) == (7, {"l": ["x"]})
    assert (recipe.matryoshka, recipe.name) == ([64, 32], "a = b")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps", "write key=value"),
        ("=3", "write key=value"),
        ("steps.x=1", "steps is not a table"),
        ("steps.x.y=1", "steps.x is not a table"),
        ("data.none.limit=1", "nothing is named 'none' there"),
        ("data.nli=1", "data is not a table"),
    ],
)
def test_a_wrong_override_is_quoted(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"--set {override}.*{message}"):
        read(tmp_path, GOOD, override)


def test_a_byte_order_mark_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text('base = "b"\n', encoding="utf-8-sig")
    assert read_toml(tmp_path / "r.toml") == {"base": "b"}


def test_false_leaves_a_part_out(tmp_path: Path) -> None:
    recipe = read(tmp_path, GOOD + "[distillation]\nteacher = 't'\n", "lora=false", "distillation=false")
    assert recipe.lora is None
    assert recipe.distillation is None


def test_what_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no recipe at"):
        read_recipe(tmp_path / "none.toml")
    with pytest.raises(UsageError, match="is not TOML"):
        read(tmp_path, "steps = ")
    with pytest.raises(UsageError, match="missing required field `base`"):
        read(tmp_path, "steps = 3")
