"""Choices that are over the limits, made smaller until they are within, at the least loss of probability.

Costs are free to ask, so a method that draws sub-networks from probabilities need not spend evaluations on those that cannot be the answer. What is drawn is
taken towards the limits greedily: of all single decisions that could have a smaller value, that one is changed which saves most excess for the probability that
it loses, and again until nothing is in excess. Drawing until a sample happens to be within would give the distribution truncated to the limits, and would
hardly ever end where limits are tight; this is near the sample and ends always.
"""

from __future__ import annotations

from collections.abc import Sequence

from llmdistill.elastic.decisions import Decisions
from llmdistill.elastic.question import Question, excess

_LEAST_LOSS = 1e-3  # in nats: a change to a value that is more probable still counts as some


def within_limits(question: Question, decisions: Decisions, choices: Sequence[int], log_probabilities: Sequence[Sequence[float]]) -> list[int]:
    """The choices, or smaller ones that keep the limits; where none do, the nearest that are found."""
    choices, over = list(choices), _excess(question, decisions, choices)
    while over > 0:
        steps: list[tuple[float, list[int], float]] = []
        for place in range(len(choices)):
            if decisions.is_active(place, choices):
                of_place = log_probabilities[place]
                for smaller in range(choices[place]):
                    changed = [*choices[:place], smaller, *choices[place + 1 :]]
                    left = _excess(question, decisions, changed)
                    lost = max(_LEAST_LOSS, of_place[choices[place]] - of_place[smaller])
                    steps.append(((over - left) / lost, changed, left))
        best = max(steps, key=lambda step: step[0], default=(0.0, choices, over))
        if best[0] <= 0:
            return choices
        _, choices, over = best
    return choices


def _excess(question: Question, decisions: Decisions, choices: Sequence[int]) -> float:
    return excess(question.costs(decisions.subnet(choices)), question.limits) if question.limits else 0.0
