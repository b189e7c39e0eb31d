"""How many ranks each layer gets under one budget. Numbers only: no torch, and nothing about what is factorised.

A budget says which share of the parameters, bytes or FLOPs of the weights in scope may be left (biases stay and are not counted). FLOPs are 2 for each
multiply-add of one token that passes every linear once; tokens of encoder and decoder weigh the same, although a student that reads much and writes little
spends more in the encoder.

A layer of n ranks costs n times `rank_cost`, and no more than `full_cost`: from break-even on, where n * rank_cost >= full_cost, it stays dense, which costs
no more and loses nothing. So the last step of a layer, from some rank to dense, wins all that is left of it at once.

- UNIFORM: every layer keeps the same share of its cost. SVD-LLM (Wang et al. 2024) and ASVD's basis.
- ENERGY: every layer keeps the same share of its importance, the greatest that the budget allows.
- GLOBAL: one ranking of all ranks of all layers by importance a cost, as in QSVD (Wang et al. 2025, section 3.2). Where we differ: the step to dense takes
  part in it. Each layer's curve of importance over cost is replaced by its concave hull, on which the greedy choice is the optimum up to the step that no
  longer fits (Everett 1963); what then is left of the budget goes to single ranks.

Importance is the caller's: squared singular values say what error a rank removes, QSVD's say what it does to the loss.
"""

from __future__ import annotations

import enum
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import heapify, heappop, heappush
from itertools import accumulate


class Budget(enum.Enum):
    """What a share is kept of."""

    PARAMETERS = "numbers of the weights"
    BYTES = "bytes of the weights in their dtypes"
    FLOPS = "floating-point operations for one token"


class Allocation(enum.Enum):
    """How the layers divide the budget."""

    UNIFORM = "the same share of each layer's cost"
    ENERGY = "the same share of each layer's importance"
    GLOBAL = "one ranking of the ranks of all layers by importance a cost"


@dataclass(frozen=True, kw_only=True)
class Item:
    """What is factorised as one: a linear, or several with a shared factor."""

    name: str
    importance: Sequence[float]
    """Of each rank, none negative, the greatest first. Its length is the full rank."""
    rank_cost: float
    full_cost: float
    """As it is now, dense."""

    def __post_init__(self) -> None:
        assert self.importance, self.name
        assert min(self.rank_cost, self.full_cost) > 0, self.name
        assert math.isfinite(self.importance[0]), self.name
        assert all(first >= second >= 0 for first, second in zip(self.importance, [*self.importance[1:], 0.0], strict=True)), self.name

    @property
    def full_rank(self) -> int:
        return len(self.importance)

    @property
    def dense_rank(self) -> int:
        """The least rank at break-even. Where it is above the full rank, as factors in fewer bits can have it, the layer never stays dense."""
        return math.ceil(self.full_cost / self.rank_cost)

    def is_dense(self, rank: int) -> bool:
        """Whether a layer of this rank stays as it is."""
        return rank >= self.dense_rank

    def cost(self, rank: int) -> float:
        return self.full_cost if self.is_dense(rank) else rank * self.rank_cost

    @property
    def most(self) -> int:
        """The rank at which nothing is lost: dense, or full."""
        return min(self.full_rank, self.dense_rank)

    @cached_property
    def removed(self) -> list[float]:
        """The importance that 0, 1, 2, ... ranks have together; all of it where the layer stays dense."""
        sums = list(accumulate(self.importance, initial=0.0))
        return [*sums[: self.most], sums[-1]]

    def note(self, rank: int) -> str:
        """Why a layer of this rank stays dense."""
        return f"rank {rank} or more is at or above break-even: two factors would cost as much as the dense weight, or more"


def linear_costs(in_features: int, out_features: int, budget: Budget, *, bytes_per_number: int) -> tuple[int, int]:
    """What one rank of a linear costs, and what the dense one does."""
    unit = {Budget.PARAMETERS: 1, Budget.BYTES: bytes_per_number, Budget.FLOPS: 2}[budget]
    return (in_features + out_features) * unit, in_features * out_features * unit


