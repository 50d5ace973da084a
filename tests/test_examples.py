"""Every script in examples/ runs, and prints the result that it promises."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.evaluate.example_data import write_example_data

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """`run("encode.py", *arguments)` is the output of one script, run in this process."""

    def run_script(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run_script


@pytest.mark.weights
def test_encode(run):
    output = run("encode.py")
    assert "vectors: (3, 576) float32" in output
    assert "truncated: (3, 256)" in output
    assert "same vector alone and in a batch: True" in output


@pytest.mark.weights
def test_semantic_search_finds_the_right_passage(run):
    output = run("semantic_search.py", "How do I get my money back?")
    assert "refund" in output.splitlines()[1]


@pytest.mark.weights
def test_clustering_separates_the_topics(run):
    clusters = [set(part.splitlines()[1:]) for part in run("clustering.py").split("cluster ")[1:]]
    assert sorted(len(cluster) for cluster in clusters) == [3, 3, 3]
    assert any("goalkeeper" in " ".join(cluster) and "striker" in " ".join(cluster) for cluster in clusters)


@pytest.mark.weights
def test_the_official_client_gets_vectors_from_the_server(run):
    assert "2 vectors of 576 dimensions" in run("serve_and_call.py")


@pytest.mark.slow
def test_training_brings_queries_nearer_to_their_answers(capfd: pytest.CaptureFixture[str], tmp_path: Path):
    script = [sys.executable, EXAMPLES / "train_on_pairs.py", tmp_path / "run", "4"]
    subprocess.run(script, check=True)
    output = capfd.readouterr().out
    before, after = (float(re.findall(rf"^{word}: +(\S+)$", output, re.M)[0]) for word in ("before", "after"))
    assert after > before


@pytest.mark.slow
@pytest.mark.weights
def test_distillation_writes_two_depths(capfd: pytest.CaptureFixture[str], tmp_path: Path):
    things, verbs = ("parcel", "invoice", "password", "contract", "phone", "refund"), ("lost", "late", "wrong", "new")
    texts = [f"my {thing} number {n} is {verb}" for thing in things for verb in verbs for n in range(12)]
    (tmp_path / "texts.txt").write_text("\n".join(texts), encoding="utf-8")
    subprocess.run([sys.executable, EXAMPLES / "distil.py", tmp_path / "run", tmp_path / "texts.txt", "6"], check=True)
    output = capfd.readouterr().out
    assert "model: 22 MB, vectors of 256 numbers" in output
    assert "model-4-layers: 15 MB, vectors of 256 numbers" in output
    assert float(re.findall(r"teacher's vectors: (\S+)", output)[0]) > 0.5


@pytest.mark.slow
def test_evaluation_writes_a_report_and_compares(tmp_path: Path):
    data = write_example_data(tmp_path / "data")
    script = [sys.executable, EXAMPLES / "evaluate_and_compare.py", data, tmp_path / "results", "STSBenchmark"]
    subprocess.run(script, check=True)
    assert (tmp_path / "results" / "report.html").exists()


def test_the_readme_of_the_examples_lists_every_script():
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for script in EXAMPLES.glob("*.py"):
        assert f"[{script.name}]({script.name})" in page
    for line in page.splitlines():
        if line.startswith("| ["):
            assert (EXAMPLES / line[3 : line.index("]")]).exists()
