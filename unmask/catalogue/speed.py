"""A sweep of speeds, length by concurrency, and how its points are kept as measurements."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from unmask.catalogue.measurement import SPEED, Measurement

_WHAT = re.compile(r"(?P<value>.+), (?P<tokens>\d+) tokens, (?P<callers>\d+) at once")

THROUGHPUT, MEDIAN, SLOW = "tokens per second", "latency, median", "latency, 95th percentile"
_UNITS = {THROUGHPUT: "tokens/s", MEDIAN: "ms", SLOW: "ms"}


@dataclass(frozen=True)
class SpeedPoint:
    """What so many callers at once get, each with one text of so many tokens at a time. Latencies in milliseconds."""

    tokens: int
    callers: int
    tokens_per_second: float
    median_ms: float
    slow_ms: float


def measurements_of_sweep(points: Sequence[SpeedPoint], **shared: object) -> list[Measurement]:
    """Three values for each point.

    Args:
        shared: the other fields of the measurements.
    """
    found = []
    for point in points:
        values = {THROUGHPUT: point.tokens_per_second, MEDIAN: point.median_ms, SLOW: point.slow_ms}
        found += [
            Measurement(
                group=SPEED,
                what=f"{name}, {point.tokens} tokens, {point.callers} at once",
                value=round(value, 2),
                unit=_UNITS[name],
                **shared,  # pyright: ignore[reportArgumentType] - the caller's fields are a measurement's
            )
            for name, value in values.items()
        ]
    return found


def points_of(measurements: Sequence[Measurement]) -> list[SpeedPoint]:
    """The points that measurements of a sweep come to, by length and then by callers; broken ones are left out."""
    values: dict[tuple[int, int], dict[str, float]] = {}
    for measurement in measurements:
        if found := _WHAT.fullmatch(measurement.what):
            place = int(found["tokens"]), int(found["callers"])
            values.setdefault(place, {})[found["value"]] = measurement.value
    return [
        SpeedPoint(*place, known[THROUGHPUT], known[MEDIAN], known[SLOW])
        for place, known in sorted(values.items())
        if known.keys() >= _UNITS.keys()
    ]
