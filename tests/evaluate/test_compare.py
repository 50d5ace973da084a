"""Comparison of results: verdicts, refusals of unlike measurements, output formats; and drift of vectors."""

import json
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from unmask.errors import UsageError
from unmask.evaluate.compare import compare_by_name, compare_results, find_results, measure_drift
from unmask.evaluate.models.embedding_model import ModelKind
from unmask.evaluate.report import print_comparison, write_comparison
from unmask.evaluate.results import (
    Category,
    Cost,
    ModelResult,
    Provenance,
    Results,
    TaskScore,
    read_results,
    write_example_values,
    write_results,
)
from unmask.evaluate.statistics import score_of

TASKS: dict[str, Category] = {"Sts": "STS", "Easy": "Classification", "Hard": "Retrieval", "Pos": "WordLevel"}


def measure(folder: Path, names: Sequence[str], skills: Sequence[float], revision: str = "0123456789") -> Path:
    """Write results of models with different skills on tasks whose examples are the same for all."""
    models = []
    for number, (name, skill) in enumerate(zip(names, skills, strict=True)):
        model = ModelResult(name=name, kind="unmask", revision=revision, cost=Cost())
        for index, (task, category) in enumerate(TASKS.items()):
            common, own = np.random.default_rng(index), np.random.default_rng((index, number, int(100 * skill)))
            score = TaskScore(task=task, category=category, metric="accuracy", data=f"{index:016x}")
            if category == "STS":
                score.statistic, gold = "spearman", common.integers(0, 6, 400)
                values = np.stack((gold + own.normal(0, 4 - 4 * skill, 400), gold), axis=1)
            else:
                values = (common.random(400) + own.normal(0, 0.05, 400) < skill).astype(float)
            score.score, score.examples = score_of(values, score.statistic), 400
            write_example_values(folder, model.name, task, values)
            model.scores.append(score)
        models.append(model)
    write_results(
        folder,
        Results(
            suites=["local"],
            models=models,
            provenance=Provenance(command="", started="", seconds=0, machine="", versions={}),
        ),
    )
    return folder


def change(folder: Path, task: str, /, **fields: object) -> None:
    """Change fields of the first model's score on a task."""
    results = read_results(folder)
    score = next(score for score in results.models[0].scores if score.task == task)
    for field, value in fields.items():
        setattr(score, field, value)
    write_results(folder, results)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[str, str]:
    return (
        str(measure(tmp_path / "a", ["owner/strong"], [0.8])),
        str(measure(tmp_path / "b", ["owner/weak"], [0.6])),
    )


def test_the_better_model_is_found(pair: tuple[str, str]) -> None:
    comparison, moved = compare_by_name(*pair)
    assert comparison and moved is None
    assert [row.task for row in comparison.tasks] == list(TASKS)
    assert all(row.test and row.test.verdict == "better" and row.delta > 0 for row in comparison.tasks)
    assert comparison.counted == ["Sts", "Easy", "Hard"]  # words are apart
    assert comparison.overall and comparison.overall.verdict == "better"
    assert (
        comparison.delta
        == pytest.approx(comparison.overall.delta)
        == np.mean([row.delta for row in comparison.tasks[:3]])
    )
    mirrored, _ = compare_by_name(pair[1], pair[0])
    assert mirrored and mirrored.overall and mirrored.overall.verdict == "worse"


def test_equal_models_are_not_told_apart(tmp_path: Path) -> None:
    folder = str(measure(tmp_path, ["x", "y"], [0.7, 0.7]))
    comparison, _ = compare_by_name(folder, f"{folder}:y")
    assert comparison and comparison.overall and comparison.overall.verdict == "noise"
    assert all(row.test and row.test.verdict == "noise" for row in comparison.tasks)


def test_two_models_of_one_folder_by_any_of_their_names(tmp_path: Path) -> None:
    folder = measure(tmp_path / "run:1", ["owner/x", "other/y"], [0.7, 0.6])
    for name in ("other/y", "y", "other-y"):
        assert find_results(f"{folder}:{name}").name == "other/y"
    assert find_results(str(folder)).name == find_results(str(folder / "results.json")).name == "owner/x"
    with pytest.raises(UsageError, match=r"no model z; it holds owner/x, other/y"):
        find_results(f"{folder}:z")
    with pytest.raises(UsageError, match="would be compared with itself"):
        compare_by_name(str(folder), f"{folder}:owner/x")
    with pytest.raises(UsageError, match=r"nowhere is not a folder of results"):
        find_results("nowhere")


def test_two_revisions_of_one_model_are_told_apart(tmp_path: Path) -> None:
    folders = [str(measure(tmp_path / r, ["m"], [s], revision=r * 10)) for r, s in (("a", 0.7), ("b", 0.8))]
    comparison, _ = compare_by_name(folders[0], folders[1])
    assert comparison and (comparison.a, comparison.b) == ("m @aaaaaaaa", "m @bbbbbbbb")
    copied = shutil.copytree(folders[0], tmp_path / "copy")
    again, _ = compare_by_name(folders[0], str(copied))
    assert again and again.a != again.b and again.delta == 0 and again.overall and again.overall.p_value == 1


