"""How fast the server answers on this machine, measured when it starts, and what a request would take by that.

A request's time is taken to be linear: to begin, for each token of its prompt, for each token that it may write, and for each other row that a step moves
along. Rows of other sub-networks count like neighbours in the batch, which is a little too few, since they are moved by steps of their own.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmdistill.serve.engines import PlacedDecoding
    from llmdistill.serve.scheduler import BatchEngine

NUM_STEPS = 8
NUM_ROUNDS = 5
NUM_NEIGHBOURS = 7
LONG_PROMPT = 64


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Seconds, by what they are spent on."""

    beginning: float  # before the first token, whatever the prompt
    per_prompt_token: float
    per_step: float  # one row alone
    per_neighbour: float  # what each further row adds to a step

    def seconds(self, num_prompt_tokens: int, num_new_tokens: int, num_neighbours: int = 0) -> float:
        """From a row's place in the batch to its last token."""
        return self.beginning + num_prompt_tokens * self.per_prompt_token + num_new_tokens * (self.per_step + num_neighbours * self.per_neighbour)

    def towards(self, other: Pace, share: float) -> Pace:
        """The pace so far along the way to another."""
        return Pace(**{field.name: (1 - share) * getattr(self, field.name) + share * getattr(other, field.name) for field in fields(self)})


class Stopwatch:
    """Times an idle engine on random prompts, again and again; what else the machine does only adds, so the least of all times counts."""

    def __init__(self, engine: BatchEngine, make_decoding: Callable[[int], PlacedDecoding], *, vocabulary_size: int, num_positions: int, max_rows: int) -> None:
        """`make_decoding` is told how many tokens; `num_positions` is 0 where nothing limits them."""
        self._engine, self._make_decoding, self._vocabulary_size = engine, make_decoding, vocabulary_size
        self._long = max(2, min(LONG_PROMPT, num_positions // 2 if num_positions else LONG_PROMPT))
        self._short = max(1, self._long // 4)
        self._num_neighbours = min(NUM_NEIGHBOURS, max_rows - 1)
        self._draw = random.Random(0)
        self._layers: list[int] = []
        self._least = {"long": float("inf"), "short": float("inf"), "step": float("inf"), "together": float("inf")}

    def round(self) -> None:
        """Once with a long prompt, once with a short one, once with neighbours."""
        long, step = self._time_rows(1, self._long)
        short, _ = self._time_rows(1, self._short)
        _, together = self._time_rows(1 + self._num_neighbours, self._short)
        for name, seconds in (("long", long), ("short", short), ("step", step), ("together", together)):
            self._least[name] = min(self._least[name], seconds)

    @property
    def pace(self) -> Pace:
        """By the rounds so far."""
        least = self._least
        per_prompt_token = max(0.0, (least["long"] - least["short"]) / (self._long - self._short))
        return Pace(
            beginning=max(0.0, least["short"] - least["step"] - self._short * per_prompt_token),
            per_prompt_token=per_prompt_token,
            per_step=least["step"],
            per_neighbour=max(0.0, least["together"] - least["step"]) / max(1, self._num_neighbours),
        )

    @property
    def mean_layers(self) -> float:
        """That a token went through."""
        return sum(self._layers) / len(self._layers)

    def _time_rows(self, num_rows: int, num_prompt_tokens: int) -> tuple[float, float]:
        """Seconds of the first step, which reads the prompts, and of a later one."""
        prompts = [[self._draw.randrange(self._vocabulary_size) for _ in range(num_prompt_tokens)] for _ in range(num_rows)]
        rows = [self._engine.add(prompt, self._make_decoding(NUM_STEPS + 1)) for prompt in prompts]
        times = []
        for _ in range(NUM_STEPS):
            begin = time.perf_counter()
            tokens = self._engine.step()
            times.append(time.perf_counter() - begin)
            self._layers.extend(token.num_layers for token in tokens)
        for row in rows:
            self._engine.drop(row)
        return times[0], median(times[1:])


def run(watches: Sequence[Stopwatch]) -> None:
    """Time all in turn, round by round, so that a busy moment of the machine falls on all of them alike."""
    for _ in range(NUM_ROUNDS):
        for watch in watches:
            watch.round()