def allocate(items: Sequence[Item], keep: float, allocation: Allocation) -> dict[str, int]:
    """The rank of each item, at least 1, with which all together cost at most `keep` of what they cost dense. `Item.is_dense` tells which stay dense."""
    if not 0 < keep <= 1:
        raise ValueError(f"keep is {keep}; give the share to keep, above 0 and at most 1")
    allowed = keep * sum(item.full_cost for item in items)
    least = sum(item.cost(1) for item in items)
    if least > allowed:
        share = least / sum(item.full_cost for item in items)
        raise ValueError(f"keep is {keep}, and rank 1 everywhere keeps {share:.4f} already: keep more")
    ranks = {Allocation.UNIFORM: _uniform, Allocation.ENERGY: _energy, Allocation.GLOBAL: _global}[allocation](items, keep, allowed)
    return {item.name: rank for item, rank in zip(items, ranks, strict=True)}


def kept_share(items: Sequence[Item], ranks: Mapping[str, int]) -> float:
    """What these ranks cost together, as a share of what the items cost dense."""
    return sum(item.cost(ranks[item.name]) for item in items) / sum(item.full_cost for item in items)


def _uniform(items: Sequence[Item], keep: float, _: float) -> list[int]:
    ranks = [min(item.most, int(keep * item.full_cost / item.rank_cost) if keep < 1 else item.most) for item in items]
    for item, rank in zip(items, ranks, strict=True):
        if rank < 1:
            raise ValueError(f"keep is {keep}, and rank 1 of {item.name} keeps {item.cost(1) / item.full_cost:.4f} of it already: keep more, or rank globally")
    return ranks


def _energy(items: Sequence[Item], keep: float, allowed: float) -> list[int]:
    def ranks_at(share: float) -> list[int]:
        return [max(1, min(item.most, bisect_left(item.removed, share * item.removed[-1]))) for item in items]

    shares = sorted({0.0, 1.0, *(sum_ / item.removed[-1] for item in items if item.removed[-1] for sum_ in item.removed)})
    affordable, too_much = 0, len(shares)  # indices into the shares at which some layer's rank changes
    while too_much - affordable > 1:
        middle = (affordable + too_much) // 2
        if _spent(items, ranks_at(shares[middle])) <= allowed:
            affordable = middle
        else:
            too_much = middle
    return ranks_at(shares[affordable])


def _global(items: Sequence[Item], _: float, allowed: float) -> list[int]:
    """The best of three greedy choices: on the hulls; on the hulls, with the first step that did not fit taken before all others; by single ranks."""
    turns, never = [_turn(item) for item in items], [item.most for item in items]
    start = [1 for _ in items]
    on_hulls, refused = _greedy(items, start, turns, allowed)
    choices = [on_hulls]
    if refused is not None:
        forced = [item.most if index == refused else 1 for index, item in enumerate(items)]
        if _spent(items, forced) <= allowed:
            choices.append(_greedy(items, forced, turns, allowed)[0])
    filled = [_greedy(items, ranks, never, allowed)[0] for ranks in [*choices, start]]
    return max(filled, key=lambda ranks: sum(item.removed[rank] for item, rank in zip(items, ranks, strict=True)))


def _turn(item: Item) -> int:
    """The rank from which one step to the end wins more a cost than the next rank: where the concave hull leaves the curve."""
    for rank in range(1, item.most):
        if _density(item, rank, item.most) > _density(item, rank, rank + 1):
            return rank
    return item.most


def _greedy(items: Sequence[Item], start: Sequence[int], turns: Sequence[int], allowed: float) -> tuple[list[int], int | None]:
    """Steps by density while they fit: to the next rank, or from an item's turn to the end. An item whose step does not fit stops; the first one is told."""
    ranks, spent, refused = list(start), _spent(items, start), None

    def end(index: int) -> int:
        return ranks[index] + 1 if ranks[index] < turns[index] else items[index].most

    def entry(index: int) -> tuple[float, int]:
        return -_density(items[index], ranks[index], end(index)), index

    heap = [entry(index) for index, item in enumerate(items) if ranks[index] < item.most]
    heapify(heap)
    while heap:
        index = heappop(heap)[1]
        item = items[index]
        cost = item.cost(end(index)) - item.cost(ranks[index])
        if spent + cost > allowed:
            refused = index if refused is None else refused
            continue
        ranks[index], spent = end(index), spent + cost
        if ranks[index] < item.most:
            heappush(heap, entry(index))
    return ranks, refused


def _density(item: Item, start: int, end: int) -> float:
    """Importance won for each cost."""
    cost = item.cost(end) - item.cost(start)
    return (item.removed[end] - item.removed[start]) / cost if cost > 0 else math.inf


def _spent(items: Sequence[Item], ranks: Sequence[int]) -> float:
    return sum(item.cost(rank) for item, rank in zip(items, ranks, strict=True))
