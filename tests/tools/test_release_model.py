"""`tools/release_model.py`: a small run, trained and evaluated here, becomes a model of a copy of the package."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import model_card
import msgspec
import numpy as np
import pytest
import release_model
from model_card import decoder_depth
from release_model import shorten_paths

from tests.training.tiny import recipe_of, write_pairs
from unmask import Encoder
from unmask.catalogue import parse_record
from unmask.catalogue.measurement import read_measurements
from unmask.evaluate import run as evaluation_run
from unmask.evaluate.cost import sample_texts
from unmask.evaluate.results import read_results
from unmask.evaluate.run import Evaluation, run_evaluation
from unmask.training.train import run_training

pytestmark = pytest.mark.weights

REPOSITORY = Path(__file__).parents[2]
NAMES = {"tiny-2l": "model", "tiny-1l": "model-1-layers"}  # the full model and its exit
TEXTS = ["The canary sings.", "stone under the bright moon", "a"]
FACTS = {
    "tiny-2l": {"parameters": 28_311_552 + 576 + 2 * 3_540_096 + 48 * 577},
    "tiny-1l": {"parameters": 28_311_552 + 576 + 3_540_096 + 48 * 577},
}
PAIRS = '\n[data."pairs.tsv"]\nwhat = "random words"\nlicence = "none needed"\n'


@dataclass(frozen=True)
class Workshop:
    """A copy of the repository's folders that the tool needs, and a run with its evaluation."""

    root: Path
    run: Path

    @property
    def results(self) -> Path:
        return self.root / "docs" / "evaluation" / "results.json"

    def command(self, name: str, folder: Path, results: Path | None = None) -> list[str]:
        """The tool's path and arguments."""
        tool = str(self.root / "tools" / "release_model.py")
        return [tool, str(folder), "--name", name, "--results", str(results or self.results)]

    def python(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=self.root, env=self.environment, capture_output=True, text=True, check=False)

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(self.root)}


def copy_repository(root: Path) -> None:
    """Copy what the tool reads and writes; the weights of other models stay behind."""
    left_out = shutil.ignore_patterns("__pycache__", "adapters", "layers")
    shutil.copytree(REPOSITORY / "unmask", root / "unmask", ignore=left_out)
    shutil.copytree(REPOSITORY / "tools", root / "tools", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "tests" / "golden").mkdir(parents=True)
    shutil.copy(REPOSITORY / "tests" / "golden" / "shipped_vectors.json", root / "tests" / "golden")
    with (root / "tools" / "training_data.toml").open("a", encoding="utf-8") as file:
        file.write(PAIRS)


def write_record(root: Path, name: str) -> None:
    """Write a record after that of six layers, with the facts of the tiny model."""
    folder = root / "unmask" / "catalogue" / "records"
    text = (folder / "smollm2-embed-6l.toml").read_text(encoding="utf-8").partition("\n[canary]")[0]
    facts = {"id": f'"unmask/{name}"', "dimensions": "48", "matryoshka": "[24]", "max_tokens": "128"} | FACTS[name]
    for field, fact in facts.items():
        text = re.sub(rf"^{field} = .*$", f"{field} = {fact}", text, count=1, flags=re.M)
    (folder / f"{name}.toml").write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory, eval_data: Path) -> Workshop:
    folder = tmp_path_factory.mktemp("release")
    recipe = recipe_of(
        base="unmask/smollm2-135m",
        layers=2,
        steps=2,
        lora=None,
        freeze_embedding=True,
        exits=[{"layers": 1, "weight": 0.5}],
        head={"dimensions": 48},
        save={
            "precision": "int8",
            "embedding": False,
            "max_length": 128,
            "takes_instructions": False,
            "matryoshka": [24],
        },
    )
    run_training(recipe, data=write_pairs(folder), output=folder / "run")
    root = folder / "repository"
    copy_repository(root)
    for name in NAMES:
        write_record(root, name)
    whole, exit_model = (folder / "run" / part for part in NAMES.values())
    evaluation = Evaluation(
        models=(f"{whole}?name=unmask/tiny-2l",),
        baselines=(
            f"{exit_model}?name=unmask/tiny-1l",
            f"{whole}?dimensions=24&name=short",
            f"{whole}?dtype=int8&name=eight bits",
        ),
        tasks=("STSBenchmark", "WikiQAReranking"),
        data=eval_data,
        output=root / "docs" / "evaluation",
        command="unmask evaluate RUN/model --task STSBenchmark",
    )
    with pytest.MonkeyPatch.context() as scope:
        # Speed is measured on a few texts only, and memory is not: these figures are no part of these tests.
        scope.setattr(evaluation_run, "sample_texts", lambda: sample_texts()[:3])
        scope.setattr(evaluation_run, "measure_memory", lambda *arguments: None)
        run_evaluation(evaluation)
    return Workshop(root, folder / "run")