def test_chosen_tasks_only(pair: tuple[str, str]) -> None:
    comparison, _ = compare_by_name(*pair, tasks=["Hard", "Pos"])
    assert comparison and [row.task for row in comparison.tasks] == ["Hard", "Pos"] and comparison.counted == ["Hard"]
    with pytest.raises(
        UsageError, match=r"owner/strong and owner/weak did not run Nope; both ran Sts, Easy, Hard, Pos"
    ):
        compare_by_name(*pair, tasks=["Nope"])


@pytest.mark.parametrize(("field", "value"), [("data", "f" * 16), ("metric", "f1"), ("statistic", "spearman")])
def test_unlike_measurements_are_refused_by_name(pair: tuple[str, str], field: str, value: str) -> None:
    change(Path(pair[0]), "Easy", **{field: value})
    with pytest.raises(UsageError, match=rf"Easy: owner/strong was measured with {field} {value} and owner/weak with"):
        compare_by_name(*pair)
    compare_by_name(*pair, tasks=["Sts", "Hard"])  # the way out that the message names


def test_other_examples_are_refused(pair: tuple[str, str]) -> None:
    model = read_results(Path(pair[0])).models[0]
    write_example_values(Path(pair[0]), model.name, "Hard", np.ones(399))
    with pytest.raises(UsageError, match=r"Hard: the examples of the two results do not match: 399 examples"):
        compare_by_name(*pair)
    write_example_values(Path(pair[0]), model.name, "Hard", np.ones(400))
    values = np.stack((np.arange(400), np.arange(400)), axis=1)
    write_example_values(Path(pair[0]), model.name, "Sts", values)
    with pytest.raises(UsageError, match=r"Sts: .*gold scores differ"):
        compare_by_name(*pair)


def test_failed_and_missing_tasks_are_left_out_with_the_reason(pair: tuple[str, str]) -> None:
    change(Path(pair[0]), "Easy", score=None, error="out of memory")
    change(Path(pair[0]), "Pos", task="Other")
    comparison, _ = compare_by_name(*pair)
    assert comparison and [row.task for row in comparison.tasks] == ["Sts", "Hard"]
    assert comparison.left_out == {
        "Easy": "failed for owner/strong: out of memory",
        "Other": "not run by owner/weak",
        "Pos": "not run by owner/strong",
    }
    for task in ("Sts", "Hard"):
        change(Path(pair[0]), task, score=None)
    with pytest.raises(UsageError, match="completed no task in common"):
        compare_by_name(*pair)


