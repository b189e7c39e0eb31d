"""How fast the server answers on this machine, measured when it starts, and what a request would take by that.

A request's time is taken to be linear: to begin, for each token of its prompt, for each token that it may write, and for each other row that a step moves
along. Rows of other sub-networks count like neighbours in the batch, which is a little too few, since they are moved by steps of their own.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmdistill.serve.engines import PlacedDecoding
    from llmdistill.serve.scheduler import BatchEngine

NUM_STEPS = 8
NUM_REPEATS = 3
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


def measure(
    engine: BatchEngine, make_decoding: Callable[[int], PlacedDecoding], *, vocabulary_size: int, num_positions: int, max_rows: int
) -> tuple[Pace, float]:
    """The pace of an idle engine on random prompts, and the mean number of layers that a token went through. `make_decoding` is told how many tokens."""
    long = max(2, min(LONG_PROMPT, num_positions // 2 if num_positions else LONG_PROMPT))
    short, draw = max(1, long // 4), random.Random(0)
    layers: list[int] = []

    def time_rows(num_rows: int, num_prompt_tokens: int) -> tuple[float, float]:
        """Seconds of the first step and of a later one; the least of some tries, since what else the machine does only adds."""
        firsts, laters = [], []
        for _ in range(NUM_REPEATS):
            rows = [engine.add([draw.randrange(vocabulary_size) for _ in range(num_prompt_tokens)], make_decoding(NUM_STEPS + 1)) for _ in range(num_rows)]
            times = []
            for _ in range(NUM_STEPS):
                begin = time.perf_counter()
                layers.extend(token.num_layers for token in engine.step())
                times.append(time.perf_counter() - begin)
            firsts.append(times[0])
            laters.append(median(times[1:]))
            for row in rows:
                engine.drop(row)
        return min(firsts), min(laters)

    time_rows(1, long)  # what is only slow the first time
    long_first, step = time_rows(1, long)
    short_first, _ = time_rows(1, short)
    num_neighbours = min(NUM_NEIGHBOURS, max_rows - 1)
    together = time_rows(1 + num_neighbours, short)[1] if num_neighbours else step
    per_prompt_token = max(0.0, (long_first - short_first) / (long - short))
    pace = Pace(
        beginning=max(0.0, short_first - step - short * per_prompt_token),
        per_prompt_token=per_prompt_token,
        per_step=step,
        per_neighbour=max(0.0, together - step) / max(1, num_neighbours),
    )
    return pace, sum(layers) / len(layers)
