"""Line charts of a model's page: speed as measured at onboarding, and speed of the requests answered here."""

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime

from unmask.api.traffic import INTERVAL_S, TrafficInterval
from unmask.catalogue.speed import SpeedPoint
from unmask.charts import formatting
from unmask.charts.line_chart import LineChart, LineSeries, line_chart, x_of_category, x_of_share


def sweep_charts(points: Sequence[SpeedPoint]) -> list[LineChart]:
    """Return the throughput and latency by number of concurrent callers, one line for each length of text."""
    if not points:
        return []
    lengths = sorted({point.tokens for point in points})
    callers = sorted({point.callers for point in points})
    places = {count: x_of_category(at, len(callers)) for at, count in enumerate(callers)}

    def chart(title: str, value: Callable[[SpeedPoint], float], unit: str) -> LineChart:
        series = [
            LineSeries(
                f"{length} tokens",
                [
                    (places[point.callers], value(point), f"{length} tokens, {point.callers} at once")
                    for point in points
                    if point.tokens == length
                ],
            )
            for length in lengths
        ]
        label = f"{title} by callers at once, for texts of {formatting.listed([str(n) for n in lengths])} tokens"
        ticks = [(places[count], str(count)) for count in callers]
        return line_chart(title, label, series, unit, x_name="callers at once", x_ticks=ticks)

    return [
        chart("Throughput, tokens per second", lambda point: point.tokens_per_second, "tokens/s"),
        chart("Median latency, milliseconds", lambda point: point.median_ms, "ms"),
    ]


def traffic_charts(stretches: Sequence[TrafficInterval]) -> list[LineChart]:
    """Return the throughput and latency of the requests that a model has answered here over the last day."""
    if not stretches:
        return []
    first, last = stretches[0].start, stretches[-1].start
    span = max(last - first, INTERVAL_S)

    def x_of(began: int) -> float:
        return x_of_share(0.5 if first == last else (began - first) / span)

    ends = [stretches[0]] if first == last else [stretches[0], stretches[-1]]
    ticks = [(x_of(stretch.start), _clock(stretch.start)) for stretch in ends]

    def chart(title: str, unit: str, values: Mapping[str, Callable[[TrafficInterval], float]]) -> LineChart:
        series = [
            LineSeries(name, [(x_of(s.start), value(s), f"{_clock(s.start)}, {name}") for s in stretches])
            for name, value in values.items()
        ]
        label = f"{title}, over the last day"
        return line_chart(title, label, series, unit, x_name="UTC, by five minutes", x_ticks=ticks)

    return [
        chart("Tokens answered per second", "tokens/s", {"tokens": lambda stretch: stretch.tokens / INTERVAL_S}),
        chart(
            "Latency, milliseconds",
            "ms",
            {"median": lambda stretch: stretch.latency_ms(0.5), "95 %": lambda stretch: stretch.latency_ms(0.95)},
        ),
    ]


def _clock(began: int) -> str:
    return datetime.fromtimestamp(began, UTC).strftime("%H:%M")
