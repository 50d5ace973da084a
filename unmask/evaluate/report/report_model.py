"""What a report says, worked out from the results before anything is drawn."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unmask.charts import formatting
from unmask.errors import UsageError
from unmask.evaluate.compare import Comparison, MeasuredModel, TaskComparison, compare_results
from unmask.evaluate.published_scores import SAME_DATA, PublishedModel
from unmask.evaluate.results import Category, ModelResult, Results, TaskScore
from unmask.evaluate.statistics import Paired, holm

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
# How the paper's three tasks are recognised among ours, in the order of the figures above.
_PAPER_TASKS = ("chunk", "ner", "pos")

# With more rivals than this the answer counts them instead of naming each.
_NAMED_RIVALS = 3


@dataclass(frozen=True)
class Span:
    """A piece of a sentence; strong ones are set apart."""

    text: str
    strong: bool = False


@dataclass(frozen=True)
class ModelSummary:
    """A model in the summary. `index` gives it its colour in every chart."""

    index: int
    model: ModelResult
    short: str
    mean: float | None
    means: dict[Category, float]
    completed: int
    failed: int
    against: Paired | None  # the subject minus this model, on the common tasks


@dataclass(frozen=True)
class TaskGroup:
    """One task, all models that ran it: (row, score, the subject compared with that model)."""

    task: str
    metric: str
    entries: list[tuple[ModelSummary, TaskScore, TaskComparison | None]]


@dataclass(frozen=True)
class WordTable:
    """Accuracy of word-level tasks: names of columns, then (label, figures, from the paper?)."""

    tasks: list[str]
    rows: list[tuple[str, list[float | None], bool]]


@dataclass(frozen=True)
class ReportModel:
    """Everything that a report shows.

    Attributes:
        answer: the opening, sentence by sentence.
        common: tasks that every model completed; all means are over these.
        silent: models that completed nothing and so do not narrow `common`.
        untested: why a model could not be compared with the subject, where its examples or data do not match.
        published_tasks: those of `common` whose published scores are comparable.
        published: other people's models on exactly those.
        placed: our models' means on those, by name.
    """

    results: Results
    answer: list[list[Span]]
    common: list[str]
    silent: list[str]
    untested: list[str]
    rows: list[ModelSummary]
    groups: dict[Category, list[TaskGroup]]
    counts: dict[Category, int]
    failures: list[tuple[ModelSummary, TaskScore]]
    words: WordTable | None
    published_tasks: list[str]
    published: list[PublishedModel]
    placed: dict[str, float]

    @property
    def subject(self) -> ModelSummary:
        return self.rows[0]

    @property
    def means_of(self) -> list[Category]:
        """The categories that have a mean."""
        return [category for category in CATEGORIES if self.counts[category]]

    @property
    def any_published(self) -> bool:
        return any(self.has_published(category) for category in self.groups)

    def has_published(self, category: Category) -> bool:
        """Whether a task of this category has a published score beside it."""
        return any(s.published is not None for group in self.groups[category] for _, s, _ in group.entries)

    @property
    def published_sources(self) -> list[str]:
        sources = (score.published_source for row in self.rows for score in row.model.scores)
        return list(dict.fromkeys(source for source in sources if source))


def comparable_tasks(results: Results) -> list[str]:
    """Tasks that every model completed and whose published scores, if any, are on the same data."""
    common, _ = _common(results)
    fetched = {s.task for m in results.models for s in m.scores if s.data is None and s.category != "WordLevel"}
    return [task for task in common if task in SAME_DATA or task in fetched]


def build_report_model(folder: Path, results: Results, published: list[PublishedModel] | None = None) -> ReportModel:
    """Work out the report of a run.

    Args:
        folder: where the per-example values lie; without them nothing is tested, and the report says so.
        results: the run.
        published: other models on `comparable_tasks(results)`.

    Raises:
        UsageError: the run has no model, or a task under two categories.
    """
    if not results.models:
        raise UsageError("the results name no model, so there is nothing to report")
    common, silent = _common(results)
    comparisons, untested = _comparisons(folder, results, common)
    overall = _overall(comparisons)
    short = formatting.short_names([model.name for model in results.models])
    rows = [
        _row(index, model, short[model.name], common, overall.get(model.name))
        for index, model in enumerate(results.models)
    ]
    shown = comparable_tasks(results)
    return ReportModel(
        results=results,
        answer=_answer(results, rows, common, silent),
        common=common,
        silent=silent,
        untested=untested,
        rows=rows,
        groups=_groups(rows, comparisons),
        counts={
            category: len(
                {s.task for m in results.models for s in m.scores if s.task in common and s.category == category}
            )
            for category in CATEGORIES
        },
        failures=[(row, score) for row in rows for score in row.model.scores if score.score is None],
        words=_words(rows),
        published_tasks=shown,
        published=published or [],
        placed={row.model.name: _mean(row.model, shown) for row in rows if shown and row.mean is not None},
    )


def _completed(model: ModelResult) -> dict[str, TaskScore]:
    return {score.task: score for score in model.scores if score.score is not None}


def _common(results: Results) -> tuple[list[str], list[str]]:
    """Tasks that all models completed, and the models that completed none at all.

    Word-level tasks have a table of their own and few models take them, so they count only where nothing else does.
    """
    done = {model.name: _completed(model) for model in results.models}
    for words in (False, True):
        able = {
            name: [task for task, score in scores.items() if (score.category == "WordLevel") == words]
            for name, scores in done.items()
        }
        able = {name: tasks for name, tasks in able.items() if tasks}
        if able:
            first, *others = able.values()
            common = [task for task in first if all(task in tasks for tasks in others)]
            return common, [model.name for model in results.models if model.name not in able]
    return [], [model.name for model in results.models]


def _mean(model: ModelResult, tasks: list[str]) -> float:
    done = _completed(model)
    return float(np.mean([done[task].score or 0.0 for task in tasks]))


def _row(index: int, model: ModelResult, short: str, common: list[str], against: Paired | None) -> ModelSummary:
    done = _completed(model)
    complete = bool(common) and all(task in done for task in common)
    by_category: dict[Category, list[str]] = {}
    for task in common if complete else ():
        by_category.setdefault(done[task].category, []).append(task)
    return ModelSummary(
        index=index,
        model=model,
        short=short,
        mean=_mean(model, common) if complete else None,
        means={category: _mean(model, tasks) for category, tasks in by_category.items()},
        completed=len(done),
        failed=len(model.scores) - len(done),
        against=against,
    )


def _comparisons(folder: Path, results: Results, common: list[str]) -> tuple[dict[str, Comparison], list[str]]:
    """The subject against each other model that shares a task with it, and why some cannot be compared."""
    subject, *others = results.models
    found, refused = {}, []
    for other in others:
        if _completed(subject).keys() & _completed(other).keys():
            # A run that went on with other data must not cost the report of all that it measured.
            try:
                found[other.name] = compare_results(
                    MeasuredModel(folder, subject), MeasuredModel(folder, other), counted=common
                )
            except UsageError as error:
                refused.append(str(error))
    return found, refused


def _overall(comparisons: dict[str, Comparison]) -> dict[str, Paired]:
    """Tests of the mean against each rival, adjusted for their number."""
    tests = {name: found.overall for name, found in comparisons.items() if found.overall is not None}
    return dict(zip(tests, holm(list(tests.values())), strict=True))


def _groups(rows: list[ModelSummary], comparisons: dict[str, Comparison]) -> dict[Category, list[TaskGroup]]:
    compared = {(name, row.task): row for name, found in comparisons.items() for row in found.tasks}
    groups: dict[Category, dict[str, TaskGroup]] = {category: {} for category in CATEGORIES}
    for row in rows:
        for score in row.model.scores:
            group = groups[score.category].setdefault(score.task, TaskGroup(score.task, score.metric, []))
            group.entries.append((row, score, compared.get((row.model.name, score.task))))
    return {category: list(tasks.values()) for category, tasks in groups.items() if tasks}


def _words(rows: list[ModelSummary]) -> WordTable | None:
    tasks = list(dict.fromkeys(s.task for row in rows for s in row.model.scores if s.category == "WordLevel"))
    if not tasks:
        return None
    paper_columns = [_paper_task(task) for task in tasks]
    ours: list[tuple[str, list[float | None], bool]] = []
    for row in rows:
        done = _completed(row.model)
        figures = [done[task].score if task in done else None for task in tasks]
        if any(figure is not None for figure in figures):
            ours.append((row.model.name, figures, False))
    papers = [
        (label, [None if column is None else figures[column] for column in paper_columns], True)
        for label, *figures in PAPER_WORDS
    ]
    return WordTable(tasks, ours + (papers if any(column is not None for column in paper_columns) else []))


def _paper_task(task: str) -> int | None:
    """Which of the paper's tasks this is; only CoNLL-2003 is."""
    name = task.casefold()
    if "conll" not in name:
        return None
    return next((index for index, part in enumerate(_PAPER_TASKS) if part in name), None)


