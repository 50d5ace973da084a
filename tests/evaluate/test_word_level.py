"""Word-level tasks, from the folder of data to the score."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from unmask import Encoder
from unmask.errors import UsageError
from unmask.evaluate.word_level import WORD_TASKS, run_word_task
from unmask.evaluate.word_states import STATES

ROWS = {"train": 60, "dev": 10, "test": 20}


@pytest.fixture(scope="module")
def corpora(eval_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the first sentences of both corpora, in their own layout."""
    folder = tmp_path_factory.mktemp("corpora")
    for corpus in ("conll2003", "ud_ewt"):
        (folder / corpus).mkdir()
        for split, count in ROWS.items():
            with gzip.open(eval_data / corpus / f"{split}.jsonl.gz", "rt", encoding="utf-8") as rows:
                head = [line for line, _ in zip(rows, range(count), strict=False)]
            (folder / corpus / f"{split}.jsonl").write_text("".join(head), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def tiny(golden_dir: Path) -> Encoder:
    return Encoder.load(golden_dir / "tiny_llama")


class Refusing(torch.nn.Module):
    """A decoder that fails on any forward."""

    def forward(self, ids: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        raise AssertionError("a forward, though every state was on disk")


@pytest.mark.parametrize("task", WORD_TASKS)
def test_score_follows_from_one_value_per_word(task: str, tiny: Encoder, corpora: Path, tmp_path: Path) -> None:
    score = run_word_task(task, tiny, corpora, tmp_path, revision="tiny")
    assert score.values.dtype == np.float32
    assert set(score.values.tolist()) <= {0.0, 1.0}
    assert score.accuracy == pytest.approx(100 * score.values.mean(dtype=np.float64))
    assert len(score.values) == score.test_words == sum(score.labels.values())
    assert list(score.labels) == list(WORD_TASKS[task].labels)
    assert score.details["sentences"] == sum(ROWS.values())
    assert score.details["cut_words"] == score.details["blank_words"] == 0
    assert score.accuracy == score.details[score.states]
    assert score.details[f"{score.states}_dev"] == max(score.details[f"{kind}_dev"] for kind in STATES)  # pyright: ignore[reportArgumentType]
    assert len(score.data) == 16


def test_cached_states_serve_all_tasks_of_a_corpus(
    tiny: Encoder, corpora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    first = run_word_task("CoNLL2003POS", tiny, corpora, tmp_path, revision="tiny", progress=steps.append)
    assert sum(steps) == sum(ROWS.values())
    monkeypatch.setattr(type(tiny), "device", torch.device("cpu"))
    monkeypatch.setattr(tiny, "_decoder", Refusing())
    again = run_word_task("CoNLL2003POS", tiny, corpora, tmp_path, revision="tiny")
    np.testing.assert_array_equal(again.values, first.values)
    assert again.details == first.details
    for kind in STATES:
        alone = run_word_task("CoNLL2003POS", tiny, corpora, tmp_path, revision="tiny", states=kind)
        assert alone.states == kind
        assert alone.accuracy == pytest.approx(first.details[kind], abs=0.3)
    run_word_task("CoNLL2003Chunking", tiny, corpora, tmp_path, revision="tiny", full=True)


def test_cut_words_are_wrong_and_counted(golden_dir: Path, corpora: Path, tmp_path: Path) -> None:
    short = Encoder.load(golden_dir / "tiny_llama", max_length=24)
    score = run_word_task("UDEWTUniversalPOS", short, corpora, tmp_path, revision="tiny", states="same_token")
    whole = [json.loads(line) for line in (corpora / "ud_ewt" / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    assert score.test_words == sum(len(row["tokens"]) for row in whole)
    cut = score.details["cut_test_words"]
    assert isinstance(cut, int)
    assert 0 < cut <= np.count_nonzero(score.values == 0)
    end = 0
    for row in whole:  # what is cut is at the end of long sentences
        end += len(row["tokens"])
        if len(row["tokens"]) > 24:
            assert score.values[end - 1] == 0


def test_wrong_arguments_are_named(golden_dir: Path, tiny: Encoder, corpora: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no word-level task 'POS'"):
        run_word_task("POS", tiny, corpora, tmp_path, revision="tiny")
    with pytest.raises(UsageError, match="states='next_word'"):
        run_word_task("CoNLL2003POS", tiny, corpora, tmp_path, revision="tiny", states="next_word")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match="lacks train"):
        run_word_task("CoNLL2003POS", tiny, tmp_path, tmp_path, revision="tiny")


def test_a_real_model_knows_parts_of_speech(corpora: Path, tmp_path: Path, real_model) -> None:
    encoder = Encoder.load(real_model("smollm2-135m"), dtype="float32")
    score = run_word_task("UDEWTUniversalPOS", encoder, corpora, tmp_path, revision="smollm2", states="same_token")
    majority = score.details["majority"]
    assert isinstance(majority, float)
    assert score.accuracy > majority + 35
