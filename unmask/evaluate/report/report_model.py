"""The content of a report, computed from the results before anything is drawn."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from unmask.charts import formatting
from unmask.errors import UsageError
from unmask.evaluate.compare import Comparison, MeasuredModel, TaskComparison, compare_results
from unmask.evaluate.published_scores import SAME_DATA, PublishedModel
from unmask.evaluate.results import Category, ModelResult, Results, TaskScore
from unmask.evaluate.statistics import PairedDifference, holm

CATEGORIES: tuple[Category, ...] = (
    "STS",
    "Classification",
    "Clustering",
    "PairClassification",
    "Retrieval",
    "Reranking",
    "Summarization",
    "WordLevel",
)
CATEGORY_NAMES = {"WordLevel": "Word level", "PairClassification": "Pair classification"}

# Frozen Sheared-LLaMA-1.3B with a linear probe on CoNLL-2003: LLM2Vec, arXiv 2404.05961, Table 4.
PAPER_WORDS = (
    ("S-LLaMA-1.3B, causal", 86.10, 96.09, 90.89),
    ("S-LLaMA-1.3B, bidirectional", 76.50, 92.17, 89.18),
    ("S-LLaMA-1.3B, bidirectional + MNTP", 90.51, 96.59, 92.04),
)
# Parts of our names of the paper's three tasks, in the order of the figures above.
_PAPER_TASKS = ("chunk", "ner", "pos")

# With more rivals than this the answer counts them instead of naming each.
_NAMED_RIVALS = 3


@dataclass(frozen=True)
class Span:
    """A piece of a sentence; strong ones are set in bold."""

    text: str
    strong: bool = False


@dataclass(frozen=True)
class ModelSummary:
    """A model's row of the summary.

    Attributes:
        index: number of the model, which is its colour in every chart.
        short_name: name without owner or folder.
        mean: over the tasks that all models completed; None if this model did not.
        means: category -> mean over these tasks.
        completed, failed: numbers of tasks.
        difference: the subject minus this model, on the common tasks.
    """

    index: int
    model: ModelResult
    short_name: str
    mean: float | None
    means: dict[Category, float]
    completed: int
    failed: int
    difference: PairedDifference | None


class TaskEntry(NamedTuple):
    """One model on one task. `comparison` is the subject compared with the model."""

    row: ModelSummary
    score: TaskScore
    comparison: TaskComparison | None


@dataclass(frozen=True)
class TaskGroup:
    """One task and all models that ran it."""

    task: str
    metric: str
    entries: list[TaskEntry]


class WordRow(NamedTuple):
    """Accuracies of one model, one per task of the `WordTable`; `is_cited` if they are from the paper."""

    label: str
    figures: list[float | None]
    is_cited: bool


@dataclass(frozen=True)
class WordTable:
    """Accuracy on the word-level tasks."""

    tasks: list[str]
    rows: list[WordRow]


@dataclass(frozen=True)
class ReportModel:
    """The content of a report.

    Attributes:
        answer: the opening, sentence by sentence.
        common: tasks that every model completed; all means are over these.
        unmeasured: models that completed nothing and so do not narrow `common`.
        refusals: reasons for which models could not be compared with the subject: other examples or other data.
        rows: one per model, the subject first.
        groups: category -> its tasks.
        counts: category -> number of common tasks.
        published_tasks: those of `common` whose published scores are comparable.
        published: other people's models on exactly those tasks.
        own_means: means of our models on those tasks, by name.
    """

    results: Results
    answer: list[list[Span]]
    common: list[str]
    unmeasured: list[str]
    refusals: list[str]
    rows: list[ModelSummary]
    groups: dict[Category, list[TaskGroup]]
    counts: dict[Category, int]
    failures: list[tuple[ModelSummary, TaskScore]]
    word_table: WordTable | None
    published_tasks: list[str]
    published: list[PublishedModel]
    own_means: dict[str, float]

    @property
    def subject(self) -> ModelSummary:
        """Return the model that the report is about."""
        return self.rows[0]

    @property
    def categories_with_mean(self) -> list[Category]:
        """Return the categories with a common task."""
        return [category for category in CATEGORIES if self.counts[category]]

    @property
    def any_published(self) -> bool:
        return any(self.has_published(category) for category in self.groups)

    def has_published(self, category: Category) -> bool:
        """Return True if a task of this category has a published score beside it."""
        return any(entry.score.published is not None for group in self.groups[category] for entry in group.entries)

    @property
    def has_memory(self) -> bool:
        """True if the memory of a model is known."""
        return any(row.model.cost.peak_resident_bytes is not None for row in self.rows)

    @property
    def published_sources(self) -> list[str]:
        sources = (score.published_source for row in self.rows for score in row.model.scores)
        return list(dict.fromkeys(source for source in sources if source))


def comparable_tasks(results: Results) -> list[str]:
    """Return the tasks that every model completed and whose published scores, if any, are on the same data."""
    common, _ = _common_tasks(results)
    fetched = {s.task for m in results.models for s in m.scores if s.data is None and s.category != "WordLevel"}
    return [task for task in common if task in SAME_DATA or task in fetched]


def build_report_model(folder: Path, results: Results, published: Sequence[PublishedModel] = ()) -> ReportModel:
    """Compute the content of a report.

    Args:
        folder: folder with the per-example values; without them nothing is tested, and the report says so.
        results: the run.
        published: other models on `comparable_tasks(results)`.

    Raises:
        UsageError: the run has no model, or a task under two categories.
    """
    if not results.models:
        raise UsageError("the results name no model, so there is nothing to report")
    common, unmeasured = _common_tasks(results)
    comparisons, refusals = _comparisons(folder, results, common)
    differences = _differences(comparisons)
    short_names = formatting.short_names([model.name for model in results.models])
    rows = [
        _summary(index, model, short_names[model.name], common, differences.get(model.name))
        for index, model in enumerate(results.models)
    ]
    published_tasks = comparable_tasks(results)
    return ReportModel(
        results=results,
        answer=_answer(results, rows, common, unmeasured),
        common=common,
        unmeasured=unmeasured,
        refusals=refusals,
        rows=rows,
        groups=_groups(rows, comparisons),
        counts={category: _count(results, common, category) for category in CATEGORIES},
        failures=[(row, score) for row in rows for score in row.model.scores if score.score is None],
        word_table=_word_table(rows),
        published_tasks=published_tasks,
        published=list(published),
        own_means={
            row.model.name: _mean(row.model, published_tasks)
            for row in rows
            if published_tasks and row.mean is not None
        },
    )


def _completed(model: ModelResult) -> dict[str, TaskScore]:
    return {score.task: score for score in model.scores if score.score is not None}


def _common_tasks(results: Results) -> tuple[list[str], list[str]]:
    """Return the tasks that all models completed, and the names of the models that completed none at all.

    Word-level tasks have a table of their own and few models run them, so they count only if there is nothing else.
    """
    completed = {model.name: _completed(model) for model in results.models}
    for words in (False, True):
        by_model = {
            name: [task for task, score in scores.items() if (score.category == "WordLevel") == words]
            for name, scores in completed.items()
        }
        by_model = {name: tasks for name, tasks in by_model.items() if tasks}
        if by_model:
            first, *others = by_model.values()
            common = [task for task in first if all(task in tasks for tasks in others)]
            return common, [model.name for model in results.models if model.name not in by_model]
    return [], [model.name for model in results.models]


def _count(results: Results, common: Collection[str], category: Category) -> int:
    scores = (score for model in results.models for score in model.scores)
    return len({score.task for score in scores if score.task in common and score.category == category})


def _mean(model: ModelResult, tasks: list[str]) -> float:
    scores = _completed(model)
    return float(np.mean([scores[task].score or 0.0 for task in tasks]))


def _summary(
    index: int, model: ModelResult, short_name: str, common: list[str], difference: PairedDifference | None
) -> ModelSummary:
    scores = _completed(model)
    has_mean = bool(common) and all(task in scores for task in common)
    by_category: dict[Category, list[str]] = {}
    for task in common if has_mean else ():
        by_category.setdefault(scores[task].category, []).append(task)
    return ModelSummary(
        index=index,
        model=model,
        short_name=short_name,
        mean=_mean(model, common) if has_mean else None,
        means={category: _mean(model, tasks) for category, tasks in by_category.items()},
        completed=len(scores),
        failed=len(model.scores) - len(scores),
        difference=difference,
    )


def _comparisons(folder: Path, results: Results, common: list[str]) -> tuple[dict[str, Comparison], list[str]]:
    """Compare the subject with each other model that shares a task with it; also return reasons where it fails."""
    subject, *others = results.models
    comparisons, refusals = {}, []
    for other in others:
        if _completed(subject).keys() & _completed(other).keys():
            pair = MeasuredModel(folder, subject), MeasuredModel(folder, other)
            # A run that was continued with other data must not lose the report of everything else.
            try:
                comparisons[other.name] = compare_results(*pair, counted=common)
            except UsageError as error:
                refusals.append(str(error))
    return comparisons, refusals


def _differences(comparisons: Mapping[str, Comparison]) -> dict[str, PairedDifference]:
    """Return the tests of the mean against each rival, adjusted for their number."""
    tests = {name: comparison.overall for name, comparison in comparisons.items() if comparison.overall is not None}
    return dict(zip(tests, holm(list(tests.values())), strict=True))


def _groups(rows: list[ModelSummary], comparisons: Mapping[str, Comparison]) -> dict[Category, list[TaskGroup]]:
    compared = {(name, task.task): task for name, comparison in comparisons.items() for task in comparison.tasks}
    groups: dict[Category, dict[str, TaskGroup]] = {category: {} for category in CATEGORIES}
    for row in rows:
        for score in row.model.scores:
            group = groups[score.category].setdefault(score.task, TaskGroup(score.task, score.metric, []))
            group.entries.append(TaskEntry(row, score, compared.get((row.model.name, score.task))))
    return {category: list(tasks.values()) for category, tasks in groups.items() if tasks}


def _word_table(rows: list[ModelSummary]) -> WordTable | None:
    tasks = list(dict.fromkeys(s.task for row in rows for s in row.model.scores if s.category == "WordLevel"))
    if not tasks:
        return None
    word_rows: list[WordRow] = []
    for row in rows:
        scores = _completed(row.model)
        figures = [scores[task].score if task in scores else None for task in tasks]
        if any(figure is not None for figure in figures):
            word_rows.append(WordRow(row.model.name, figures, is_cited=False))
    paper_columns = [_paper_task(task) for task in tasks]
    if any(column is not None for column in paper_columns):
        for label, *figures in PAPER_WORDS:
            cited = [None if column is None else figures[column] for column in paper_columns]
            word_rows.append(WordRow(label, cited, is_cited=True))
    return WordTable(tasks, word_rows)


def _paper_task(task: str) -> int | None:
    """Return the column of a task in the paper's table; None for tasks outside CoNLL-2003."""
    name = task.casefold()
    if "conll" not in name:
        return None
    return next((index for index, part in enumerate(_PAPER_TASKS) if part in name), None)


