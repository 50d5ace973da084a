"""Tests of renamed recipe keys: old ones are read with a warning, in files, overrides and stored runs."""

import warnings
from pathlib import Path

import pytest

from tests.training.test_recipe import GOOD, read
from unmask.errors import UsageError
from unmask.training.old_keys import RENAMED_KEYS
from unmask.training.recipe import Recipe
from unmask.training.recipe_file import stored_recipe

# Old key with its value, new key, and the value in the recipe.
CASES = [
    ('held_apart="../eval"', "decontaminate_against", lambda recipe: recipe.decontaminate_against, "../eval"),
    ("held_apart=false", "decontaminate_against", lambda recipe: recipe.decontaminate_against, None),
    ("epochs_at_most=2.5", "max_epochs", lambda recipe: recipe.max_epochs, 2.5),
    ('lora.start="other"', "lora.init_from", lambda recipe: recipe.lora.init_from, "other"),
    ('lora={start="other"}', "lora.init_from", lambda recipe: recipe.lora.init_from, "other"),
    ("data.two words.distil=false", "data.use_teacher", lambda recipe: recipe.data[1].use_teacher, False),
    ("data.two words.contrast=true", "data.use_labels", lambda recipe: recipe.data[1].use_labels, True),
]


@pytest.mark.parametrize(("override", "new", "value_of", "value"), CASES, ids=[case[0] for case in CASES])
def test_an_override_with_an_old_key_is_read(override: str, new: str, value_of, value, tmp_path: Path) -> None:
    with pytest.warns(FutureWarning, match=f"is now called {new}") as caught:
        assert value_of(read(tmp_path, GOOD, override)) == value
    assert len(caught) == 1
    assert f"--set {override}" in str(caught[0].message)


def test_a_file_with_old_keys_is_read(tmp_path: Path) -> None:
    old = GOOD.replace('label = "l"', 'label = "l"\ncontrast = true\ndistil = false').replace(
        "[optimiser]", 'held_apart = "../eval"\nepochs_at_most = 3\n[lora]\nstart = "a"\n[optimiser]'
    )
    with pytest.warns(FutureWarning) as caught:
        recipe = read(tmp_path, old)
    assert len(caught) == sum(map(len, RENAMED_KEYS.values()))
    assert all("recipe.toml" in str(warning.message) for warning in caught)
    assert recipe.lora is not None
    assert (recipe.decontaminate_against, recipe.max_epochs, recipe.lora.init_from) == ("../eval", 3, "a")
    assert (recipe.data[1].use_labels, recipe.data[1].use_teacher) == (True, False)


def test_an_override_with_an_old_key_replaces_the_new_one_in_the_file(tmp_path: Path) -> None:
    text = GOOD.replace("[optimiser]", "max_epochs = 3\n[optimiser]")
    with pytest.warns(FutureWarning):
        assert read(tmp_path, text, "epochs_at_most=1").max_epochs == 1


def test_both_names_in_one_file_are_refused(tmp_path: Path) -> None:
    text = GOOD.replace("[optimiser]", "max_epochs = 3\nepochs_at_most = 3\n[optimiser]")
    with pytest.raises(UsageError, match="epochs_at_most is the old name of max_epochs, and both are there; remove"):
        read(tmp_path, text)


@pytest.mark.filterwarnings("error::FutureWarning")
def test_a_stored_recipe_with_old_keys_is_read_without_a_warning(tmp_path: Path) -> None:
    stored = {
        "base": "a/b",
        "objective": "supervised",
        "steps": 3,
        "held_apart": "eval",
        "lora": {"start": "a"},
        "data": [{"name": "nli", "path": "nli.tsv", "query": "q", "positive": "p", "contrast": True}],
    }
    recipe = stored_recipe(stored)
    assert isinstance(recipe, Recipe)
    assert recipe.lora is not None
    assert (recipe.decontaminate_against, recipe.lora.init_from) == ("eval", "a")
    assert "held_apart" in stored  # the caller's dict is left as it was


def test_new_keys_do_not_warn(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read(tmp_path, GOOD, "max_epochs=1", "lora.init_from=a")
