"""Usage day by day as stacked bars, drawn on the server."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta

from unmask.accounts.money import format_dollars
from unmask.accounts.usage import Used
from unmask.evaluate.report import formatting

COLOURS = 5  # series with a colour of their own; what is less goes together
OTHERS = "everything else"

_HEIGHT, _TOP, _BOTTOM = 220.0, 12.0, 26.0
_CHARACTER = 7.4  # width of a digit in the charts' text
_STEPS = (1, 2, 7, 14, 31)  # days in a bar


@dataclass(frozen=True)
class Bar:
    """A piece of a bar. `title` tells the exact figure."""

    x: float
    y: float
    width: float
    height: float
    colour: int
    title: str


@dataclass(frozen=True)
class Mark:
    """A tick of an axis."""

    at: float
    label: str


@dataclass(frozen=True)
class Bars:
    """A drawing, for screens that are wide or not."""

    wide: bool
    width: float
    height: float
    left: float
    bottom: float
    bars: list[Bar]
    days: list[Mark]
    values: list[Mark]


@dataclass(frozen=True)
class Chart:
    """Both drawings, and what the colours stand for. There is none without usage."""

    drawings: list[Bars]
    legend: list[tuple[int, str]]
    step: int


def usage_chart(
    rows: Sequence[Used],
    first: date,
    last: date,
    what: str,
    series: Callable[[Used], str],
) -> Chart | None:
    """Bars for rows that were grouped by day and by one thing more.

    Args:
        first, last: days that the chart covers, both included.
        what: "cost", "tokens" or "requests".
        series: what a row counts as.
    """
    sums: dict[str, int] = {}
    for row in rows:
        sums[series(row)] = sums.get(series(row), 0) + getattr(row, what)
    ranked = sorted((name for name in sums if sums[name]), key=lambda name: (-sums[name], name))
    if not ranked:
        return None
    colours = {name: min(at, COLOURS) for at, name in enumerate(ranked)}
    legend = [(at, name) for at, name in enumerate(ranked[:COLOURS])]
    if len(ranked) > COLOURS:
        legend.append((COLOURS, OTHERS))
    values: dict[tuple[date, int], int] = {}
    for row in rows:
        value = getattr(row, what)
        if value and row.day is not None:
            place = row.day, colours[series(row)]
            values[place] = values.get(place, 0) + value
    names = dict(legend)
    drawings = [_drawn(values, names, first, last, what, wide) for wide in (True, False)]
    return Chart(drawings, legend, _step(first, last, most=62))


def shown(what: str, value: int) -> str:
    """A figure with its unit, exactly."""
    return f"${format_dollars(value)}" if what == "cost" else f"{value:,} {what}"


def _drawn(
    values: Mapping[tuple[date, int], int], names: Mapping[int, str], first: date, last: date, what: str, wide: bool
) -> Bars:
    step = _step(first, last, most=62 if wide else 31)
    bins = math.ceil(((last - first).days + 1) / step)
    stacks: list[dict[int, int]] = [{} for _ in range(bins)]
    for (day, colour), value in values.items():
        stack = stacks[(day - first).days // step]
        stack[colour] = stack.get(colour, 0) + value
    ticks = _ticks(max(sum(stack.values()) for stack in stacks))
    labels = [_axis(what, tick) for tick in ticks]
    width = 960.0 if wide else 360.0
    left = max(map(len, labels)) * _CHARACTER + 10
    slot = (width - left) / bins
    floor = _HEIGHT - _BOTTOM
    scale = (floor - _TOP) / ticks[-1]
    gap = min(4.0, slot * 0.2)
    bars = []
    for at, stack in enumerate(stacks):
        y = floor
        for colour in sorted(stack):
            height = stack[colour] * scale
            y -= height
            title = f"{_days(first + timedelta(at * step), step, last)}: {shown(what, stack[colour])}, {names[colour]}"
            bars.append(Bar(left + at * slot + gap / 2, y, slot - gap, height, colour, title))
    return Bars(
        wide,
        width,
        _HEIGHT,
        left,
        floor,
        bars,
        _dates(first, step, bins, left, slot, room=90 if wide else 80),
        [Mark(floor - tick * scale, label) for tick, label in zip(ticks, labels, strict=True)],
    )


def _step(first: date, last: date, most: int) -> int:
    days = (last - first).days + 1
    return next((step for step in _STEPS if days <= step * most), _STEPS[-1])


def _ticks(most: int) -> list[int]:
    """Round values from nothing to above the most, four or five of them."""
    rough = max(1.0, most / 4)
    power = 10 ** math.floor(math.log10(rough))
    step = max(1, int(next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)))
    return [step * at for at in range(math.ceil(most / step) + 1)]


def _axis(what: str, value: int) -> str:
    if what != "cost":
        return formatting.magnitude(value) if value else "0"
    return f"${format_dollars(value)}" if value else "$0"


def _dates(first: date, step: int, bins: int, left: float, slot: float, room: float) -> list[Mark]:
    """Dates below the bars, as many as have room; the last one is far enough from the edge to be whole."""
    every = max(1, math.ceil(room / slot))
    days = [(at, first + timedelta(at * step)) for at in range(0, bins, every)]
    half = room * 0.35
    right = left + bins * slot
    marks = [Mark(left + (at + 0.5) * slot, f"{day.day} {day:%b}") for at, day in days]
    return [Mark(max(mark.at, left + half * 0.6), mark.label) for mark in marks if mark.at + half * 0.6 <= right]


def _days(day: date, step: int, last: date) -> str:
    end = min(last, day + timedelta(step - 1))
    return f"{day.day} {day:%b %Y}" if end == day else f"{day.day} {day:%b} to {end.day} {end:%b %Y}"
