"""Evolutionary search: the better ones of a population have children, by mutation and by crossover.

Source: Once-for-All (Cai et al. 2020, section 3.4) and HAT (Wang et al. 2020, section 3.2): a population is drawn within the limits, the most accurate are
parents, and each generation is the parents with their children; a child that exceeds a limit is drawn again. OFA has 100 members, a quarter of them
parents, half of the children by mutation with probability 0.1, and 500 generations on a predictor that costs nothing.

Differences, with what they do to the best accuracy within a fifth of the operations (hardly more than the smallest sub-network has) and within half of them,
on synthetic accuracies over 3 million sub-networks, in the mean of 8 seeds. After 200 evaluations random search has 0.602 and 0.860, this 0.647 and 0.888:

- what was asked already is drawn again too, since asking twice would tell nothing, and the more often a child is drawn, the likelier it mutates: else a
  population that has converged draws for ever.
- of those that are too costly half are made smaller at random until they fit, which finds trades of one part against another; with OFA's drawing again alone,
  0.608 and 0.892. Limits that drawing at random would never keep are no obstacle so.
- 16 members, since an evaluation here is a run over the validation rows; with OFA's 100, 0.634 and 0.870. After 500 evaluations both have 0.647 and 0.89.
- without limits the aim is the whole front: parents are chosen by domination and crowding over accuracy and cost (domination.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import ClassVar

from llmdistill.elastic.choice import Subnet
from llmdistill.elastic.decisions import Decisions
from llmdistill.elastic.domination import by_merit
from llmdistill.elastic.question import Candidate, Question
from llmdistill.elastic.random_search import tell_end
from llmdistill.elastic.variation import cross, keeps_limits, mutate, shrink

_DRAWS_TO_DOUBLE = 20
"""After so many draws for one child mutation is twice as likely, up to the half."""


@dataclass(frozen=True, kw_only=True)
class Evolution:
    """`parent_share` of the population are parents, `mutation_share` of the children come by mutation, the others by crossover.

    max_draws: for one new member. It ends when so many in a row gave nothing new within the limits.
    """

    kind: ClassVar[str] = "evolution"
    population_size: int = 16
    parent_share: float = 0.25
    mutation_share: float = 0.5
    mutation_probability: float = 0.1
    max_draws: int = 1_000

    def __post_init__(self) -> None:
        if self.population_size < 4 or self.max_draws < 1:
            raise ValueError(f"Evolution has population_size {self.population_size} and max_draws {self.max_draws}; give 4 or more, and 1 or more")
        if not 0 < self.parent_share < 1 or not 2 <= self.num_parents < self.population_size:
            raise ValueError(
                f"Evolution.parent_share is {self.parent_share} of {self.population_size}; give a share for two parents or more that leaves room for a child"
            )
        if not (0 <= self.mutation_share <= 1 and 0 < self.mutation_probability <= 1):
            raise ValueError(
                f"Evolution has mutation_share {self.mutation_share} and mutation_probability {self.mutation_probability}; "
                "give 0 up to 1, and more than 0 up to 1"
            )

    @property
    def num_parents(self) -> int:
        """How many go on from a generation to the next."""
        return round(self.population_size * self.parent_share)

    def run(self, question: Question, *, seed: int) -> None:
        """Generation after generation until the budget is spent or nothing new is found."""
        generator, decisions = Random(seed), Decisions(question.space)
        population: list[Candidate] = []
        while True:
            parents = _best(question, population, self.num_parents)
            children: list[Candidate] = []
            while len(parents) + len(children) < self.population_size:
                subnet = self._child(question, decisions, [parent.subnet for parent in parents], generator)
                if subnet is None:
                    tell_end(question, self.max_draws)
                    return
                children.append(question.ask(subnet))
            population = parents + children

    def _child(self, question: Question, decisions: Decisions, parents: list[Subnet], generator: Random) -> Subnet | None:
        """One that is new and within the limits; at random where there are no parents yet."""
        for num_draws in range(self.max_draws):
            child = self._draw(decisions, parents, generator, num_draws) if len(parents) > 1 else question.space.sample(generator)
            if not keeps_limits(question, child) and generator.random() < 0.5:
                child = shrink(decisions, child, lambda subnet: keeps_limits(question, subnet), generator) or child
            if child not in question.asked and keeps_limits(question, child):
                return child
        return None

    def _draw(self, decisions: Decisions, parents: list[Subnet], generator: Random, num_draws: int) -> Subnet:
        mutates = generator.random() < self.mutation_share
        first, second = generator.sample(parents, 2)
        child = first if mutates else cross(decisions, first, second, generator)
        if mutates or num_draws >= _DRAWS_TO_DOUBLE:
            probability = self.mutation_probability * 2 ** min(10.0, num_draws / _DRAWS_TO_DOUBLE)
            child = mutate(decisions, child, generator, probability=min(max(0.5, self.mutation_probability), probability))
        return child


def _best(question: Question, population: list[Candidate], num: int) -> list[Candidate]:
    if question.limits:
        return sorted(population, key=lambda one: (-one.accuracy, one.costs[question.cost]))[:num]
    points = [(-one.accuracy, one.costs[question.cost]) for one in population]
    return [population[index] for index in by_merit(points)[:num]]
