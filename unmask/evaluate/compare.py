"""Comparison of two models: which is better, on which tasks, by how much, beyond noise or not; and vector drift."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from unmask.encoder.unit_length import unit_length
from unmask.errors import UsageError
from unmask.evaluate.cache import CachedModel
from unmask.evaluate.models import EmbeddingModel, open_model
from unmask.evaluate.results import Category, ModelResult, Statistic, TaskScore, read_example_values, read_results
from unmask.evaluate.statistics import PairedDifference, holm, paired, paired_mean
from unmask.home import home
from unmask.tables import open_binary, open_table

NEIGHBOURS = 10


@dataclass(frozen=True)
class MeasuredModel:
    """The results of one model, and the folder with its per-example values."""

    folder: Path
    model: ModelResult

    @property
    def name(self) -> str:
        return self.model.name


@dataclass(frozen=True)
class TaskComparison:
    """Two models on one task, scores 0-100. `test` is A minus B; None without per-example values."""

    task: str
    category: Category
    metric: str
    score_a: float
    score_b: float
    examples: int
    test: PairedDifference | None

    @property
    def delta(self) -> float:
        return self.score_a - self.score_b


@dataclass(frozen=True)
class Comparison:
    """Two models on the tasks that both completed.

    Attributes:
        a, b: labels of the models, always different.
        tasks: in the order of A's results; p-values adjusted for their number (Holm).
        overall: test of the difference of the means over `counted`; None without per-example values.
        counted: names of the tasks in the mean.
        mean_a, mean_b: means over `counted`.
        left_out: task -> reason for which it cannot be compared.
    """

    a: str
    b: str
    tasks: list[TaskComparison]
    overall: PairedDifference | None
    counted: list[str]
    mean_a: float
    mean_b: float
    left_out: dict[str, str]

    @property
    def delta(self) -> float:
        return self.mean_a - self.mean_b


@dataclass(frozen=True)
class VectorDrift:
    """Distance between the vectors of two models on the same texts.

    Attributes:
        a, b: names of the models.
        texts: number of different texts.
        mean_cosine, worst_cosine: between the two vectors of a text; None if they differ in length.
        worst_text: the text that moved most; None with the cosines.
        neighbours: number of nearest neighbours compared for each text.
        overlap: mean share (0-1) of these that are the same in both models.
        same_nearest: share (0-1) of texts whose nearest neighbour is the same.
    """

    a: str
    b: str
    texts: int
    mean_cosine: float | None
    worst_cosine: float | None
    worst_text: str | None
    neighbours: int
    overlap: float
    same_nearest: float


def find_results(spec: str) -> MeasuredModel:
    """Find the results of a model: `FOLDER` for the first model of a run, `FOLDER:MODEL` for another one.

    MODEL may be shortened to its last part ("all-MiniLM-L6-v2") or its file name.

    Raises:
        UsageError: no such folder, no such model in it, or more than one.
    """
    folder, _, name = (spec, "", "") if Path(spec).exists() else spec.rpartition(":")
    if not folder:
        raise UsageError(f"{spec} is not a folder of results; name one that `unmask evaluate` wrote")
    results = read_results(Path(folder))
    results_folder = Path(folder) if Path(folder).is_dir() else Path(folder).parent
    if not results.models:
        raise UsageError(f"{folder} holds the results of no model")
    if not name:
        return MeasuredModel(results_folder, results.models[0])
    exact = [model for model in results.models if name in (model.name, model.slug)]
    matches = exact or [model for model in results.models if model.name.rstrip("/").rpartition("/")[2] == name]
    if len(matches) != 1:
        names = ", ".join(model.name for model in results.models)
        problem = "more than one model is called" if matches else "there is no model"
        raise UsageError(f"{folder}: {problem} {name}; it holds {names}")
    return MeasuredModel(results_folder, matches[0])


def compare_results(
    a: MeasuredModel, b: MeasuredModel, tasks: Sequence[str] = (), *, counted: Collection[str] | None = None
) -> Comparison:
    """Compare two models, task by task and on the mean over tasks.

    Args:
        a, b: from `find_results`.
        tasks: compare only on these; by default on all that both completed.
        counted: tasks among them whose mean is compared. By default all but word-level tasks, or these if there is
            nothing else.

    Raises:
        UsageError: nothing to compare; one of `tasks` was not run by both; data or examples differ.
    """
    scores_a = {score.task: score for score in a.model.scores}
    scores_b = {score.task: score for score in b.model.scores}
    names = _tasks_to_compare(a, b, scores_a, scores_b, tasks)
    left_out = {
        task: reason for task in names if (reason := _missing_score(a, b, scores_a.get(task), scores_b.get(task)))
    }
    rows: list[TaskComparison] = []
    values: dict[str, tuple[np.ndarray, np.ndarray, Statistic]] = {}
    for task in names:
        if task in left_out:
            continue
        score_a, score_b = scores_a[task], scores_b[task]
        _require_same_measurement(a, b, score_a, score_b)
        test = None
        if (pair := _paired_values(a, b, score_a)) is not None:
            values[task] = pair
            test = _paired_test(task, *pair)
        rows.append(_task_comparison(score_a, score_b, test))
    if not rows:
        reasons = "; ".join(f"{task}: {reason}" for task, reason in left_out.items())
        raise UsageError(f"{a.name} and {b.name} completed no task in common" + (f" ({reasons})" if reasons else ""))
    return _summary(a, b, _adjusted(rows), values, counted, left_out)


def compare_by_name(
    a: str, b: str, tasks: Sequence[str] = (), texts: Path | None = None
) -> tuple[Comparison | None, VectorDrift | None]:
    """Compare results, and with `texts` vectors too: the work of `unmask compare`.

    Args:
        a, b: results as for `find_results`. With `texts` also models as for `open_model`, which gives a drift alone.
        tasks: as for `compare_results`.
        texts: a file with one text per line; blank lines do not count.

    Raises:
        UsageError: as `find_results`, `compare_results`, `measure_drift` and `open_model`; the texts cannot be read;
            a model has changed since its results were measured.
    """
    if texts is None:
        return compare_results(find_results(a), find_results(b), tasks), None
    lines = _read_lines(texts)
    sides = [find_results(side) if _names_results(side) else None for side in (a, b)]
    comparison = compare_results(sides[0], sides[1], tasks) if sides[0] and sides[1] else None
    if tasks and comparison is None:
        raise UsageError("--task compares results, but these are models; name folders that `unmask evaluate` wrote")
    first, second = (_open_model(spec, side) for spec, side in zip((a, b), sides, strict=True))
    return comparison, measure_drift(first, second, lines, cache=home() / "vectors")


def measure_drift(
    a: EmbeddingModel, b: EmbeddingModel, texts: Sequence[str], *, cache: Path | None = None
) -> VectorDrift:
    """Encode the texts with both models and compare the vectors and their nearest neighbours.

    Args:
        a, b: usually two revisions of one model; models of different dimensions have neighbours but no cosine.
        texts: at least 2, repeated ones counted once. The [texts, texts] similarities are computed in slices.
        cache: folder of a `VectorCache`, to read and store vectors; none by default.

    Raises:
        UsageError: fewer than 2 different texts.
    """
    texts = list(dict.fromkeys(texts))
    if len(texts) < 2:
        raise UsageError(f"{len(texts)} different texts are too few to compare neighbours; give 2 or more")
    vectors_a, vectors_b = (
        unit_length(np.asarray((model if cache is None else CachedModel(model, cache)).encode(texts), dtype=np.float32))
        for model in (a, b)
    )
    near = min(NEIGHBOURS, len(texts) - 1)
    nearest_a, nearest_b = _nearest(vectors_a, near), _nearest(vectors_b, near)
    shared = [len(set(row_a) & set(row_b)) for row_a, row_b in zip(nearest_a.tolist(), nearest_b.tolist(), strict=True)]
    mean = worst = text = None
    if vectors_a.shape == vectors_b.shape:
        cosines = np.einsum("nd,nd->n", vectors_a, vectors_b, dtype=np.float64)
        mean, worst, text = float(cosines.mean()), float(cosines.min()), texts[int(cosines.argmin())]
    return VectorDrift(
        a=a.name,
        b=b.name,
        texts=len(texts),
        mean_cosine=mean,
        worst_cosine=worst,
        worst_text=text,
        neighbours=near,
        overlap=float(np.mean(shared)) / near,
        same_nearest=float(np.mean(nearest_a[:, 0] == nearest_b[:, 0])),
    )


def _tasks_to_compare(
    a: MeasuredModel,
    b: MeasuredModel,
    scores_a: Mapping[str, TaskScore],
    scores_b: Mapping[str, TaskScore],
    tasks: Sequence[str],
) -> list[str]:
    """Return `tasks`, or by default all of both models in the order of A's; refuse tasks that one did not run."""
    for task in tasks:
        lacking = [side.name for side, scores in ((a, scores_a), (b, scores_b)) if task not in scores]
        if lacking:
            in_common = ", ".join(task for task in scores_a if task in scores_b) or "nothing in common"
            raise UsageError(f"{' and '.join(lacking)} did not run {task}; both ran {in_common}")
    return list(tasks) or [*scores_a, *(task for task in scores_b if task not in scores_a)]


