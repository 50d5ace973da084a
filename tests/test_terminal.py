"""Tables and progress lines at every width: no word is cut, and a pipe gets plain lines."""

import io
import json
import re
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unmask import terminal
from unmask.terminal import Progress, Step, print_table, progress_line, table_lines

HEADINGS = ("model", "tokens", "licence", "summary")
ROWS = (
    ("organisation/a-model-with-a-long-name", "512", "Apache-2.0", "A small text encoder for machines without a GPU."),
    ("org/b", "8192", "MIT", "A larger one."),
)
WORDS = st.text("abcdefg-/.", min_size=1, max_size=30)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_rows_that_fit_take_one_line_each() -> None:
    lines = table_lines(("a", "number"), [("x", "1"), ("yy", "20")], 60, right=("number",))
    assert lines == ["a   number", "x        1", "yy      20"]


def test_a_pipe_gets_one_line_per_row() -> None:
    assert len(table_lines(HEADINGS, ROWS, None)) == 3


def test_long_cells_are_broken_between_words() -> None:
    lines = table_lines(HEADINGS, ROWS, 100)
    assert max(map(len, lines)) <= 100
    assert lines[1].endswith("A small text encoder for machines without") and lines[2].strip() == "a GPU."


def test_in_a_narrow_terminal_each_row_is_a_block() -> None:
    assert table_lines(HEADINGS, ROWS, 60)[:5] == [
        "organisation/a-model-with-a-long-name",
        "  tokens   512",
        "  licence  Apache-2.0",
        "  summary  A small text encoder for machines without a GPU.",
        "org/b",
    ]


@given(st.lists(st.lists(st.lists(WORDS, max_size=9).map(" ".join), min_size=3, max_size=3), max_size=4))
@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_word_is_cut(width: int, rows: list[list[str]]) -> None:
    lines = table_lines(("first", "second", "third"), rows, width)
    words = sorted(word for row in rows for cell in row for word in cell.split())
    printed = " ".join(lines).split()
    for word in words:
        printed.remove(word)
    assert all(len(line) <= width for line in lines)


def test_json_has_an_object_per_row(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("last used", "count"), [("now", 1), (None, 2)], as_json=True)
    assert json.loads(capsys.readouterr().out) == [{"last_used": "now", "count": 1}, {"last_used": None, "count": 2}]


def test_no_rows_are_a_sentence_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    print_table(("time", "count"), [])
    assert capsys.readouterr() == ("time  count\n", "")  # a script gets the headings
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    print_table(("time", "count"), [])
    assert capsys.readouterr() == ("", "nothing to list\n")


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize(
    "step",
    [
        Step("encode", 1_234_567, 10_000_000, "rows", ("28,319 tokens/s",)),
        Step("train", 100, 2_000, "steps", ("loss 2.1234", "12,345 tokens/s", "dev/stsb 81.2", "dev/sick 75.4")),
        Step("sentence-transformers/all-MiniLM-L6-v2 · STSBenchmark", 3, None, "texts", ("9,999 tokens/s",)),
        Step("licence"),
    ],
    ids=["encode", "train", "no-total", "name-alone"],
)
def test_a_progress_line_fits_and_cuts_no_word(width: int, step: Step) -> None:
    line = progress_line(step, 3_725.0, width)
    assert len(line) <= width and step.name in line
    whole = progress_line(step, 3_725.0, None).replace(", ", "  ")
    without_bar = re.sub(r"^\[[#.]+\]  ", "", line)
    assert set(without_bar.split("  ")) <= set(whole.split("  "))


def test_the_time_left_outlasts_the_details() -> None:
    step = Step("train", 1, 9, "steps", ("loss 2.1234", "12,345 tokens/s"))
    assert progress_line(step, 60.0, 50) == "train  1 of 9 steps  loss 2.1234  0:01:00 left"
    assert progress_line(step, 60.0, 36) == "train  1 of 9 steps  0:01:00 left"


def test_a_pipe_gets_a_line_at_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "_SECONDS_BETWEEN_LINES", 0)
    stream = io.StringIO()
    with Progress(stream) as progress:
        for rows in (8, 16, 24):
            progress.show(Step("encode", rows, 24, "rows"))
        progress.log("done")
    lines = stream.getvalue().splitlines()
    assert [line.split(", ")[1] for line in lines[:3]] == ["8 of 24 rows", "16 of 24 rows", "24 of 24 rows"]
    assert lines[2].endswith("0:00:00 left") and re.fullmatch(r"\d\d:\d\d:\d\d done", lines[3])
    assert "\x1b" not in stream.getvalue()


def test_a_terminal_gets_a_line_that_is_redrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with Progress(stream) as progress:
        progress.show(Step("encode", 0, 24, "rows"))
        progress.show(Step("encode", 24, 24, "rows"))
    assert "24 of 24 rows" in stream.getvalue() and "[####" in stream.getvalue()
