"""The charts of compression say what was kept, where, and what it cost."""

import re
import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest

from llmdistill.report import figures
from llmdistill.report.compression_charts import Point, layer_map, trade_off

NASTY = "<script>alert('&')</script>"


def layer(path: str, role: str, number: int = 0, *, kind: str = "low_rank", note: str = "", **values: float) -> dict[str, Any]:
    return {"path": path, "kind": kind, "note": note, "figures": values, "stack": "encoder", "layer": number, "role": role}


def test_points_lie_where_their_share_and_quality_say() -> None:
    points = [Point(name="whole", share=1.0, quality=0.8, interval=(0.7, 0.9)), Point(name=NASTY, share=0.25, quality=0.6)]
    root = ElementTree.fromstring(str(trade_off(points, title=NASTY, show=figures.percent)))
    (x_whole, y_whole), (x_small, y_small) = [(float(dot.get("cx", 0)), float(dot.get("cy", 0))) for dot in root.iter("circle")]
    assert x_small < x_whole
    assert y_whole < y_small, "more is higher"
    assert len(root.findall(".//path")) == 1, "one has an interval"
    assert "80.0% at 100.0% of the bytes" in next(iter(root.iter("title"))).text  # pyright: ignore[reportOperatorIssue]


def test_a_cell_is_as_dark_as_the_share_that_was_kept() -> None:
    layers = [
        layer("a.q", "q", rank_share=0.25, rank=4),
        layer("a.k", "k", kind="kept", note=NASTY),
        layer("b.q", "q", 1, kind="int8", bits=8),
        {**layer("embedding", "", kind="int8_embedding"), "role": None},
    ]
    drawn = str(layer_map(layers, label=NASTY))
    root = ElementTree.fromstring(drawn)
    cells = list(root.iter("rect"))
    assert [re.search(r"--share:(\d+)%", cell.get("style", "")).group(1) for cell in cells] == ["25", "100", "25"]  # pyright: ignore[reportOptionalMemberAccess]
    assert "<script" not in drawn
    assert "encoder 1" in drawn


def test_both_factors_of_a_linear_are_one_cell() -> None:
    drawn = layer_map([layer("a.q.down", "q", kind="int8", bits=8), layer("a.q.up", "q", kind="int8", bits=8)], label="int8")
    assert len(list(ElementTree.fromstring(str(drawn)).iter("rect"))) == 1


@pytest.mark.parametrize("chart", [trade_off([], title="", show=str), layer_map([], label="")])
def test_a_chart_of_nothing_is_nothing(chart: str) -> None:
    assert str(chart) == ""
