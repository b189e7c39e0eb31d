"""What a search among sub-networks found is drawn and told as it was measured, and stays text whatever it says."""

from __future__ import annotations

import random
import re
import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest

from llmdistill.report import page
from llmdistill.report.search_charts import MAX_ASKED, front_chart, shown_cost, thinned, titled
from llmdistill.report.text import summary

NASTY = "<script>alert('&\"')</script>"


def search(*, num_asked: int = 300, cost: str = "latency_ms_batch_1", **changes: Any) -> dict[str, Any]:
    """One as the stage leaves it, without its name."""
    chance = random.Random(0)
    points = [point(number, largest=number == 4, smallest=number == 0) for number in range(5)]
    asked = [{"accuracy": 0.5 + 0.3 * share - 0.1 * chance.random(), "cost": 2 + 6 * share} for share in (chance.random() for _ in range(num_asked))]
    found = {
        "cost": cost,
        "limits": [{"cost": "latency_ms_batch_1", "most": 6.5}, {"cost": "weight_bytes", "most": 1e7}],
        "methods": {"evolution": {"num_asked": 500, "hypervolume": 0.61}, NASTY: {"num_asked": 500, "hypervolume": 0.4}},
        "num_samples": 120,
        "accuracy_predictor": {"kendall_tau": 0.8, "mean_absolute_error": 0.012, "num_held_out": 30},
        "cost_predictors": {"latency_ms_batch_1": {"mean_relative_error": 0.041, "kendall_tau": 0.9, "num_held_out": 30}},
        "asked": asked,
        "chosen": points[2]["subnet"],
        "points": points,
    }
    return found | changes


def point(number: int, *, largest: bool = False, smallest: bool = False) -> dict[str, Any]:
    """A point of the front."""
    return {
        "subnet": f"encoder.depth={number},encoder.ffn=256+128+64,decoder.depth=1,decoder.heads=2,{NASTY if number == 3 else 'decoder.ffn=64'}",
        "parameters": 123_456 * (number + 1),
        "predicted_accuracy": 0.6 + 0.05 * number,
        "measured_accuracy": 0.595 + 0.045 * number,
        "predicted": {"parameters": 123_456 * (number + 1), "weight_bytes": 493_824 * (number + 1), "latency_ms_batch_1": 2.1 + 1.5 * number},
        "measured": {"latency_ms_batch_1": 2.2 + 1.4 * number},
        "is_largest": largest,
        "is_smallest": smallest,
    }


def report(*found: dict[str, Any]) -> dict[str, Any]:
    """No more than this section and what every page needs."""
    data: dict[str, Any] = {"title": "Elastic", "students": [], "stages": [], "task": None, "created_utc": "", "findings": [], "machine": None}
    return data | {"elastic": page.searches({"name": f"search {number}", **one} for number, one in enumerate(found))}


def marks(drawn: str, style: str) -> list[tuple[float, float]]:
    """Where the circles of this class are, the legend's left out."""
    circles = [one for one in ElementTree.fromstring(drawn).iter("circle") if one.get("class") == style]
    return [(float(one.get("cx", 0)), float(one.get("cy", 0))) for one in circles][:-1]


def test_points_lie_where_cost_and_accuracy_say() -> None:
    found = search()
    drawn = str(front_chart(found))
    assert len(marks(drawn, "asked")) == 300
    predicted, chosen = marks(drawn, "predicted"), marks(drawn, "dot chosen")
    measured = sorted(marks(drawn, "dot measured") + chosen)
    for places in (predicted, measured):
        assert places == sorted(places, key=lambda place: (place[0], -place[1])), "dearer is to the right, better is higher"
    assert chosen == [measured[2]]
    assert predicted[0][0] < measured[0][0], "the smallest was slower than predicted"
    assert predicted[-1][1] < measured[-1][1], "the largest was worse than predicted"
    joins = [one for one in ElementTree.fromstring(drawn).iter("line") if one.get("class") == "join"]
    assert [(float(one.get("x1", 0)), float(one.get("y1", 0))) for one in joins] == predicted
    assert [(float(one.get("x2", 0)), float(one.get("y2", 0))) for one in joins] == measured
    told = [one.text or "" for one in ElementTree.fromstring(drawn).iter("title")]
    assert any("predicted 70.0% at 5.10 ms; measured 68.5% at 5 ms" in one for one in told)


