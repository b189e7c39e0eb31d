"""Random search: sub-networks drawn independently, the measure of what every other method adds.

Source: Bergstra and Bengio 2012, "Random search for hyper-parameter optimization"; Li and Talwalkar 2020, "Random search and reproducibility for neural
architecture search", which found it hard to beat at equal budgets. Limits are kept by rejection: costs are free, so only what fits is asked about.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from random import Random
from typing import ClassVar

from llmdistill.elastic.question import Question
from llmdistill.elastic.variation import first_new

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RandomSearch:
    """Each axis uniform over its values. It ends when `max_draws` in a row gave nothing new within the limits."""

    kind: ClassVar[str] = "random"
    max_draws: int = 5_000

    def __post_init__(self) -> None:
        if self.max_draws < 1:
            raise ValueError(f"RandomSearch.max_draws is {self.max_draws}; give 1 or more")

    def run(self, question: Question, *, seed: int) -> None:
        """Ask about new ones until the budget is spent."""
        generator = Random(seed)
        while question.left >= 1:
            subnet = first_new(question, lambda: question.space.sample(generator), max_draws=self.max_draws)
            if subnet is None:
                tell_end(question, self.max_draws)
                return
            question.ask(subnet)


def tell_end(question: Question, num_draws: int) -> None:
    """Say why a search ends with budget left: ValueError where it has found nothing at all, a line in the log where it has."""
    if len(question.asked) == question.space.num_subnets:
        return
    limits = ", ".join(f"{limit.cost} <= {limit.most:g}" for limit in question.limits)
    if not question.asked:
        smallest = question.costs(question.space.smallest())
        raise ValueError(
            f"of {num_draws} sub-networks drawn none keeps {limits}; the smallest has {', '.join(f'{name} {cost:g}' for name, cost in smallest.items())}: "
            "raise the limits, give the space smaller values, or search by evolution, which goes to where the limits are"
        )
    _log.warning(
        "the search ends after %d of %g evaluations: %d draws in a row gave nothing new%s",
        len(question.asked),
        question.budget,
        num_draws,
        f" that keeps {limits}" if limits else "",
    )
