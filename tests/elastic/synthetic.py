"""Spaces and accuracies that need no model: an accuracy that grows with everything, by laws of diminishing returns, in which parts need each other."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

from llmdistill.elastic.axes import Axes
from llmdistill.elastic.cost import flops, num_bytes
from llmdistill.elastic.features import features
from llmdistill.elastic.question import Limit, Question
from llmdistill.elastic.shape import ModelShape, StackShape
from llmdistill.elastic.space import Space, Subnet

_LAYER: dict[str, Any] = {"heads": 4, "group": 1, "head_width": 16, "ffn_width": 128}
_ENCODER = StackShape(name="encoder", num_layers=4, roles=("q", "k", "v", "o", "ffn_in", "ffn_out"), num_norms=2, num_buckets=32, **_LAYER)
_DECODER = StackShape(
    name="decoder",
    num_layers=4,
    roles=("q", "k", "v", "o", "cross_q", "cross_k", "cross_v", "cross_o", "ffn_in", "ffn_out"),
    num_norms=3,
    num_buckets=32,
    **_LAYER,
)
LARGE = Axes(width=(0.5, 0.75)).space(ModelShape(architecture="t5", vocabulary=500, width=64, tied_head=True, stacks=(_ENCODER, _DECODER)))
"""Millions of sub-networks."""
SMALL = Axes(ffn=(0.25, 0.5), heads=(0.5,), depth=(0.5,), width=(0.5,), even=True).space(LARGE.shape)
"""48 of them."""


def synthetic_accuracy(space: Space, *, seed: int = 0) -> Callable[[Subnet], float]:
    """Some parts matter ten times as much as others, and some only together."""
    generator = random.Random(seed)
    num = len(features(space, space.largest()))
    weights = [10 ** generator.uniform(-1, 0) for _ in range(num)]
    pairs = [(generator.randrange(num), generator.randrange(num), generator.uniform(0.2, 1.0)) for _ in range(num)]
    most = (sum(weights) + sum(weight for *_, weight in pairs)) or 1.0

    def accuracy(subnet: Subnet) -> float:
        vector = features(space, subnet)
        alone = sum(weight * value**0.5 for weight, value in zip(weights, vector, strict=True))
        together = sum(weight * min(vector[first], vector[second]) for first, second, weight in pairs)
        return 0.95 * (1 - math.exp(-3 * (alone + together) / most))

    return accuracy


def question(space: Space, budget: float, *, limit: float = 0.0, seed: int = 0) -> Question:
    """Accuracy against operations, which may be so large a share of those of the whole model at most; 0 is no limit."""

    def costs(subnet: Subnet) -> dict[str, float]:
        return {"flops": flops(space, subnet, prompt_tokens=32, new_tokens=16), "weight_bytes": num_bytes(space, subnet)}

    limits = (Limit(cost="flops", most=limit * costs(space.largest())["flops"]),) if limit else ()
    return Question(space=space, accuracy=synthetic_accuracy(space, seed=seed), costs=costs, cost="flops", limits=limits, budget=budget)