@pytest.fixture(scope="module")
def released(workshop: Workshop) -> Workshop:
    for name, part in NAMES.items():
        done = workshop.python(*workshop.command(name, workshop.run / part))
        assert done.returncode == 0, done.stderr
    return workshop


@pytest.fixture
def release(
    released: Workshop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """`release(name, folder)` runs the tool over the copy, in this process. Returns the exit code and the errors."""
    monkeypatch.setattr(model_card, "HERE", released.root / "tools")

    def run(name: str, folder: Path, results: Path | None = None) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [*released.command(name, folder, results), "--root", str(released.root)])
        code = release_model.main()
        return code, capsys.readouterr().err

    return run


def test_the_names_give_the_vectors_of_the_run_to_the_bit(released: Workshop, tmp_path: Path) -> None:
    code = (
        "import sys, json, numpy; from unmask import Encoder\n"
        "for name in sys.argv[3:]:\n"
        "    encoder = Encoder.load(f'unmask/{name}', dtype='float32')\n"
        "    numpy.save(f'{sys.argv[1]}/{name}.npy', encoder.encode(json.loads(sys.argv[2])))\n"
    )
    done = released.python("-c", code, str(tmp_path), json.dumps(TEXTS), *NAMES)
    assert done.returncode == 0, done.stderr
    for name, part in NAMES.items():
        expected = Encoder.load(str(released.run / part), dtype="float32").encode(TEXTS)
        assert expected.shape == (3, 48) and np.array_equal(np.load(tmp_path / f"{name}.npy"), expected)


def test_a_server_answers_with_it_once_its_canary_is_right(released: Workshop, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "unmask", "serve", "--model", "unmask/tiny-1l", "--port", "0"]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=released.root, env=released.environment
        )
    try:
        assert server.stdout is not None
        address = re.search(r"http://127\.0\.0\.1:\d+", server.stdout.readline())
        assert address, (tmp_path / "log").read_text()
        request = urllib.request.Request(
            f"{address[0]}/v1/embeddings",
            data=json.dumps({"model": "unmask/tiny-1l", "input": TEXTS}).encode(),
            headers={"Content-Type": "application/json", "Prefer": "wait=60"},
        )
        answer = json.load(urllib.request.urlopen(request, timeout=120))
        with urllib.request.urlopen(f"{address[0]}/ready", timeout=120) as ready:
            assert ready.status == 200
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
        assert server.stdout is not None
        server.stdout.close()
    expected = Encoder.load(str(released.run / "model-1-layers")).encode(TEXTS, normalize=True)
    np.testing.assert_allclose([row["embedding"] for row in answer["data"]], expected, atol=1e-5)


def test_only_what_is_needed_is_written(released: Workshop) -> None:
    weights = {"config.json", "llm2vec_config.json", "model.safetensors", "head.safetensors"}
    for name, part in NAMES.items():
        folder = released.root / "unmask" / "checkpoint" / "layers" / name
        assert {file.name for file in folder.iterdir()} == weights | {"run.json", "README.md"}
        for file in weights:
            assert (folder / file).read_bytes() == (released.run / part / file).read_bytes()
        run = json.loads((folder / "run.json").read_text())
        assert run["recipe"]["steps"] == 2 and str(released.run.parent) not in json.dumps(run)


