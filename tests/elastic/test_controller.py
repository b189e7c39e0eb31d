"""The controller: its rewards, its budget, its seeds; and it finds more than as many random sub-networks do."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_space import LLAMA, LLAMA_STACK, SPACES

from llmdistill.elastic.axes import Axes
from llmdistill.elastic.controller import Controller, _Run
from llmdistill.elastic.cost import num_parameters
from llmdistill.elastic.decisions import Decisions
from llmdistill.elastic.question import Candidate, Limit, Question, best, hypervolume, search
from llmdistill.elastic.space import Space, Subnet


def wide_space() -> Space:
    """Many decisions: 8 layers, each with heads and neurons of its own."""
    stack = replace(LLAMA_STACK, num_layers=8)
    return Axes(ffn=(0.25, 0.5, 0.75), heads=(0.34, 0.67), depth=(0.5, 0.75)).space(replace(LLAMA, stacks=(stack,)))


def synthetic(space: Space, seed: int = 7) -> Callable[[Subnet], float]:
    """An accuracy to which every decision adds a part of its own, rising with its value; some parts are large, most are small."""
    decisions, generator = Decisions(space), random.Random(seed)
    parts = [generator.random() ** 4 for _ in decisions.open]

    def accuracy(subnet: Subnet) -> float:
        choices = decisions.choices(subnet)
        made = [decisions.is_active(place, choices) for place in range(len(choices))]
        got = sum(
            part * (choice / (len(decision.values) - 1)) ** 0.5 * active
            for part, choice, decision, active in zip(parts, choices, decisions.open, made, strict=True)
        )
        return 0.2 + 0.8 * got / (sum(parts) or 1.0)

    return accuracy


def question_of(space: Space, *, budget: float, limits: tuple[Limit, ...] = (), accuracy: Callable[[Subnet], float] | None = None) -> Question:
    def costs(subnet: Subnet) -> dict[str, float]:
        return {"parameters": float(num_parameters(space, subnet))}

    return Question(space=space, accuracy=accuracy or synthetic(space), costs=costs, cost="parameters", limits=limits, budget=budget)


def randomly(question: Question, seed: int) -> list[Candidate]:
    """As many at random, within the limits, which are free to look at."""
    generator = random.Random(seed)
    while question.left >= 1:
        subnet = question.space.sample(generator)
        if Candidate(subnet=subnet, accuracy=0, costs=question.costs(subnet)).keeps(question.limits):
            question.ask(subnet)
    return list(question.asked.values())


def test_it_finds_better_than_random_search_within_a_limit() -> None:
    space = wide_space()
    most = num_parameters(space, space.largest()) * 0.75
    limits = (Limit(cost="parameters", most=most),)
    ours, theirs = [], []
    for seed in range(5):
        found = search(Controller(), question_of(space, budget=150, limits=limits), seed=seed)
        assert all(one.keeps(limits) for one in found)
        ours.append(best(found, "parameters", limits).accuracy)
        theirs.append(best(randomly(question_of(space, budget=150, limits=limits), seed), "parameters", limits).accuracy)
    assert statistics.mean(ours) > statistics.mean(theirs) + 0.01, (ours, theirs)


def test_its_front_is_better_than_that_of_random_search() -> None:
    space = wide_space()
    worst = float(num_parameters(space, space.largest()))
    ours, theirs = [], []
    for seed in range(5):
        ours.append(hypervolume(search(Controller(), question_of(space, budget=200), seed=seed), "parameters", worst_cost=worst))
        theirs.append(hypervolume(randomly(question_of(space, budget=200), seed), "parameters", worst_cost=worst))
    assert statistics.mean(ours) > statistics.mean(theirs), (ours, theirs)


@pytest.mark.parametrize("budget", [1, 7, 10, 64.5])
@pytest.mark.parametrize("name", ["t5", "llama", "t5 even"])
def test_no_budget_is_exceeded_or_left_unused(name: str, budget: float) -> None:
    question = question_of(SPACES[name], budget=budget)
    found = search(Controller(), question, seed=0)
    assert question.num_spent == len(found) <= budget
    assert len(found) >= min(math.floor(budget), SPACES[name].num_subnets // 2)


def test_it_ends_where_all_is_known() -> None:
    space = SPACES["t5 even"]
    question = question_of(space, budget=10_000)
    assert len(search(Controller(), question, seed=0)) == space.num_subnets


def test_the_same_seed_gives_the_same_answers_and_no_other_draws_are_disturbed() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    asked = [search(Controller(), question_of(SPACES["t5"], budget=40), seed=seed) for seed in (3, 3, 4)]
    assert asked[0] == asked[1] != asked[2]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_rewards_are_those_of_mnasnet() -> None:
    """Hard: nothing for being cheaper, the ratio for being dearer. Soft: the same exponent on both sides. Without limits against the whole model."""
    space = SPACES["llama"]
    large, small = space.largest(), space.smallest()
    most = num_parameters(space, large) * 0.9
    ratio_small = most / num_parameters(space, small)

    def reward(subnet: Subnet, limits: tuple[Limit, ...], **settings: Any) -> float:
        question = question_of(space, budget=9, limits=limits, accuracy=lambda _: 0.5)
        question.ask(small)
        return _Run(Controller(**settings), question, Decisions(space), 0)._reward(subnet, 0.3)

    limits = (Limit(cost="parameters", most=most),)
    assert reward(small, limits) == 0.5
    assert reward(large, limits) == pytest.approx(0.5 * 0.9)
    assert reward(small, limits, under=0.07, over=0.07) == pytest.approx(0.5 * ratio_small**0.07)
    assert reward(large, limits, under=0.07, over=0.07) == pytest.approx(0.5 * 0.9**0.07)
    assert reward(small, ()) == pytest.approx(0.5 * (num_parameters(space, large) / num_parameters(space, small)) ** 0.3)


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_only_decisions_that_are_made_are_scored(name: str) -> None:
    """At first all values are equally probable, so that an episode's log-probability says how many decisions it has."""
    space = SPACES[name]
    decisions = Decisions(space)
    run = _Run(Controller(episodes_per_update=20), question_of(space, budget=5), decisions, 0)
    episodes, log_p_B, entropy = run._episodes(1.0)
    numbers = []
    for episode, log_p in zip(episodes, log_p_B.tolist(), strict=True):
        made = [len(decision.values) for place, decision in enumerate(decisions.open) if decisions.is_active(place, episode)]
        assert log_p == pytest.approx(-sum(map(math.log, made)), rel=1e-5)
        numbers.append(sum(map(math.log, made)))
    assert len(set(numbers)) > 1
    assert entropy.item() == pytest.approx(statistics.mean(numbers), rel=1e-5)


