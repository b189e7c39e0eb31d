"""Charts are well-formed, escape what they are given, and place things where the numbers say."""

import itertools
import math
import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmdistill.report import figures
from llmdistill.report.charts import Curve, Measure, heat_map, lines, panels, share_bar, ticks
from llmdistill.report.pipeline_chart import columns, pipeline_chart, reduced

NASTY = "<script>alert('&')</script>\"'"


def parsed(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(str(svg))


def stage(key: str, *depends_on: str, name: str = "") -> dict[str, object]:
    return {"key": key, "name": name or key, "seconds": 2.5, "cached": False, "depends_on": list(depends_on)}


@given(st.floats(-100, 100), st.floats(1e-3, 1e6))
def test_ticks_cover_the_range_evenly(low: float, width: float) -> None:
    high = low + width
    marks = ticks(low, high)
    steps = [after - before for before, after in itertools.pairwise(marks)]
    assert marks[0] <= low + 1e-6 * width
    assert marks[-1] >= high - 1e-6 * width
    assert 2 <= len(marks) <= 9
    assert all(math.isclose(step, steps[0], rel_tol=1e-4) for step in steps)


@pytest.mark.parametrize(
    "chart",
    [
        lines([Curve(name=NASTY, points=[(0, 1.0), (10, 0.5)], colour="red")], title=NASTY, x_label=NASTY),
        panels([NASTY, "b"], ["red", "blue"], [Measure(title=NASTY, values=[None, 2.0], show=figures.size)], label=NASTY),
        panels([NASTY], ["red"], [Measure(title="accuracy", values=[0.5], show=figures.percent, intervals=[[0.4, 0.6]])], label=NASTY),
        heat_map([NASTY, "b"], [NASTY, "b", "unreadable"], [[3, 0, 1], [0, 0, 0]], label=NASTY),
        share_bar(0.5, NASTY),
        pipeline_chart([stage("a", name=NASTY), stage("b", "a")]),
    ],
)
def test_every_chart_is_xml_without_what_it_was_given(chart: str) -> None:
    root = parsed(chart)
    assert root.tag == "svg"
    assert not root.findall(".//script")
    assert "<script" not in str(chart)


def test_a_chart_of_nothing_is_nothing() -> None:
    assert str(lines([Curve(name="empty", points=[], colour="red")], title="loss", x_label="step")) == ""
    assert parsed(pipeline_chart([])).tag == "svg"


@pytest.mark.parametrize("points", [[(5.0, 0.3)], [(0.0, 0.0), (1.0, 0.0)], [(0.0, -2.0), (3.0, 4.0)]])
def test_lines_stay_inside_their_frame(points: list[tuple[float, float]]) -> None:
    root = parsed(lines([Curve(name="one", points=points, colour="red")], title="loss", x_label="step", width=500, height=250))
    path = root.find("path")
    assert path is not None
    numbers = [float(number) for number in re.findall(r"-?[\d.]+", path.attrib["d"])]
    assert all(0 <= x <= 500 for x in numbers[::2])
    assert all(0 <= y <= 250 for y in numbers[1::2])


def test_labels_of_close_curves_do_not_overlap() -> None:
    curves = [Curve(name=f"student {index}", points=[(0, 1.0), (1, 0.5 + index / 1e4)], colour="red") for index in range(6)]
    root = parsed(lines(curves, title="loss", x_label="step"))
    heights = sorted(float(text.attrib["y"]) for text in root.findall("text") if (text.text or "").startswith("student"))
    assert len(heights) == 6
    assert all(below - above >= 14.9 for above, below in itertools.pairwise(heights))
    assert heights[-1] <= 250


def test_an_error_bar_spans_its_interval() -> None:
    root = parsed(
        panels(["a", "b"], ["red", "blue"], [Measure(title="accuracy", values=[0.6, 0.8], show=figures.percent, intervals=[[0.5, 0.7], None])], label="l")
    )
    dots = [float(dot.attrib["cx"]) for dot in root.findall("circle")]
    whisker = next(path for path in root.findall("path") if path.attrib["class"] == "whisker")
    start, end = (float(number) for number in re.findall(r"[\d.]+", whisker.attrib["d"])[:3:2])
    assert start < dots[0] < end < dots[1]
    assert math.isclose((start + end) / 2, dots[0], abs_tol=0.2)


def test_bars_are_as_long_as_their_values() -> None:
    root = parsed(panels(["a", "b"], ["red", "blue"], [Measure(title="bytes", values=[100.0, 400.0], show=figures.size)], label="l"))
    lengths = [float(re.findall(r"h([\d.]+)", path.attrib["d"])[0]) + 3 for path in root.findall("path")]
    assert math.isclose(lengths[1] / lengths[0], 4, rel_tol=1e-3)


def test_the_pipeline_is_drawn_by_its_order() -> None:
    depends_on = {"a": [], "b": ["a"], "c": ["a", "b"], "d": ["a", "b", "c", "elsewhere"], "e": ["a"]}
    edges = reduced(depends_on)
    assert edges == {"a": [], "b": ["a"], "c": ["b"], "d": ["c"], "e": ["a"]}
    assert [set(column) for column in columns(edges)] == [{"a"}, {"b", "e"}, {"c"}, {"d"}]
    root = parsed(pipeline_chart([stage(key, *others) for key, others in depends_on.items()]))
    assert len(root.findall("g")) == 5
    assert len([path for path in root.findall("path") if path.attrib["class"] == "edge"]) == 4


@given(st.integers(1, 12).flatmap(lambda num: st.tuples(*(st.sets(st.integers(0, max(0, index - 1)), max_size=4) for index in range(num)))))
def test_reduction_keeps_who_comes_before_whom(others: tuple[set[int], ...]) -> None:
    depends_on = {str(index): sorted(str(other) for other in above if other < index) for index, above in enumerate(others)}

    def reach(edges: dict[str, list[str]], key: str) -> set[str]:
        return set(edges[key]).union(*(reach(edges, other) for other in edges[key]))

    edges = reduced(depends_on)
    assert all(reach(edges, key) == reach(depends_on, key) for key in depends_on)
    assert sorted(key for column in columns(edges) for key in column) == sorted(depends_on)


@pytest.mark.parametrize(
    "shown, expected",
    [
        (figures.size(8_540_000), "8.54 MB"),
        (figures.size(0), "0 B"),
        (figures.size(999_999), "1.00 MB"),
        (figures.compact(2_134_016), "2.13 M"),
        (figures.compact(98_123), "98.1 k"),
        (figures.compact(42), "42"),
        (figures.count(1_234_567), "1,234,567"),
        (figures.percent(0.8625), "86.2%"),
        (figures.percent(None), "–"),
        (figures.interval([0.825, 0.893]), "82.5–89.3%"),
        (figures.duration(0.213), "0.21 s"),
        (figures.duration(59.9), "1 min 0 s"),
        (figures.duration(5123), "1 h 25 min"),
        (figures.milliseconds(3.214), "3.21 ms"),
        (figures.milliseconds(0.00321), "0.00321 ms"),
        (figures.milliseconds(321.4), "321 ms"),
        (figures.milliseconds(9.999), "10.0 ms"),
        (figures.milliseconds(1234.5), "1,230 ms"),
        (figures.dollars(0.0012), "$0.0012"),
        (figures.dollars(12.5), "$12.50"),
        (figures.probability(0.00001), "< 0.001"),
    ],
)
def test_figures_read_as_people_write_them(shown: str, expected: str) -> None:
    assert shown == expected