def test_limits_on_other_costs_and_far_away_are_no_lines() -> None:
    def lines(limits: list[dict[str, Any]]) -> list[str]:
        return re.findall(r">limit ([^<]*)<", str(front_chart(search(limits=limits))))

    assert lines(search()["limits"]) == ["6.50 ms"]
    assert lines([{"cost": "latency_ms_batch_1", "most": 600}]) == []
    assert lines([]) == []


def test_a_cost_that_needs_no_measuring_is_its_own_measurement() -> None:
    found = search(cost="parameters", asked=[], limits=[])
    drawn = str(front_chart(found))
    across = [x for x, _ in marks(drawn, "predicted")]
    assert across == [x for x, _ in sorted(marks(drawn, "dot measured") + marks(drawn, "dot chosen"))]


def test_one_point_alone_is_drawn_and_none_is_nothing() -> None:
    alone = point(0, largest=True, smallest=True)
    assert marks(str(front_chart(search(points=[alone], asked=[], limits=[], chosen=alone["subnet"]))), "predicted")
    assert str(front_chart(search(points=[]))) == ""
    assert "Sub-networks" in page.render(report(search(points=[], asked=[])))


def test_many_sub_networks_are_thinned_evenly() -> None:
    asked = [{"accuracy": 0.5, "cost": float(number)} for number in range(2 * MAX_ASKED + 1)]
    kept = thinned(asked)
    assert (len(kept), kept[0], kept[1]["cost"]) == (MAX_ASKED, asked[0], 2.0)
    (told,) = page.searches([{"name": "search", **search(num_asked=MAX_ASKED + 7)}])
    assert len(told["asked"]) == MAX_ASKED


@pytest.mark.parametrize(
    "name, value, shown, title",
    [
        ("latency_ms_batch_1", 2.345, "2.35 ms", "latency, batch 1"),
        ("weight_bytes", 5e6, "5 MB", "weight"),
        ("parameters", 1_234_567, "1.23 M", "parameters"),
        ("latency_ms", None, "–", "latency"),
    ],
)
def test_costs_are_shown_by_their_units(name: str, value: float | None, shown: str, title: str) -> None:
    assert shown_cost(name, value) == shown
    assert titled(name) == title


def test_the_section_tells_all_and_stays_text() -> None:
    html = page.render(report(search(), search(limits=[])))
    assert '<a href="#search">Sub-networks</a>' in html
    for part in (
        "search 0",
        "search 1",
        "the most accurate with latency, batch 1 of at most 6.50 ms and weight of at most 10 MB",
        "the cheapest that is about",
    ):
        assert part in html
    for part in ("1.2 points", "4.1%", "0.610", "123 k", "494 kB", "59.5%", "label right"):
        assert part in html
    assert "<script" not in html
    assert "http" not in html.replace("http-equiv", "")
    assert "Sub-networks" not in page.render(report())


def test_the_terminal_tells_what_was_chosen() -> None:
    told = summary(report(search(), search(limits=[], chosen=point(3)["subnet"])))
    lines = told.splitlines()
    first = lines.index("search 0: the most accurate with latency, batch 1 of at most 6.50 ms and weight of at most 10 MB is")
    assert lines[first + 1] == point(2)["subnet"]
    assert [line.split() for line in lines[first + 2 : first + 6 : 3]] == [
        ["validation", "accuracy", "parameters", "weight", "latency,", "batch", "1"],
        ["measured", "68.5%", "370", "k", "1.48", "MB", "5", "ms"],
    ]
    assert lines[first + 4].split() == ["predicted", "70.0%", "370", "k", "1.48", "MB", "5.10", "ms"]
    second = lines.index("search 1: the cheapest that is about as accurate as the best is")
    assert lines[second + 1] == point(3)["subnet"]
    assert "is about" not in summary(report())
