"""The picture of speed over memory."""

from xml.etree import ElementTree

import pytest

from fitlora.errors import UserError
from fitlora.report.frontier import Point, Series, _scale, frontier, plot, plot_of
from fitlora.units import GIB
from tests.planner.test_rivals import NOT_MEASURED, Truth, make

SVG = "{http://www.w3.org/2000/svg}"


def point(speed: float, gib: float) -> Point:
    return Point(round(gib * GIB), speed, "a <plan>")


def test_a_frontier_rises() -> None:
    points = [point(10.0, 5), point(9.0, 6), point(12.0, 7)]
    assert frontier(points[::-1]) == [points[0], points[2]]


@pytest.mark.parametrize(
    ("highest", "scale"),
    [(24_601, (25_000, 5_000)), (26_000, (30_000, 10_000)), (807, (1_000, 200)), (3, (3, 1))],
)
def test_steps_of_an_axis_are_round(highest: float, scale: tuple[int, int]) -> None:
    assert _scale(highest) == scale


def test_more_memory_is_further_right_and_faster_is_higher() -> None:
    points = [point(100.0, 4), point(900.0, 16), point(500.0, 20)]
    root = ElementTree.fromstring(plot([Series("ours", "#000", "#fff", points)], "title", [8]))
    dots = [dot for dot in root.iter(f"{SVG}circle") if dot.find(f"{SVG}title") is not None]
    across, down = ([float(dot.attrib[key]) for dot in dots] for key in ("cx", "cy"))
    assert across == sorted(across)
    assert down[0] > down[2] > down[1]
    assert [dot.attrib["class"] for dot in dots] == ["dot s0", "dot s0", "dot behind s0"]
    assert "a <plan>" in (dots[0].findtext(f"{SVG}title") or "")


def test_the_plan_is_drawn_among_those_for_other_sizes() -> None:
    search = make(Truth(), 9)
    choice = next(search.fitting())
    assert search.within(GIB) is None
    others = [search.within(gib * GIB) for gib in (5, 9, 40)]
    assert others[1] is not None
    assert others[1].plan == choice.plan, "the budget's own plan is the same"
    found = [other for other in others if other is not None]
    speeds = [each.forecast.tokens_per_second for each in found if each.forecast is not None]
    assert speeds == sorted(speeds)
    assert len(speeds) == 3
    text = plot_of(choice, found, 9 * GIB)
    assert text.count("<title>") == 1 + 3 + 1
    assert f"the Plan, for 9 GiB: {speeds[1]:,.0f} tokens/s" in text


def test_without_a_speed_there_is_no_picture() -> None:
    choice = next(make(Truth(), 9, rates=NOT_MEASURED).fitting())
    with pytest.raises(UserError, match="speed of this device or model is not known"):
        plot_of(choice, [], 9 * GIB)