def _answer(results: Results, rows: list[ModelSummary], common: list[str], silent: list[str]) -> list[list[Span]]:
    subject, *rivals = rows
    sentences = [_how_good(subject, len(rows) - len(silent), common), *_against_whom(subject, rivals)]
    sentences += _at_what_cost(results, subject, rivals)
    failed = sum(row.failed for row in rows)
    if failed:
        sentences.append(
            [Span(f"{formatting.plural(failed, 'task')} failed and {'is' if failed == 1 else 'are'} not counted.")]
        )
    return sentences


def _how_good(subject: ModelSummary, models: int, common: list[str]) -> list[Span]:
    name = Span(subject.model.name, strong=True)
    if subject.mean is None:
        what = "completed no task" if not subject.completed else "shares no completed task with all other models"
        return [name, Span(f" {what}, so it has no mean.")]
    over = formatting.plural(len(common), "task")
    who = (
        "" if models == 1 else " that both models completed" if models == 2 else f" that all {models} models completed"
    )
    return [
        name,
        Span(" averages "),
        Span(formatting.score(subject.mean, 1), strong=True),
        Span(f" over the {over}{who}." if who else f" over {over}."),
    ]


def _against_whom(subject: ModelSummary, rivals: list[ModelSummary]) -> list[list[Span]]:
    rivals = sorted((row for row in rivals if row.mean is not None), key=lambda row: -(row.mean or 0))
    if subject.mean is None or not rivals:
        return []
    if len(rivals) <= _NAMED_RIVALS:
        clauses = [_clause(subject, rival, first=index == 0) for index, rival in enumerate(rivals)]
        joined = [Span("That is ")]
        for index, clause in enumerate(clauses):
            joined += [Span("; and " if index == len(clauses) - 1 else "; ")] if index else []
            joined += clause
        return [[*joined, Span(".")]]
    beaten = sum(_verdict(row) == "better" for row in rivals)
    lost = sum(_verdict(row) == "worse" for row in rivals)
    tally = [f"better than {beaten}", f"worse than {lost}", f"not told apart from {len(rivals) - beaten - lost}"]
    return [
        [Span(f"Of the {len(rivals)} other models it is {formatting.listed(tally)}.")],
        [Span("The best of them is "), *_best_clause(subject, rivals[0]), Span(".")],
    ]