def test_the_record_has_its_canary_and_the_measurements_those_of_the_evaluation(released: Workshop) -> None:
    catalogue = released.root / "unmask" / "catalogue"
    for name in NAMES:
        text = (catalogue / "records" / f"{name}.toml").read_text(encoding="utf-8")
        canary = parse_record(text, name).canary
        assert canary is not None and text.count("[canary]") == 1
        measurements = read_measurements(catalogue / "measurements" / f"{name}.jsonl")
        result = next(model for model in read_results(released.results).models if model.name == f"unmask/{name}")
        scores = {m.what: m.value for m in measurements if m.group == "local"}
        assert scores == {score.task: round(score.score or 0.0, 4) for score in result.scores}
        assert {m.raw for m in measurements} == {"docs/evaluation/results.json"}
    vectors = json.loads((released.root / "tests" / "golden" / "shipped_vectors.json").read_text())
    before = json.loads((REPOSITORY / "tests" / "golden" / "shipped_vectors.json").read_text(encoding="utf-8"))
    assert set(vectors) == {*before, "unmask/tiny-2l", "unmask/tiny-1l"}
    assert all(vectors[model] == before[model] for model in before)
    encoder = Encoder.load(str(released.run / "model"), dtype="float32")
    rows = vectors["unmask/tiny-2l"]
    np.testing.assert_allclose(encoder.encode(list(rows), normalize=True)[:, :8], list(rows.values()), atol=1e-6)


def test_the_card_has_the_figures_of_the_evaluation_and_the_data_with_licences(released: Workshop) -> None:
    layers = released.root / "unmask" / "checkpoint" / "layers"
    card = (layers / "tiny-2l" / "README.md").read_text(encoding="utf-8")
    by_name = {
        model.name: {score.task: score.score or 0.0 for score in model.scores}
        for model in read_results(released.results).models
    }
    own, short = by_name["unmask/tiny-2l"], by_name["short"]
    mean = sum(own.values()) / 2
    row = f"| this model | {mean:.2f} | {own['STSBenchmark']:.2f} | {own['WikiQAReranking']:.2f} |"
    head = "| | mean | STS (1) | Reranking (1) | STSBenchmark |\n|---|---:|---:|---:|---:|"
    assert f"\n\n{head}\n{row} {own['STSBenchmark']:.2f} |\n| the same, " in card
    assert f"- first 24 numbers: mean {sum(short.values()) / 2 - mean:+.2f}" in card and "- int8: mean" in card
    assert "| pairs | random words | none needed | 40 | 0 |" in card and "No evaluation texts were taken out" in card
    exit_card = (layers / "tiny-1l" / "README.md").read_text(encoding="utf-8")
    assert "an exit of a model of 2 layers" in exit_card and "an exit of" not in card
    assert decoder_depth(released.run / "model-1-layers") == 2  # for a recipe that does not say it


def test_a_second_time_changes_nothing(released: Workshop, release: Callable[..., tuple[int, str]]) -> None:
    def contents() -> dict[str, bytes]:
        files = [*(released.root / "unmask").rglob("*.*"), *(released.root / "tests").rglob("*.json")]
        return {str(file): file.read_bytes() for file in files if file.is_file() and file.suffix != ".pyc"}

    before = contents()
    code, error = release("tiny-2l", released.run / "model")
    assert code == 0, error
    assert contents() == before


