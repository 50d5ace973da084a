"""The two charts of the list: quality against speed, and quality against size."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from unmask.catalogue.measurement import Measurement
from unmask.charts.scatter import Scatter, ScatterPoint, scatters
from unmask.web.catalogue.model_view import Shown, source_key

# Colours by what a visitor can do with the model.
_COLOURS = {"live": 0, "deprecated": 0, "reference": 2}
_SOON = 1

# Beyond these a chart says nothing more: the best are drawn, and the best of those have their names.
_DRAWN, _NAMED = 60, 10


@dataclass(frozen=True)
class Plot:
    """A chart. `missing` models lack a value for it; `beyond` have one, but are not among the best."""

    drawings: list[Scatter]
    drawn: int
    missing: int
    beyond: int = 0
    example: Measurement | None = None


def quality_and_speed(models: Sequence[Shown]) -> Plot:
    """The mean of the suite local against texts per second, of models that were timed in one run.

    Speeds of two machines do not belong on one axis, so the run with the most models is drawn.
    """
    timed = [shown for shown in models if shown.figures.local is not None and shown.figures.texts_per_second]
    runs = Counter(_run(shown) for shown in timed)
    best = max(runs, key=lambda run: runs[run], default=None)
    chosen = [shown for shown in timed if _run(shown) == best]
    points = [
        ScatterPoint(
            shown.record.id, m.value, shown.figures.local or 0, colour(shown), shown.record.name or shown.record.id
        )
        for shown in chosen
        if (m := shown.figures.texts_per_second)
    ]
    example = chosen[0].figures.texts_per_second if chosen else None
    return _plot(points, "texts per second, one run", "mean of 14 tasks, measured here", len(models), example)


def quality_and_size(models: Sequence[Shown]) -> Plot:
    """The mean of MTEB's 56 English tasks against the number of parameters."""
    points = [
        ScatterPoint(shown.record.id, shown.record.parameters, shown.figures.mteb, colour(shown), _brief(shown))
        for shown in models
        if shown.figures.mteb is not None and shown.record.parameters
    ]
    return _plot(points, "parameters", "mean of MTEB's 56 tasks", len(models), None)


def colour(shown: Shown) -> int:
    return _COLOURS.get(shown.standing, _SOON)


def _plot(points: list[ScatterPoint], x: str, y: str, total: int, example: Measurement | None) -> Plot:
    best = sorted(points, key=lambda point: -point.y)[:_DRAWN]
    # Those without a name are dots: keeping names clear of sixty coloured points takes longer than a page may.
    named = tuple(p if at < _NAMED else replace(p, label="", index=None) for at, p in enumerate(best))
    drawings = _laid_out(named, x, y) if len(named) > 1 else []
    return Plot(drawings, len(named), total - len(points), len(points) - len(named), example)


@lru_cache(maxsize=64)
def _laid_out(points: tuple[ScatterPoint, ...], x: str, y: str) -> list[Scatter]:
    return scatters(points, x, y, beside=True)


def _run(shown: Shown) -> tuple[object, ...]:
    measurement = shown.figures.texts_per_second
    assert measurement
    hardware, command, on = measurement.hardware, measurement.command, measurement.on
    return (hardware, command, on, source_key(measurement)[1])


def _brief(shown: Shown) -> str:
    """A name short enough to stand beside a point."""
    name = (shown.record.name or shown.record.id).removeprefix("LLM2Vec ")
    return name.replace("Instruct ", "").replace(" Instruct", "").replace(", supervised", ", sup.")
