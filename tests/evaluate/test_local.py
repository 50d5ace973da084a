"""The offline suite: digests of its examples, names, instructions, sampling."""

from pathlib import Path

import pytest

from unmask.errors import UsageError
from unmask.evaluate.instructions import instruction_for
from unmask.evaluate.local import LOCAL_TASKS
from unmask.evaluate.local.examples import beginning, read_tsv, sample
from unmask.evaluate.local.public_data import MEASURED_DIGESTS
from unmask.evaluate.published_scores import SAME_DATA

# Another digest is another task: its scores compare with no earlier ones, and docs/evaluation.md has to say so.
# Of the rows of our own making in tests/evaluate/example_data.py:
DIGESTS = {
    "STS12": "fa44bcefe16fca66",
    "STS13": "134342969ee9d11c",
    "STS16": "b0182ddc4369fa0c",
    "STSBenchmark": "62926ae016971104",
    "Banking77Classification": "78c0ce5223f15e33",
    "SlurpScenarioClassification": "19d4a05aebd64c62",
    "SlurpIntentClassification": "4a42cf20b6079b1e",
    "NewsgroupsSubjectClustering": "fafd662336cd2c6a",
    "StackOverflowTitleClustering": "851c3502cc0b2d66",
    "ArxivTitleClustering": "263d0c1cba8b3c84",
    "ArxivTitleRetrieval": "a30b23077e2645c4",
    "PassageRetrieval": "f3311358e177f980",
    "CisiRetrieval": "ccd18bb542bcdcf8",
    "WikiQAReranking": "9d2f121592976d53",
}


@pytest.mark.parametrize("name", LOCAL_TASKS)
def test_the_examples_are_the_same_everywhere(name: str, eval_data: Path) -> None:
    task = LOCAL_TASKS[name]
    tables = task.read(eval_data)
    assert task.digest(tables) == DIGESTS[name]
    for table in tables.values():
        assert len({len(column) for column in table.values()}) == 1
    if "judged" in tables:
        assert set(tables["judged"]["document"]) <= set(tables["corpus"]["id"])
        assert set(tables["judged"]["query"]) == set(tables["queries"]["id"])


@pytest.mark.public_data
@pytest.mark.parametrize("name", LOCAL_TASKS)
def test_the_cut_of_the_public_data(name: str, public_data: Path) -> None:
    task = LOCAL_TASKS[name]
    assert task.digest(task.read(public_data)) == MEASURED_DIGESTS[name]


def test_names_of_mtebs_are_for_mtebs_own_data() -> None:
    import mteb

    mteb_names = {task.metadata.name for task in mteb.get_tasks(exclude_superseded=False)}
    assert {name for name, task in LOCAL_TASKS.items() if task.mteb_own} == mteb_names & set(LOCAL_TASKS) == SAME_DATA


@pytest.mark.parametrize("name", LOCAL_TASKS)
def test_every_task_has_an_instruction_that_ends_as_the_references(name: str) -> None:
    category = LOCAL_TASKS[name].category
    assert instruction_for(name, category, "queries", "").endswith(":")
    sides = instruction_for(name, category, "documents", "")
    assert sides == ("" if category in ("Retrieval", "Reranking") else instruction_for(name, category, "queries", ""))


def test_mtebs_own_instruction_where_there_is_none_of_ours() -> None:
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
