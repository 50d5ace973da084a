"""The offline suite over the shared data: what is in it, and that its cut never moves unnoticed."""

from pathlib import Path

import pytest

from unmask.errors import UsageError
from unmask.evaluate.instructions import instruction_for
from unmask.evaluate.local import LOCAL_TASKS
from unmask.evaluate.local.examples import beginning, read_tsv, sample
from unmask.evaluate.published_scores import SAME_DATA

# Another digest is another task: its scores compare with no earlier ones, and docs/evaluation.md has to say so.
DIGESTS = {
    "STS12": "db883da7f9d2e74b",
    "STS13": "322d038fcac2858f",
    "STS16": "4c48ca4c6dfadb9b",
    "STSBenchmark": "626222cc76264157",
    "Banking77Classification": "dcc6f564fc71b24e",
    "SlurpScenarioClassification": "1970364a82de0750",
    "SlurpIntentClassification": "21bdd3e3d7e1bc73",
    "NewsgroupsSubjectClustering": "fbda83c84703afec",
    "StackOverflowTitleClustering": "1adc1f61b2f74e95",
    "ArxivTitleClustering": "a490bc33d333aee3",
    "ArxivTitleRetrieval": "e6fa12a47c9dbef9",
    "PassageRetrieval": "ac26ddc051b7a6d2",
    "CisiRetrieval": "ea1afdbc9b5c0e8d",
    "WikiQAReranking": "9268f3e2af5ed719",
}


@pytest.fixture(scope="module")
def data(shared_dir: Path) -> Path:
    return shared_dir / "data" / "eval"


@pytest.mark.parametrize("name", LOCAL_TASKS)
def test_the_cut_is_the_same_everywhere(name: str, data: Path) -> None:
    task = LOCAL_TASKS[name]
    tables = task.read(data)
    assert task.digest(tables) == DIGESTS[name]
    for table in tables.values():
        assert len({len(column) for column in table.values()}) == 1
    if "judged" in tables:
        assert set(tables["judged"]["document"]) <= set(tables["corpus"]["id"])
        assert set(tables["judged"]["query"]) == set(tables["queries"]["id"])


def test_names_of_mtebs_are_for_mtebs_own_data() -> None:
    import mteb

    known = {task.metadata.name for task in mteb.get_tasks(exclude_superseded=False)}
    assert {name for name, task in LOCAL_TASKS.items() if task.mteb_own} == known & set(LOCAL_TASKS) == SAME_DATA


@pytest.mark.parametrize("name", LOCAL_TASKS)
def test_every_task_has_an_instruction_that_ends_as_the_references(name: str) -> None:
    category = LOCAL_TASKS[name].category
    assert instruction_for(name, category, "queries", "").endswith(":")
    sides = instruction_for(name, category, "documents", "")
    assert sides == ("" if category in ("Retrieval", "Reranking") else instruction_for(name, category, "queries", ""))


def test_mtebs_own_wording_where_there_is_none_of_ours() -> None:
    prompt = "Given a scientific claim, retrieve documents that support or refute the claim"
    assert instruction_for("SciFact", "Retrieval", "queries", prompt) == prompt + ":"
    assert instruction_for("SciFact", "Retrieval", "documents", prompt) == ""
    assert instruction_for("AskUbuntuDupQuestions", "Reranking", "documents", "Retrieve duplicates.") == (
        "Retrieve duplicates:"
    )
    published = "McGill-NLP/LLM2Vec-Sheared-LLaMA-mntp-supervised"
    assert instruction_for("Banking77Classification", "Classification", "queries", "Theirs", model=published) == (
        "Theirs:"
    )


def test_a_larger_sample_holds_the_smaller_one() -> None:
    texts = [f"text {i}" for i in range(100)]
    assert set(sample(texts, 10, str)) < set(sample(texts, 30, str)) < set(texts)
    assert sample(texts, 200, str) == texts


def test_beginning_keeps_whole_words() -> None:
    assert beginning("one two three", 7) == "one two"
    assert beginning("one two three", 13) == "one two three"


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--data names the folder"):
        LOCAL_TASKS["STS12"].read(tmp_path)
    (tmp_path / "ragged.tsv").write_text("a\tb\n1\n", encoding="utf-8")
    (tmp_path / "broken.tsv.gz").write_bytes(b"not gzip")
    for name in ("ragged.tsv", "broken.tsv.gz"):
        with pytest.raises(UsageError, match="cannot be read"):
            read_tsv(tmp_path / name)
