"""Every script in examples/ runs, and prints the result that it promises."""

import re
import runpy
import sys
from pathlib import Path

import pytest

from unmask.evaluate import run as evaluation_run
from unmask.evaluate.cost import sample_texts
from unmask.training import curves

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """`run("encode.py", *arguments)` is the output of one script, run in this process."""

    # A second of work for each training, which tests/training/test_curves.py tests.
    monkeypatch.setattr(curves, "draw_curves", lambda folder: None)

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
def test_training_tells_answers_of_a_query_from_others(run, tmp_path: Path):
    output = run("train_on_pairs.py", str(tmp_path / "run"), "3")
    before, after = (float(re.findall(rf"^{word}: +(\S+)$", output, re.M)[0]) for word in ("before", "after"))
    assert after > before


@pytest.mark.slow
@pytest.mark.weights
def test_distillation_writes_two_depths(run, tmp_path: Path):
    things, verbs = ("parcel", "invoice", "password", "contract", "phone", "refund"), ("lost", "late", "wrong", "new")
    texts = [f"my {thing} number {n} is {verb}" for thing in things for verb in verbs for n in range(12)]
    (tmp_path / "texts.txt").write_text("\n".join(texts), encoding="utf-8")
    output = run("distil.py", str(tmp_path / "run"), str(tmp_path / "texts.txt"), "4")
    assert "model: 22 MB, vectors of 256 numbers" in output
    assert "model-4-layers: 15 MB, vectors of 256 numbers" in output
    assert float(re.findall(r"teacher's vectors: (\S+)", output)[0]) > 0.5


@pytest.mark.slow
def test_evaluation_writes_a_report_and_compares(run, eval_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # Speed is measured on a few texts only, and memory is not: these figures are no part of this test.
    monkeypatch.setattr(evaluation_run, "sample_texts", lambda: sample_texts()[:3])
    monkeypatch.setattr(evaluation_run, "measure_memory", lambda *arguments: None)
    output = run("evaluate_and_compare.py", str(eval_data), str(tmp_path / "results"), "STSBenchmark")
    assert f"The report is {tmp_path}/results/report.html" in output
    assert (tmp_path / "results" / "report.html").exists()


@pytest.mark.parametrize("name", ["train_on_pairs.py", "distil.py", "evaluate_and_compare.py"])
def test_a_script_without_its_arguments_says_which(run, name: str):
    with pytest.raises(SystemExit, match=f"python examples/{name}"):
        run(name)


def test_the_readme_of_the_examples_lists_every_script():
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for script in EXAMPLES.glob("*.py"):
        assert f"[{script.name}]({script.name})" in page
    for line in page.splitlines():
        if line.startswith("| ["):
            assert (EXAMPLES / line[3 : line.index("]")]).exists()
