"""Tests of the fields `rows` and `share` of a data set."""

from pathlib import Path

import pytest

from unmask.errors import UsageError
from unmask.training.examples import load_examples
from unmask.training.recipe import DataSource
from unmask.training.recipe_file import read_recipe


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "rows.txt").write_text("".join(f"text {number}\n" for number in range(40)))
    return tmp_path


def queries(folder: Path, **fields: object) -> set[str]:
    source = DataSource(name="x", path="rows.txt", text="text", **fields)  # pyright: ignore[reportArgumentType]
    return {example.query for example in load_examples(source, folder, None, 1, 0.0).train}


def test_even_and_odd_rows_are_two_halves(folder: Path) -> None:
    even, odd = queries(folder, rows="even"), queries(folder, rows="odd")
    assert even == {f"text {number}" for number in range(0, 40, 2)}
    assert even | odd == queries(folder) and not even & odd


def test_a_share_is_taken_after_what_is_held_out_and_before_the_limit(folder: Path) -> None:
    assert len(queries(folder, share=0.25)) == 10
    assert len(queries(folder, share=0.25, held_out=20)) == 5
    assert len(queries(folder, share=0.25, limit=3)) == 3
    assert len(queries(folder, share=0.001)) == 1
    assert queries(folder, share=0.25) < queries(folder, share=0.5)


def test_shares_that_are_none(folder: Path) -> None:
    for line, message in (
        ("share = 0.0", "share"),
        ('rows = "third"', "rows"),
        ("share = 0.5\nstream = true\nweight = 1.0", "excludes label, limit, share"),
    ):
        recipe = folder / "r.toml"
        recipe.write_text(
            f'base = "x"\nobjective = "mntp"\nsteps = 1\n[[data]]\nname = "a"\npath = "a"\ntext = "t"\n{line}\n'
        )
        with pytest.raises(UsageError, match=message):
            read_recipe(recipe)
