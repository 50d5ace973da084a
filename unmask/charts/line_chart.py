"""Line charts: paths, points and ticks in pixels. `templates/line_chart.svg.j2` draws them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from unmask.charts import formatting

WIDTH, HEIGHT = 520, 236
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 12, 48


@dataclass(frozen=True)
class LineSeries:
    """Data of one line.

    Attributes:
        name: for the legend.
        points: (x in pixels, value, text that stands before the value in the point's title).
    """

    name: str
    points: Sequence[tuple[float, float, str]]


@dataclass(frozen=True)
class PlacedLine:
    """One line: its name, the number of its colour, the SVG path, and its points as (x, y, title)."""

    name: str
    colour: int
    path: str
    points: list[tuple[float, float, str]]


@dataclass(frozen=True)
class LineChart:
    """Geometry of a chart for the template: lines, and ticks as (place, text)."""

    title: str
    label: str
    lines: list[PlacedLine]
    x_ticks: Sequence[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    x_name: str
    width: int = WIDTH
    height: int = HEIGHT
    left: int = _LEFT
    right: int = WIDTH - _RIGHT
    bottom: int = HEIGHT - _BOTTOM


def line_chart(
    title: str,
    label: str,
    series: Sequence[LineSeries],
    unit: str,
    *,
    x_name: str,
    x_ticks: Sequence[tuple[float, str]],
) -> LineChart:
    """Lay out lines on a y axis from 0 to a round number above all values.

    Args:
        title: stands above the chart.
        label: describes the chart for a screen reader.
        series: one for each line, in the order of their colours.
        unit: follows each value in the titles of the points.
        x_name: stands below the x axis.
        x_ticks: (x in pixels, text).
    """
    height, y_ticks = _y_scale([value for line in series for _, value, _ in line.points])
    lines = []
    for colour, line in enumerate(series):
        points = [(x, height(value), f"{text}: {_with_unit(value, unit)}") for x, value, text in line.points]
        lines.append(PlacedLine(line.name, colour, _path(points), points))
    return LineChart(title, label, lines, x_ticks, y_ticks, x_name)


def x_of_category(index: int, count: int) -> float:
    """Return x, in pixels, of one of `count` categories that share the width evenly."""
    inner = WIDTH - _LEFT - _RIGHT
    return round(_LEFT + inner * (index + 0.5) / count, 1)


def x_of_share(share: float) -> float:
    """Return x, in pixels, of a place given as a share of the width, from 0 to 1."""
    return round(_LEFT + share * (WIDTH - _LEFT - _RIGHT), 1)


def _path(points: Sequence[tuple[float, float, str]]) -> str:
    return "M" + "L".join(f"{x:g} {y:g}" for x, y, _ in points) if points else ""


def _y_scale(values: Sequence[float]) -> tuple[Callable[[float], float], list[tuple[float, str]]]:
    """Return the function from a value to y, in pixels, and the ticks."""
    most = max(values, default=0) or 1.0
    step = 10 ** math.floor(math.log10(most / 2))
    step *= next(factor for factor in (1, 2, 5, 10) if most / (step * factor) <= 4)
    top = step * math.ceil(most / step - 1e-9)
    inner = HEIGHT - _TOP - _BOTTOM

    def height(value: float) -> float:
        return round(HEIGHT - _BOTTOM - inner * value / top, 1)

    ticks = [(height(step * n), _tick_text(step * n)) for n in range(round(top / step) + 1)]
    return height, ticks


def _tick_text(value: float) -> str:
    return formatting.magnitude(value) if value >= 1000 else f"{value:g}"


def _with_unit(value: float, unit: str) -> str:
    return f"{value:,.0f} {unit}" if value >= 10 else f"{value:.2g} {unit}"
