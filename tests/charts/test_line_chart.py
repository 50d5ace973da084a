"""Line charts: the y axis, and the places of points."""

from unmask.charts.line_chart import LineSeries, line_chart, x_of_category, x_of_share


def test_points_lie_on_an_axis_from_zero_to_a_round_number() -> None:
    series = [LineSeries("a", [(100.0, 0, "none"), (200.0, 7, "some")]), LineSeries("b", [(100.0, 3.5, "half")])]
    chart = line_chart("Title", "Description", series, "ms", x_name="x", x_ticks=[(100.0, "1")])
    assert [text for _, text in chart.y_ticks] == ["0", "2", "4", "6", "8"]
    (zero, seven), (half,) = (line.points for line in chart.lines)
    assert zero[1] == chart.bottom == chart.y_ticks[0][0]
    assert chart.y_ticks[-1][0] < seven[1] < half[1] < zero[1]  # up is less
    assert seven[2] == "some: 7 ms" and [line.colour for line in chart.lines] == [0, 1]
    assert chart.lines[0].path == f"M100 {zero[1]:g}L200 {seven[1]:g}"


def test_x_stays_inside_the_plot() -> None:
    places = [x_of_category(at, 4) for at in range(4)]
    assert places == sorted(places) and x_of_share(0) < places[0] and places[-1] < x_of_share(1)