def test_what_does_not_belong_together_is_refused(
    released: Workshop, release: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    def refusal(name: str, folder: Path, results: Path | None = None) -> str:
        code, error = release(name, folder, results)
        assert code == 2, error
        return error

    assert "is 35" in refusal("tiny-1l", released.run / "model")  # parameters
    assert "is missing; write it by hand" in refusal("unknown", released.run / "model")
    assert "name a result folder" in refusal("tiny-2l", released.run)
    elsewhere = shutil.copy(released.results, tmp_path)
    assert "can only cite a committed file" in refusal("tiny-2l", released.run / "model", results=Path(elsewhere))
    results = read_results(released.results)
    for model in results.models:
        model.revision = "0" * 16
    changed = released.results.with_name("changed.json")
    changed.write_bytes(msgspec.json.encode(results))
    assert "no float32 evaluation of the weights" in refusal("tiny-2l", released.run / "model", results=changed)
    results.provenance.command = "unmask evaluate '/models/a b?name=c' --suite local"
    changed.write_bytes(msgspec.json.encode(results))
    assert "holds a path of this machine" in refusal("tiny-2l", released.run / "model", results=changed)
    old = tmp_path / "run"
    shutil.copytree(released.run, old)
    description = json.loads((old / "run.json").read_text(encoding="utf-8"))
    del description["rows"]  # as before runs counted them
    (old / "run.json").write_text(json.dumps(description), encoding="utf-8")
    assert "does not count the rows of 'pairs'" in refusal("tiny-2l", old / "model")
    table = released.root / "tools" / "training_data.toml"
    text = table.read_text(encoding="utf-8")
    try:
        table.write_text(text + 'unclear = "nobody knows"\n', encoding="utf-8")
        assert "pairs.tsv: nobody knows, so no model" in refusal("tiny-2l", released.run / "model")
        table.write_text(text + 'leave_out = { origin = ["x"] }\n', encoding="utf-8")
        assert "must leave out origin = ['x']" in refusal("tiny-2l", released.run / "model")
        table.write_text(text.removesuffix(PAIRS), encoding="utf-8")
        assert "pairs.tsv has no entry" in refusal("tiny-2l", released.run / "model")
    finally:
        table.write_text(text, encoding="utf-8")


def test_a_card_names_the_parts_of_a_file_that_the_recipe_uses() -> None:
    parts = [
        {"values": ["a"], "what": "letters", "licence": "MIT"},
        {"values": ["b"], "what": "birds", "licence": "CC0"},
    ]
    entry = {"what": "{parts} and more", "column": "origin", "parts": parts}
    both = model_card.describe_source({"only": {}, "without": {"else": ["a"]}}, entry)
    assert both == ("letters, birds and more", "MIT, CC0")
    chosen = {"only": {"origin": ["b"]}, "without": {}}, {"only": {}, "without": {"origin": ["a", "c"]}}
    assert {model_card.describe_source(source, entry) for source in chosen} == {("birds and more", "CC0")}


def test_a_card_lists_earlier_runs_with_their_data(released: Workshop, tmp_path: Path) -> None:
    earlier = json.loads((released.run / "run.json").read_text(encoding="utf-8"))
    earlier["recipe"] |= {"name": "the run before", "steps": 77}
    (tmp_path / "run.json").write_text(json.dumps(earlier), encoding="utf-8")
    shutil.copytree(released.root, tmp_path / "repository")
    command = [*released.command("tiny-2l", released.run / "model"), "--earlier", str(tmp_path / "run.json")]
    command[0] = str(tmp_path / "repository" / "tools" / "release_model.py")
    command[command.index("--results") + 1] = str(tmp_path / "repository" / "docs" / "evaluation" / "results.json")
    done = subprocess.run(
        [sys.executable, *command], cwd=tmp_path / "repository", capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "repository")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "repository" / "unmask" / "checkpoint" / "layers" / "tiny-2l"
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "| an earlier run | `the run before`, from `unmask/smollm2-135m`, its first 2 layers: 77 steps of" in card
    assert card.count("| pairs | random words | none needed |") == 2
    assert "| stored | `run-1.json`, `run.json`: the resolved recipe," in card
    assert json.loads((folder / "run-1.json").read_text())["recipe"]["steps"] == 77
    assert json.loads((folder / "run.json").read_text())["recipe"]["steps"] == 2


def test_paths_become_names() -> None:
    run = {
        "teachers": [{"model": "st:/a/b/all-mpnet?dtype=bfloat16"}],
        "base": "/x/y",
        "path": "../eval/dev.tsv",
        "n": 3,
    }
    assert shorten_paths(run) == {
        "teachers": [{"model": "st:all-mpnet?dtype=bfloat16"}],
        "base": "y",
        "path": "../eval/dev.tsv",
        "n": 3,
    }
    assert shorten_paths("https://host/a/b") == "https://host/a/b" and shorten_paths("org/name") == "org/name"
