"""Which of many sub-networks go on, when there are two aims: ranks by domination, and within a rank those that stand alone.

Source: Deb et al. 2002, "A fast and elitist multiobjective genetic algorithm: NSGA-II", sections III.A (ranks) and III.B (crowding distance). With two aims a
rank is found by one sweep over the sorted points, so that the whole takes n log n steps for each rank and no comparison of all pairs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence


def domination_ranks(points: Sequence[tuple[float, float]]) -> list[int]:
    """0 for those that no other dominates, 1 for those that only these do, and so on. Both numbers of a point are the better the lower they are."""
    order = sorted(range(len(points)), key=lambda index: points[index])
    ranks = [0] * len(points)
    last: list[tuple[float, float]] = []  # of each rank the last point so far, which has the lowest second number
    for index in order:
        first, second = points[index]
        # Points come by their first number, so one before dominates this one if its second is no higher, and they are not equal.
        rank = next((rank for rank, other in enumerate(last) if other[1] > second or other == (first, second)), len(last))
        ranks[index] = rank
        last[rank : rank + 1] = [(first, second)]
    return ranks


def crowding_distances(points: Sequence[tuple[float, float]]) -> list[float]:
    """For each point how far its neighbours are from each other, as a share of the range and added up over both numbers; infinite at the ends."""
    distances = [0.0] * len(points)
    for axis in (0, 1):
        order = sorted(range(len(points)), key=lambda index: points[index][axis])
        if not order or (extent := points[order[-1]][axis] - points[order[0]][axis]) == 0:
            continue
        distances[order[0]] = distances[order[-1]] = math.inf
        for before, index, after in zip(order, order[1:], order[2:], strict=False):
            distances[index] += (points[after][axis] - points[before][axis]) / extent
    return distances


def by_merit(points: Sequence[tuple[float, float]]) -> list[int]:
    """Positions, the best first: lower ranks, and within a rank the less crowded."""
    ranks = domination_ranks(points)
    ordered: list[int] = []
    for _, group in itertools.groupby(sorted(range(len(points)), key=lambda index: ranks[index]), key=lambda index: ranks[index]):
        members = list(group)
        distances = crowding_distances([points[index] for index in members])
        ordered += [index for _, index in sorted(zip(distances, members, strict=True), key=lambda pair: -pair[0])]
    return ordered