def _missing_score(
    a: MeasuredModel, b: MeasuredModel, score_a: TaskScore | None, score_b: TaskScore | None
) -> str | None:
    """Return the reason for which a task has no two scores to compare; None if it has."""
    for side, score in ((a, score_a), (b, score_b)):
        if score is None:
            return f"not run by {side.name}"
        if score.score is None:
            return f"failed for {side.name}: {score.error or 'no reason given'}"
    return None


def _require_same_measurement(a: MeasuredModel, b: MeasuredModel, score_a: TaskScore, score_b: TaskScore) -> None:
    for name, of_a, of_b in (
        ("data", score_a.data, score_b.data),
        ("metric", score_a.metric, score_b.metric),
        ("statistic", score_a.statistic, score_b.statistic),
    ):
        if of_a != of_b:
            raise UsageError(
                f"{score_a.task}: {a.name} was measured with {name} {of_a} and {b.name} with {of_b}; run both again "
                "on the same data, or leave the task out with --task"
            )


def _paired_values(
    a: MeasuredModel, b: MeasuredModel, score: TaskScore
) -> tuple[np.ndarray, np.ndarray, Statistic] | None:
    values_a = read_example_values(a.folder, a.name, score.task)
    values_b = read_example_values(b.folder, b.name, score.task)
    if values_a is None or values_b is None or min(len(values_a), len(values_b)) < 2:
        return None
    return values_a, values_b, score.statistic


