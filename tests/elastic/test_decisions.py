"""The flat list of decisions: every sub-network is its choices and the other way round, and any choices are legal."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from test_space import AXES, DECODER, ENCODER, LLAMA, SPACES, T5

from llmdistill.elastic.axes import Axes
from llmdistill.elastic.decisions import Decisions
from llmdistill.elastic.space import Space


@pytest.fixture(params=sorted(SPACES))
def space(request: pytest.FixtureRequest) -> Space:
    return SPACES[request.param]


def test_every_subnet_comes_back_from_its_choices(space: Space) -> None:
    decisions = Decisions(space)
    subnets = list(space.every())
    for subnet in subnets[:: max(1, len(subnets) // 3000)]:
        assert decisions.subnet(decisions.choices(subnet)) == subnet


def test_any_choices_are_legal_and_the_active_ones_come_back(space: Space) -> None:
    decisions, generator = Decisions(space), random.Random(0)
    reached = set()
    for _ in range(300):
        choices = [generator.randrange(len(decision.values)) for decision in decisions.open]
        subnet = decisions.subnet(choices)
        space.check(subnet)
        reached.add(subnet)
        for place, (chosen, back) in enumerate(zip(choices, decisions.choices(subnet), strict=True)):
            assert back == (chosen if decisions.is_active(place, choices) else len(decisions.open[place].values) - 1)
    assert len(reached) > min(100, space.num_subnets // 3)


def test_inactive_decisions_make_no_difference_and_active_ones_do(space: Space) -> None:
    decisions, generator = Decisions(space), random.Random(1)
    for _ in range(50):
        choices = [generator.randrange(len(decision.values)) for decision in decisions.open]
        before = decisions.subnet(choices)
        for place, decision in enumerate(decisions.open):
            changed = list(choices)
            changed[place] = (choices[place] + 1) % len(decision.values)
            assert (decisions.subnet(changed) != before) == decisions.is_active(place, choices)


def test_the_number_of_subnets_is_that_of_active_choices() -> None:
    """In a space without depths every combination is another sub-network."""
    axes = Axes(ffn=(0.5,), heads=(0.5,), depth=(1.0,), width=(0.5,))
    for shape in (T5, LLAMA):
        space = axes.space(shape)
        number = 1
        for decision in Decisions(space).open:
            number *= len(decision.values)
        assert number == space.num_subnets


def test_names_and_order() -> None:
    space = SPACES["t5"]
    names = [decision.name for decision in Decisions(space).open]
    assert names[:4] == ["width", "encoder.depth", "encoder.heads", "encoder.0.ffn"]
    assert "decoder.1.ffn" in names
    assert "encoder.1.rank" in names
    assert not [name for name in names if name.startswith("decoder") and name.endswith("rank")]  # nothing there has ranks
    assert len(set(names)) == len(names)
    assert [decision.name for decision in Decisions(SPACES["t5 even"]).open] == ["width", "encoder.depth", "decoder.depth", "heads", "ffn"]
    assert "decoder.1.heads" in [decision.name for decision in Decisions(SPACES["llama"]).open]
    assert Decisions(SPACES["fixed"]).open == ()
    assert Decisions(SPACES["fixed"]).subnet([]) == SPACES["fixed"].largest()


def test_largest_and_depths_of_the_stacks_a_decision_concerns() -> None:
    decisions = Decisions(SPACES["t5"])
    assert decisions.subnet(decisions.largest()) == SPACES["t5"].largest()
    by_name = {decision.name: place for place, decision in enumerate(decisions.open)}
    assert decisions.depth_places(by_name["encoder.2.ffn"]) == (by_name["encoder.depth"],)
    assert decisions.depth_places(by_name["width"]) == ()
    even = Decisions(SPACES["t5 even"])
    assert even.depth_places([decision.name for decision in even.open].index("ffn")) == (1, 2)


def test_a_layer_stays_at_the_depths_that_its_order_says() -> None:
    stacks = (replace(ENCODER, ranks=()), DECODER)
    space = replace(AXES, rank=(1.0,), depth=(0.25, 0.5)).space(replace(T5, stacks=stacks), {"encoder": (2, 0, 3, 1)})
    decisions = Decisions(space)
    assert [decisions.kept_at("encoder", layer) for layer in range(4)] == [(False, True, True), (False, False, True), (True, True, True), (False, False, True)]


def test_wrong_choices_are_refused() -> None:
    decisions = Decisions(SPACES["llama"])
    for wrong in ([], [99] * len(decisions.open), [-1] * len(decisions.open)):
        with pytest.raises(ValueError, match="positions"):
            decisions.subnet(wrong)
