"""Usage by day as a chart of stacked bars."""

from collections.abc import Callable, Mapping, Sequence
from datetime import date

from unmask.accounts.money import format_dollars
from unmask.accounts.usage import UsageGroup
from unmask.charts import formatting
from unmask.charts.bar_chart import BarChart, BarData, bar_chart


def usage_chart(
    rows: Sequence[UsageGroup], first: date, last: date, measure: str, series: Callable[[UsageGroup], str]
) -> BarChart | None:
    """Draw rows of usage that were grouped by day and by one thing more. None without usage.

    Args:
        rows: usage by day.
        first, last: days that the chart covers, both included.
        measure: "cost", "tokens" or "requests".
        series: returns the name of the series to which a row belongs.
    """
    values: dict[tuple[date, str], int] = {}
    for row in rows:
        if row.day is not None:
            place = row.day, series(row)
            values[place] = values.get(place, 0) + getattr(row, measure)
    if measure == "cost":
        return dollar_chart(values, first, last)
    return bar_chart(BarData(values, first, last, _count_tick, lambda value: f"{value:,} {measure}"))


def dollar_chart(values: Mapping[tuple[date, str], int], first: date, last: date) -> BarChart | None:
    """Draw amounts by day. None without any.

    Args:
        values: day and name of the series -> nano-dollars.
        first, last: days that the chart covers, both included.
    """
    return bar_chart(BarData(values, first, last, _dollar_tick, lambda value: f"${format_dollars(value)}"))


def _dollar_tick(value: int) -> str:
    return f"${format_dollars(value)}" if value else "$0"


def _count_tick(value: int) -> str:
    return formatting.magnitude(value) if value else "0"