def _answer(results: Results, rows: list[ModelSummary], common: list[str], unmeasured: list[str]) -> list[list[Span]]:
    """Return the opening of the report: quality, rivals, cost, failures."""
    subject, *rivals = rows
    sentences = [_quality_sentence(subject, len(rows) - len(unmeasured), common), *_rival_sentences(subject, rivals)]
    sentences += _cost_sentences(results, subject, rivals)
    failed = sum(row.failed for row in rows)
    if failed:
        sentences.append(
            [Span(f"{formatting.plural(failed, 'task')} failed and {'is' if failed == 1 else 'are'} not counted.")]
        )
    return sentences


def _quality_sentence(subject: ModelSummary, models: int, common: list[str]) -> list[Span]:
    name = Span(subject.model.name, strong=True)
    if subject.mean is None:
        reason = "completed no task" if not subject.completed else "shares no completed task with all other models"
        return [name, Span(f" {reason}, so it has no mean.")]
    tasks = formatting.plural(len(common), "task")
    if models == 1:
        end = f" over {tasks}."
    else:
        end = f" over the {tasks} that {'both models' if models == 2 else f'all {models} models'} completed."
    return [name, Span(" averages "), Span(formatting.score(subject.mean, 1), strong=True), Span(end)]


def _rival_sentences(subject: ModelSummary, rivals: list[ModelSummary]) -> list[list[Span]]:
    rivals = sorted((row for row in rivals if row.mean is not None), key=lambda row: -(row.mean or 0))
    if subject.mean is None or not rivals:
        return []
    if len(rivals) <= _NAMED_RIVALS:
        clauses = [_rival_clause(subject, rival, first=index == 0) for index, rival in enumerate(rivals)]
        sentence = [Span("That is ")]
        for index, clause in enumerate(clauses):
            sentence += [Span("; and " if index == len(clauses) - 1 else "; ")] if index else []
            sentence += clause
        return [[*sentence, Span(".")]]
    beaten = sum(_verdict(row) == "better" for row in rivals)
    lost = sum(_verdict(row) == "worse" for row in rivals)
    tally = [f"better than {beaten}", f"worse than {lost}", f"not told apart from {len(rivals) - beaten - lost}"]
    return [
        [Span(f"Of the {len(rivals)} other models it is {formatting.listed(tally)}.")],
        [Span("The best of them is "), *_best_rival_clause(subject, rivals[0]), Span(".")],
    ]


