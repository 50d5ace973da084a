"""The two charts of the list of models: quality against speed, and quality against size."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from unmask.catalogue.measurement import Measurement
from unmask.charts.scatter import Scatter, ScatterPoint, scatters
from unmask.web.catalogue.model_view import ModelView

# Colour numbers by display status; all other statuses have _SOON.
_COLOURS = {"live": 0, "deprecated": 0, "reference": 2}
_SOON = 1

# A chart shows the best models only, and names the best of those: with more it cannot be read.
_MAX_POINTS, _MAX_NAMES = 60, 10


@dataclass(frozen=True)
class QualityChart:
    """A scatter chart of models.

    Attributes:
        drawings: for wide and for narrow screens; empty if fewer than two models have both values.
        drawn: number of models in the chart.
        missing: number of models that lack a value.
        beyond: number of models that have both values and are not among the best.
        example: a measurement of the run whose speeds are drawn.
    """

    drawings: list[Scatter]
    drawn: int
    missing: int
    beyond: int = 0
    example: Measurement | None = None


def quality_and_speed(models: Sequence[ModelView]) -> QualityChart:
    """Draw the mean of the suite local against texts per second.

    Speeds of two machines do not belong on one axis. Only the run that measured the most models is drawn.
    """
    timed = [view for view in models if view.figures.local is not None and view.figures.texts_per_second]
    runs = Counter(_run(view) for view in timed)
    largest_run = max(runs, key=lambda run: runs[run], default=None)
    selected = [view for view in timed if _run(view) == largest_run]
    points = [
        ScatterPoint(
            view.record.id, m.value, view.figures.local or 0, _colour(view), view.record.name or view.record.id
        )
        for view in selected
        if (m := view.figures.texts_per_second)
    ]
    example = selected[0].figures.texts_per_second if selected else None
    return _chart(points, "texts per second, one run", "mean of 14 tasks, measured here", len(models), example)


def quality_and_size(models: Sequence[ModelView]) -> QualityChart:
    """Draw the mean of MTEB's 56 English tasks against the number of parameters."""
    points = [
        ScatterPoint(view.record.id, view.record.parameters, view.figures.mteb, _colour(view), _short_name(view))
        for view in models
        if view.figures.mteb is not None and view.record.parameters
    ]
    return _chart(points, "parameters", "mean of MTEB's 56 tasks", len(models), None)


def _colour(view: ModelView) -> int:
    return _COLOURS.get(view.display_status, _SOON)


def _chart(
    points: list[ScatterPoint], x_label: str, y_label: str, total: int, example: Measurement | None
) -> QualityChart:
    best = sorted(points, key=lambda point: -point.y)[:_MAX_POINTS]
    # Points without a name become grey dots: placing names clear of 60 coloured points would be too slow for a page.
    drawn = tuple(p if rank < _MAX_NAMES else replace(p, label="", index=None) for rank, p in enumerate(best))
    drawings = _drawings(drawn, x_label, y_label) if len(drawn) > 1 else []
    return QualityChart(drawings, len(drawn), total - len(points), len(points) - len(drawn), example)


@lru_cache(maxsize=64)
def _drawings(points: tuple[ScatterPoint, ...], x_label: str, y_label: str) -> list[Scatter]:
    return scatters(points, x_label, y_label, beside=True)


def _run(view: ModelView) -> tuple[object, ...]:
    """Return a key of the run that measured the model's speed: machine, command, day and author."""
    measurement = view.figures.texts_per_second
    assert measurement
    return measurement.hardware, measurement.command, measurement.on, measurement.by


def _short_name(view: ModelView) -> str:
    """Shorten the name so that it fits beside a point."""
    name = (view.record.name or view.record.id).removeprefix("LLM2Vec ")
    return name.replace("Instruct ", "").replace(" Instruct", "").replace(", supervised", ", sup.")
