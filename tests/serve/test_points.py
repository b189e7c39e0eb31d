"""Which operating point a budget gets, and which points make the front."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmdistill.models.exit_settings import Point
from llmdistill.serve.bodies import NO_BUDGET, Budget
from llmdistill.serve.errors import ServeError
from llmdistill.serve.offered import read_front
from llmdistill.serve.pace import Pace
from llmdistill.serve.points import REFERENCE_TOKENS, OperatingPoint, Points, with_exits


def pace(latency_ms: float) -> Pace:
    return Pace(beginning=0.0, per_prompt_token=0.0, per_step=latency_ms / 1000 / REFERENCE_TOKENS, per_neighbour=0.0)


def point(subnet: str, latency_ms: float, accuracy: float | None, weight_bytes: int = 1, names: tuple[str, ...] = ()) -> OperatingPoint:
    return OperatingPoint(subnet=subnet, names=names, num_layers=4, weight_bytes=weight_bytes, accuracy=accuracy, pace=pace(latency_ms))


def risk(delta: float, threshold: float, mean_layers: float) -> Point:
    return Point(delta=delta, threshold=threshold, mean_loss=0.0, mean_layers=mean_layers)


def latency(one: OperatingPoint) -> float:
    return one.latency_ms


ELASTIC = Points([point("depth=1", 10, 0.6, names=("smallest",)), point("depth=2", 20, 0.7), point("depth=3", 40, 0.65), point("depth=4", 50, 0.8)])
EXITS = Points([*with_exits(point("largest", 40, 0.8), (pace(10), 1.0), [risk(0.01, 0.9, 3.0), risk(0.05, 0.5, 2.0)]), point("depth=1", 15, 0.7)])


def test_the_front_has_no_point_that_another_beats() -> None:
    assert [one.subnet for one in ELASTIC.front] == ["depth=4", "depth=2", "depth=1"]
    assert [(one.subnet, one.exit_risk) for one in EXITS.front] == [("largest", 0.01), ("largest", 0.05), ("depth=1", 0.0)]


def test_of_equals_and_without_accuracies_larger_ones_are_taken_for_better_ones() -> None:
    equals = Points([point("a", 10, 0.5, 5), point("b", 20, 0.5, 9)])
    assert [one.subnet for one in equals.all] == [one.subnet for one in equals.front] == ["b", "a"]
    points = Points([point("a", 10, None, 5), point("b", 20, None, 9), point("c", 5, 0.9, 2)])
    assert [one.subnet for one in points.all] == ["b", "a", "c"]


@settings(deadline=None)
@given(values=st.lists(st.tuples(st.floats(1, 100), st.floats(0, 1)), min_size=1, max_size=8), limit=st.floats(1, 100))
def test_a_latency_gets_the_most_accurate_within_it(values: list[tuple[float, float]], limit: float) -> None:
    points = Points([point(f"depth={place}", latency_ms, accuracy) for place, (latency_ms, accuracy) in enumerate(values)])
    within = [one for one in points.all if latency(one) <= limit]
    for better, worse in zip(points.front, points.front[1:], strict=False):
        assert better.latency_ms > worse.latency_ms
        assert (better.accuracy or 0) >= (worse.accuracy or 0)
    assert points.front[0] is points.all[0]
    if within:
        assert points.choose(Budget(max_latency_ms=limit), latency).accuracy == max(one.accuracy or 0 for one in within)
    else:
        with pytest.raises(ServeError, match="the fastest that may answer this request takes about"):
            points.choose(Budget(max_latency_ms=limit), latency)


def test_a_sub_network_by_its_text_or_its_name() -> None:
    assert ELASTIC.choose(Budget(subnet="depth=2"), latency).subnet == "depth=2"
    assert ELASTIC.choose(Budget(subnet="smallest"), latency).subnet == "depth=1"
    with pytest.raises(ServeError, match=r"no sub-network 'depth=9' .* it may be depth=4; depth=2; depth=3; depth=1 \(smallest\)") as raised:
        ELASTIC.choose(Budget(subnet="depth=9"), latency)
    assert (raised.value.status, raised.value.param) == (400, "llmdistill.subnet")


@pytest.mark.parametrize("risk, threshold", [(0.0, 1.0), (0.005, 1.0), (0.01, 0.9), (0.02, 0.9), (0.05, 0.5), (1.0, 0.5)])
def test_an_exit_risk_is_the_largest_calibrated_one_that_is_allowed(risk: float, threshold: float) -> None:
    assert EXITS.choose(Budget(exit_risk=risk), latency).exit_threshold == threshold
    assert EXITS.choose(Budget(exit_risk=risk), latency).subnet == "largest"


def test_a_risk_without_calibrated_exits_says_how_to_calibrate() -> None:
    with pytest.raises(ServeError, match="`llmdistill run dynamic --checkpoint FOLDER` trains some and calibrates them") as raised:
        ELASTIC.choose(Budget(exit_risk=0.1), latency)
    assert raised.value.status == 400
    with pytest.raises(ServeError, match=r"no sub-network 'depth=1' for this request; of those in /v1/models it may be largest$"):
        EXITS.choose(Budget(exit_risk=0.1, subnet="depth=1"), latency)


def test_full_depth_of_calibrated_exits_is_for_those_who_ask() -> None:
    assert EXITS.choose(Budget(subnet="largest"), latency).exit_risk == 0.01
    assert EXITS.choose(NO_BUDGET, latency).exit_risk == 0.01
    assert EXITS.choose(Budget(max_latency_ms=1000), latency).exit_risk == 0.01
    assert EXITS.choose(Budget(max_latency_ms=1000, exit_risk=0), latency).exit_risk == 0.0


def test_an_exit_points_pace_lies_between_full_depth_and_the_first_exit() -> None:
    points = {one.exit_risk: one for one in EXITS.all if one.has_calibration}
    assert points[0.05].latency_ms == pytest.approx(20)
    assert points[0.01].latency_ms == pytest.approx(30)
    full, never = with_exits(point("largest", 40, 0.8), (pace(10), 4.0), [risk(0.01, 0.9, 4.0)])
    assert never.pace == full.pace


def test_a_front_that_is_no_searchs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give the folder of a search"):
        read_front(tmp_path)
    (tmp_path / "search.json").write_text(json.dumps({"points": [{"subnet": "largest"}], "chosen": "largest"}))
    with pytest.raises(ValueError, match="is no search's: KeyError: 'measured_accuracy'"):
        read_front(tmp_path)


def test_a_pace_is_linear() -> None:
    one = Pace(beginning=1.0, per_prompt_token=0.1, per_step=0.01, per_neighbour=0.001)
    assert one.seconds(10, 100, 3) == pytest.approx(1 + 1 + 100 * 0.013)
    assert one.towards(replace(one, beginning=3.0), 0.5) == replace(one, beginning=2.0)