def test_without_examples_there_is_a_difference_and_no_test(
    pair: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(Path(pair[0]) / "examples")
    comparison, _ = compare_by_name(*pair)
    assert (
        comparison
        and comparison.overall is None
        and all(row.test is None for row in comparison.tasks)
        and comparison.delta > 0
    )
    print_comparison(comparison)
    output = capsys.readouterr().out
    assert "nobody knows whether that is noise" in " ".join(output.split()) and "not tested" in output


def test_every_format_has_the_figures(pair: tuple[str, str], tmp_path: Path) -> None:
    a, b = (find_results(side) for side in pair)
    comparison = compare_results(a, b)
    for suffix in ("html", "md", "json"):
        write_comparison(tmp_path / f"out.{suffix}", comparison)
    markdown = (tmp_path / "out.md").read_text(encoding="utf-8")
    html = (tmp_path / "out.html").read_text(encoding="utf-8")
    data = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert data["drift"] is None and data["comparison"]["overall"]["verdict"] == "better"
    for row, written in zip(comparison.tasks, data["comparison"]["tasks"], strict=True):
        assert written["score_a"] == row.score_a and written["test"]["p_value"] == (row.test and row.test.p_value)
        for text in (markdown, html):
            assert f"{row.score_a:.2f}" in text and f"+{row.delta:.2f}" in text
    assert "owner/strong is better than owner/weak on the mean of 3 tasks" in markdown.replace("\\", "")
    with pytest.raises(UsageError, match=r"end the name in \.html, \.md or \.json"):
        write_comparison(tmp_path / "out.txt", comparison)


class Letters:
    """An embedding model whose vectors count letters, rotated by an angle: a revision that drifted."""

    kind: ModelKind = "unmask"
    parameters: int | None = None
    takes_instructions = False

    def __init__(self, name: str, angle: float = 0.0, *, dimensions: int = 26) -> None:
        self.name, self.revision, self.dimensions, self.angle = name, f"{name}-1", dimensions, angle
        self.calls = 0

    def encode(self, texts: Sequence[str], instruction: str = "") -> np.ndarray:
        self.calls += 1
        counted = np.array([[text.count(chr(97 + at)) for at in range(self.dimensions)] for text in texts], np.float32)
        turned = counted.copy()
        turned[:, 0] = np.cos(self.angle) * counted[:, 0] - np.sin(self.angle) * counted[:, 1]
        turned[:, 1] = np.sin(self.angle) * counted[:, 0] + np.cos(self.angle) * counted[:, 1]
        return turned

    def count_tokens(self, texts: Sequence[str], instruction: str = "") -> int | None:
        return None


SENTENCES = [
    "a cab",
    "abba",
    "deed of",
    "the quick fox",
    "lazy dog",
    "jumps over it",
    "zzz",
    "bab",
    "quiet",
    "loud",
    "ef",
    "gh",
]


def test_drift_of_the_same_vectors_is_none() -> None:
    vector_drift = measure_drift(Letters("one"), Letters("two"), [*SENTENCES, "abba"])
    assert vector_drift.texts == 12 and vector_drift.neighbours == 10
    assert vector_drift.mean_cosine == pytest.approx(1) and vector_drift.worst_cosine == pytest.approx(1)
    assert vector_drift.overlap == vector_drift.same_nearest == 1


def test_drift_names_the_text_that_moved_most() -> None:
    vector_drift = measure_drift(Letters("one"), Letters("two", 1.0), SENTENCES)
    assert vector_drift.worst_cosine == pytest.approx(np.cos(1.0), abs=1e-6) and vector_drift.worst_text in (
        "abba",
        "bab",
    )
    assert (
        vector_drift.mean_cosine
        and vector_drift.worst_cosine
        and vector_drift.worst_cosine < vector_drift.mean_cosine < 1
    )
    assert vector_drift.overlap == vector_drift.same_nearest == 1  # turning all vectors alike changes no neighbour


def test_drift_sees_ranks_change() -> None:
    stretched = Letters("two")
    encode, weights = stretched.encode, np.linspace(0, 1, 26, dtype=np.float32) ** 4
    stretched.encode = lambda texts, instruction="": encode(texts) * weights
    vector_drift = measure_drift(Letters("one"), stretched, [*SENTENCES, "more of it", "and more", "a fox", "the dog"])
    assert 0.5 < vector_drift.overlap < 1 and 0 < vector_drift.same_nearest < 1


def test_drift_between_other_lengths_has_neighbours_only(tmp_path: Path) -> None:
    vector_drift = measure_drift(Letters("one"), Letters("two", dimensions=20), SENTENCES[:4])
    assert vector_drift.mean_cosine is vector_drift.worst_cosine is vector_drift.worst_text is None
    assert vector_drift.neighbours == 3 and vector_drift.overlap == 1
    write_comparison(tmp_path / "drift.md", None, vector_drift)
    assert "so no cosine" in (tmp_path / "drift.md").read_text(encoding="utf-8")
    with pytest.raises(UsageError, match="1 different texts are too few"):
        measure_drift(Letters("one"), Letters("two"), ["same", "same"])


def test_drift_encodes_nothing_twice(tmp_path: Path) -> None:
    one, two = Letters("one"), Letters("two", 0.3)
    first = measure_drift(one, two, SENTENCES, cache=tmp_path)
    assert measure_drift(one, two, SENTENCES, cache=tmp_path) == first and (one.calls, two.calls) == (1, 1)


def test_the_commands(
    unmask: Callable[..., subprocess.CompletedProcess[str]], pair: tuple[str, str], golden_dir: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.html"
    done = unmask("compare", *pair, "--task", "Hard", "-o", str(output))
    assert done.returncode == 0, done.stderr
    printed = " ".join(done.stdout.split())
    assert "owner/strong is better than owner/weak on the mean of 1 task" in printed and "A better" in printed
    assert output.is_file()
    data = json.loads(unmask("compare", *pair, "--json").stdout)
    assert data["drift"] is None
    assert {"Hard"} < {row["task"] for row in data["comparison"]["tasks"]}
    assert unmask("report", pair[0]).returncode == 0
    assert (Path(pair[0]) / "report.html").is_file() and (Path(pair[0]) / "report.md").is_file()
    texts = tmp_path / "texts.txt"
    texts.write_text("\n\n".join(SENTENCES), encoding="utf-8")
    model = str(golden_dir / "tiny_llama")
    sides = [model, f"{model}?causal&name=causal"]
    done = unmask("compare", *sides, "--texts", str(texts))
    assert done.returncode == 0, done.stderr
    printed = " ".join(done.stdout.split())
    assert "From tiny_llama to causal, over 12 texts: cosine 0." in printed and "10 nearest neighbours" in printed
    with pytest.raises(UsageError, match="--task compares results"):
        compare_by_name(sides[0], sides[1], tasks=["Hard"], texts=texts)
    with pytest.raises(UsageError, match=r"--texts .*missing cannot be read"):
        compare_by_name(sides[0], sides[1], texts=tmp_path / "missing")


def test_results_of_a_model_that_has_changed_since(golden_dir: Path, tmp_path: Path) -> None:
    model = str(golden_dir / "tiny_llama")
    folders = [str(measure(tmp_path / r, [model], [0.7], revision=r * 10)) for r in "ab"]
    (tmp_path / "texts").write_text("one\ntwo\n", encoding="utf-8")
    with pytest.raises(UsageError, match=r"but .* was measured at aaaaaaaaaa"):
        compare_by_name(folders[0], folders[1], texts=tmp_path / "texts")
