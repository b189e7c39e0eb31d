"""Searches that need no gradients: children are legal, seeds decide, budgets and limits hold, and the better methods are better."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from random import Random
from statistics import mean
from typing import Any

import pytest
from elastic_models import AXES, MODELS, random_model
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import LARGE, SMALL, question

from llmdistill.elastic.axes import Axes
from llmdistill.elastic.decisions import Decisions
from llmdistill.elastic.evolution import Evolution
from llmdistill.elastic.measure import shape_of
from llmdistill.elastic.nsga2 import NSGA2
from llmdistill.elastic.question import Candidate, Question, Search, best, front, hypervolume, search
from llmdistill.elastic.random_search import RandomSearch
from llmdistill.elastic.space import Space
from llmdistill.elastic.variation import cross, mutate, shrink

METHODS: tuple[Search, ...] = (RandomSearch(), Evolution(), NSGA2())


def by_kind(method: Search) -> str:
    return method.kind


@cache
def model_space(name: str) -> Space:
    return AXES.space(shape_of(random_model(name)))


SPACES: dict[str, Callable[[], Space]] = {name: lambda name=name: model_space(name) for name in MODELS}
SPACES |= {"even": lambda: SMALL, "large": lambda: LARGE, "fixed": lambda: Axes(ffn=(1.0,), heads=(1.0,), depth=(1.0,)).space(LARGE.shape)}


@pytest.mark.parametrize("name", SPACES)
@settings(max_examples=40)
@given(seed=st.integers(0, 2**32), probability=st.floats(0.01, 1.0))
def test_every_child_is_legal_and_has_its_parents_choices(name: str, seed: int, probability: float) -> None:
    space, generator = SPACES[name](), Random(seed)
    decisions = Decisions(space)
    first, second = space.sample(generator), space.sample(generator)
    mutant = mutate(decisions, first, generator, probability=probability)
    child = cross(decisions, first, second, generator)
    for subnet in (mutant, child):
        space.check(subnet)
    choices = {subnet: decisions.choices(subnet) for subnet in (first, second, child)}
    for place in range(len(decisions.open)):
        if decisions.is_active(place, choices[child]):
            having = {choices[parent][place] for parent in (first, second) if decisions.is_active(place, choices[parent])}
            assert choices[child][place] in having
    assert cross(decisions, first, first, generator) == first


def test_mutation_reaches_everything_and_can_leave_everything() -> None:
    decisions = Decisions(SMALL)
    generator = Random(0)
    assert {mutate(decisions, SMALL.largest(), generator, probability=0.4) for _ in range(3_000)} == set(SMALL.every())
    changed = [mutate(decisions, SMALL.largest(), generator, probability=0.1) != SMALL.largest() for _ in range(1_000)]
    assert 0.1 < mean(changed) < 0.5


def test_shrinking_goes_on_until_it_fits() -> None:
    decisions, generator = Decisions(LARGE), Random(0)
    costs = question(LARGE, 1).costs
    most = 1.05 * costs(LARGE.smallest())["flops"]
    small = shrink(decisions, LARGE.largest(), lambda subnet: costs(subnet)["flops"] <= most, generator)
    assert small is not None
    assert costs(small)["flops"] <= most
    assert shrink(decisions, small, lambda _: True, generator) == small
    assert shrink(decisions, LARGE.largest(), lambda _: False, generator) is None


@pytest.mark.parametrize("method", METHODS, ids=by_kind)
@pytest.mark.parametrize("limit", [0.0, 0.4])
def test_the_same_seed_asks_the_same_within_budget_and_limits(method: Search, limit: float) -> None:
    runs = []
    for seed in (1, 1, 2):
        asked = question(LARGE, 50, limit=limit)
        runs.append(search(method, asked, seed=seed))
        assert len(runs[-1]) == asked.num_spent == 50
        assert all(one.keeps(asked.limits) for one in runs[-1])
        for one in runs[-1]:
            LARGE.check(one.subnet)
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


@pytest.mark.parametrize("method", METHODS, ids=by_kind)
def test_a_small_space_is_found_whole_and_then_the_search_ends(method: Search) -> None:
    asked = question(SMALL, 10_000)
    everything = {subnet: question(SMALL, 48).ask(subnet) for subnet in SMALL.every()}
    found = search(method, asked, seed=0)
    true_front = front(list(everything.values()), "flops")
    if isinstance(method, NSGA2):  # converges upon the front, and ends when nothing new comes
        assert front(found, "flops")[-1] == true_front[-1]
        assert _area(found, asked) >= 0.97 * _area(list(everything.values()), asked)
    else:
        assert {one.subnet: one for one in found} == everything


@pytest.mark.parametrize("method", METHODS, ids=by_kind)
@pytest.mark.parametrize("limit", [0.25, 0.5])
def test_the_best_of_a_small_space_is_found(method: Search, limit: float) -> None:
    asked = question(SMALL, 40, limit=limit)
    truth = question(SMALL, 48, limit=limit)
    everything = [truth.ask(subnet) for subnet in SMALL.every()]
    assert best(search(method, asked, seed=0), "flops", asked.limits) == best(everything, "flops", truth.limits)


@pytest.mark.parametrize("method", METHODS[1:], ids=by_kind)
def test_fronts_are_better_than_those_of_random_search(method: Search) -> None:
    areas: dict[str, list[float]] = {"method": [], "random": []}
    for seed in range(4):
        for name, one in (("method", method), ("random", RandomSearch())):
            asked = question(LARGE, 150, seed=seed)
            areas[name].append(_area(search(one, asked, seed=seed), asked))
    assert mean(areas["method"]) > mean(areas["random"]) + 0.01


@pytest.mark.parametrize("limit", [0.25, 0.5])
def test_evolution_is_better_within_limits_than_random_search(limit: float) -> None:
    accuracies: dict[str, list[float]] = {"evolution": [], "random": []}
    for seed in range(4):
        for one in (Evolution(), RandomSearch()):
            asked = question(LARGE, 100, limit=limit, seed=seed)
            accuracies[one.kind].append(best(search(one, asked, seed=seed), "flops", asked.limits).accuracy)
    assert mean(accuracies["evolution"]) > mean(accuracies["random"]) + 0.01


def test_a_limit_that_drawing_never_keeps_is_told_and_evolution_goes_there(caplog: pytest.LogCaptureFixture) -> None:
    smallest = question(LARGE, 1).costs(LARGE.smallest())["flops"]
    limit = 1.0001 * smallest / question(LARGE, 1).costs(LARGE.largest())["flops"]
    with pytest.raises(ValueError, match=r"of 50 sub-networks drawn none keeps flops <= .*; the smallest has flops .*search by evolution"):
        search(RandomSearch(max_draws=50), question(LARGE, 10, limit=limit), seed=0)
    asked = question(LARGE, 10, limit=limit)
    with caplog.at_level(logging.WARNING):
        found = search(Evolution(max_draws=50), asked, seed=0)
    assert LARGE.smallest() in [one.subnet for one in found]
    assert all(one.keeps(asked.limits) for one in found)
    assert "the search ends after" in caplog.text
    with pytest.raises(ValueError, match=r"drawn none keeps"):
        search(Evolution(max_draws=50), question(LARGE, 10, limit=limit / 2), seed=0)
    with pytest.raises(ValueError, match=r"drawn none keeps"):
        search(NSGA2(max_free_trials=50), question(LARGE, 10, limit=limit / 2), seed=0)


def test_what_is_beyond_the_limits_takes_no_evaluation() -> None:
    asked = question(LARGE, 30, limit=0.3)
    accuracies: list[Any] = []
    true = asked.accuracy

    def counted(subnet: Any) -> float:
        accuracies.append(subnet)
        return true(subnet)

    asked.accuracy = counted
    search(NSGA2(population_size=8), asked, seed=0)
    assert len(accuracies) == len(set(accuracies)) == 30


@pytest.mark.parametrize("method", METHODS, ids=by_kind)
def test_a_space_of_one_is_asked_once(method: Search) -> None:
    assert len(search(method, question(SPACES["fixed"](), 5), seed=0)) == 1


def test_nsga2_without_optuna_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ValueError, match=r"pip install 'llmdistill\[search\]'"):
        search(NSGA2(), question(SMALL, 5), seed=0)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: RandomSearch(max_draws=0), "RandomSearch.max_draws is 0"),
        (lambda: Evolution(population_size=3), "population_size 3"),
        (lambda: Evolution(parent_share=0.01), "parent_share is 0.01 of 16"),
        (lambda: replace(Evolution(), parent_share=0.99), "leaves room for a child"),
        (lambda: Evolution(mutation_probability=0.0), "mutation_probability 0.0"),
        (lambda: NSGA2(population_size=1), "population_size 1"),
        (lambda: NSGA2(crossover_probability=2.0), "crossover_probability is 2.0"),
    ],
)
def test_settings_that_cannot_be_say_why(make: Callable[[], Search], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def _area(candidates: list[Candidate], asked: Question) -> float:
    return hypervolume(candidates, "flops", worst_cost=asked.costs(asked.space.largest())["flops"])
