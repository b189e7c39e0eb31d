"""Which sub-networks are trained: a function of the seed and the step, always legal, and from the largest to the whole space in progressive shrinking."""

from __future__ import annotations

from dataclasses import replace

import pytest
from elastic_models import MODELS, elastic_model

from llmdistill.elastic.axes import Axes
from llmdistill.elastic.space import Space
from llmdistill.elastic.strategy import AXES, Progressive, Sandwich, watched

UNEVEN = Axes(ffn=(0.25, 0.5), heads=(0.5,), depth=(0.34, 0.67), width=(0.5, 0.75), rank=(0.5,))
strategies = pytest.mark.parametrize("strategy", [Sandwich(), Sandwich(num_random=0), Progressive(), Progressive(order=AXES[::-1], num_random=1)])


def space_of(name: str, *, even: bool = False) -> Space:
    return elastic_model(name, replace(UNEVEN, even=even))[1]


@strategies
@pytest.mark.parametrize(
    "name, even",
    [(name, False) for name in MODELS] + [(name, True) for name in MODELS if "llama" not in name],  # whose widths must be multiples of the heads
)
def test_every_step_has_as_many_legal_ones_and_a_resumed_run_has_the_same(name: str, strategy: Sandwich | Progressive, even: bool) -> None:
    space = space_of(name, even=even)
    at, again = (strategy.subnets(space, seed=3, num_steps=40) for _ in range(2))
    for step in (*range(39, -1, -7), *range(40)):
        subnets = at(step)
        assert len(subnets) == strategy.num_subnets
        for subnet in subnets:
            space.check(subnet)
        assert list(again(step)) == list(subnets)


def test_the_sandwich_has_the_smallest_and_others_by_seed_and_step() -> None:
    space = space_of("t5 v1.1")
    at, other = (Sandwich().subnets(space, seed=seed, num_steps=40) for seed in (0, 1))
    assert {at(step)[0] for step in range(9)} == {space.smallest()}
    assert len({at(step)[1] for step in range(40)}) > 30
    assert at(5)[1:] != other(5)[1:]


@pytest.mark.parametrize("name", list(MODELS))
def test_phases_open_one_value_at_a_time_until_all_are_open(name: str) -> None:
    space = space_of(name)
    phases = Progressive().phases(space)
    assert phases[-1] == space
    sizes = [phase.num_subnets for phase in phases]
    assert sizes == sorted(set(sizes))
    assert sizes[0] > 1
    for phase in phases:
        assert phase.largest() == space.largest()


def test_early_steps_are_shallow_in_the_first_axis_only() -> None:
    space = space_of("llama grouped")
    at = Progressive(order=("ffn", "depth", "heads", "rank", "width")).subnets(space, seed=0, num_steps=1000)
    first = [subnet for step in range(5) for subnet in at(step)]
    assert {subnet.width for subnet in first} == {space.shape.width}
    assert {stack.depth for subnet in first for stack in subnet.stacks} == {3}
    assert {width for subnet in first for stack in subnet.stacks for width in stack.ffn_widths} == set(space.stacks[0].ffn_widths[-2:])
    last = [subnet for step in range(900, 1000) for subnet in at(step)]
    assert {subnet.width for subnet in last} == set(space.widths)


def test_what_is_watched_is_the_smallest_and_the_same_every_time() -> None:
    space = space_of("qwen2")
    assert watched(space, seed=1) == watched(space, seed=1) != watched(space, seed=2)
    assert watched(space, seed=1)[0] == space.smallest()


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda: Sandwich(num_random=-1), "num_random is -1; give 0 or more"),
        (lambda: Progressive(num_random=0), "num_random is 0; give 1 or more"),
        (lambda: Progressive(order=("depth",)), "name each of depth, ffn, heads, rank, width once"),
        (lambda: Progressive(open_share=0.0), "open_share is 0.0"),
    ],
)
def test_settings_that_cannot_be_are_refused(wrong: object, message: str) -> None:
    assert callable(wrong)
    with pytest.raises(ValueError, match=message):
        wrong()
