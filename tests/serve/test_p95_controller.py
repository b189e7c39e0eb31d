"""The controller, told latencies by hand: it stays on the front, ends where it should, and does not swing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmdistill.serve.controller import MOST_PATIENCE, WINDOW, Controller
from llmdistill.serve.pace import Pace
from llmdistill.serve.points import OperatingPoint

TARGET_MS = 100.0


def front(num_points: int) -> list[OperatingPoint]:
    paces = [Pace(beginning=0.0, per_prompt_token=0.0, per_step=0.001 / (1 + place), per_neighbour=0.0) for place in range(num_points)]
    return [OperatingPoint(subnet=f"depth={num_points - place}", num_layers=num_points, weight_bytes=1, pace=pace) for place, pace in enumerate(paces)]


def positions(controller: Controller, latency_ms: Callable[[int], float], num_rows: int) -> list[int]:
    """Where each row decoded, when its latency hangs on that."""
    found = []
    for _ in range(num_rows):
        found.append(controller.position)
        controller.observe(controller.decide().epoch, latency_ms(controller.position))
    return found


@settings(deadline=None, max_examples=50)
@given(num_points=st.integers(1, 5), latencies=st.lists(st.floats(0, 300), max_size=600))
def test_it_never_leaves_the_front_and_does_what_the_latencies_say(num_points: int, latencies: Sequence[float]) -> None:
    points = front(num_points)
    seen = []
    for _ in range(2):
        controller, found = Controller(points, TARGET_MS), [0]
        for latency in latencies:
            assert controller.decide().point is points[controller.position]
            controller.observe(controller.decide().epoch, latency)
            found.append(controller.position)
        seen.append(found)
    assert seen[0] == seen[1]
    assert all(abs(after - before) <= 1 for before, after in zip(seen[0], seen[0][1:], strict=False))


@pytest.mark.parametrize("num_points", [1, 2, 5])
def test_a_load_that_is_always_light_ends_at_the_best_point_and_one_too_heavy_at_the_cheapest(num_points: int) -> None:
    controller = Controller(front(num_points), TARGET_MS)
    assert positions(controller, lambda _: 500.0, num_points * WINDOW)[-1] == num_points - 1
    assert positions(controller, lambda _: 500.0, 10 * WINDOW) == [num_points - 1] * 10 * WINDOW
    assert positions(controller, lambda _: 1.0, (num_points + 1) * WINDOW)[-1] == 0
    assert positions(controller, lambda _: 1.0, 10 * WINDOW) == [0] * 10 * WINDOW


def test_one_in_twenty_may_be_late() -> None:
    controller = Controller(front(2), TARGET_MS)
    for number in range(50 * WINDOW):
        controller.observe(controller.decide().epoch, 500.0 if number % 20 == 0 else 90.0)
    assert controller.position == 0
    for number in range(2 * WINDOW):
        controller.observe(controller.decide().epoch, 500.0 if number % 10 == 0 else 90.0)
    assert controller.position == 1


def test_it_stays_where_the_target_is_held_without_much_to_spare() -> None:
    found = positions(Controller(front(4), TARGET_MS), lambda position: [400, 200, 80, 20][position], 100 * WINDOW)
    assert found[-90 * WINDOW :] == [2] * 90 * WINDOW


def test_where_no_point_is_just_right_tries_become_rare() -> None:
    found = positions(Controller(front(2), TARGET_MS), lambda position: [400, 20][position], 1000 * WINDOW)
    late = [place for place, position in enumerate(found) if position == 0]
    assert len(late) / len(found) < 0.005
    assert len([place for place in late if place > 500 * WINDOW]) <= 500 / MOST_PATIENCE * 3 + 3  # three late ones end a try


def test_a_try_that_holds_makes_it_eager_again() -> None:
    controller = Controller(front(2), TARGET_MS)
    positions(controller, lambda position: [400, 20][position], 200 * WINDOW)
    positions(controller, lambda _: 20.0, (MOST_PATIENCE + 2) * WINDOW)
    assert controller.position == 0
    positions(controller, lambda _: 400.0, 3)
    assert controller.position == 1
    positions(controller, lambda _: 20.0, WINDOW)
    assert controller.position == 0


def test_rows_of_before_a_move_and_rows_that_chose_for_themselves_do_not_count() -> None:
    controller = Controller(front(3), TARGET_MS)
    before = controller.decide().epoch
    positions(controller, lambda _: 500.0, 3)
    assert controller.position == 1
    for _ in range(10 * WINDOW):
        controller.observe(before, 500.0)
        controller.observe(0, 500.0)
    assert controller.position == 1


def test_without_a_target_it_stays_at_the_best() -> None:
    assert set(positions(Controller(front(3), math.inf), lambda _: 1e9, 10 * WINDOW)) == {0}


def test_a_front_has_points() -> None:
    with pytest.raises(ValueError, match="no points"):
        Controller([], TARGET_MS)
