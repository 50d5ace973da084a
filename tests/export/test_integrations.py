"""The snippets of docs/integrations.md, run as they stand there against a server, and against exported folders.

Each is a program of its own, which learns the server's address and key from its environment. It prints each passage
with a score, which must be the cosine of the model's own vectors of the passage and of the question.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from package_folders import isolated_python, link_packages, node_packages, python_packages

from tests.accounts.postgres import cluster, programs_with_vectors
from tests.api.live import KEY, LocalService, running
from tests.conftest import model_cache
from tests.export.tiny import FEW
from unmask import Encoder
from unmask.export import ExportOptions, run_export, run_parity
from unmask.export.capabilities import Target

REPOSITORY = Path(__file__).parents[2]
PAGE = REPOSITORY / "docs" / "integrations.md"
READERS = REPOSITORY / "tools" / "readers"
PINS = Path(__file__).parent / "integrations.txt"
SETTINGS = {"query_instruction": "Find what answers:", "document_instruction": "A passage:", "max_length": 128}
# All begin with letters that the tiny vocabulary holds with a space before them: sentence-transformers leaves one token
# fewer out of others, as docs/export.md says.
PASSAGES = ("The keeper lights the lamp at dusk.", "The dough rises faster in a warm kitchen.")
QUESTION = "when is the lamp lit"
# Environments of the snippets: this one, the packages of integrations.txt, those of fastembed, or node.
HERE = ("OpenAI's client", "LangChain")
HERE_SLOWLY = ("MTEB", "pgvector", "sentence-transformers")
APART = ("Chroma", "Haystack", "LanceDB", "LlamaIndex", "Qdrant", "txtai")
JAVASCRIPT = "OpenAI's client in JavaScript"
# A task of mteb's with two passages, appended to the snippet for mteb. It prints the scores in its predictions.
TASK = """
from datasets import Dataset
from mteb import TaskMetadata, evaluate
from mteb.abstasks.retrieval import AbsTaskRetrieval


class Lamps(AbsTaskRetrieval):
    metadata = TaskMetadata(
        name="Lamps", description="Lamps.", dataset={"path": "here", "revision": "1"}, type="Retrieval", category="t2t",
        modalities=["text"], eval_splits=["test"], eval_langs=["eng-Latn"], main_score="ndcg_at_10",
    )

    def load_data(self, **options):
        corpus = [{"id": passage, "title": "", "text": passage} for passage in passages]
        queries = [{"id": "question", "text": "when is the lamp lit"}]
        split = {"corpus": Dataset.from_list(corpus), "queries": Dataset.from_list(queries)}
        relevant = {"relevant_docs": {"question": {passages[0]: 1}}, "top_ranked": None}
        self.dataset, self.data_loaded = {"default": {"test": {**split, **relevant}}}, True


print("by mteb.evaluate")
evaluate(ServedModel("my-model"), Lamps(), cache=None, prediction_folder="predictions", co2_tracker=False)
import json, pathlib

(file,) = pathlib.Path("predictions").rglob("*.json")
for passage, score in json.loads(file.read_text())["default"]["test"]["question"].items():
    print(f"{score:.4f} {passage}")
"""


def sections() -> dict[str, str]:
    """Sections of the page that hold a snippet, by their headings."""
    parts = re.split(r"^##+ ", PAGE.read_text(encoding="utf-8"), flags=re.M)
    return {part.partition("\n")[0]: part for part in parts if re.search(r"```(python|js)\n", part)}


def snippet(name: str) -> str:
    """The only block of code in a section."""
    (code,) = re.findall(r"```(?:python|js)\n(.+?)```", sections()[name], flags=re.S)
    return code


def program(name: str, file: Path) -> tuple[list[str], Mapping[str, str]]:
    """Command and environment of a snippet that was written to a file, with its packages beside it."""
    here = {"PATH": os.environ["PATH"]}
    if name == JAVASCRIPT:
        packages = node_packages(READERS / "package.json", model_cache())
        (file.parent / "node_modules").symlink_to(packages / "node_modules")
        return ["node", str(file)], here
    if name == "fastembed":
        return isolated_python([python_packages(READERS / "fastembed.txt", model_cache())], str(file))
    if name in APART:
        linked = link_packages(file.parent / "linked", "torch", "transformers")
        return isolated_python([python_packages(PINS, model_cache()), linked], str(file))
    return [sys.executable, str(file)], here


def scores(code: str, name: str, folder: Path, **variables: str) -> list[dict[str, float]]:
    """Run a snippet in a folder; return the scores of the passages as they are printed, two at a time."""
    file = folder / ("snippet.mjs" if name == JAVASCRIPT else "snippet.py")
    file.write_text(code, encoding="utf-8")
    command, environment = program(name, file)
    quiet = {"HAYSTACK_TELEMETRY_ENABLED": "False", "ANONYMIZED_TELEMETRY": "False", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command,
        cwd=folder,
        env={**environment, **quiet, "HOME": str(folder), **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = re.findall(r"^(-?\d\.\d{4}) (.+)$", done.stdout, flags=re.M)
    assert len(lines) % len(PASSAGES) == 0 and lines, done.stdout
    pairs = [lines[at : at + len(PASSAGES)] for at in range(0, len(lines), len(PASSAGES))]
    return [{passage: float(score) for score, passage in pair} for pair in pairs]


@pytest.fixture(scope="module")
def model(golden_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose folder has the name that the snippets ask for, with an instruction for each side."""
    folder = tmp_path_factory.mktemp("models") / "my-model"
    shutil.copytree(golden_dir / "tiny_llama", folder)
    (folder / "llm2vec_config.json").write_text(json.dumps(SETTINGS))
    return folder


