"""Geometry of the report's charts. `templates/charts.svg.j2` draws the bars, `unmask/charts` the scatter charts.

Bars are placed in per cent of the width, with text outside the drawing, so they are sharp and legible at any width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from unmask.charts import formatting
from unmask.charts.scatter import Scatter, ScatterPoint, scatters
from unmask.evaluate.published_scores import PublishedModel
from unmask.evaluate.report.report_model import ModelSummary, ReportModel, TaskGroup
from unmask.evaluate.results import TaskScore

# Points (0-100) that a published model may lie below the lowest of ours and the lowest tenth of the published ones.
_TOLERANCE = 8.0


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
    """The bars of one task, one per model."""

    task: str
    metric: str
    bars: list[ScoreBar]


def task_bars(group: TaskGroup) -> TaskBars:
    """Return the bars of one task, one per model, on a scale from 0 to 100."""
    bars = [_bar(group.task, entry.row, entry.score) for entry in group.entries]
    return TaskBars(group.task, formatting.metric(group.metric), bars)


def _bar(task: str, row: ModelSummary, score: TaskScore) -> ScoreBar:
    name = f"{task}, {row.short_name}"
    if score.score is None:
        return ScoreBar(row, None, None, None, score.published, "failed", f"{name}: failed, {score.error}")
    title = f"{name}: {formatting.score(score.score)}"
    if score.interval:
        title += f" ({formatting.interval(score.interval)})"
    if score.published is not None:
        title += f", published {formatting.score(score.published)}"
    low, high = (_clip(bound) for bound in score.interval) if score.interval else (None, None)
    published = None if score.published is None else _clip(score.published)
    return ScoreBar(row, _clip(score.score), low, high, published, formatting.score(score.score, 1), title)


def _clip(score: float) -> float:
    return min(100.0, max(0.0, score))


def speed_scatter(report: ReportModel, *, beside: bool = False) -> list[Scatter]:
    """Return the chart of mean score against texts per second; empty if fewer than two models have both."""
    points = [
        ScatterPoint(row.short_name, row.model.cost.texts_per_second, row.mean, row.index, row.short_name)
        for row in report.rows
        if row.mean is not None and row.model.cost.texts_per_second
    ]
    tasks = formatting.plural(len(report.common), "task")
    return scatters(points, "texts per second, here", f"mean of {tasks}", beside=beside) if len(points) > 1 else []


def size_scatter(report: ReportModel) -> list[Scatter]:
    """Return the chart of mean score against parameters, with published models; empty without these."""
    if not report.published:
        return []
    published = sorted((m for m in report.published if m.parameters), key=lambda m: (m.parameters or 0, -m.mean))
    points = [
        ScatterPoint(
            row.short_name, row.model.cost.parameters, report.own_means[row.model.name], row.index, row.short_name
        )
        for row in report.rows
        if row.model.name in report.own_means and row.model.cost.parameters
    ]
    best = -math.inf
    for model in published_in_chart(published, [point.y for point in points]):
        # Only the best model up to its size gets a label: readers look for these.
        label = formatting.short_names([model.name])[model.name] if model.mean > best else ""
        best = max(best, model.mean)
        points.append(ScatterPoint(model.name, model.parameters or 0, model.mean, None, label))
    tasks = formatting.plural(len(report.published_tasks), "task")
    return scatters(points, "parameters", f"mean of {tasks}", beside=True)


def published_in_chart(published: Sequence[PublishedModel], own_means: Sequence[float]) -> list[PublishedModel]:
    """Return the published models with a known size, without those so far below all others that the chart flattens."""
    sized = [model for model in published if model.parameters]
    means = sorted(model.mean for model in sized)
    floor = min([*own_means, *means[len(means) // 10 :][:1]], default=0.0) - _TOLERANCE
    return [model for model in sized if model.mean >= floor]
