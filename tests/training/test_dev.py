"""Tests of the evaluation during training."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unmask.errors import UsageError
from unmask.training.dev import HELD_OUT_COSINE, DevSets, spearman
from unmask.training.examples import Example, Examples
from unmask.training.recipe import DataSource, Dev
from unmask.training.rows import BadRows


class Letters:
    """An encoder whose vectors are counts of letters."""

    def __init__(self) -> None:
        self.instructions: list[str] = []

    def __call__(self, texts: Sequence[str], instruction: str) -> np.ndarray:
        self.instructions.append(instruction)
        counts = np.array([[text.count(letter) for letter in "abcdef"] for text in texts], dtype=float)
        return counts / np.linalg.norm(counts, axis=1, keepdims=True)


def pairs_of(examples: list[Example], train: list[Example] | None = None, **fields) -> DevSets:
    source = DataSource(name="set", path="x.tsv", **(fields or {"query": "q", "positive": "p"}))
    return DevSets([], [Examples(source, train or [], examples, BadRows(), 0)], None)


def test_graded_pairs_by_rank(tmp_path: Path) -> None:
    (tmp_path / "dev.tsv").write_text("x\ty\ts\nab\tab\t5\nab\tac\t3\nab\tcd\t0\n", encoding="utf-8")
    dev = [Dev(name="sts", path="dev.tsv", first="x", second="y", score="s")]
    assert DevSets(dev, [], tmp_path).scores(Letters())["sts"] == pytest.approx(100.0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("x\ty\nab\tab\n", r"dev.tsv has no column 's'; it has the columns 'x', 'y'"),
        ("x\ty\ts\nab\tab\thigh\n", "dev.tsv:2: field 's': 'high' is no finite number"),
        ("x\ty\ts\nab\tab\tnan\n", "dev.tsv:2: field 's': 'nan' is no finite number"),
        ("x\ty\ts\nab\t\t3\n", "dev.tsv:2: field 'y' is empty"),
        ("x\ty\ts\nab\ta\t3\nab\tb\t3\n", "dev 'sts': all scores in dev.tsv are 3"),
        ("x\ty\ts\n", "dev 'sts': dev.tsv holds no rows"),
        ("x\ty\ts\nab\tab\t3\nbad\nab\tac\t1\n", "1 of 3 rows are unusable"),
    ],
)
def test_a_graded_file_that_cannot_be_used(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "dev.tsv").write_text(content, encoding="utf-8")
    dev = [Dev(name="sts", path="dev.tsv", first="x", second="y", score="s")]
    with pytest.raises(UsageError, match=message):
        DevSets(dev, [], tmp_path)


def test_held_out_pairs_by_the_nearest() -> None:
    dev = pairs_of([Example("a", "aab"), Example("b", "bc"), Example("c", "aac"), Example("d", "d")])
    assert dev.scores(Letters())["set"] == 75.0


def test_a_positive_that_two_queries_share_is_right_for_both() -> None:
    dev = pairs_of([Example("ab", "aab"), Example("abb", "aab"), Example("d", "d")])
    assert dev.scores(Letters())["set"] == 100.0


@pytest.mark.parametrize("symmetric", [False, True])
def test_instructions_are_those_of_training(symmetric: bool) -> None:
    encoder = Letters()
    fields = {"query": "q", "positive": "p", "instruction": "find", "symmetric": symmetric}
    pairs_of([Example("a", "b")], **fields).scores(encoder)
    assert encoder.instructions == ["find", "find" if symmetric else ""]


def test_labels_are_found_by_a_text_of_the_same_label() -> None:
    train = [Example("aa", label="1"), Example("bb", label="2")]
    held = [Example("a", label="1"), Example("ab", label="1"), Example("b", label="2"), Example("c", label="new")]
    dev = pairs_of(held, train, text="t", label="l")
    assert len(dev) == 1
    assert dev.scores(Letters())["set"] == 100.0


def test_texts_alone_are_not_watched() -> None:
    assert len(pairs_of([Example("a"), Example("b")], text="t")) == 0


def test_vectors_are_compared_with_the_first_numbers_of_a_longer_target() -> None:
    source = DataSource(name="set", path="x.tsv", text="t")
    held_out = [Example("ab"), Example("abc")]
    targets = {"ab": [0.6, 0.0, 0, 0, 0, 0, 0.8], "abc": [0.0, 0.3, 0.4, 0, 0, 0, 0.75**0.5]}
    dev = DevSets(
        [], [Examples(source, [], held_out, BadRows(), 0)], None, lambda texts: np.array([*map(targets.get, texts)])
    )
    # ab: cosine of (1, 1) and (1, 0). abc: cosine of (1, 1, 1) and (0, 3, 4).
    assert dev.scores(Letters()) == {HELD_OUT_COSINE: pytest.approx(50 * (2**-0.5 + 7 / 5 / 3**0.5))}


@given(st.lists(st.integers(-5, 5), min_size=3, max_size=30).filter(lambda values: len(set(values)) > 1))
def test_spearman_is_scipys(values: list[int]) -> None:
    scipy_stats = pytest.importorskip("scipy.stats")
    other = np.roll(np.array(values) ** 2 + np.arange(len(values)) % 3, 1)
    if len(set(other.tolist())) > 1:
        assert spearman(np.array(values), other) == pytest.approx(float(scipy_stats.spearmanr(values, other)[0]))
