"""Points of a sweep of speeds, and their conversion to measurements and back."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from unmask.catalogue.measurement import SPEED, Measurement

_WHAT = re.compile(r"(?P<value>.+), (?P<tokens>\d+) tokens, (?P<callers>\d+) at once")

THROUGHPUT, MEDIAN, SLOW = "tokens per second", "latency, median", "latency, 95th percentile"
_UNITS = {THROUGHPUT: "tokens/s", MEDIAN: "ms", SLOW: "ms"}


@dataclass(frozen=True)
class SpeedPoint:
    """Throughput and latency for a number of concurrent callers, each with one text of some tokens at a time."""

    tokens: int
    callers: int
    tokens_per_second: float
    median_ms: float
    slow_ms: float


def measurements_of_sweep(points: Sequence[SpeedPoint], **shared: object) -> list[Measurement]:
    """Convert points to measurements, three for each point.

    Args:
        shared: the other fields of the measurements.
    """
    measurements = []
    for point in points:
        values = {THROUGHPUT: point.tokens_per_second, MEDIAN: point.median_ms, SLOW: point.slow_ms}
        measurements += [
            Measurement(
                group=SPEED,
                what=f"{name}, {point.tokens} tokens, {point.callers} at once",
                value=round(value, 2),
                unit=_UNITS[name],
                **shared,  # pyright: ignore[reportArgumentType] - the caller's fields are a measurement's
            )
            for name, value in values.items()
        ]
    return measurements


def points_of(measurements: Sequence[Measurement]) -> list[SpeedPoint]:
    """Read the points back from measurements, by length and then by callers. Incomplete points are left out."""
    values: dict[tuple[int, int], dict[str, float]] = {}
    for measurement in measurements:
        if match := _WHAT.fullmatch(measurement.what):
            place = int(match["tokens"]), int(match["callers"])
            values.setdefault(place, {})[match["value"]] = measurement.value
    return [
        SpeedPoint(*place, point[THROUGHPUT], point[MEDIAN], point[SLOW])
        for place, point in sorted(values.items())
        if point.keys() >= _UNITS.keys()
    ]