def _verdict(row: ModelSummary) -> str | None:
    return None if row.against is None else row.against.verdict


def _in_prose(row: ModelSummary) -> str:
    return formatting.shortened(row.short)


def _clause(subject: ModelSummary, rival: ModelSummary, *, first: bool) -> list[Span]:
    """`1.2 points below X, more than noise (95 % interval 0.6 to 1.8)`."""
    delta = (subject.mean or 0) - (rival.mean or 0)
    side = "above" if delta > 0 else "below"
    amount = f"{abs(delta):.1f}" if round(abs(delta), 1) else "less than 0.1"
    spans = [Span(f"{amount} points {side} " if first else f"{amount} {side} "), Span(_in_prose(rival), strong=True)]
    return [*spans, Span(_how_sure(rival.against, delta, first=first))]


def _best_clause(subject: ModelSummary, rival: ModelSummary) -> list[Span]:
    delta = (rival.mean or 0) - (subject.mean or 0)
    side = "above" if delta > 0 else "below"
    return [
        Span(_in_prose(rival), strong=True),
        Span(f", {abs(delta):.1f} points {side}{_how_sure(rival.against, -delta, first=True)}"),
    ]


def _how_sure(test: Paired | None, delta: float, *, first: bool) -> str:
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


def _at_what_cost(results: Results, subject: ModelSummary, rivals: list[ModelSummary]) -> list[list[Span]]:
    cost = subject.model.cost
    spans = []
    if cost.texts_per_second:
        speed = [Span("It encodes "), Span(f"{formatting.count(cost.texts_per_second)} texts/s", strong=True)]
        speed.append(Span(f" on {results.provenance.machine}"))
        ratios = [
            f"{_speed_ratio(cost.texts_per_second / row.model.cost.texts_per_second)} {_in_prose(row)}"
            for row in rivals[:_NAMED_RIVALS]
            if row.model.cost.texts_per_second
        ]
        spans = [*speed, Span(f", {formatting.listed(ratios)}." if ratios else ".")]
    parts = []
    if cost.peak_memory_bytes is not None:
        parts.append(f"{formatting.magnitude(cost.peak_memory_bytes, 'B')} of memory")
    if cost.vector_bytes:
        parts.append(f"{formatting.count(cost.vector_bytes)} bytes per vector")
    if parts:
        spans.append(Span(f"{' ' if spans else ''}It takes {formatting.listed(parts)}."))
    return [spans] if spans else []


def _speed_ratio(ratio: float) -> str:
    if ratio >= 1.05:
        return f"{_times(ratio)} times as fast as"
    return f"{_times(1 / ratio)} times slower than" if ratio <= 0.95 else "as fast as"


def _times(ratio: float) -> str:
    return f"{ratio:.1f}" if ratio < 20 else f"{ratio:,.0f}"
