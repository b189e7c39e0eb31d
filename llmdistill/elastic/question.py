"""What a search is asked, and how its answers are counted: the same for every method, so that they can be compared.

A question is a space, what a sub-network's accuracy and costs are, the limits that an answer must keep, and a budget. The budget is in evaluations: one is
the accuracy of one sub-network on all validation rows. Costs (milliseconds, bytes) come from a table or from arithmetic and are free. What a method asks
twice is counted once. A method that takes gradients says how many evaluations they are worth (`spend`): a pass forward and backward over a share of the
rows is three times that share.

A method asks until the budget is spent. What it has found is then read off everything that was asked: the front, or the best within the limits.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Protocol

from llmdistill.elastic.choice import Subnet
from llmdistill.elastic.space import Space

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmdistill.batches import Example
    from llmdistill.train import Loss

GRADIENT_PASSES = 3
"""A pass forward and backward, in passes forward."""


class BudgetSpentError(Exception):
    """There are no evaluations left; what was asked before stays answered."""


@dataclass(frozen=True, kw_only=True)
class Limit:
    """A cost that must not be exceeded, by the name that costs give it, such as latency_ms_batch_1 or weight_bytes."""

    cost: str
    most: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.most) and self.most > 0):
            raise ValueError(f"the limit of {self.cost} is {self.most}; give a number above 0")

    @classmethod
    def parse(cls, text: str) -> Limit:
        """From a text such as latency_ms_batch_1<=20."""
        cost, _, most = (part.strip() for part in text.partition("<="))
        try:
            return cls(cost=cost, most=float(most))
        except ValueError:
            raise ValueError(f"{text!r} is no limit; write COST<=NUMBER with a number above 0, such as latency_ms_batch_1<=20 or weight_bytes<=1e7") from None


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A sub-network that was asked about. Accuracy is higher for better ones; costs are lower."""

    subnet: Subnet
    accuracy: float
    costs: Mapping[str, float]

    def keeps(self, limits: Sequence[Limit]) -> bool:
        """Whether it is within all limits."""
        return excess(self.costs, limits) == 0


@dataclass(frozen=True, kw_only=True)
class Supernet:
    """The elastic model and the validation rows, for methods that look inside. The model is whole; a method leaves it so, and its weights as they are."""

    model: PreTrainedModel
    examples: Sequence[Example]
    loss: Loss


@dataclass(kw_only=True)
class Question:
    """One search's question. `cost` is the one that is weighed against accuracy."""

    space: Space
    accuracy: Callable[[Subnet], float]
    costs: Callable[[Subnet], Mapping[str, float]]
    cost: str
    limits: tuple[Limit, ...] = ()
    budget: float
    supernet: Supernet | None = None
    """None where only accuracies are to be had, such as those of a predictor."""
    asked: dict[Subnet, Candidate] = field(default_factory=dict)
    num_spent: float = 0.0

    def __post_init__(self) -> None:
        if not self.budget >= 1:
            raise ValueError(f"the budget of a search is {self.budget}; give 1 evaluation or more")
        known = self.costs(self.space.largest())
        for name in (self.cost, *(limit.cost for limit in self.limits)):
            if name not in known:
                raise ValueError(f"{name!r} is no cost that is known here; there are {', '.join(known)}")

    @property
    def left(self) -> float:
        """Evaluations that may still be spent."""
        return self.budget - self.num_spent

    def ask(self, subnet: Subnet) -> Candidate:
        """Its accuracy and costs; BudgetSpentError where that would be one too many."""
        if subnet not in self.asked:
            self.space.check(subnet)
            self.spend(1)
            self.asked[subnet] = Candidate(subnet=subnet, accuracy=self.accuracy(subnet), costs=self.costs(subnet))
        return self.asked[subnet]

    def spend(self, evaluations: float) -> None:
        """Count what was done besides asking; BudgetSpentError where there is not so much left, and then it must not be done."""
        if evaluations > self.left + 1e-9:
            raise BudgetSpentError
        self.num_spent += evaluations


class Search(Protocol):
    """A method: settings, and `run`, which asks until the budget is spent or it has no more to ask. `run` may let BudgetSpentError through."""

    kind: ClassVar[str]

    def run(self, question: Question, *, seed: int) -> None: ...


def search(method: Search, question: Question, *, seed: int) -> list[Candidate]:
    """All that the method asked about, in its order."""
    with contextlib.suppress(BudgetSpentError):
        method.run(question, seed=seed)
    return list(question.asked.values())


def excess(costs: Mapping[str, float], limits: Sequence[Limit]) -> float:
    """By what share the limits are exceeded, added up; 0 where all are kept."""
    return sum(max(0.0, costs[limit.cost] / limit.most - 1) for limit in limits)


def front(candidates: Sequence[Candidate], cost: str, limits: Sequence[Limit] = ()) -> list[Candidate]:
    """Those within the limits than which none is both cheaper and at least as accurate, or as cheap and more accurate; the cheapest first."""
    kept: list[Candidate] = []
    for one in sorted((one for one in candidates if one.keeps(limits)), key=lambda one: (one.costs[cost], -one.accuracy)):
        if not kept or one.accuracy > kept[-1].accuracy:
            kept.append(one)
    return kept


def best(candidates: Sequence[Candidate], cost: str, limits: Sequence[Limit] = ()) -> Candidate:
    """The most accurate within the limits, the cheapest of equals; ValueError where there is none."""
    within = front(candidates, cost, limits)
    if not within:
        told = ", ".join(f"{limit.cost} <= {limit.most:g}" for limit in limits)
        least = min(candidates, key=lambda one: excess(one.costs, limits)).costs if candidates else {}
        raise ValueError(
            f"none of {len(candidates)} sub-networks keeps {told}; the nearest has {dict(least)}: raise the limits or give the space smaller values"
        )
    return within[-1]


def hypervolume(candidates: Sequence[Candidate], cost: str, *, worst_cost: float, worst_accuracy: float = 0.0) -> float:
    """The area that the front dominates up to the worst point, as a share of the largest there could be: with no cost and always right."""
    area, accuracy = 0.0, worst_accuracy
    for one in front(candidates, cost):
        if one.costs[cost] < worst_cost and one.accuracy > accuracy:
            area += (one.accuracy - accuracy) * (worst_cost - one.costs[cost])
            accuracy = one.accuracy
    return area / (worst_cost * (1 - worst_accuracy))