def _verdict(row: ModelSummary) -> str | None:
    return None if row.difference is None else row.difference.verdict


def _name_in_text(row: ModelSummary) -> str:
    return formatting.shortened(row.short_name)


def _rival_clause(subject: ModelSummary, rival: ModelSummary, *, first: bool) -> list[Span]:
    """Return `1.2 points below X, more than noise (95 % interval 0.6 to 1.8)`."""
    delta = (subject.mean or 0) - (rival.mean or 0)
    side = "above" if delta > 0 else "below"
    amount = f"{abs(delta):.1f}" if round(abs(delta), 1) else "less than 0.1"
    name = Span(_name_in_text(rival), strong=True)
    spans = [Span(f"{amount} points {side} " if first else f"{amount} {side} "), name]
    return [*spans, Span(_certainty(rival.difference, delta, first=first))]


def _best_rival_clause(subject: ModelSummary, rival: ModelSummary) -> list[Span]:
    delta = (rival.mean or 0) - (subject.mean or 0)
    side = "above" if delta > 0 else "below"
    return [
        Span(_name_in_text(rival), strong=True),
        Span(f", {abs(delta):.1f} points {side}{_certainty(rival.difference, -delta, first=True)}"),
    ]


def _certainty(test: PairedDifference | None, delta: float, *, first: bool) -> str:
    """Return how certain a difference is, as `, more than noise (0.6 to 1.8)`; `first` explains the interval."""
    if test is None:
        return " (without per-example values, so not tested)"
    low, high = test.interval
    if test.verdict == "noise":
        lead = "95\N{NO-BREAK SPACE}% interval "
        return f", which is within noise ({lead}{formatting.signed(low, 1)} to {formatting.signed(high, 1)})"
    lead = "95\N{NO-BREAK SPACE}% interval " if first else ""
    if delta < 0:
        low, high = -high, -low
    return f", more than noise ({lead}{formatting.score(low, 1)} to {formatting.score(high, 1)})"


