"""Tests of reading rows into examples: columns, labels, bad rows, sampling and held-out rows."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unmask.errors import UsageError
from unmask.training.decontamination import Decontaminator
from unmask.training.examples import Example, Examples, load_examples, pieces
from unmask.training.recipe import DataSource


def load(
    folder: Path, rows: list[dict[str, Any]], held: Decontaminator | None = None, bad: float = 0.0, **fields: Any
) -> Examples:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_examples(DataSource(name="set", path="rows.jsonl", **fields), folder, held, seed=1, max_bad_rows=bad)


def test_pairs_with_negatives_in_columns_and_lists(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"q": "a", "p": "b", "n1": "c", "n2": ["d", "", None, "e"]},
        {"q": "f", "p": ["g", "unused"], "n1": None, "n2": []},
    ]
    dataset = load(tmp_path, rows, query="q", positive="p", negatives=["n1", "n2"])
    assert sorted(dataset.train, key=lambda e: e.query) == [Example("a", "b", ("c", "d", "e")), Example("f", "g")]


def test_labels_may_be_numbers(tmp_path: Path) -> None:
    dataset = load(tmp_path, [{"t": "a", "l": 0}, {"t": "b", "l": "x"}], text="t", label="l")
    assert {(e.query, e.label) for e in dataset.train} == {("a", "0"), ("b", "x")}


@pytest.mark.parametrize(
    ("row", "fields", "reason"),
    [
        ({"q": " ", "p": "b"}, {"query": "q", "positive": "p"}, "rows.jsonl:2: field 'q' is empty"),
        (
            {"q": 3, "p": "b"},
            {"query": "q", "positive": "p"},
            "rows.jsonl:2: field 'q': number found where a string is needed",
        ),
        ({"q": "a"}, {"query": "q", "positive": "p"}, "rows.jsonl:2: no field 'p'; it has the fields 'q'"),
        ({"q": "a", "p": "b", "n": 3}, {"query": "q", "positive": "p", "negatives": ["n"]}, "field 'n': number found"),
        (
            {"q": "half \ud83d", "p": "b"},
            {"query": "q", "positive": "p"},
            "field 'q': \\ud83d is half a surrogate pair",
        ),
        ({"q": "a", "p": None}, {"text": "q", "label": "p"}, "rows.jsonl:2: no p"),
    ],
)
def test_a_row_that_cannot_be_used_is_counted(
    row: dict[str, Any], fields: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    good = {"q": "x", "p": "y", "n": "z"}
    dataset = load(tmp_path, [good, row, good], bad=0.5, **fields)
    assert (len(dataset.train), dataset.bad.bad, dataset.bad.seen) == (2, 1, 3)
    assert reason in dataset.bad.places[0]
    with pytest.raises(UsageError, match="1 of 3 rows are unusable"):
        load(tmp_path, [good, row, good], bad=0.1, **fields)


@pytest.mark.parametrize("fields", [{"query": "q", "positive": "x"}, {"text": "q", "only": {"x": ["1"]}}])
def test_an_unknown_column_is_an_error_that_lists_the_known(fields: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"data 'set': rows.jsonl:1 has no column 'x'; it has q, p"):
        load(tmp_path, [{"q": "a", "p": "b"}], **fields)


def test_an_unknown_column_is_found_behind_bad_rows_too(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("q\tp\nbad\nbad\nbad\na\tb\n", encoding="utf-8")
    with pytest.raises(UsageError, match=r"a.tsv has no column 'x'; it has the columns 'q', 'p'"):
        load_examples(DataSource(name="set", path="a.tsv", query="q", positive="x"), tmp_path, None, 1, 0.9)


def test_rows_are_chosen_by_value(tmp_path: Path) -> None:
    rows = [{"t": str(i), "kind": kind} for i, kind in enumerate(["a", "b", "c", "a"])]
    assert {e.query for e in load(tmp_path, rows, text="t", only={"kind": ["a", "b"]}).train} == {"0", "1", "3"}
    assert {e.query for e in load(tmp_path, rows, text="t", without={"kind": ["a"]}).train} == {"1", "2"}


def test_the_sample_follows_from_the_seed_and_leaves_out_what_is_held_out(tmp_path: Path) -> None:
    rows = [{"t": f"text {i}"} for i in range(50)]
    dataset = load(tmp_path, rows, text="t", limit=20, held_out=10)
    again = load(tmp_path, rows, text="t", limit=20, held_out=10)
    assert dataset.train == again.train
    assert dataset.digest() == again.digest()
    assert (len(dataset.train), len(dataset.held_out)) == (20, 10)
    assert not {e.query for e in dataset.train} & {e.query for e in dataset.held_out}
    other = load_examples(DataSource(name="other", path="rows.jsonl", text="t", limit=20), tmp_path, None, 1, 0.0)
    assert other.digest() != dataset.digest()


def test_evaluation_texts_are_dropped_wherever_they_stand(tmp_path: Path) -> None:
    held = Decontaminator(["the quick brown fox"])
    rows = [
        {"q": "The quick, brown fox!", "p": "b", "n": "c"},
        {"q": "a", "p": "the quick brown fox", "n": "c"},
        {"q": "a", "p": "b", "n": "The Quick Brown Fox"},
        {"q": "a quick fox", "p": "b", "n": "c"},
    ]
    dataset = load(tmp_path, rows, held, query="q", positive="p", negatives=["n"])
    assert dataset.overlapping == 3
    assert [e.query for e in dataset.train] == ["a quick fox"]


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    reason = r"data 'set': no usable row in rows.jsonl \(0 seen, 0 overlap with evaluation data\)"
    with pytest.raises(UsageError, match=reason):
        load(tmp_path, [], text="t")
    with pytest.raises(UsageError, match="all 2 rows are held out"):
        load(tmp_path, [{"t": "a"}, {"t": "b"}], text="t", held_out=5)


def test_texts_are_cut_between_words(tmp_path: Path) -> None:
    rows = [{"q": "  one two three", "p": "four", "n": ["fivesixseven eight", "nine ten"]}]
    dataset = load(tmp_path, rows, query="q", positive="p", negatives=["n"], max_characters=8)
    assert dataset.train == [Example("one two", "four", ("fivesixs", "nine ten"))]


def test_a_long_text_becomes_pieces_of_whole_sentences(tmp_path: Path) -> None:
    rows = [
        {"t": "Q: How do I sort it? I have a list.\n\n{\n    return sorted(a, b)\nUse sort. It is short! "},
        {"t": "A sentence that goes on and on without an end"},
    ]
    dataset = load(tmp_path, rows, text="t", piece_characters=24)
    expected = {"Q: How do I sort it?", "I have a list.", "return sorted(a, b)", "Use sort. It is short!"}
    assert {e.query for e in dataset.train} == expected | {"A sentence that goes on"}
    assert dataset.bad.seen == 2


def test_pieces_of_an_empty_text_are_a_bad_row(tmp_path: Path) -> None:
    dataset = load(tmp_path, [{"t": " "}, {"t": "three words here"}], bad=1.0, text="t", piece_characters=20)
    assert [e.query for e in dataset.train] == ["three words here"]
    assert dataset.bad.places == ["rows.jsonl:1: field 't' is empty"]


@given(st.text(alphabet="ab .?!\n", max_size=200), st.integers(1, 40))
def test_pieces_hold_only_words_of_their_text_in_its_order(text: str, characters: int) -> None:
    words = iter(text.split())
    for piece in pieces(text, characters):
        assert 0 < len(piece) <= characters
        assert all(any(word.startswith(part) for word in words) for part in piece.split())


def test_pieces_go_with_a_text_alone() -> None:
    with pytest.raises(ValueError, match="piece_characters goes with text, and excludes label"):
        DataSource(name="set", path="p", query="q", positive="p", piece_characters=9)
    with pytest.raises(ValueError, match="piece_characters goes with text, and excludes label"):
        DataSource(name="set", path="p", text="t", label="l", piece_characters=9)