@pytest.fixture(scope="module")
def expected(model: Path) -> dict[str, Any]:
    """The cosine of each passage with the question."""
    encoder = Encoder.load(model, dtype="float32")
    (query,) = encoder.encode_query([QUESTION], normalize=True)
    cosines = encoder.encode_document(PASSAGES, normalize=True) @ query
    # A client that asks for both sides in one way must not get away with it.
    (other,) = encoder.encode_document([QUESTION], normalize=True)
    assert abs(encoder.encode_document(PASSAGES, normalize=True) @ other - cosines).min() > 0.01
    return {passage: pytest.approx(float(cosine), abs=2e-4) for passage, cosine in zip(PASSAGES, cosines, strict=True)}


@pytest.fixture(scope="module")
def service(model: Path) -> Iterator[LocalService]:
    with running(model) as started:
        yield started


@pytest.fixture(scope="module")
def address(service: LocalService) -> dict[str, str]:
    """Variables of a snippet's environment for the server."""
    return {"OPENAI_BASE_URL": f"{service.url}/v1", "OPENAI_API_KEY": KEY}


@pytest.fixture(scope="module")
def database() -> Iterator[dict[str, str]]:
    """Variables of a snippet's environment for an empty database that can have pgvector."""
    with cluster(programs_with_vectors()) as started:
        name = sa.make_url(started.empty()).database
        yield {"PGHOST": str(started.folder), "PGUSER": started.user, "PGDATABASE": str(name)}


def exported(model: Path, target: Target, folder: Path) -> None:
    run_export(ExportOptions(model=str(model), target=target, output=folder, check=False), lambda line: None)


def test_every_snippet_is_run_by_a_test() -> None:
    assert sorted(sections()) == sorted([*HERE, *HERE_SLOWLY, *APART, JAVASCRIPT, "fastembed"])


def test_the_page_names_the_versions_of_the_tests() -> None:
    pins = dict(line.split("==") for file in (PINS, READERS / "fastembed.txt") for line in requirements(file))
    pins |= json.loads((READERS / "package.json").read_text())["dependencies"]
    for name in (*APART, JAVASCRIPT, "fastembed"):
        stated = re.search(r"^Tested with (.+?)(?: of npm|, in memory)?\.(?: |$)", sections()[name], flags=re.M)
        assert stated, f"the section {name} does not name its versions"
        for package in stated[1].split(" and "):
            title, version = package.split()
            assert pins[title] == version, package


def requirements(file: Path) -> list[str]:
    return [line for line in file.read_text().splitlines() if line and not line.startswith("#")]


@pytest.mark.parametrize("name", HERE)
def test_a_client_prints_the_models_scores(
    name: str, expected: dict[str, Any], address: dict[str, str], tmp_path: Path
) -> None:
    assert scores(snippet(name), name, tmp_path, **address) == [expected]


@pytest.mark.parity
@pytest.mark.parametrize("name", [*APART, JAVASCRIPT])
def test_a_client_of_its_own_packages_prints_the_models_scores(
    name: str, expected: dict[str, Any], address: dict[str, str], tmp_path: Path
) -> None:
    assert scores(snippet(name), name, tmp_path, **address) == [expected]


@pytest.mark.parity
def test_postgres_ranks_by_the_models_scores(
    expected: dict[str, Any], address: dict[str, str], database: dict[str, str], tmp_path: Path
) -> None:
    assert scores(snippet("pgvector"), "pgvector", tmp_path, **address, **database) == [expected]


@pytest.mark.parity
def test_mteb_evaluates_the_served_model(expected: dict[str, Any], address: dict[str, str], tmp_path: Path) -> None:
    """The snippet by itself, then in a task, which batches, normalises and ranks."""
    assert scores(snippet("MTEB") + TASK, "MTEB", tmp_path, **address) == [expected, expected]


@pytest.mark.parity
@pytest.mark.parametrize(("name", "target"), [("sentence-transformers", "hub"), ("fastembed", "onnx")])
def test_a_library_reads_a_folder_to_the_models_scores(
    name: str, target: Target, model: Path, expected: dict[str, Any], tmp_path: Path
) -> None:
    exported(model, target, tmp_path / f"my-model-{target}")
    assert scores(snippet(name), name, tmp_path) == [expected]


def test_parity_asks_an_endpoint_for_queries_by_name(
    model: Path, service: LocalService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    report = run_parity(str(model), f"{service.url}/v1", model_name="my-model", texts=FEW)
    assert report.passed, report.faults
    assert {row.use for row in report.rows} == {"texts", "documents", "queries"}
    other = run_parity(str(model), f"{service.url}/v1", model_name="my-model:query", texts=FEW)
    assert not other.passed and other.notes
