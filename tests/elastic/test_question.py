"""What a search is asked: the budget is never exceeded, and front, best and hypervolume are those of brute force."""

from __future__ import annotations

import random

import pytest
from synthetic import LARGE, SMALL, question

from llmdistill.elastic.domination import by_merit, crowding_distances, domination_ranks
from llmdistill.elastic.question import BudgetSpentError, Candidate, Limit, best, excess, front, hypervolume


def test_asking_twice_costs_once_and_the_budget_is_never_exceeded() -> None:
    asked = question(SMALL, 3)
    first, second, third, fourth = list(SMALL.every())[:4]
    for subnet in (first, second, first, third, third):
        asked.ask(subnet)
    assert (asked.num_spent, asked.left, list(asked.asked)) == (3, 0, [first, second, third])
    with pytest.raises(BudgetSpentError):
        asked.ask(fourth)
    with pytest.raises(BudgetSpentError):
        asked.spend(0.01)
    assert asked.ask(second).accuracy == asked.accuracy(second)
    assert fourth not in asked.asked


def test_what_cannot_be_asked_says_why() -> None:
    with pytest.raises(ValueError, match=r"budget of a search is 0"):
        question(SMALL, 0)
    with pytest.raises(ValueError, match=r"limit of flops is -1.0"):
        Limit(cost="flops", most=-1.0)
    asked = question(SMALL, 1)
    with pytest.raises(ValueError, match=r"'seconds' is no cost that is known here; there are flops, weight_bytes"):
        type(asked)(space=SMALL, accuracy=asked.accuracy, costs=asked.costs, cost="seconds", budget=1)
    with pytest.raises(ValueError, match=r"width is 64000"):
        asked.ask(type(SMALL.largest())(width=64000, stacks=SMALL.largest().stacks))
    assert asked.num_spent == 0


@pytest.mark.parametrize("limit", [0.0, 0.35])
def test_front_and_best_are_those_of_brute_force(limit: float) -> None:
    asked = question(SMALL, 48, limit=limit)
    everything = [asked.ask(subnet) for subnet in SMALL.every()]
    within = [one for one in everything if excess(one.costs, asked.limits) == 0]

    def dominates(one: Candidate, other: Candidate) -> bool:
        pairs = (one.costs["flops"], -one.accuracy), (other.costs["flops"], -other.accuracy)
        return pairs[0] != pairs[1] and all(mine <= theirs for mine, theirs in zip(*pairs, strict=True))

    found = front(everything, "flops", asked.limits)
    assert {one.subnet for one in found} == {one.subnet for one in within if not any(dominates(other, one) for other in within)}
    assert [one.costs["flops"] for one in found] == sorted(one.costs["flops"] for one in found)
    assert best(everything, "flops", asked.limits).accuracy == max(one.accuracy for one in within)


def test_hypervolume_is_the_share_of_points_that_are_dominated() -> None:
    asked = question(LARGE, 30)
    generator = random.Random(0)
    candidates = [asked.ask(LARGE.sample(generator)) for _ in range(30)]
    worst = asked.costs(LARGE.largest())["flops"]
    points = [(generator.uniform(0, worst), generator.uniform(0.1, 1)) for _ in range(20_000)]
    share = sum(any(one.costs["flops"] <= cost and one.accuracy >= accuracy for one in candidates) for cost, accuracy in points) / len(points)
    assert hypervolume(candidates, "flops", worst_cost=worst, worst_accuracy=0.1) == pytest.approx(share, abs=0.015)
    assert hypervolume([], "flops", worst_cost=worst) == 0


def test_limits_that_nothing_keeps_name_the_nearest() -> None:
    asked = question(SMALL, 2, limit=0.001)
    candidates = [asked.ask(SMALL.smallest()), asked.ask(SMALL.largest())]
    with pytest.raises(ValueError, match=rf"none of 2 sub-networks keeps flops <= .*nearest has .*{candidates[0].costs['flops']}.*raise the limits"):
        best(candidates, "flops", asked.limits)


def test_ranks_are_those_of_comparing_all_pairs() -> None:
    generator = random.Random(0)
    for num in (0, 1, 40):
        points = [(float(generator.randrange(8)), float(generator.randrange(8))) for _ in range(num)]
        ranks, left = [-1] * num, set(range(num))
        for rank in range(num):
            free = {one for one in left if not any(points[other] != points[one] and max(map(_gap, points[other], points[one])) <= 0 for other in left)}
            for one in free:
                ranks[one] = rank
            left -= free
        assert domination_ranks(points) == ranks
        assert sorted(by_merit(points), key=lambda index: ranks[index]) == by_merit(points)


def _gap(first: float, second: float) -> float:
    return first - second


def test_the_less_crowded_go_first() -> None:
    points = [(0.0, 10.0), (1.0, 9.0), (1.5, 8.5), (6.0, 2.0), (10.0, 0.0)]
    distances = crowding_distances(points)
    assert distances[0] == distances[-1] == float("inf")
    assert distances[3] > distances[2] > distances[1]
    assert by_merit(points)[2] == 3
    assert crowding_distances([(1.0, 1.0), (1.0, 1.0)]) == [0.0, 0.0]
