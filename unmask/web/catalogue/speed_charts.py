"""Two charts of a model's page: how fast it was measured to be, and how fast it has been here."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from unmask.api.traffic import STRETCH_S, Stretch
from unmask.catalogue.speed import Point
from unmask.evaluate.report import formatting

WIDTH, HEIGHT = 520, 236
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 12, 48


@dataclass(frozen=True)
class Line:
    """One line: its name, its colour's number, the path, and its points as (x, y, what it says)."""

    name: str
    colour: int
    path: str
    points: list[tuple[float, float, str]]


@dataclass(frozen=True)
class Chart:
    """Geometry for a template: lines, and ticks as (place, text)."""

    title: str
    label: str
    lines: list[Line]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    x_name: str
    width: int = WIDTH
    height: int = HEIGHT
    left: int = _LEFT
    right: int = WIDTH - _RIGHT
    bottom: int = HEIGHT - _BOTTOM


def sweep_charts(points: Sequence[Point]) -> list[Chart]:
    """Throughput and latency by callers at once, a line for each length of text."""
    if not points:
        return []
    lengths = sorted({point.tokens for point in points})
    callers = sorted({point.callers for point in points})
    places = {count: _spread(at, len(callers)) for at, count in enumerate(callers)}
    ticks = [(places[count], str(count)) for count in callers]

    def drawn(title: str, value: Callable[[Point], float], unit: str) -> Chart:
        height, y_ticks = _scale([value(point) for point in points], unit)
        lines = [
            _line(
                f"{length} tokens",
                colour,
                [
                    (
                        places[p.callers],
                        height(value(p)),
                        f"{length} tokens, {p.callers} at once: {_said(value(p), unit)}",
                    )
                    for p in points
                    if p.tokens == length
                ],
            )
            for colour, length in enumerate(lengths)
        ]
        label = f"{title} by callers at once, for texts of {formatting.listed([str(n) for n in lengths])} tokens"
        return Chart(title, label, lines, ticks, y_ticks, "callers at once")

    return [
        drawn("Throughput, tokens per second", lambda point: point.tokens_per_second, "tokens/s"),
        drawn("Median latency, milliseconds", lambda point: point.median_ms, "ms"),
    ]


def history_charts(stretches: Sequence[Stretch]) -> list[Chart]:
    """Throughput and latency of what a model has answered here, over the last day."""
    if not stretches:
        return []
    first, last = stretches[0].began, stretches[-1].began
    span = max(last - first, STRETCH_S)

    def place(began: int) -> float:
        share = 0.5 if first == last else (began - first) / span
        return round(_LEFT + share * (WIDTH - _LEFT - _RIGHT), 1)

    ends = [stretches[0]] if first == last else [stretches[0], stretches[-1]]
    ticks = [(place(stretch.began), _clock(stretch.began)) for stretch in ends]

    def drawn(title: str, series: Sequence[tuple[str, Callable[[Stretch], float]]], unit: str) -> Chart:
        height, y_ticks = _scale([value(stretch) for _, value in series for stretch in stretches], unit)
        lines = [
            _line(
                name,
                colour,
                [
                    (place(s.began), height(value(s)), f"{_clock(s.began)}, {name}: {_said(value(s), unit)}")
                    for s in stretches
                ],
            )
            for colour, (name, value) in enumerate(series)
        ]
        return Chart(title, f"{title}, over the last day", lines, ticks, y_ticks, "UTC, by five minutes")

    return [
        drawn("Tokens answered per second", [("tokens", lambda s: s.tokens / STRETCH_S)], "tokens/s"),
        drawn(
            "Latency, milliseconds",
            [("median", lambda s: s.latency_ms(0.5)), ("95 %", lambda s: s.latency_ms(0.95))],
            "ms",
        ),
    ]


def _line(name: str, colour: int, points: list[tuple[float, float, str]]) -> Line:
    path = "M" + "L".join(f"{x:g} {y:g}" for x, y, _ in points) if points else ""
    return Line(name, colour, path, points)


def _spread(at: int, count: int) -> float:
    inner = WIDTH - _LEFT - _RIGHT
    return round(_LEFT + inner * (at + 0.5) / count, 1)


def _scale(values: Sequence[float], unit: str) -> tuple[Callable[[float], float], list[tuple[float, str]]]:
    """From nothing to a round number above all values."""
    most = max(values, default=0) or 1.0
    step = 10 ** math.floor(math.log10(most / 2))
    step *= next(factor for factor in (1, 2, 5, 10) if most / (step * factor) <= 4)
    top = step * math.ceil(most / step - 1e-9)
    inner = HEIGHT - _TOP - _BOTTOM

    def height(value: float) -> float:
        return round(HEIGHT - _BOTTOM - inner * value / top, 1)

    ticks = [(height(step * n), _brief(step * n)) for n in range(round(top / step) + 1)]
    return height, ticks


def _brief(value: float) -> str:
    return formatting.magnitude(value) if value >= 1000 else f"{value:g}"


def _said(value: float, unit: str) -> str:
    return f"{value:,.0f} {unit}" if value >= 10 else f"{value:.2g} {unit}"


def _clock(began: int) -> str:
    return datetime.fromtimestamp(began, UTC).strftime("%H:%M")
