"""How searches vary sub-networks: draw one, change one a little, mix two, and make one smaller until it fits.

The operators of Once-for-All's evolutionary search (Cai et al. 2020, section 3.4, after Real et al. 2019) and of HAT (Wang et al. 2020, section 3.2), over the
decisions of a space (decisions.py): mutation draws each decision anew with some probability, crossover takes each from one of both parents. Any choices of
the decisions are a legal sub-network, so nothing has to be repaired, in even spaces and with shared heads alike.

Where we differ is in layers that are not there. OFA's genes hold values for them too, which drift unseen and come to light when the depth grows. Here a
sub-network is all that is known of it: a layer that comes back is drawn at random, and in a crossover a layer that only one parent has is that parent's.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from llmdistill.elastic.choice import Subnet
from llmdistill.elastic.decisions import Decisions
from llmdistill.elastic.question import Question, excess


def mutate(decisions: Decisions, parent: Subnet, generator: Random, *, probability: float) -> Subnet:
    """Each decision stays with the rest of the probability, and is drawn anew from all of its values otherwise."""
    choices = decisions.choices(parent)
    child = [
        generator.randrange(len(decision.values)) if generator.random() < probability or not decisions.is_active(place, choices) else choices[place]
        for place, decision in enumerate(decisions.open)
    ]
    return decisions.subnet(child)


def cross(decisions: Decisions, first: Subnet, second: Subnet, generator: Random) -> Subnet:
    """Each decision is that of one of both. Depths nest, so a layer that stays is a layer of the parent whose depth it is."""
    parents = [decisions.choices(first), decisions.choices(second)]
    child = []
    for place in range(len(decisions.open)):
        having = [choices[place] for choices in parents if decisions.is_active(place, choices)]
        child.append(generator.choice(having or [parents[0][place]]))
    return decisions.subnet(child)


def shrink(decisions: Decisions, subnet: Subnet, fits: Callable[[Subnet], bool], generator: Random) -> Subnet | None:
    """Makes decisions smaller by one value, drawn one after the other, until it fits; None where the smallest does not either."""
    choices = list(decisions.choices(subnet))
    while not fits(subnet):
        larger = [place for place, choice in enumerate(choices) if choice > 0 and decisions.is_active(place, choices)]
        if not larger:
            return None
        choices[generator.choice(larger)] -= 1
        subnet = decisions.subnet(choices)
    return subnet


def keeps_limits(question: Question, subnet: Subnet) -> bool:
    """Whether it is within all limits of the question, which takes no evaluation."""
    return not question.limits or excess(question.costs(subnet), question.limits) == 0


def first_new(question: Question, draw: Callable[[], Subnet], *, max_draws: int) -> Subnet | None:
    """The first that is drawn, was not asked about yet and keeps the limits; None after so many draws without one."""
    for _ in range(max_draws):
        subnet = draw()
        if subnet not in question.asked and keeps_limits(question, subnet):
            return subnet
    return None
