"""Tests of the order of the data: reproducible, the same after a resume, each row once per epoch, by weight."""

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.training.tiny import recipe_of
from unmask.errors import UsageError
from unmask.training.decontamination import Decontaminator
from unmask.training.examples import load_examples
from unmask.training.mixture import Mixture, TextBatch
from unmask.training.recipe import Recipe
from unmask.training.train import mixture_of


def write_texts(folder: Path, name: str, rows: int) -> None:
    lines = "".join(f"{name} text number {i}\tlabel {i % 3}\n" for i in range(rows))
    (folder / f"{name}.tsv").write_text(f"text\tlabel\n{lines}", encoding="utf-8")


def recipe(*sources: dict[str, Any], **fields: Any) -> Recipe:
    data = [{"path": f"{source['name']}.tsv", "text": "text", **source} for source in sources]
    return recipe_of("simcse", data=data, **fields)


def mixture(chosen: Recipe, folder: Path, held: Decontaminator | None = None) -> Mixture:
    sets = [load_examples(s, folder, held, chosen.seed, chosen.max_bad_rows) for s in chosen.data if not s.stream]
    return mixture_of(chosen, sets, folder, held)


def content_of(batches: list[TextBatch]) -> list[tuple[str, list[str]]]:
    return [(batch.name, [f"{e.query}>{e.positive}" for e in batch.examples]) for batch in batches]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    chosen = tmp_path_factory.mktemp("data")
    for name, rows in (("a", 23), ("b", 11), ("c", 40)):
        write_texts(chosen, name, rows)
    return chosen


SOURCES = (
    {"name": "a", "label": "label"},
    {"name": "b", "batch": 3, "weight": 9.0},
    {"name": "c", "stream": True, "weight": 20.0},
)


@settings(max_examples=15)
@given(skip=st.integers(0, 40))
def test_skipping_is_continuing(skip: int, folder: Path) -> None:
    chosen = recipe(*SOURCES, batch={"size": 5}, shuffle_buffer=7)
    whole = content_of(list(islice(mixture(chosen, folder).batches(), 45)))
    assert content_of(list(islice(mixture(chosen, folder).batches(skip), 45 - skip))) == whole[skip:]


def test_another_seed_is_another_order(folder: Path) -> None:
    one, other = (
        content_of(list(islice(mixture(recipe(*SOURCES, seed=seed), folder).batches(), 20))) for seed in (1, 2)
    )
    assert one != other


def test_a_batch_is_from_one_set_and_has_its_size(folder: Path) -> None:
    for batch in islice(mixture(recipe(*SOURCES, batch={"size": 5}), folder).batches(), 30):
        assert len(batch.examples) == (batch.parts[0].source.batch or 5)
        assert all(example.query.startswith(batch.name) for example in batch.examples)


def test_sets_are_drawn_by_weight_and_by_rows_where_none_is_given(folder: Path) -> None:
    chosen = recipe({"name": "a", "weight": 30.0}, {"name": "b", "weight": 10.0}, {"name": "c"}, batch={"size": 1})
    drawn = Counter(batch.name for batch in islice(mixture(chosen, folder).batches(), 4000))
    assert drawn["a"] / 4000 == pytest.approx(30 / 80, abs=0.03)
    assert drawn["c"] / 4000 == pytest.approx(40 / 80, abs=0.03)


@pytest.mark.parametrize("buffer", [1, 7, 40, 1000])
@pytest.mark.parametrize("stream", [False, True])
def test_every_row_comes_once_per_epoch(stream: bool, buffer: int, folder: Path) -> None:
    chosen = recipe({"name": "c", "weight": 1.0, "stream": stream}, batch={"size": 10}, shuffle_buffer=buffer)
    batches = list(islice(mixture(chosen, folder).batches(), 12))
    epochs = [[e.query for batch in batches[i : i + 4] for e in batch.examples] for i in (0, 4, 8)]
    assert all(len(set(epoch)) == 40 for epoch in epochs)
    if buffer > 1 or not stream:
        assert epochs[0] != epochs[1]
        assert epochs[0] != sorted(epochs[0], key=lambda text: int(text.split()[-1]))


def test_a_label_gives_a_positive_of_the_same_label(folder: Path) -> None:
    labels = {f"a text number {i}": f"label {i % 3}" for i in range(23)}
    examples = [
        e for b in islice(mixture(recipe({"name": "a", "label": "label"}), folder).batches(), 200) for e in b.examples
    ]
    assert all(e.positive is not None and labels[e.query] == labels[e.positive] == e.label for e in examples)
    assert len({(e.query, e.positive) for e in examples}) > 60
    assert all(e.query != e.positive for e in examples)
    # In eighty epochs a text meets every other one of its label.
    partners = Counter(e.positive for e in examples if e.query == "a text number 0")
    assert set(partners) == {f"a text number {i}" for i in range(3, 23, 3)}


def test_a_text_alone_with_its_label_is_its_own_positive(tmp_path: Path) -> None:
    (tmp_path / "c.tsv").write_text("text\tlabel\none\tx\ntwo\ty\nthree\ty\n", encoding="utf-8")
    batch = next(mixture(recipe({"name": "c", "label": "label"}), tmp_path).batches())
    pairs = {(e.query, e.positive) for e in batch.examples}
    assert pairs == {("one", "one"), ("two", "three"), ("three", "two")}


def test_a_stream_leaves_evaluation_texts_out(folder: Path) -> None:
    chosen = recipe({"name": "c", "weight": 1.0, "stream": True}, batch={"size": 39})
    batch = next(mixture(chosen, folder, Decontaminator(["c text number 5"])).batches())
    assert len({e.query for e in batch.examples}) == 39
    assert "c text number 5" not in {e.query for e in batch.examples}


def test_a_stream_without_a_usable_row_ends_in_an_error(folder: Path) -> None:
    chosen = recipe({"name": "c", "weight": 1.0, "stream": True, "only": {"label": ["none"]}})
    with pytest.raises(UsageError, match=r"data 'c': no usable row in c.tsv"):
        next(mixture(chosen, folder).batches())


def test_a_stream_with_too_many_bad_rows_stops(tmp_path: Path) -> None:
    (tmp_path / "c.tsv").write_text("text\tlabel\n" + "good text\tx\n" * 8 + "bad\n" * 2, encoding="utf-8")
    chosen = recipe({"name": "c", "weight": 1.0, "stream": True}, batch={"size": 8})
    with pytest.raises(UsageError, match="2 of 10 rows are unusable"):
        list(islice(mixture(chosen, tmp_path).batches(), 3))


def test_epochs_are_counted_in_steps(folder: Path) -> None:
    alone = mixture(recipe({"name": "c"}, batch={"size": 10}), folder)
    assert (alone.steps_of(1), alone.steps_of(2.5)) == (4, 10)
    both = mixture(recipe({"name": "a"}, {"name": "c"}, batch={"size": 10}), folder)
    names = Counter(batch.name for batch in islice(both.batches(), both.steps_of(3)))
    assert names["a"] * 10 >= 3 * 23
    assert names["c"] * 10 >= 3 * 40
