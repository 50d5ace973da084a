"""Geometry of the report's charts. `templates/charts.svg.j2` draws the bars, `unmask/charts` the scatter charts.

Bars are placed in per cent of whatever width they are given, with text outside the drawing, so they are sharp and
legible at any width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from unmask.charts import formatting
from unmask.charts.scatter import Scatter, ScatterPoint, scatters
from unmask.evaluate.published_scores import PublishedModel
from unmask.evaluate.report.report_model import ModelSummary, ReportModel, TaskGroup
from unmask.evaluate.results import TaskScore

# Points that an outlier may lie below the lowest of ours and the lowest tenth of the others.
_TOLERATED = 8.0


@dataclass(frozen=True)
class ScoreBar:
    """A model's bar on a task; positions in per cent of the scale, None where nothing is drawn."""

    row: ModelSummary
    end: float | None
    low: float | None
    high: float | None
    published: float | None
    text: str
    title: str


@dataclass(frozen=True)
class TaskBars:
    task: str
    metric: str
    bars: list[ScoreBar]


def task_bars(group: TaskGroup) -> TaskBars:
    """The bars of one task, a bar per model, on a scale from 0 to 100."""
    return TaskBars(
        group.task, formatting.metric(group.metric), [_bar(group.task, row, score) for row, score, _ in group.entries]
    )


def _bar(task: str, row: ModelSummary, score: TaskScore) -> ScoreBar:
    if score.score is None:
        return ScoreBar(row, None, None, None, score.published, "failed", f"{task}, {row.short}: failed, {score.error}")
    title = f"{task}, {row.short}: {formatting.score(score.score)}"
    if score.interval:
        title += f" ({formatting.interval(score.interval)})"
    if score.published is not None:
        title += f", published {formatting.score(score.published)}"
    low, high = (_on_scale(bound) for bound in score.interval) if score.interval else (None, None)
    published = None if score.published is None else _on_scale(score.published)
    return ScoreBar(row, _on_scale(score.score), low, high, published, formatting.score(score.score, 1), title)


def _on_scale(score: float) -> float:
    return min(100.0, max(0.0, score))


def speed_scatter(story: ReportModel, *, beside: bool = False) -> list[Scatter]:
    """Mean score against texts per second, wide and narrow; nothing if fewer than two models have both."""
    points = [
        ScatterPoint(row.short, row.model.cost.texts_per_second, row.mean, row.index, row.short)
        for row in story.rows
        if row.mean is not None and row.model.cost.texts_per_second
    ]
    tasks = formatting.plural(len(story.common), "task")
    return scatters(points, "texts per second, here", f"mean of {tasks}", beside=beside) if len(points) > 1 else []


def size_scatter(story: ReportModel) -> list[Scatter]:
    """Mean score against parameters, with other people's models for context; nothing without them."""
    if not story.published:
        return []
    theirs = sorted((m for m in story.published if m.parameters), key=lambda m: (m.parameters or 0, -m.mean))
    points = [
        ScatterPoint(row.short, row.model.cost.parameters, story.placed[row.model.name], row.index, row.short)
        for row in story.rows
        if row.model.name in story.placed and row.model.cost.parameters
    ]
    best = -math.inf
    for model in shown(theirs, [point.y for point in points]):
        # A label for the best of its size: those that a reader would look for.
        label = formatting.short_names([model.name])[model.name] if model.mean > best else ""
        best = max(best, model.mean)
        points.append(ScatterPoint(model.name, model.parameters or 0, model.mean, None, label))
    tasks = formatting.plural(len(story.published_tasks), "task")
    return scatters(points, "parameters", f"mean of {tasks}", beside=True)


def shown(others: Sequence[PublishedModel], ours: Sequence[float]) -> list[PublishedModel]:
    """The published models that have a known size and do not lie so far below all else as to flatten the chart."""
    sized = [model for model in others if model.parameters]
    means = sorted(model.mean for model in sized)
    floor = min([*ours, *means[len(means) // 10 :][:1]], default=0.0) - _TOLERATED
    return [model for model in sized if model.mean >= floor]
