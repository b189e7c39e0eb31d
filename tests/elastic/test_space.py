"""Spaces and sub-networks as data: legal values, text, JSON, vectors; no model is run."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import replace

import pytest

from llmdistill.elastic.axes import Axes, spread_order
from llmdistill.elastic.choice import parse, write
from llmdistill.elastic.features import feature_names, features
from llmdistill.elastic.shape import ModelShape, StackShape
from llmdistill.elastic.space import Space, StackChoice, Subnet, is_even

CAUSAL_ROLES = ("q", "k", "v", "o", "ffn_gate", "ffn_in", "ffn_out")
ENCODER = StackShape(
    name="encoder",
    num_layers=4,
    heads=4,
    group=1,
    head_width=8,
    ffn_width=64,
    roles=("q", "k", "v", "o", "ffn_in", "ffn_out"),
    num_norms=2,
    num_buckets=32,
    ranks=(("1.q", 12),),
)
DECODER = replace(
    ENCODER, name="decoder", num_layers=2, num_norms=3, ranks=(), roles=(*ENCODER.roles[:4], "cross_q", "cross_k", "cross_v", "cross_o", *ENCODER.roles[4:])
)
T5 = ModelShape(architecture="t5", vocabulary=100, width=32, tied_head=True, stacks=(ENCODER, DECODER))
LLAMA_STACK = replace(DECODER, heads=6, group=2, num_buckets=0, roles=CAUSAL_ROLES, num_norms=2)
LLAMA = ModelShape(architecture="llama", vocabulary=100, width=48, tied_head=True, stacks=(LLAMA_STACK,))
AXES = Axes(ffn=(0.5,), heads=(0.25, 0.5), depth=(0.5,), width=(0.5,), rank=(0.5,))
SPACES = {
    "t5": AXES.space(T5),
    "t5 even": replace(AXES, even=True, rank=(1.0,)).space(replace(T5, stacks=(replace(ENCODER, ranks=()), DECODER))),
    "llama": AXES.space(LLAMA),
    "fixed": Axes(ffn=(1.0,), heads=(1.0,), depth=(1.0,)).space(LLAMA),
}


@pytest.fixture(params=sorted(SPACES))
def space(request: pytest.FixtureRequest) -> Space:
    return SPACES[request.param]


def test_every_subnet_is_legal_once_and_counted(space: Space) -> None:
    subnets = list(space.every())
    assert len(subnets) == len(set(subnets)) == space.num_subnets
    assert {space.largest(), space.smallest()} <= set(subnets)
    for subnet in subnets[:: max(1, len(subnets) // 200)]:
        space.check(subnet)


def test_samples_are_legal_and_repeatable_and_reach_every_value(space: Space) -> None:
    samples = [space.sample(random.Random(seed)) for seed in range(200)]
    assert samples == [space.sample(random.Random(seed)) for seed in range(200)]
    for subnet in samples:
        space.check(subnet)
        assert not space.even or is_even(subnet)
    for number, stack in enumerate(space.stacks):
        assert {subnet.stacks[number].depth for subnet in samples} == set(stack.depths)
        assert {width for subnet in samples for width in subnet.stacks[number].ffn_widths} == set(stack.ffn_widths)
        assert {heads for subnet in samples for heads in subnet.stacks[number].heads} == set(stack.heads)
    assert {subnet.width for subnet in samples} == set(space.widths)


def test_space_and_subnet_survive_json(space: Space) -> None:
    assert Space.from_json(json.loads(json.dumps(space.to_json()))) == space
    subnet = space.sample(random.Random(1))
    assert Subnet.from_json(json.loads(json.dumps(subnet.to_json()))) == subnet


def test_text_says_every_subnet(space: Space) -> None:
    for seed in range(50):
        subnet = space.sample(random.Random(seed))
        assert parse(write(subnet, space), space) == subnet
    assert parse("largest", space) == space.largest()
    assert parse("smallest", space) == space.smallest()


def test_what_is_not_said_is_the_largest() -> None:
    space = SPACES["t5"]
    whole = space.largest()
    subnet = parse("ffn=32, decoder.depth=1", space)
    assert subnet.width == 32
    assert subnet.stacks[0] == replace(whole.stacks[0], ffn_widths=(32,) * 4)
    assert subnet.stacks[1] == StackChoice(heads=(4,), ffn_widths=(32,), ranks=(1.0,))
    assert parse("decoder.ffn=64+32", space).stacks[1].ffn_widths == (64, 32)


@pytest.mark.parametrize(
    "text, message",
    [
        ("ffn=48", r"encoder.ffn is 48: this checkpoint has 32, 64"),
        ("tail=3", r"'tail=3'.*write width=NUMBER"),
        ("middle.ffn=32", r"stacks: encoder, decoder"),
        ("ffn", r"'ffn' in 'ffn' is no choice"),
        ("ffn=a", r"'ffn=a' has no whole numbers"),
        ("decoder.ffn=32+64+32", r"decoder.ffn has 3 values for 2 layers"),
        ("encoder.heads=4+2+4+4", r"encoder.heads is .*share one table"),
        ("depth=0", r"encoder.depth is 0: this checkpoint has 2, 4"),
    ],
)
def test_text_that_means_nothing_says_what_would(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text, SPACES["t5"])


def test_spaces_that_cannot_be_say_why() -> None:
    space = SPACES["llama"]
    stack = space.stacks[0]
    for changed, message in (
        (replace(stack, heads=(3, 6)), "2 of them share a key/value head"),
        (replace(stack, depths=(2, 1)), "ascending"),
        (replace(stack, ffn_widths=(16,)), r"with the whole \(64\)"),
        (replace(stack, layer_order=(0, 0)), "every layer from 0 to 1 once"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(space, stacks=(changed,))
    with pytest.raises(ValueError, match="multiple of the heads"):
        replace(SPACES["fixed"], stacks=(replace(SPACES["fixed"].stacks[0], heads=(4, 6)),), widths=(8, 34, 48), even=True)
    with pytest.raises(ValueError, match=r"Axes.ffn has 1.5"):
        Axes(ffn=(1.5,))
    with pytest.raises(ValueError, match="layer_orders are given for"):
        AXES.space(LLAMA, {"encoder": (0, 1)})
    even = SPACES["t5 even"]
    with pytest.raises(ValueError, match="the space is even"):
        even.check(replace(even.largest(), stacks=(even.largest().stacks[0], even.smallest().stacks[1])))


def test_layers_are_kept_by_order_and_nest() -> None:
    stack = replace(SPACES["t5"].stacks[0], layer_order=(2, 0, 3, 1))
    assert [stack.kept_layers(depth) for depth in (1, 2, 3)] == [(2,), (0, 2), (0, 2, 3)]


def test_spread_order_is_even_at_half_the_depth() -> None:
    assert sorted(spread_order(9)[:5]) == [0, 2, 4, 6, 8]
    for number in range(1, 12):
        assert sorted(spread_order(number)) == list(range(number))


def test_vectors_tell_subnets_apart(space: Space) -> None:
    subnets = list(space.every())[:3000]
    vectors = {features(space, subnet) for subnet in subnets}
    assert len(vectors) == len(subnets)
    assert {len(vector) for vector in vectors} == {len(feature_names(space))}
    assert all(0.0 <= value <= 1.0 for vector in vectors for value in vector)
    assert set(features(space, space.largest())) <= {1.0}


def test_settings_load_no_torch() -> None:
    modules = "axes, choice, cost, features, kept, shape, space"
    code = f"import sys; from llmdistill.elastic import {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
