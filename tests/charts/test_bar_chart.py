"""Stacked bars: heights, colours and the days of the axis."""

from datetime import date, timedelta

import pytest

from unmask.charts.bar_chart import COLOURS, OTHERS, BarChart, BarData, bar_chart

FIRST = date(2026, 1, 1)


def chart(values: dict[tuple[int, str], int], days: int = 10) -> BarChart | None:
    """Draw values by (day, series), with plain numbers as texts."""
    by_date = {(FIRST + timedelta(day), series): value for (day, series), value in values.items()}
    return bar_chart(BarData(by_date, FIRST, FIRST + timedelta(days - 1), str, str))


def test_nothing_to_draw() -> None:
    assert chart({}) is None and chart({(0, "a"): 0}) is None


def test_heights_are_in_proportion_and_stacked_on_the_axis() -> None:
    drawn = chart({(0, "a"): 30, (0, "b"): 10, (4, "a"): 20})
    assert drawn is not None
    for drawing in drawn.drawings:
        a, b, later = drawing.bars
        assert a.height == pytest.approx(3 * b.height) and later.height == pytest.approx(2 * b.height)
        assert a.y + a.height == pytest.approx(drawing.bottom) and b.y + b.height == pytest.approx(a.y)
        assert later.x > a.x == b.x
    assert [bar.title for bar in drawn.drawings[0].bars] == [
        "1 Jan 2026: 30, a",
        "1 Jan 2026: 10, b",
        "5 Jan 2026: 20, a",
    ]
    assert drawn.legend == [(0, "a"), (1, "b")]


def test_small_series_share_a_colour() -> None:
    drawn = chart({(0, f"series {n}"): 100 - n for n in range(COLOURS + 3)})
    assert drawn is not None
    assert drawn.legend[-1] == (COLOURS, OTHERS) and len(drawn.legend) == COLOURS + 1
    assert len(drawn.drawings[0].bars) == COLOURS + 1


def test_long_spans_have_several_days_in_a_bar() -> None:
    drawn = chart({(0, "a"): 1, (89, "a"): 1}, days=90)
    assert drawn is not None
    assert [bar.title for bar in drawn.drawings[0].bars] == ["1 Jan to 2 Jan 2026: 1, a", "30 Mar to 31 Mar 2026: 1, a"]
