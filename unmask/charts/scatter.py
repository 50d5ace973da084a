"""Scatter charts: the place of every point, label and tick, in pixels. `templates/scatter.svg.j2` draws them.

A drawing has to know its width to keep labels apart. Each chart is therefore laid out twice, for wide and for narrow
screens, and the page shows the one that fits.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from unmask.charts import formatting

WIDE, NARROW = 900, 350
_BESIDE = 450  # one of two charts side by side

# Pixels around the plot for the labels of the axes.
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 14, 14, 44
# Width of a character of the 13-pixel label face, rounded up so that wide fonts do not collide either.
_CHARACTER, _LINE = 7.6, 16
_RADIUS = 6.5

Anchor = Literal["start", "end", "middle"]
Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Tick:
    """A tick of an axis; `at` is in pixels."""

    at: float
    text: str


@dataclass(frozen=True)
class PlacedPoint:
    """A point with its label, in pixels. `index` is the number of its colour; None makes it a grey dot."""

    x: float
    y: float
    index: int | None
    title: str
    label: str = ""
    label_x: float = 0
    label_y: float = 0
    anchor: Anchor = "start"


@dataclass(frozen=True)
class Scatter:
    """A scatter chart laid out for one width, in pixels."""

    width: int
    height: int
    plot: Box
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    x_label: str
    y_label: str
    marks: list[PlacedPoint]
    title: str


@dataclass(frozen=True)
class ScatterPoint:
    """A point of the data. Without an `index` it is a grey dot, whose label is left out where there is no room."""

    name: str
    x: float
    y: float
    index: int | None = None
    label: str = ""


def scatters(points: Sequence[ScatterPoint], x_label: str, y_label: str, *, beside: bool) -> list[Scatter]:
    """Lay out points on a logarithmic x axis, for wide and for narrow screens.

    Args:
        points: at least one, with `x` above 0.
        x_label, y_label: titles of the axes; the text of `x_label` before its first comma is the unit.
        beside: the wide drawing shares its row with another one.
    """
    wide = (_BESIDE, 380) if beside else (WIDE, 380)
    return [_scatter(points, x_label, y_label, *size) for size in (wide, (NARROW, 360))]


def _scatter(points: Sequence[ScatterPoint], x_label: str, y_label: str, width: int, height: int) -> Scatter:
    left, top, right, bottom = _LEFT, _TOP, width - _RIGHT, height - _BOTTOM
    x_low, x_high = _padded([math.log10(point.x) for point in points], 0.12, 0.3)
    y_low, y_high = _padded([point.y for point in points], 0.12, 1.0)

    def place_x(value: float) -> float:
        return left + (math.log10(value) - x_low) / (x_high - x_low) * (right - left)

    def place_y(value: float) -> float:
        return bottom - (value - y_low) / (y_high - y_low) * (bottom - top)

    spots = [(place_x(point.x), place_y(point.y)) for point in points]
    coloured = [index for index, point in enumerate(points) if point.index is not None]
    taken = [_box(*spots[index], _RADIUS) for index in coloured]
    grey = [_box(*spot, 3) for index, spot in enumerate(spots) if points[index].index is None]
    marks: dict[int, PlacedPoint] = {}
    # Coloured points first: their labels are always drawn. Grey points get a label only where there is room.
    for index in [*coloured, *(i for i, point in enumerate(points) if point.index is None)]:
        point, (x, y) = points[index], spots[index]
        title = f"{point.name}: {formatting.score(point.y)}, {formatting.magnitude(point.x)} {x_label.split(',')[0]}"
        mark = PlacedPoint(x, y, point.index, title)
        if point.label:
            label = formatting.shortened(point.label, 30 if width > NARROW else 22)
            mark = _place_label(mark, label, taken, grey if point.index is None else [], (left, top, right, bottom))
        marks[index] = mark
    ordered = sorted(marks.items(), key=lambda item: points[item[0]].index is not None)  # coloured points on top
    return Scatter(
        width=width,
        height=height,
        plot=(left, top, right, bottom),
        x_ticks=[Tick(place_x(value), _tick(value)) for value in _log_ticks(x_low, x_high)],
        y_ticks=[Tick(place_y(value), f"{value:g}") for value in _linear_ticks(y_low, y_high)],
        x_label=x_label,
        y_label=y_label,
        marks=[mark for _, mark in ordered],
        title=f"{y_label} against {x_label}",
    )


def _place_label(mark: PlacedPoint, label: str, taken: list[Box], others: list[Box], plot: Box) -> PlacedPoint:
    """Place the label right, left, above or below its point, where it overlaps least.

    Args:
        mark: the point.
        label: its text.
        taken: boxes of points and labels placed before; the new label's box is appended.
        others: further boxes to keep clear.
        plot: area of the plot.

    Returns:
        The point with its label; without it if the point is grey and the label overlaps everywhere.
    """
    wide = len(label) * _CHARACTER * (0.85 if mark.index is None else 1)
    best: tuple[float, PlacedPoint, Box] | None = None
    gap = _RADIUS + 5
    # A grey label has no colour that ties it to its point, so it must stand right beside it.
    for distance in (0,) if mark.index is None else (0, _LINE, 2 * _LINE):
        places: list[tuple[float, float, Anchor]] = [
            (mark.x + gap, mark.y - distance, "start"),
            (mark.x - gap, mark.y - distance, "end"),
            (mark.x, mark.y - gap - 3 - distance, "middle"),
            (mark.x, mark.y + gap + 8 + distance, "middle"),
            (mark.x + gap, mark.y + distance, "start"),
            (mark.x - gap, mark.y + distance, "end"),
        ]
        for x, y, anchor in places:
            start = x - {"start": 0.0, "end": wide, "middle": wide / 2}[anchor]
            # A label that would be cut off at the edge is moved back into the plot.
            shift = max(0, plot[0] + 4 - start) - max(0, start + wide - plot[2] + 2)
            if shift and anchor != "middle":
                continue
            box = (start + shift, y - _LINE / 2, start + shift + wide, y + _LINE / 2)
            outside = max(0, plot[1] - box[1]) + max(0, box[3] - plot[3])
            cost = sum(_overlap(box, other) for other in (*taken, *others)) + 50 * outside
            placed = PlacedPoint(mark.x, mark.y, mark.index, mark.title, label, x + shift, y, anchor)
            if best is None or cost < best[0]:
                best = (cost, placed, box)
    if best is None or (mark.index is None and best[0] > 0):
        return mark
    taken.append(best[2])
    return best[1]


def _box(x: float, y: float, radius: float) -> Box:
    return x - radius, y - radius, x + radius, y + radius


def _overlap(one: Box, two: Box) -> float:
    return max(0, min(one[2], two[2]) - max(one[0], two[0])) * max(0, min(one[3], two[3]) - max(one[1], two[1]))


def _padded(values: Sequence[float], share: float, least: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    pad = max((high - low) * share, least)
    return low - pad, high + pad


def _linear_ticks(low: float, high: float) -> list[float]:
    step = next(s for s in (0.5, 1, 2, 5, 10, 20, 50, 100) if (high - low) / s <= 6)
    return [step * index for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Return powers of ten, with 2 and 5 times each of them on a short axis."""
    between = (1,) if high - low > 2.2 else (1, 3) if high - low > 1.4 else (1, 2, 5)
    values = [m * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for m in between]
    return [value for value in values if low <= math.log10(value) <= high]


def _tick(value: float) -> str:
    return f"{value:,g}" if value < 10_000 else formatting.magnitude(value).replace(".0", "")
