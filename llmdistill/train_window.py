"""The figures of the training log: sums since its last line, over all processes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from llmdistill.batches import Batch


class Window:
    """What this process did since the last line of the log. Losses stay tensors, so that a GPU is not waited for at every step."""

    def __init__(self) -> None:
        self._sums: list[Tensor] = []
        self._counts: list[Tensor] = []
        self._num_examples = self._num_tokens = self._num_real_tokens = 0
        self._gradient_norm: Any = 0.0
        self._learning_rate = 0.0
        self._started_s = time.perf_counter()

    def add(self, batch: Batch, sums_P: Tensor) -> None:
        """A micro-batch of this process and its summed losses."""
        self._sums.append(sums_P)
        if not batch.idle:
            self._num_examples += batch.num_examples
            self._num_tokens += batch.num_tokens
            self._num_real_tokens += batch.num_real_tokens

    def end_step(self, counts_P: Tensor, gradient_norm: Any, learning_rate: float) -> None:
        """A step's counts, those of all processes, and what the optimizer did."""
        self._counts.append(counts_P)
        self._gradient_norm, self._learning_rate = gradient_norm, learning_rate

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that is no training."""
        began_s = time.perf_counter()
        yield
        self._started_s += time.perf_counter() - began_s

    def totals(self, accelerator: Accelerator) -> tuple[Tensor, Tensor, dict[str, float]]:
        """Summed losses and counts of all processes, and the other figures, of the last step or by second."""
        seconds = time.perf_counter() - self._started_s
        own_P = torch.stack(self._sums).sum(0)
        sizes = own_P.new_tensor([self._num_examples, self._num_tokens, self._num_real_tokens])
        sums: Any = accelerator.reduce(torch.cat([own_P, sizes]), "sum")
        num_examples, num_tokens, num_real_tokens = sums[len(own_P) :].tolist()
        figures = {
            "learning_rate": self._learning_rate,
            "gradient_norm": float(self._gradient_norm),
            "examples_per_second": num_examples / seconds,
            "tokens_per_second": num_real_tokens / seconds,
            "padding_percent": 100 * (1 - num_real_tokens / num_tokens),
        }
        return sums[: len(own_P)], torch.stack(self._counts).sum(0), figures
