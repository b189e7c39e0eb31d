"""How fast a model answers: the time of whole `generate` calls at given batch sizes, on the engine that serves."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import quantiles
from typing import TYPE_CHECKING

import torch

from llmdistill.decode.decoding import Decoding
from llmdistill.decode.engine import Engine

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Wall-clock time from the prompts' tokens to all answers' tokens, over the measured batches of one size."""

    batch_size: int
    num_batches: int
    latency_ms_p50: float
    latency_ms_p95: float
    tokens_per_second: float  # generated tokens, stop tokens included
    tokens_per_answer: float


def measure(model: nn.Module, prompts: Sequence[Sequence[int]], decoding: Decoding, batch_sizes: Sequence[int] = (1, 32), repeats: int = 10) -> list[Latency]:
    """Times `repeats` batches of each size, after one that is not counted; batches take the prompts in turn and begin again when there are no more."""
    if not prompts:
        raise ValueError("there are no prompts to measure with; give at least one")
    if repeats < 1 or not batch_sizes or min(batch_sizes) < 1:
        raise ValueError(f"repeats is {repeats} and batch_sizes are {tuple(batch_sizes)}; give one repeat and one batch size of 1 or more, at least")
    engine = Engine(model, max_batch_rows=max(batch_sizes))
    return [_measure_size(engine, prompts, decoding, batch_size, repeats) for batch_size in batch_sizes]


def _measure_size(engine: Engine, prompts: Sequence[Sequence[int]], decoding: Decoding, batch_size: int, repeats: int) -> Latency:
    seconds, num_tokens = [], 0
    for index in range(-1, repeats):
        batch = [prompts[(max(index, 0) * batch_size + place) % len(prompts)] for place in range(batch_size)]
        _synchronize()
        begin = time.perf_counter()
        answers = engine.generate(batch, decoding)
        _synchronize()
        if index >= 0:
            seconds.append(time.perf_counter() - begin)
            num_tokens += sum(len(answer.tokens) + (answer.finish_reason == "stop") for answer in answers)
    percentiles = quantiles(seconds, n=20, method="inclusive") if repeats > 1 else seconds * 19
    return Latency(
        batch_size=batch_size,
        num_batches=repeats,
        latency_ms_p50=percentiles[9] * 1000,
        latency_ms_p95=percentiles[18] * 1000,
        tokens_per_second=num_tokens / sum(seconds),
        tokens_per_answer=num_tokens / (repeats * batch_size),
    )


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