def test_limits_that_none_keeps_are_answered_by_the_nearest() -> None:
    space = SPACES["llama"]
    found = search(Controller(), question_of(space, budget=20, limits=(Limit(cost="parameters", most=1),)), seed=0)
    assert [one.subnet for one in found] == [space.smallest()]


def test_a_tight_limit_is_found_without_spending_anything_on_what_is_over_it() -> None:
    space = wide_space()
    limits = (Limit(cost="parameters", most=num_parameters(space, space.smallest()) * 1.1),)
    found = search(Controller(), question_of(space, budget=20, limits=limits), seed=0)
    assert len(found) >= 5
    assert all(one.keeps(limits) for one in found)


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match=r"exp\(-loss\)"):
        search(Controller(), question_of(SPACES["t5"], budget=5, accuracy=lambda _: -1.0), seed=0)
    wrongs: list[dict[str, Any]] = [{"exponents": ()}, {"exponents": (0.0,)}, {"under": 2.0}, {"over": 0.0}, {"learning_rate": 0.0}, {"width": 0}]
    for wrong in wrongs:
        with pytest.raises(ValueError, match="give"):
            Controller(**wrong)
    assert [one.subnet for one in search(Controller(), question_of(SPACES["fixed"], budget=5), seed=0)] == [SPACES["fixed"].largest()]
