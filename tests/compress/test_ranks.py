"""Laws of the budget: it is met and nearly used up, more of it never takes ranks away, and no allocation of single ranks wins more than the global one."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmdistill.compress.ranks import Allocation, Budget, Item, allocate, kept_share, linear_costs

KEEPS = st.floats(0.35, 1.0)


@st.composite
def layers(draw: st.DrawFn, most: int = 6, width: int = 24) -> list[Item]:
    """Linears of some sizes with some spectra, flat and steep ones, zero ones too."""
    items = []
    for number in range(draw(st.integers(1, most))):
        inputs, outputs = draw(st.integers(8, width)), draw(st.integers(8, width))
        values = draw(st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1e3)), min_size=min(inputs, outputs), max_size=min(inputs, outputs)))
        rank_cost, full_cost = linear_costs(inputs, outputs, Budget.PARAMETERS, bytes_per_number=4)
        items.append(Item(name=str(number), importance=sorted(values, reverse=True), rank_cost=rank_cost, full_cost=full_cost))
    return items


def won(items: list[Item], ranks: dict[str, int]) -> float:
    return sum(item.removed[min(ranks[item.name], item.most)] for item in items)


@given(layers(), KEEPS, st.sampled_from(Allocation))
@settings(deadline=None)
def test_the_budget_is_met(items: list[Item], keep: float, allocation: Allocation) -> None:
    ranks = allocate(items, keep, allocation)
    assert kept_share(items, ranks) <= keep * (1 + 1e-12)
    assert all(1 <= ranks[item.name] <= item.full_rank for item in items)


@given(layers(), KEEPS)
@settings(deadline=None)
def test_uniform_ranks_are_within_one_rank_of_the_share(items: list[Item], keep: float) -> None:
    ranks = allocate(items, keep, Allocation.UNIFORM)
    for item in items:
        assert item.cost(ranks[item.name]) <= keep * item.full_cost < item.cost(ranks[item.name]) + item.rank_cost or item.is_dense(ranks[item.name])


@given(layers(), KEEPS)
@settings(deadline=None)
def test_global_ranks_leave_less_than_one_step_unused(items: list[Item], keep: float) -> None:
    ranks = allocate(items, keep, Allocation.GLOBAL)
    left = keep * sum(item.full_cost for item in items) - sum(item.cost(ranks[item.name]) for item in items)
    for item in items:
        rank = ranks[item.name]
        assert item.is_dense(rank) or item.cost(rank + 1) - item.cost(rank) > left


@given(layers(), KEEPS)
@settings(deadline=None)
def test_every_layer_keeps_at_least_the_share_of_its_importance_that_the_energy_allocation_found(items: list[Item], keep: float) -> None:
    ranks = allocate(items, keep, Allocation.ENERGY)
    reached = [item.removed[ranks[item.name]] / item.removed[-1] for item in items if item.removed[-1]]
    one_less = [item.removed[ranks[item.name] - 1] / item.removed[-1] for item in items if item.removed[-1] and ranks[item.name] > 1]
    assert min(reached, default=1.0) >= max(one_less, default=0.0)


@given(layers(), st.floats(0.35, 0.9), st.floats(0.0, 0.1), st.sampled_from([Allocation.UNIFORM, Allocation.ENERGY]))
@settings(deadline=None)
def test_more_to_keep_takes_no_rank_away(items: list[Item], keep: float, more: float, allocation: Allocation) -> None:
    fewer, many = allocate(items, keep, allocation), allocate(items, keep + more, allocation)
    assert all(fewer[name] <= many[name] for name in fewer)


@given(layers(most=3, width=10), KEEPS)
@settings(deadline=None)
def test_global_is_the_optimum_up_to_its_last_step(items: list[Item], keep: float) -> None:
    """Of all ranks there are, found by trying: none wins more at the cost that global has, up to one step that did not fit."""
    ranks = allocate(items, keep, Allocation.GLOBAL)
    spent = sum(item.cost(ranks[item.name]) for item in items)
    largest_step = max(item.removed[-1] for item in items)
    for tried in itertools.product(*(range(1, item.most + 1) for item in items)):
        those = {item.name: rank for item, rank in zip(items, tried, strict=True)}
        if sum(item.cost(rank) for item, rank in zip(items, tried, strict=True)) <= spent:
            assert won(items, those) <= won(items, ranks) + largest_step * (1 + 1e-9)


@pytest.mark.parametrize("keep", [0.5, 0.7, 0.9])
def test_global_wins_at_least_what_the_others_win(keep: float) -> None:
    items = [
        Item(name=str(number), importance=[(rank + 1) ** -slope for rank in range(24)], rank_cost=24 + outputs, full_cost=24 * outputs)
        for number, (slope, outputs) in enumerate([(0.3, 24), (1.0, 64), (2.0, 64), (1.5, 32)])
    ]
    best = won(items, allocate(items, keep, Allocation.GLOBAL))
    assert best >= won(items, allocate(items, keep, Allocation.ENERGY))
    assert best > won(items, allocate(items, keep, Allocation.UNIFORM))


def test_a_flat_layer_stays_dense_and_a_steep_one_gives_its_ranks() -> None:
    """Ranks of a flat layer are worth little one by one, but the step to dense wins half its energy for the last rank."""
    flat = Item(name="flat", importance=[1.0] * 16, rank_cost=32, full_cost=256)
    steep = Item(name="steep", importance=[16.0, 1e-3, *[0.0] * 14], rank_cost=32, full_cost=256)
    ranks = allocate([flat, steep], 0.6, Allocation.GLOBAL)
    assert flat.is_dense(ranks["flat"])
    assert not steep.is_dense(ranks["steep"])


def test_everything_kept_is_everything_dense() -> None:
    items = [Item(name=str(size), importance=[1.0] * size, rank_cost=2 * size, full_cost=size * size) for size in (4, 9, 16)]
    for allocation in Allocation:
        assert all(item.is_dense(rank) for item, rank in zip(items, allocate(items, 1.0, allocation).values(), strict=True))


def test_factors_in_fewer_bits_have_no_break_even_and_reach_full_rank() -> None:
    item = Item(name="int4", importance=[4.0, 3.0, 2.0, 1.0], rank_cost=1, full_cost=16)
    assert allocate([item], 1.0, Allocation.GLOBAL) == {"int4": 4}
    assert not item.is_dense(4)


def test_costs_in_each_unit() -> None:
    assert linear_costs(3, 5, Budget.PARAMETERS, bytes_per_number=2) == (8, 15)
    assert linear_costs(3, 5, Budget.BYTES, bytes_per_number=2) == (16, 30)
    assert linear_costs(3, 5, Budget.FLOPS, bytes_per_number=2) == (16, 30)


@pytest.mark.parametrize("settings, says", [({"keep": 0.0}, "keep is 0"), ({"keep": 1.5}, "keep is 1.5"), ({"keep": 0.01}, "rank 1 everywhere keeps 0.5")])
def test_refuses_what_cannot_be_kept(settings: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        allocate([Item(name="a", importance=[1.0] * 4, rank_cost=8, full_cost=16)], settings["keep"], Allocation.GLOBAL)


def test_a_uniform_share_below_rank_1_names_the_layer() -> None:
    large, small = Item(name="large", importance=[1.0] * 64, rank_cost=128, full_cost=4096), Item(name="small", importance=[1.0] * 4, rank_cost=8, full_cost=16)
    with pytest.raises(ValueError, match=r"rank 1 of small keeps 0\.5"):
        allocate([large, small], 0.2, Allocation.UNIFORM)
