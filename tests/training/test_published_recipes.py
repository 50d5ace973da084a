"""The recipes that ship, compared with the published LLM2Vec runs, and those of the docs with the code."""

import re
from pathlib import Path

import msgspec
import pytest

from unmask.training.distillation_settings import Distillation, Ranking, Teacher
from unmask.training.recipe import (
    Batch,
    Contrastive,
    DataSource,
    Dev,
    Exit,
    HeadSettings,
    Lora,
    Mntp,
    Optimiser,
    Recipe,
    Save,
    SimCse,
)
from unmask.training.recipe_file import read_recipe

RECIPES = Path(__file__).parent.parent.parent / "recipes"
BASES = ("sheared-llama-1.3b", "llama-2-7b-chat", "mistral-7b-instruct-v0.2", "llama-3-8b-instruct")


def recipe(base: str, step: str) -> Recipe:
    return read_recipe(RECIPES / "llm2vec" / f"{base}-{step}.toml")


@pytest.mark.parametrize("file", sorted(RECIPES.rglob("*.toml")), ids=lambda file: file.stem)
def test_every_recipe_can_be_read(file: Path) -> None:
    run = read_recipe(file)
    assert file.parent.name != "llm2vec" or run.name == file.stem
    assert f"recipes/{file.parent.name}/{file.name}" in file.read_text(encoding="utf-8")  # its own command line


@pytest.mark.parametrize("base", BASES)
def test_masked_next_token_prediction(base: str) -> None:
    run = recipe(base, "mntp")
    mistral = base.startswith("mistral")
    assert (run.mntp.probability, run.mntp.masking) == ((0.8, "all") if mistral else (0.2, "bert"))
    assert (run.mntp.block, run.mntp.mask_token, run.steps) == (512, "_", 1000)
    assert (run.optimiser.lr, run.optimiser.schedule, run.optimiser.warmup) == (5e-5, "linear", 0)
    assert run.adapters == []


@pytest.mark.parametrize("base", BASES)
def test_simcse(base: str) -> None:
    run = recipe(base, "simcse")
    assert (run.batch.size, run.max_length, run.optimiser.lr) == (128, 128, 3e-5)
    assert (run.simcse.attention_dropout, run.simcse.temperature) == (0.3, 0.05)
    assert run.optimiser.total_steps == 3 * (1_000_000 // 128)
    assert len(run.adapters) == 1 and run.adapters[0].endswith("-mntp")


@pytest.mark.parametrize("base", BASES)
def test_supervised(base: str) -> None:
    run = recipe(base, "supervised")
    assert (run.batch.size, run.max_length, run.contrastive.hard_negatives) == (512, 512, 1)
    assert (run.optimiser.lr, run.optimiser.warmup, run.contrastive.temperature) == (2e-4, 300, 0.02)
    assert run.optimiser.total_steps == 3 * (1_500_000 // 512)
    assert (run.contrastive.both_ways, run.contrastive.false_negative_margin) == (False, None)
    # What the reference lost: both sides of symmetric sets are asked about in the same words.
    assert {source.name for source in run.data if source.symmetric} == {"allnli odd", "quora even", "quora odd"}
    assert {source.path for source in run.data if source.rows != "all"} == {"allnli.jsonl", "quora_duplicates.jsonl"}
    assert len({source.path for source in run.data}) == 14
    assert all(source.instruction.endswith(":") for source in run.data)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("step", ["mntp", "simcse", "supervised"])
def test_what_all_steps_share(base: str, step: str) -> None:
    run = recipe(base, step)
    assert run.lora is not None
    assert (run.lora.rank, run.lora.alpha, run.lora.dropout, len(run.lora.targets)) == (16, 32, 0.05, 7)
    assert (run.precision, run.gradient_checkpointing, run.seed) == ("bfloat16", True, 42)
    assert run.base == recipe(base, "mntp").base


DOCS = Path(__file__).parents[2] / "docs"
# The heading of each table in docs/reference/recipe.md, and the fields that it lists.
TABLES: dict[str, type[msgspec.Struct]] = {
    "Run": Recipe,
    "`[[data]]`": DataSource,
    "`[[dev]]`": Dev,
    "`[lora]`": Lora,
    "`[head]`": HeadSettings,
    "`[[exits]]`": Exit,
    "`[optimiser]`": Optimiser,
    "`[batch]`": Batch,
    "`[save]`": Save,
    "`[mntp]`": Mntp,
    "`[simcse]`": SimCse,
    "`[contrastive]`": Contrastive,
    "`[distillation]`": Distillation,
    "`[[distillation.teachers]]`": Teacher,
    "`[distillation.ranking]`": Ranking,
}


@pytest.mark.parametrize("heading", TABLES)
def test_the_page_of_the_recipe_lists_every_field(heading: str) -> None:
    page = (DOCS / "reference" / "recipe.md").read_text(encoding="utf-8")
    section = re.split(r"\n#+ ", page[page.index(f"# {heading}\n") + 2 :])[0]
    table = section[section.index("| field | default | meaning |") :].split("\n\n")[0]
    cells = " ".join(line.split("|")[1] for line in table.splitlines()[2:])
    listed = re.findall(r"`(\w+)`", cells)
    assert sorted(listed) == sorted(TABLES[heading].__struct_fields__)


def test_the_complete_recipes_in_the_docs_can_be_read(tmp_path: Path) -> None:
    text = "".join((DOCS / page).read_text(encoding="utf-8") for page in ("training.md", "reference/recipe.md"))
    recipes = [block.partition("```")[0] for block in text.split("```toml\n")[1:]]
    complete = [recipe for recipe in recipes if "objective =" in recipe]
    assert len(complete) == 2
    for recipe in complete:
        (tmp_path / "recipe.toml").write_text(recipe, encoding="utf-8")
        assert read_recipe(tmp_path / "recipe.toml").data
