"""Published scores are shown only for the same model on the same data."""

from pathlib import Path

import pytest

from unmask.errors import UsageError
from unmask.evaluate.published_scores import SAME_DATA, published_models, published_score

TABLE = """category\ttask\tin_v1\tin_v2\towner__Some-Model\tother__some-model\towner__Unique\towner__partial
STS\tSTS12\t1\t1\t70.10\t60.00\t72.37\t50.00
STS\tSTS13\t1\t1\t71.30\t61.00\t80.60\t
Classification\tBanking77Classification\t1\t1\t80.00\t62.00\t80.04\t40.00
Clustering\tTwentyNewsgroupsClustering\t1\t0\t44.00\t45.00\t46.86\t30.00
"""


@pytest.fixture
def scores(tmp_path: Path) -> Path:
    (tmp_path / "mteb_english_wide.tsv").write_text(TABLE, encoding="utf-8")
    (tmp_path / "model_meta.jsonl").write_text(
        '{"name": "owner/Unique", "n_parameters": null}\n{"name": "owner/Unique", "n_parameters": 22700000}\n',
        encoding="utf-8",
    )
    (tmp_path / "README").write_text("From github embeddings-benchmark/results @abc1234 (2026)\n", encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("name", ["owner/Unique", "owner/unique", "unique", "./models/Unique/", "/data/unique"])
def test_a_model_is_found_by_its_id_or_its_folders_name(scores: Path, name: str) -> None:
    score = published_score(scores, name, "STS12")
    assert score == (72.37, "owner/Unique in embeddings-benchmark/results@abc1234")


@pytest.mark.parametrize("name", ["stranger/Unique", "some-model", "unmask/smollm2-135m-embed", "", "Unique-v2"])
def test_no_score_for_namesakes_and_strangers(scores: Path, name: str) -> None:
    assert published_score(scores, name, "STS12") is None


def test_a_folder_that_looks_like_a_hub_id(scores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "unique").mkdir(parents=True)
    assert published_score(scores, "models/unique", "STS12") is None
    monkeypatch.chdir(tmp_path)
    assert published_score(scores, "models/unique", "STS12") is not None


def test_no_score_where_the_data_differs(scores: Path) -> None:
    assert published_score(scores, "unique", "TwentyNewsgroupsClustering") is None
    fetched = published_score(scores, "unique", "TwentyNewsgroupsClustering", data_from_mteb=True)
    assert fetched is not None and fetched[0] == 46.86
    assert published_score(scores, "owner/partial", "STS13") is None


def test_other_models_over_the_same_tasks_only(scores: Path) -> None:
    models = published_models(scores, ["STS12", "STS13"], without=["owner/some-model"])
    assert [(model.name, model.parameters) for model in models] == [
        ("owner/Unique", 22_700_000),
        ("other/some-model", None),
    ]
    assert models[0].mean == pytest.approx((72.37 + 80.60) / 2)
    assert published_models(scores, []) == []


def test_a_wrong_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no mteb_english_wide\.tsv"):
        published_score(tmp_path, "unique", "STS12")
    (tmp_path / "mteb_english_wide.tsv").write_text("a\tb\n1\t2\n", encoding="utf-8")
    with pytest.raises(UsageError, match="no column named"):
        published_score(tmp_path, "unique", "STS12")


@pytest.mark.public_data
def test_the_real_table(public_data: Path) -> None:
    folder = public_data / "mteb_results"
    figures = {"STSBenchmark": 82.03, "STS16": 78.99, "STS12": 72.37, "STS13": 80.60, "Banking77Classification": 80.04}
    assert set(figures) == SAME_DATA
    for task, figure in figures.items():
        score = published_score(folder, "all-minilm-l6-v2", task)
        assert score is not None and score[0] == figure
    others = published_models(folder, sorted(SAME_DATA), without=["all-minilm-l6-v2"])
    assert len(others) > 40 and "sentence-transformers/all-MiniLM-L6-v2" not in {model.name for model in others}