def _paired_test(task: str, values_a: np.ndarray, values_b: np.ndarray, statistic: Statistic) -> PairedDifference:
    try:
        return paired(values_a, values_b, statistic)
    except ValueError as error:
        raise UsageError(f"{task}: the examples of the two results do not match: {error}; run both again") from error


def _task_comparison(score_a: TaskScore, score_b: TaskScore, test: PairedDifference | None) -> TaskComparison:
    if score_a.score is None or score_b.score is None:
        raise ValueError("only completed tasks are compared")
    return TaskComparison(
        task=score_a.task,
        category=score_a.category,
        metric=score_a.metric,
        score_a=score_a.score,
        score_b=score_b.score,
        examples=score_a.examples,
        test=test,
    )


def _adjusted(rows: list[TaskComparison]) -> list[TaskComparison]:
    """Return the rows with p-values adjusted for the number of tests."""
    adjusted = iter(holm([row.test for row in rows if row.test is not None]))
    return [replace(row, test=next(adjusted)) if row.test is not None else row for row in rows]


def _summary(
    a: MeasuredModel,
    b: MeasuredModel,
    rows: list[TaskComparison],
    values: Mapping[str, tuple[np.ndarray, np.ndarray, Statistic]],
    counted: Collection[str] | None,
    left_out: dict[str, str],
) -> Comparison:
    """Return the comparison of the means over `counted`, with the rows; `values` are task -> per-example values."""
    if counted is None:
        averaged = [row for row in rows if row.category != "WordLevel"] or rows
    else:
        averaged = [row for row in rows if row.task in counted]
    pairs = [values[row.task] for row in averaged if row.task in values]
    label_a, label_b = _labels(a, b)
    return Comparison(
        a=label_a,
        b=label_b,
        tasks=rows,
        overall=paired_mean(pairs) if pairs and len(pairs) == len(averaged) else None,
        counted=[row.task for row in averaged],
        mean_a=float(np.mean([row.score_a for row in averaged])) if averaged else float("nan"),
        mean_b=float(np.mean([row.score_b for row in averaged])) if averaged else float("nan"),
        left_out=left_out,
    )


def _labels(a: MeasuredModel, b: MeasuredModel) -> tuple[str, str]:
    """Return two different labels: the names, else with revisions, else with folders."""
    if a.name != b.name:
        return a.name, b.name
    if a.model.revision != b.model.revision:
        return f"{a.name} @{a.model.revision[:8]}", f"{b.name} @{b.model.revision[:8]}"
    if a.folder.resolve() != b.folder.resolve():
        return f"{a.name} ({a.folder})", f"{b.name} ({b.folder})"
    raise UsageError(f"{a.name} would be compared with itself; name two models or two folders of results")


def _names_results(spec: str) -> bool:
    folder = Path(spec) if Path(spec).exists() else Path(spec.rpartition(":")[0])
    return spec != "" and (folder / "results.json").is_file()


def _open_model(spec: str, measured: MeasuredModel | None) -> EmbeddingModel:
    """Open a model to compare its vectors: in float32, or in the precision it was measured in or that `spec` names."""
    if measured is None:
        return open_model(spec, {"dtype": "float32"})
    details = measured.model.details
    precision = {"dtype": str(details.get("precision", "float32"))}
    model = open_model(str(details.get("specification", measured.name)), precision)
    if model.revision != measured.model.revision:
        raise UsageError(
            f"{measured.name} is revision {model.revision} now, but {spec} was measured at {measured.model.revision}; "
            "to compare vectors, name both models as `unmask evaluate` takes them"
        )
    return model


def _read_lines(file: Path) -> list[str]:
    try:
        with open_binary(file) as stream:
            texts = [row.text("text") for row in open_table(stream, "txt", file.name).rows()]
        return [text for text in texts if text.strip()]
    except (OSError, UsageError) as error:
        raise UsageError(f"--texts {file} cannot be read: {error}") from error


def _nearest(vectors: np.ndarray, near: int) -> np.ndarray:
    """Return the rows of the `near` most similar other rows of vectors [n, d], most similar first: [n, near]."""
    parts = []
    for start in range(0, len(vectors), 1024):
        similar = vectors[start : start + 1024] @ vectors.T  # [1024, n]
        similar[np.arange(len(similar)), np.arange(start, start + len(similar))] = -np.inf
        parts.append(np.argsort(-similar, axis=1, kind="stable")[:, :near])
    return np.concatenate(parts)
