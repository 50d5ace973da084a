"""Tests of decontamination: copies of evaluation texts are found in any spelling, and nothing else is."""

import gzip
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unmask.training.decontamination import Decontaminator, read_decontaminator, words_of

LONG = "The AFC champion Denver Broncos defeated the NFC champion Carolina Panthers 24 to 10 to earn their third title"
WORD = st.text(alphabet="abcdefghij", min_size=1, max_size=6)


@pytest.mark.parametrize(
    "copy",
    [
        "A man is playing a guitar",
        "a man is playing a guitar.",
        "  A MAN -- is playing; a 'guitar'!  ",
        "A man -LRB- is playing -RRB- a guitar .",
        "A man (is playing) a guitar.",
        "A\tman\nis\r\nplaying a_guitar",
    ],
)
def test_a_short_text_is_caught_in_other_dress(copy: str) -> None:
    assert Decontaminator(["A man is playing a guitar."]).overlaps(copy)


@pytest.mark.parametrize(
    ("held", "copy"),
    [
        ("They don't know it's José's café", "They do n't know it 's Jose 's cafe ."),
        ("They don\u2019t know it\u2019s José\u2019s café", "they don't know it's jose's cafe"),
        ("Jose\u0301 isn\u02bct here, I\u2018ve seen", "José is n't here, I 've seen"),
        ("The ﬁrst \uff14 rows", "the first 4 rows"),
    ],
)
def test_apostrophes_and_accents_hide_nothing(held: str, copy: str) -> None:
    assert Decontaminator([held]).overlaps(copy)
    assert Decontaminator([copy]).overlaps(held)


def test_a_run_of_a_long_text_is_caught() -> None:
    held = Decontaminator([LONG])
    assert held.overlaps(f"It is well known that {LONG.lower()}, as everybody saw.")
    assert held.overlaps(" ".join(LONG.split()[4:14]))
    assert not held.overlaps(" ".join(LONG.split()[4:13]))


@pytest.mark.parametrize(
    "clean", ["A man is playing the guitar", "A man is playing", "A man is playing a guitar on stage", "yes", "", "..."]
)
def test_another_text_is_left_alone(clean: str) -> None:
    assert not Decontaminator(["A man is playing a guitar.", LONG, "yes", "Thank you!"]).overlaps(clean)


def test_nothing_held_touches_nothing() -> None:
    assert len(Decontaminator([])) == 0
    assert not Decontaminator([]).overlaps(LONG)


@given(st.lists(WORD, min_size=3, max_size=30), st.lists(WORD, max_size=10), st.lists(WORD, max_size=10))
def test_every_text_touches_itself_and_long_ones_whatever_surrounds_them(
    words: list[str], before: list[str], after: list[str]
) -> None:
    held = Decontaminator([" ".join(words)])
    assert held.overlaps(", ".join(words).upper())
    if len(words) >= 10:
        assert held.overlaps(" ".join([*before, *words, *after]))


@given(st.text())
def test_words_have_no_case_and_no_punctuation(text: str) -> None:
    assert words_of(text) == words_of(" ".join(words_of(text)))


def test_every_text_of_a_folder_is_read(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "a.tsv").write_text("id\ttext\n1\tfirst text of all\n", encoding="utf-8")
    (tmp_path / "below" / "b.csv").write_text('text\n"second text, of all"\n', encoding="utf-8")
    (tmp_path / "below" / "c.jsonl.gz").write_bytes(gzip.compress(b'{"words": ["third", "text", "of", "all"]}\n'))
    (tmp_path / "d.txt").write_text("fourth text of all\n", encoding="utf-8")
    (tmp_path / "README.md").write_text("this is no data at all\n", encoding="utf-8")
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["fifth text of all"]}), tmp_path / "e.parquet")
    held = read_decontaminator(tmp_path)
    assert all(held.overlaps(f"{number} text of all") for number in ("first", "second", "third", "fourth", "fifth"))
    assert not held.overlaps("this is no data at all")
