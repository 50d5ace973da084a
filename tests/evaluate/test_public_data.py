"""Building the folder of evaluation data. No network is reached: a folder with the sources stands in its place."""

import gzip
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.evaluate.example_data import graded_pairs
from unmask.errors import UsageError
from unmask.evaluate.local import LOCAL_TASKS
from unmask.evaluate.local.public_data import (
    HUB_CORPORA,
    MEASURED_DIGESTS,
    PUBLIC_CORPORA,
    TASKS_NOT_FETCHED,
    fetch_public_data,
)
from unmask.evaluate.local.repository_data import REPOSITORY_CORPORA

SPLITS = {"train": 9, "validation": 5, "test": 7}

SLURP, CISI, WIKIQA = (corpus.repository for corpus in REPOSITORY_CORPORA)


def utterances(count: int) -> str:
    return "".join(
        json.dumps({"scenario": f"s{at % 2}", "intent": f"i{at % 2}", "sentence": f"text {at}", "tokens": []}) + "\n"
        for at in range(count)
    )


REPOSITORY_FILES = {
    f"{SLURP}/dataset/slurp/devel.jsonl": utterances(40),
    f"{SLURP}/dataset/slurp/test.jsonl": utterances(10),
    f"{CISI}/CISI.ALL": ".I 1\n.T\nA Title\nin two lines\n.A\nSomebody\n.W\n  A text.\nIts end.\n.X\n1\t5\t1\n"
    ".I 2\n.T\nOther\n.W\nAnother text.\n",
    f"{CISI}/CISI.QRY": ".I 1\n.W\nWhat is\nasked?\n.I 2\n.T\nNetworks\n.W\nA review.\n",
    f"{CISI}/CISI.REL": "     1      2\t0\t0.000000\n     2      1\t0\t0.000000\n",
    f"{WIKIQA}/WikiQA_data/WikiQASent-test.txt": "who ?\tHe .\t1\nwho ?\tThe sea .\t0\n",
}


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """The data sets as they lie on the hub (JSON lines, gzipped, a file per split), and the repositories' files."""
    for name, text in REPOSITORY_FILES.items():
        file = tmp_path / "hub" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    for corpus in HUB_CORPORA:
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
    measured = fetch_public_data(tmp_path / "out", source=hub, progress=lambda corpus: fetched.append(corpus.tasks[0]))
    assert fetched[:5] == ["STSBenchmark", "STS12", "STS13", "STS16", "Banking77Classification"]
    assert fetched[5:] == ["SlurpScenarioClassification", "CisiRetrieval", "WikiQAReranking"]
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
    fetch_public_data(tmp_path / "out", source=hub, progress=lambda corpus: fetched.append(corpus.tasks[0]))
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

    for corpus in HUB_CORPORA:
        assert mteb.get_task(corpus.task).metadata.dataset == {"path": corpus.dataset, "revision": corpus.revision}
        assert LOCAL_TASKS[corpus.task].mteb_own


def test_every_task_has_a_digest_and_either_a_source_or_a_reason() -> None:
    assert set(MEASURED_DIGESTS) == set(LOCAL_TASKS)
    fetched = [task for corpus in PUBLIC_CORPORA for task in corpus.tasks]
    assert sorted([*fetched, *TASKS_NOT_FETCHED]) == sorted(LOCAL_TASKS)


def test_files_of_repositories_become_the_tables_that_the_tasks_read(hub: Path, tmp_path: Path) -> None:
    fetch_public_data(tmp_path / "out", source=hub)
    slurp = LOCAL_TASKS["SlurpIntentClassification"].read(tmp_path / "out")
    assert len(slurp["train"]["text"]) == 32 and set(slurp["test"]["label"]) == {"i0", "i1"}
    cisi = LOCAL_TASKS["CisiRetrieval"].read(tmp_path / "out")
    documents = dict(zip(cisi["corpus"]["title"], cisi["corpus"]["text"], strict=True))
    assert documents == {"A Title in two lines": "A text. Its end.", "Other": "Another text."}
    assert cisi["queries"] == {"id": ["1", "2"], "text": ["What is asked?", "Networks A review."]}
    assert cisi["judged"] == {"query": ["1", "2"], "document": ["2", "1"], "relevance": [1, 1]}
    wikiqa = LOCAL_TASKS["WikiQAReranking"].read(tmp_path / "out")
    assert wikiqa["corpus"]["text"] == ["He .", "The sea ."] and wikiqa["judged"]["relevance"] == [1, 0]


@pytest.fixture
def raw_files(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The repositories' files at their commits, on a web server of this machine."""
    for corpus in REPOSITORY_CORPORA:
        folder = tmp_path / "raw" / corpus.repository
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
        (folder / corpus.commit).symlink_to(hub / corpus.repository)
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "raw"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        monkeypatch.setattr("unmask.evaluate.local.repository_data._RAW_FILES", address)
        yield
        server.shutdown()
        thread.join()


def test_a_file_from_the_network_is_checked_by_its_digest(raw_files: None) -> None:
    wikiqa = REPOSITORY_CORPORA[-1]
    with pytest.raises(UsageError, match=r"WikiQASent-test.txt has another digest than 957a23816df4"):
        wikiqa.tables(None)
    content = REPOSITORY_FILES[f"{WIKIQA}/WikiQA_data/WikiQASent-test.txt"].encode()
    digests = {"WikiQA_data/WikiQASent-test.txt": hashlib.sha256(content).hexdigest()}
    assert replace(wikiqa, digests=digests).tables(None) == wikiqa.convert([content])
    with pytest.raises(UsageError, match=r"absent.txt cannot be read \(HTTP Error 404.*--source FOLDER"):
        replace(wikiqa, digests={"absent.txt": "0"}).tables(None)


def test_the_command_shows_the_licences_and_asks(hub: Path, tmp_path: Path, unmask) -> None:
    command = ["data", "fetch", "local", "--output", str(tmp_path / "out"), "--source", str(hub)]
    refused = unmask(*command)
    assert refused.returncode == 1
    assert "CC BY-SA 4.0" in refused.stdout and "agree to the licences with --yes" in refused.stderr
    assert not (tmp_path / "out").exists()
    done = unmask(*command, "--yes")
    assert done.returncode == 0, done.stderr
    assert f"unmask evaluate --data {tmp_path / 'out'} --task STSBenchmark" in done.stdout
    assert "5 tasks of the suite 'local' have no public source with the same rows" in done.stderr
    assert "  PassageRetrieval: our own mix of XQuAD" in done.stderr
