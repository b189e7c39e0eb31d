"""What a random sub-network costs in the mean, as a differentiable function of the probabilities of its choices, from single changes.

ProxylessNAS (Cai et al. 2019, section 3.3.1) adds up, over all places, the probability of each choice times its measured latency. That takes the cost of a
network for the sum of its parts. Here the parts are not measured alone: a part costs what the whole costs more with it, asked of the same function that the
search is asked with, so that it works for milliseconds and bytes alike, and takes no evaluation.

Differences from the paper, since layers here may be absent and the model width changes every part: parts are added up for given model width and given depth of
their stack,

    E = sum_w p_w (C_w + sum over depths d p_d (C_wd - C_w) + sum over other decisions k, choices i, depths d  p_d p_i (C_wdki - C_wd))

where C_wdki is the cost of the whole model but for the width w, the depth d of k's stack and the choice i of k. A decision that concerns both stacks counts
once, and for each stack what the depth changes about it. Since low-rank linears cost rank times sizes, a layer's rank also has what it and the heads, and it
and the neurons, cost together beyond both alone. That is exact wherever the cost, at a given width, is a sum over layers of what each decision adds, such as
operations and parameters. Of other costs, such as milliseconds of a device with a dislike for some sizes, `errors` says by how much it misses.

Shapes: C costs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from llmdistill.elastic.choice import Subnet
from llmdistill.elastic.decisions import Decisions

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

_LETTERS = "abde"  # of the decisions of one term in einsum; c is that of the costs


class ExpectedCost:
    """Of these costs by name. Tables are made once; `__call__` is arithmetic on the probabilities."""

    def __init__(self, costs: Callable[[Subnet], Mapping[str, float]], decisions: Decisions, names: Sequence[str]) -> None:
        self.decisions, self.names, self._costs = decisions, tuple(names), costs
        self._known: dict[Subnet, list[float]] = {}
        self.largest_C = self._table(())
        width = decisions.place("width")
        self._always = () if width is None else (width,)
        self._terms: list[tuple[tuple[int, ...], Tensor]] = [(self._always, self._table(self._always))]
        for place, decision in enumerate(decisions.open):
            if decision.axis == "width":
                continue
            self._add((place,), decisions.depth_places(place))
            if decision.axis == "rank":
                for axis in ("heads", "ffn"):
                    partner = decisions.place(axis, decision.stack, decision.layer)
                    if partner is not None:
                        self._add((partner, place), decisions.depth_places(place))

    def __call__(self, probabilities: Sequence[Float[Tensor, " _"]]) -> Float[Tensor, " C"]:
        """The mean of each cost; probabilities in the order of the decisions, in float64."""
        total_C = torch.zeros(len(self.names), dtype=torch.float64)
        for places, table in self._terms:
            letters = _LETTERS[: len(places)]
            total_C = total_C + torch.einsum(f"{letters}c{''.join(',' + letter for letter in letters)}->c", table, *(probabilities[place] for place in places))
        return total_C

    def of(self, subnet: Subnet) -> Float[Tensor, " C"]:
        """What it takes one sub-network's costs for."""
        chosen = self.decisions.choices(subnet)
        return self([one_hot(choice, len(decision.values)) for choice, decision in zip(chosen, self.decisions.open, strict=True)])

    def errors(self, subnets: Sequence[Subnet]) -> dict[str, float]:
        """By what share of the true cost it is wrong about these, in the mean, by name."""
        true_SC = torch.tensor([self._row(subnet) for subnet in subnets], dtype=torch.float64)
        taken_SC = torch.stack([self.of(subnet) for subnet in subnets])
        return dict(zip(self.names, ((taken_SC - true_SC).abs() / true_SC).mean(0).tolist(), strict=True))

    def _add(self, places: tuple[int, ...], depths: tuple[int, ...]) -> None:
        """The terms of these decisions together, beyond those of each alone, at the depths."""
        alone = self._beyond((), places)
        if len(depths) != 1:
            self._terms.append(((*self._always, *places), alone))
        for depth in depths:
            at_depth = self._beyond((depth,), places)
            if len(depths) > 1:
                at_depth = at_depth - alone.unsqueeze(len(self._always))
            self._terms.append(((*self._always, depth, *places), at_depth))

    def _beyond(self, given: tuple[int, ...], places: tuple[int, ...]) -> Tensor:
        """What each choice costs more than the whole, or two choices together more than each alone, for each width and each choice of `given`."""
        given = (*self._always, *given)
        if len(places) == 1:
            return self._table((*given, *places)) - self._table(given).unsqueeze(-2)
        first, second = places
        both = self._table((*given, first, second)) - self._table(given)[..., None, None, :]
        return both - self._beyond(given[len(self._always) :], (first,)).unsqueeze(-2) - self._beyond(given[len(self._always) :], (second,)).unsqueeze(-3)

    def _table(self, places: tuple[int, ...]) -> Tensor:
        """Costs of all choices of these decisions, all others being the whole."""
        sizes = [len(self.decisions.open[place].values) for place in places]
        rows = []
        for combination in itertools.product(*map(range, sizes)):
            choices = self.decisions.largest()
            for place, choice in zip(places, combination, strict=True):
                choices[place] = choice
            rows.append(self._row(self.decisions.subnet(choices)))
        return torch.tensor(rows, dtype=torch.float64).view(*sizes, len(self.names))

    def _row(self, subnet: Subnet) -> list[float]:
        if subnet not in self._known:
            costs = self._costs(subnet)
            self._known[subnet] = [costs[name] for name in self.names]
        return self._known[subnet]


def one_hot(choice: int, num: int) -> Float[Tensor, " num"]:
    """Probability 1 for one choice."""
    vector = torch.zeros(num, dtype=torch.float64)
    vector[choice] = 1.0
    return vector
