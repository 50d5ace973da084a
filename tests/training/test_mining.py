"""Tests of mining: the negatives equal those of a plain search over all texts, within the limits."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask.errors import UsageError
from unmask.evaluate.cache import VectorCache
from unmask.evaluate.models import open_model
from unmask.training import mining
from unmask.training.mining import MiningSettings, limits_of, mine, nearest


class Compass:
    """A model whose vectors are directions: the text "N words" lies at N degrees; an instruction turns by 90."""

    kind: Literal["unmask"] = "unmask"
    name, revision, dimensions, takes_instructions = "compass", "compass", 2, True
    parameters: int | None = None

    def __init__(self) -> None:
        self.encoded: list[str] = []

    def encode(self, texts: Sequence[str], instruction: str = "") -> np.ndarray:
        self.encoded += texts
        degrees = np.array([float(text.split()[0]) for text in texts]) + (90 if instruction else 0)
        angles = np.radians(degrees)
        return np.stack((np.cos(angles), np.sin(angles)), axis=1).astype(np.float32) * 3

    def count_tokens(self, texts: Sequence[str], instruction: str = "") -> int | None:
        return None


def rows_file(folder: Path, rows: list[tuple[Any, Any]]) -> str:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps({"query": q, "positive": p}) + "\n" for q, p in rows))
    return str(file)


def corpus_file(folder: Path, texts: list[str]) -> str:
    (folder / "corpus.txt").write_text("".join(f"{text}\n" for text in texts))
    return str(folder / "corpus.txt")


def mined(folder: Path, model: Any, **fields: Any) -> tuple[list[dict[str, Any]], mining.MiningResult]:
    cache = VectorCache(folder / "vectors", model.revision, model.dimensions)
    done = mine(MiningSettings(**fields), model, folder / "out.jsonl", cache=cache)
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()], done


def test_the_nearest_that_are_far_enough(tmp_path: Path) -> None:
    rows = rows_file(tmp_path, [("0 query", "30 answer")])
    corpus = corpus_file(tmp_path, ["10 too near", "31 within 5 %", "40 a", "-50 b", "60 c", "30 answer", "0 QUERY "])
    # The limit is 0.95 cos 30 = 0.823 = cos 34.6.
    lines, done = mined(tmp_path, Compass(), source=rows, corpus=corpus, count=2)
    assert lines == [{"query": "0 query", "positive": "30 answer", "negatives": ["40 a", "-50 b"]}]
    assert (done.rows, done.texts, done.rows_by_negatives, done.refused) == (1, 7, (0, 0, 1), 2)
    lines, _ = mined(tmp_path, Compass(), source=rows, corpus=corpus, count=2, max_share=None)
    assert lines[0]["negatives"] == ["10 too near", "31 within 5 %"]
    lines, _ = mined(tmp_path, Compass(), source=rows, corpus=corpus, count=9, max_share=None, margin=0.3)
    assert lines[0]["negatives"] == ["60 c"]  # cos 30 - 0.3 = cos 55.5


def test_skipped_ranks_count_what_the_margin_refuses(tmp_path: Path) -> None:
    rows = rows_file(tmp_path, [("0 query", "30 answer")])
    corpus = corpus_file(tmp_path, ["10 too near", "31 within 5 %", "40 a", "-50 b", "60 c"])
    for skip, expected, refused in ((1, ["40 a", "-50 b"], 1), (2, ["40 a", "-50 b"], 0), (3, ["-50 b", "60 c"], 0)):
        lines, done = mined(tmp_path, Compass(), source=rows, corpus=corpus, count=2, skip=skip)
        assert (lines[0]["negatives"], done.refused) == (expected, refused)


def test_no_positive_of_the_query_is_its_negative(tmp_path: Path) -> None:
    rows = [("0 query", "10 one"), ("0  Query", "12 two"), ("80 other", "84 three")]
    lines, done = mined(tmp_path, Compass(), source=rows_file(tmp_path, rows), count=5, max_share=None)
    assert [line["negatives"] for line in lines] == [["84 three"], ["84 three"], ["12 two", "10 one"]]
    assert done.rows_by_negatives == (0, 2, 1, 0, 0, 0)
    assert [line["query"] for line in lines] == [query for query, _ in rows]


def test_an_instruction_is_for_queries_unless_symmetric(tmp_path: Path) -> None:
    rows = rows_file(tmp_path, [("0 query", "90 answer"), ("100 x", "130 y")])
    corpus = corpus_file(tmp_path, ["0 zero", "140 far"])
    lines, _ = mined(tmp_path, Compass(), source=rows, corpus=corpus, count=1, instruction="Turn:")
    assert lines[0]["negatives"] == ["140 far"]  # the query points at 90 now
    lines, _ = mined(
        tmp_path, Compass(), source=rows, corpus=corpus, count=1, instruction="Turn:", symmetric=True, max_share=None
    )
    assert lines[0]["negatives"] == ["0 zero"]


def test_interrupted_it_goes_on_and_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [(f"{i} query", f"{i * 7 % 90} answer") for i in range(90)]
    source = rows_file(tmp_path, rows)
    once, _ = mined(tmp_path, Compass(), source=source, count=3)
    monkeypatch.setattr(mining, "_QUERIES", 7)
    monkeypatch.setattr(mining, "_TEXTS", 5)
    again = Compass()
    assert mined(tmp_path, again, source=source, count=3)[0] == once  # block by block as at once
    assert again.encoded == []  # vectors were kept

    class Failing(Compass):
        def encode(self, texts: Sequence[str], instruction: str = "") -> np.ndarray:
            raise MemoryError

    written = (tmp_path / "out.jsonl").read_bytes()
    with pytest.raises(MemoryError):
        mine(
            MiningSettings(source=source),
            Failing(),
            tmp_path / "out.jsonl",
            cache=VectorCache(tmp_path / "new", "x", 2),
        )
    assert (tmp_path / "out.jsonl").read_bytes() == written


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 4), st.integers(0, 3), st.integers(1, 9))
def test_the_search_is_exact_in_any_blocks(seed: int, size: int, count: int, skip: int, block: int) -> None:
    generator = np.random.default_rng(seed)
    # Coarse coordinates: equal similarities are common.
    queries, texts = (generator.integers(-1, 2, (n, 3)).astype(np.float32) for n in (3, size))
    limits = generator.choice(np.array([-1, 0, 1, 2, np.inf], dtype=np.float32), 3)
    never = [sorted(set(generator.integers(0, size, 2).tolist())) for _ in range(3)]
    before = mining._TEXTS
    mining._TEXTS = block
    try:
        chosen, refused = nearest(queries, texts, limits, never, MiningSettings(source="", count=count, skip=skip))
    finally:
        mining._TEXTS = before
    lost = 0
    for index in range(3):
        scores = texts @ queries[index]
        ranked = [row for row in np.argsort(-scores, kind="stable") if row not in never[index]][skip:]
        expected = [row for row in ranked if scores[row] < limits[index]][:count]
        assert chosen[index] == expected
        lost += sum(scores[row] >= limits[index] for row in ranked[:count])
    assert refused == lost


def test_limits() -> None:
    cosines = np.array([0.8, 0.0, -0.2])
    np.testing.assert_allclose(limits_of(cosines, 0.5, None), [0.4, 0.0, -0.2])
    np.testing.assert_allclose(limits_of(cosines, None, 0.1), [0.7, -0.1, -0.3], atol=1e-7)
    np.testing.assert_allclose(limits_of(cosines, 0.95, 0.1), [0.7, -0.1, -0.3], atol=1e-7)
    assert np.isinf(limits_of(cosines, None, None)).all()


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    rows = rows_file(tmp_path, [("0 q", "1 p")])
    for fields, message in (
        ({"source": rows, "query": "question"}, "no column 'question'"),
        ({"source": str(tmp_path / "none.jsonl")}, "no training data"),
        ({"source": rows, "count": 0}, "count=0"),
        ({"source": rows, "max_share": 1.5}, "max_share=1.5"),
        ({"source": rows, "margin": -1.0}, "margin=-1"),
    ):
        with pytest.raises(UsageError, match=message):
            mined(tmp_path, Compass(), **fields)
    (tmp_path / "rows.jsonl").write_text('{"query": "0 q", "positive": ""}\n{"query": "0 q", "positive": "1 p"}\n')
    with pytest.raises(UsageError, match="1 of 2 rows are unusable"):
        mined(tmp_path, Compass(), source=rows)
    assert mined(tmp_path, Compass(), source=rows, max_bad_rows=0.5)[1].rows == 1


def test_with_a_model(golden_dir: Path, tmp_path: Path) -> None:
    model = open_model(f"{golden_dir / 'tiny_llama'}?name=tiny")
    rows = rows_file(tmp_path, [(f"question {word}", f"answer {word}") for word in ("one", "two", "three", "four")])
    lines, done = mined(tmp_path, model, source=rows, count=2, max_share=1.0)
    assert done.rows == len(lines) == 4
    for line in lines:
        assert line["positive"] not in line["negatives"]
