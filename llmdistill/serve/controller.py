"""Keeps the 95th percentile of latencies under a target by moving along the front, one step at a time.

A latency is the time from a request's arrival to the last token of one of its rows. They are counted in windows. Once so many of a window are over the target
that its p95 must be, the next request is answered one step cheaper. When p95 is well under the target the controller tries one step better. A try that fails is
what makes a controller swing: at one step all is idle, at the next the queue grows, and half of the requests are late. So each try that fails doubles the
number of windows that must be well under before the next, and one that holds for a window makes it 1 again.

A request counts at the step at which it got its place; those that got theirs before the last move say nothing about the present step and are left out. What the
controller does depends on the latencies that it is told, in their order, and on nothing else. With an infinite target it stays at the best point.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from llmdistill.serve.points import OperatingPoint

WINDOW = 40
MAX_LATE = WINDOW // 20
"""So many of a window may be over the target; with one more its p95 is."""
WELL_UNDER = 0.6
"""Of the target."""
MOST_PATIENCE = 64
OWN_CHOICE = 0
"""The epoch of requests that chose for themselves, from which the controller learns nothing."""


class Decided(NamedTuple):
    """Where a request decodes, and after which move of the controller that was decided."""

    point: OperatingPoint
    epoch: int = OWN_CHOICE


class Controller:
    """A place on the front; only the scheduler's thread tells it anything."""

    def __init__(self, front: Sequence[OperatingPoint], target_p95_ms: float) -> None:
        if not front:
            raise ValueError("the front has no points; give one at least")
        self._front = tuple(front)
        self._target_ms = target_p95_ms
        self._latencies_ms: list[float] = []
        self._num_late = 0
        self._epoch = 1
        self._patience = 1  # windows that must be well under before a step back
        self._num_under = 0
        self._is_trying = False
        self.position = 0
        """0: the best."""

    def decide(self) -> Decided:
        """Where the next request decodes that leaves it to the server."""
        return Decided(self._front[self.position], self._epoch)

    def observe(self, epoch: int, latency_ms: float) -> None:
        """A row has ended."""
        if epoch != self._epoch or math.isinf(self._target_ms):
            return
        self._latencies_ms.append(latency_ms)
        self._num_late += latency_ms > self._target_ms
        if self._num_late > MAX_LATE:
            self._cheaper()
        elif len(self._latencies_ms) == WINDOW:
            self._window_held()

    def _cheaper(self) -> None:
        if self._is_trying:
            self._patience = min(MOST_PATIENCE, 2 * self._patience)
        self._move(min(self.position + 1, len(self._front) - 1), is_trying=False)

    def _window_held(self) -> None:
        if self._is_trying:
            self._patience, self._is_trying = 1, False
        p95 = sorted(self._latencies_ms)[-1 - MAX_LATE]
        self._num_under = self._num_under + 1 if p95 < WELL_UNDER * self._target_ms else 0
        if self._num_under >= self._patience and self.position:
            self._move(self.position - 1, is_trying=True)
        else:
            self._new_window()

    def _move(self, position: int, *, is_trying: bool) -> None:
        self._num_under, self._is_trying = 0, is_trying
        if position != self.position:
            self.position = position
            self._epoch += 1
        self._new_window()

    def _new_window(self) -> None:
        self._latencies_ms, self._num_late = [], 0
