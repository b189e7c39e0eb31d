"""Where on the front of accuracy and latency an answer is made: which sub-network, and how sure a token must be to leave early.

A checkpoint that is not elastic and has no calibrated exits has one point. An elastic one has a point for each sub-network that the server offers, and each
calibrated risk of exits makes a further one. A sub-network whose exits are calibrated has a point of full depth too (risk 0), which is given to requests that
ask for it and to no others: exits were calibrated to be used.

The points are in order, the best first: by measured accuracy less the risk where accuracies are known. Of equals, which a search on a few hundred rows finds
often, and where nothing was measured, the one with more bytes of weights is taken for the better one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NoReturn

from llmdistill.models.exit_settings import NEVER, Point
from llmdistill.serve.bodies import Budget
from llmdistill.serve.errors import ServeError
from llmdistill.serve.pace import Pace

LARGEST = "largest"
REFERENCE_TOKENS = 16
"""The points are compared at prompts and answers of so many tokens."""
LEAST_GAIN = 0.05
"""A step along the front saves at least this share of the time: less is within what measuring is wrong by."""


@dataclass(frozen=True, kw_only=True)
class OperatingPoint:
    """A sub-network and an exit threshold, with what is known of them."""

    subnet: str = LARGEST  # as elastic/choice.py writes it
    names: tuple[str, ...] = ()  # what else it may be called
    exit_risk: float = 0.0  # the calibrated delta; 0: no token leaves
    exit_threshold: float = NEVER
    has_calibration: bool = False
    num_layers: int  # of the decoder
    weight_bytes: int
    accuracy: float | None = None  # of the sub-network at full depth; None: not measured
    pace: Pace

    @property
    def latency_ms(self) -> float:
        """Alone, at the lengths at which points are compared."""
        return 1000 * self.pace.seconds(REFERENCE_TOKENS, REFERENCE_TOKENS)

    @property
    def is_usual(self) -> bool:
        """Whether a request that does not ask for it may get it."""
        return self.exit_risk > 0 or not self.has_calibration

    def data(self) -> dict[str, Any]:
        """For /v1/models."""
        return {
            "subnet": self.subnet,
            "names": list(self.names),
            "exit_risk": self.exit_risk if self.has_calibration else None,
            "exit_threshold": self.exit_threshold,
            "num_layers": self.num_layers,
            "weight_bytes": self.weight_bytes,
            "accuracy": self.accuracy,
            "latency_ms": round(self.latency_ms, 3),
        }


class Points:
    """All the points of a served model."""

    def __init__(self, points: Sequence[OperatingPoint]) -> None:
        if not points:
            raise ValueError("a served model has no operating point; give it one at least")
        known = all(point.accuracy is not None for point in points)

        def worth(point: OperatingPoint) -> tuple[float, ...]:
            accuracy = (point.accuracy or 0.0) - point.exit_risk if known else 0.0
            return accuracy, point.weight_bytes, -point.exit_risk, -point.latency_ms

        self.all = tuple(sorted(points, key=worth, reverse=True))

    @cached_property
    def front(self) -> tuple[OperatingPoint, ...]:
        """The usual points of which each is faster than all better ones, the best and slowest first: the steps of the controller."""
        kept: list[OperatingPoint] = []
        for point in self.all:
            if point.is_usual and (not kept or point.latency_ms < (1 - LEAST_GAIN) * kept[-1].latency_ms):
                kept.append(point)
        return tuple(kept)

    def choose(self, budget: Budget, latency_ms: Callable[[OperatingPoint], float]) -> OperatingPoint:
        """The best point that the budget allows; `latency_ms` is what this request would take at a point. 400 where there is none."""
        points = [point for point in self.all if point.is_usual]
        if budget.exit_risk is not None:
            points = self._at_risk(budget.exit_risk)
        if budget.subnet is not None:
            points = [point for point in points if budget.subnet in (point.subnet, *point.names)] or _refuse_subnet(budget.subnet, points)
        if budget.max_latency_ms is None:
            return points[0]
        latencies = [latency_ms(point) for point in points]
        within = [point for point, latency in zip(points, latencies, strict=True) if latency <= budget.max_latency_ms]
        if not within:
            fastest = points[latencies.index(min(latencies))]
            message = (
                f"max_latency_ms is {budget.max_latency_ms:g}, and the fastest that may answer this request takes about {min(latencies):.3g} ms now: "
                f"sub-network {fastest.subnet}, exit risk {fastest.exit_risk:g}. Raise it, ask for fewer tokens, or come again when there is less to do"
            )
            raise ServeError(400, message, param="llmdistill.max_latency_ms", code="budget_too_small")
        return within[0]

    def _at_risk(self, exit_risk: float) -> list[OperatingPoint]:
        """Of each sub-network with calibrated exits, the point of the largest risk that is allowed."""
        allowed = [point for point in self.all if point.has_calibration and point.exit_risk <= exit_risk]
        if not allowed:
            message = "this checkpoint has no calibrated exits; `llmdistill run dynamic --checkpoint FOLDER` trains some and calibrates them"
            raise ServeError(400, message, param="llmdistill.exit_risk", code="no_calibrated_exits")
        most = {point.subnet: max(one.exit_risk for one in allowed if one.subnet == point.subnet) for point in allowed}
        return [point for point in allowed if point.exit_risk == most[point.subnet]]


def with_exits(point: OperatingPoint, first: tuple[Pace, float], calibrated: Sequence[Point]) -> list[OperatingPoint]:
    """A sub-network's point of full depth, and one for each threshold that its exits were calibrated for.

    `first` is the pace where every token leaves as early as it can, and how many layers it went through then. Between that and full depth the pace is taken
    to be linear in the decoder's layers, so that exits of the encoder alone are taken to save nothing.
    """
    first_pace, first_layers = first
    points = [replace(point, has_calibration=True)]
    for one in calibrated:
        share = min(1.0, max(0.0, (one.mean_layers - first_layers) / (point.num_layers - first_layers))) if first_layers < point.num_layers else 1.0
        pace = first_pace.towards(point.pace, share)
        points.append(replace(point, has_calibration=True, exit_risk=one.delta, exit_threshold=one.threshold, pace=pace))
    return points


def _refuse_subnet(subnet: str, points: Sequence[OperatingPoint]) -> NoReturn:
    offered = "; ".join(dict.fromkeys(f"{point.subnet} ({', '.join(point.names)})" if point.names else point.subnet for point in points))
    message = f"this server has no sub-network '{subnet[:60]}' for this request; of those in /v1/models it may be {offered}"
    raise ServeError(400, message, param="llmdistill.subnet", code="subnet_not_found")
