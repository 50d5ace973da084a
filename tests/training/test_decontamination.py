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


@pytest.mark.parametrize(
    ("held", "copy"),
    [
        ("\u4eca\u5929\u5929\u6c14\u5f88\u597d", "\u4eca\u5929\u5929\u6c14\u5f88\u597d\u3002"),  # Chinese
        ("\u732b\u304c\u5bdd\u3066\u3044\u308b\u3002", "\u732b\u304c\u3001\u5bdd\u3066\u3044\u308b"),  # Japanese
        ("\u30b3\u30fc\u30d2\u30fc", "\uff7a\uff70\uff8b\uff70"),  # Katakana of half the width
        ("\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35", "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35!"),  # Thai
        ("\u0eaa\u0eb0\u0e9a\u0eb2\u0e8d", "\u0eaa\u0eb0\u0e9a\u0eb2\u0e8d!"),  # Lao
        ("\u1780\u1798\u17d2\u1796\u17bb\u1787\u17b6", "\u1780\u1798\u17d2\u1796\u17bb\u1787\u17b6\u17d4"),  # Khmer
        ("\u1019\u103c\u1014\u103a\u1019\u102c", "\u1019\u103c\u1014\u103a\u1019\u102c\u104b"),  # Burmese
    ],
)
def test_scripts_without_spaces_hide_nothing(held: str, copy: str) -> None:
    assert Decontaminator([held]).overlaps(copy)
    assert not Decontaminator([held]).overlaps(copy[1:])
    assert not Decontaminator([held[:2]]).overlaps(held[:2])


def test_ten_characters_in_a_row_are_a_run() -> None:
    text = "\u5317\u4eac\u662f\u4e2d\u534e\u4eba\u6c11\u5171\u548c\u56fd\u7684\u9996\u90fd"
    held = Decontaminator([f"{text}\uff0c{text[:4]}"])
    assert held.overlaps(f"\u6211\u77e5\u9053{text[1:11]}\u5f88\u5927")
    assert not held.overlaps(f"\u6211\u77e5\u9053{text[1:10]}\u5f88\u5927")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Größe, naïve: 3.5 km²", ["große", "naive", "3", "5", "km2"]),
        ("Привет, мир", ["привет", "мир"]),
        ("안녕 세상", ["\u110b\u1161\u11ab\u1102\u1167\u11bc", "\u1109\u1166\u1109\u1161\u11bc"]),
        ("مرحبا يا عالم", ["مرحبا", "يا", "عالم"]),
        ("the 東京 tower", ["the", "東", "京", "tower"]),
    ],
)
def test_words_of_other_scripts_stay_whole(text: str, words: list[str]) -> None:
    assert words_of(text) == words


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
    lists = b'{"negatives": ["sixth text of all", "seventh text of all"], "nested": [[], ["eighth text of all"]]}\n'
    (tmp_path / "f.jsonl").write_bytes(lists)
    held = read_decontaminator(tmp_path)
    assert all(held.overlaps(f"{number} text of all") for number in ("sixth", "seventh", "eighth"))
    assert all(held.overlaps(f"{number} text of all") for number in ("first", "second", "third", "fourth", "fifth"))
    assert not held.overlaps("this is no data at all")


def test_texts_in_a_linked_folder_are_held_out(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.txt").write_text("one two three four five\n")
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    assert read_decontaminator(tmp_path / "data").overlaps("one two three four five")