def _cost_sentences(results: Results, subject: ModelSummary, rivals: list[ModelSummary]) -> list[list[Span]]:
    cost = subject.model.cost
    spans = []
    if cost.texts_per_second:
        speed = [Span("It encodes "), Span(f"{formatting.count(cost.texts_per_second)} texts/s", strong=True)]
        speed.append(Span(f" on {results.provenance.machine}"))
        ratios = [
            f"{_speed_ratio(cost.texts_per_second / row.model.cost.texts_per_second)} {_name_in_text(row)}"
            for row in rivals[:_NAMED_RIVALS]
            if row.model.cost.texts_per_second
        ]
        spans = [*speed, Span(f", {formatting.listed(ratios)}." if ratios else ".")]
    sizes = []
    if cost.peak_resident_bytes is not None:
        sizes.append(f"{formatting.magnitude(cost.peak_resident_bytes, 'B')} of memory with all libraries")
    if cost.vector_bytes:
        sizes.append(f"{formatting.count(cost.vector_bytes)} bytes per vector")
    if sizes:
        spans.append(Span(f"{' ' if spans else ''}It takes {formatting.listed(sizes)}."))
    return [spans] if spans else []


def _speed_ratio(ratio: float) -> str:
    if ratio >= 1.05:
        return f"{_times(ratio)} times as fast as"
    return f"{_times(1 / ratio)} times slower than" if ratio <= 0.95 else "as fast as"


def _times(ratio: float) -> str:
    return f"{ratio:.1f}" if ratio < 20 else f"{ratio:,.0f}"
