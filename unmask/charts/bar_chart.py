"""Stacked bars over days: every bar, label and tick in pixels. `templates/bar_chart.svg.j2` draws them."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date, timedelta

COLOURS = 5  # series with a colour of their own; the smaller ones share one more
OTHERS = "everything else"

_WIDE, _NARROW = 960.0, 360.0
_HEIGHT, _TOP, _BOTTOM = 220.0, 12.0, 26.0
_CHARACTER = 7.4  # width of a digit in the charts' text
_STEPS = (1, 2, 7, 14, 31)  # days in a bar


@dataclass(frozen=True)
class BarSegment:
    """One series' part of a bar. `title` has the exact value."""

    x: float
    y: float
    width: float
    height: float
    colour: int
    title: str


@dataclass(frozen=True)
class AxisMark:
    """A tick of an axis."""

    at: float
    label: str


@dataclass(frozen=True)
class BarDrawing:
    """The chart laid out for wide or for narrow screens."""

    wide: bool
    width: float
    height: float
    left: float
    bottom: float
    bars: list[BarSegment]
    days: list[AxisMark]
    values: list[AxisMark]


@dataclass(frozen=True)
class BarChart:
    """Both drawings, and the legend as (colour, name)."""

    drawings: list[BarDrawing]
    legend: list[tuple[int, str]]


@dataclass(frozen=True)
class BarData:
    """Values by day and series.

    Attributes:
        values: (day, series) -> value.
        first, last: days that the chart covers, both included.
        tick: writes a value beside the axis.
        exact: writes a value in the title of a bar.
    """

    values: Mapping[tuple[date, str], int]
    first: date
    last: date
    tick: Callable[[int], str]
    exact: Callable[[int], str]


def bar_chart(data: BarData) -> BarChart | None:
    """Stack the series of each day, the largest series at the bottom. None where no value is above 0."""
    sums: dict[str, int] = {}
    for (_, series), value in data.values.items():
        sums[series] = sums.get(series, 0) + value
    ranked = sorted((name for name in sums if sums[name]), key=lambda name: (-sums[name], name))
    if not ranked:
        return None
    colours = {name: min(rank, COLOURS) for rank, name in enumerate(ranked)}
    legend = [(rank, name) for rank, name in enumerate(ranked[:COLOURS])]
    if len(ranked) > COLOURS:
        legend.append((COLOURS, OTHERS))
    by_colour: dict[tuple[date, int], int] = {}
    for (day, series), value in data.values.items():
        if value:
            place = day, colours[series]
            by_colour[place] = by_colour.get(place, 0) + value
    names = dict(legend)
    return BarChart([_drawing(data, by_colour, names, wide) for wide in (True, False)], legend)


def _drawing(
    data: BarData, by_colour: Mapping[tuple[date, int], int], names: Mapping[int, str], wide: bool
) -> BarDrawing:
    step = _days_per_bar(data.first, data.last, most=62 if wide else 31)
    bins = math.ceil(((data.last - data.first).days + 1) / step)
    stacks: list[dict[int, int]] = [{} for _ in range(bins)]
    for (day, colour), value in by_colour.items():
        stack = stacks[(day - data.first).days // step]
        stack[colour] = stack.get(colour, 0) + value
    ticks = _ticks(max(sum(stack.values()) for stack in stacks))
    labels = [data.tick(tick) for tick in ticks]
    width = _WIDE if wide else _NARROW
    left = max(map(len, labels)) * _CHARACTER + 10
    slot = (width - left) / bins
    floor = _HEIGHT - _BOTTOM
    scale = (floor - _TOP) / ticks[-1]
    gap = min(4.0, slot * 0.2)
    bars = []
    for at, stack in enumerate(stacks):
        y = floor
        days = _days(data.first + timedelta(at * step), step, data.last)
        for colour in sorted(stack):
            height = stack[colour] * scale
            y -= height
            title = f"{days}: {data.exact(stack[colour])}, {names[colour]}"
            bars.append(BarSegment(left + at * slot + gap / 2, y, slot - gap, height, colour, title))
    return BarDrawing(
        wide,
        width,
        _HEIGHT,
        left,
        floor,
        bars,
        _date_marks(data.first, step, bins, left, slot, room=90 if wide else 80),
        [AxisMark(floor - tick * scale, label) for tick, label in zip(ticks, labels, strict=True)],
    )


def _days_per_bar(first: date, last: date, most: int) -> int:
    days = (last - first).days + 1
    return next((step for step in _STEPS if days <= step * most), _STEPS[-1])


def _ticks(most: int) -> list[int]:
    """Return four or five round values from 0 to at least `most`."""
    rough = max(1.0, most / 4)
    power = 10 ** math.floor(math.log10(rough))
    step = max(1, int(next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)))
    return [step * at for at in range(math.ceil(most / step) + 1)]


def _date_marks(first: date, step: int, bins: int, left: float, slot: float, room: float) -> list[AxisMark]:
    """Place dates below the bars, as many as have room, and none so near the right edge that it would be cut."""
    every = max(1, math.ceil(room / slot))
    days = [(at, first + timedelta(at * step)) for at in range(0, bins, every)]
    half = room * 0.35
    right = left + bins * slot
    marks = [AxisMark(left + (at + 0.5) * slot, f"{day.day} {day:%b}") for at, day in days]
    return [AxisMark(max(mark.at, left + half * 0.6), mark.label) for mark in marks if mark.at + half * 0.6 <= right]


def _days(day: date, step: int, last: date) -> str:
    end = min(last, day + timedelta(step - 1))
    return f"{day.day} {day:%b %Y}" if end == day else f"{day.day} {day:%b} to {end.day} {end:%b %Y}"
