"""What a request would take at an operating point, as things are now: the wait for a place, and then the point's measured pace.

The wait is that of the rows in the queue, at the rate at which rows finished lately; rows that are decoding, and those of the request itself, are the
neighbours that a step has to move along. An answer is taken to be as long as it may be, except for /v1/predict, whose answers are all of one task: of those, 19
in 20 of the last ones were no longer than what is expected.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Sequence

from llmdistill.serve.points import OperatingPoint
from llmdistill.serve.scheduler import Scheduler

NUM_RECENT = 100
FEWEST = 8
"""Before so many answers of a kind were seen, one is taken to be as long as it may be."""


class Forecast:
    """Latencies before they are, and the lengths of answers that were."""

    def __init__(self, scheduler: Scheduler, max_batch_rows: int) -> None:
        self._scheduler = scheduler
        self._max_batch_rows = max_batch_rows
        self._lengths: dict[str, deque[int]] = defaultdict(lambda: deque(maxlen=NUM_RECENT))

    def saw(self, kind: str, num_tokens: int) -> None:
        """An answer of this kind has ended."""
        self._lengths[kind].append(num_tokens)

    def length(self, kind: str, most: int) -> int:
        """Tokens to expect of an answer; `kind` is empty where nothing is known of it."""
        seen = sorted(self._lengths[kind]) if kind else []
        return min(most, seen[math.ceil(0.95 * len(seen)) - 1]) if len(seen) >= FEWEST else most

    def latency_ms(self, point: OperatingPoint, lengths: Sequence[tuple[int, int]]) -> float:
        """Of a request with rows of these lengths of prompt and answer, which decode together."""
        num_neighbours = min(self._max_batch_rows, self._scheduler.num_active + len(lengths)) - 1
        slowest = max(point.pace.seconds(num_prompt_tokens, num_new_tokens, num_neighbours) for num_prompt_tokens, num_new_tokens in lengths)
        return 1000 * (self._scheduler.wait_seconds() + slowest)
