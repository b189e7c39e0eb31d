"""How well predictions agree with what was measured: order, and errors.

Source: Kendall 1945, "The treatment of ties in ranking problems" (tau-b). A search needs the order of sub-networks more than their numbers, and tau is how many
more pairs of them are in the right order than in the wrong one, as a share of all.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from random import Random


def kendall_tau(predicted: Sequence[float], measured: Sequence[float]) -> float:
    """Kendall's tau-b: 1 for the same order, -1 for the reverse, about 0 for none; 0 where one of both is all ties and so has no order."""
    if len(predicted) != len(measured):
        raise ValueError(f"there are {len(predicted)} predictions and {len(measured)} measurements; give one prediction for each")
    balance = num_untied_predicted = num_untied_measured = 0
    for (one, true_one), (other, true_other) in itertools.combinations(zip(predicted, measured, strict=True), 2):
        order, true_order = (one > other) - (one < other), (true_one > true_other) - (true_one < true_other)
        balance += order * true_order
        num_untied_predicted += order != 0
        num_untied_measured += true_order != 0
    if not (num_untied_predicted and num_untied_measured):
        return 0.0
    return balance / math.sqrt(num_untied_predicted * num_untied_measured)


def held_out(num: int, *, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Which of `num` samples are fitted to and which are held out, by the seed: at least one of each, ascending."""
    places = list(range(num))
    Random(seed).shuffle(places)
    num_held_out = min(num - 1, max(1, round(num * share)))
    return sorted(places[num_held_out:]), sorted(places[:num_held_out])
