"""Building the folder of evaluation data. No hub is reached: a folder in the hub's layout stands in its place."""

import gzip
import json
from pathlib import Path

import pytest

from tests.evaluate.example_data import graded_pairs
from unmask.errors import UsageError
from unmask.evaluate.local import LOCAL_TASKS
from unmask.evaluate.local.public_data import (
    MEASURED_DIGESTS,
    PUBLIC_CORPORA,
    fetch_public_data,
    missing_tasks,
)

SPLITS = {"train": 9, "validation": 5, "test": 7}


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """The data sets as they lie on the hub: JSON lines, gzipped, a file per split."""
    for corpus in PUBLIC_CORPORA:
        folder = tmp_path / "hub" / corpus.dataset
        folder.mkdir(parents=True)
        for split, count in SPLITS.items():
            if corpus.task.startswith("STS"):
                rows = [
                    {"split": split, "sentence1": one, "sentence2": other, "score": score + 0.25, "genre": "x"}
                    for one, other, score in graded_pairs(count, 0)
                ]
            else:
                rows = [
                    {"text": f'"Where"\tis\n{split} {at}?', "label": at % 3, "label_text": f"intent {at % 3}"}
                    for at in range(count)
                ]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{split}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    return tmp_path / "hub"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data sets are prepared in a cache of their own, which is gone with the test."""
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_the_folder_is_what_the_tasks_read(hub: Path, tmp_path: Path) -> None:
    fetched: list[str] = []
    measured = fetch_public_data(tmp_path / "out", source=hub, progress=lambda corpus: fetched.append(corpus.task))
    assert fetched == ["STSBenchmark", "STS12", "STS13", "STS16", "Banking77Classification"]
    assert measured == []  # rows of our own making are not those of the published figures
    for name in fetched[:4]:
        table = LOCAL_TASKS[name].read(tmp_path / "out")["test"]
        expected = graded_pairs(SPLITS["test"], 0)
        assert table["sentence1"] == [row[0] for row in expected]
        assert table["score"] == [row[2] + 0.25 for row in expected]
    tables = LOCAL_TASKS["Banking77Classification"].read(tmp_path / "out")
    assert tables["train"]["text"][0] == '"Where" is train 0?'
    assert tables["test"]["label"] == [f"intent {at % 3}" for at in range(SPLITS["test"])]
    assert (tmp_path / "out" / "stsb" / "dev.tsv").read_text(encoding="utf-8").count("\n") == 1 + SPLITS["validation"]


def test_files_that_are_there_are_kept(hub: Path, tmp_path: Path) -> None:
    fetch_public_data(tmp_path / "out", source=hub)
    (tmp_path / "out" / "sts12_16" / "sts2013.tsv").unlink()
    fetched: list[str] = []
    fetch_public_data(tmp_path / "out", source=hub, progress=lambda corpus: fetched.append(corpus.task))
    assert fetched == ["STS13"]
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


def test_a_data_set_that_cannot_be_read(hub: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"stsbenchmark-sts cannot be read .*--source FOLDER"):
        fetch_public_data(tmp_path / "out", source=tmp_path)
    for file in (hub / "mteb" / "banking77").iterdir():
        file.write_bytes(gzip.compress(b'{"text": "a", "label": 1}\n'))
    with pytest.raises(UsageError, match="banking77 has no column 'label_text'; it has text, label"):
        fetch_public_data(tmp_path / "out", source=hub)


def test_revisions_are_those_that_mteb_evaluates() -> None:
    import mteb

    for corpus in PUBLIC_CORPORA:
        assert mteb.get_task(corpus.task).metadata.dataset == {"path": corpus.dataset, "revision": corpus.revision}
        assert LOCAL_TASKS[corpus.task].mteb_own


def test_every_task_has_a_digest_and_every_missing_one_is_named() -> None:
    assert set(MEASURED_DIGESTS) == set(LOCAL_TASKS)
    assert set(missing_tasks()) == {name for name, task in LOCAL_TASKS.items() if not task.mteb_own}


def test_the_command_shows_the_licences_and_asks(hub: Path, tmp_path: Path, unmask) -> None:
    command = ["data", "fetch", "local", "--output", str(tmp_path / "out"), "--source", str(hub)]
    refused = unmask(*command)
    assert refused.returncode == 1
    assert "CC BY-SA 4.0" in refused.stdout and "agree to the licences with --yes" in refused.stderr
    assert not (tmp_path / "out").exists()
    done = unmask(*command, "--yes")
    assert done.returncode == 0, done.stderr
    assert f"unmask evaluate --data {tmp_path / 'out'} --task STSBenchmark" in done.stdout
    assert "not on the hub, left out of local: Slurp" in done.stderr
