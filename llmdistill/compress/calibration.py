"""The rows that compression looks at: what statistics are taken over, and what choices are measured on.

Every batch holds one row and no padding: an input, and the targets that share it. So padding and the size of a batch cannot change a statistic, and a gradient
is that of one row, as QSVD's importance asks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from llmdistill.batches import Batch, Example, collate
from llmdistill.models.modes import evaluating
from llmdistill.train import Loss

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Rows in tokens, and the loss that says what matters in them. Labels and rationales count alike: each is a row."""

    examples: Sequence[Example]
    loss: Loss
    held_out: Sequence[Example] = ()
    """Rows on which settings are chosen (exponents, sensitive layers); the rows themselves where there are none."""
    known_loss: float | None = None
    """The held-out loss of the model that a method is given, where it was measured before."""

    def __post_init__(self) -> None:
        if not self.examples:
            raise ValueError("there are no calibration rows; data-aware compression needs at least a few dozen: give more rows, or annotate a train split")

    def batches(self, model: PreTrainedModel) -> Iterator[Batch]:
        """The rows, one by one."""
        return rows(self.examples, model)

    def mean_loss(self, model: PreTrainedModel) -> float:
        """The loss on the held-out rows, as training counts it: each part's mean over all its tokens, weighted and added up."""
        sums, counts = 0.0, 0
        with torch.inference_mode(), evaluating(model):
            for batch in rows(self.held_out or self.examples, model):
                sums = sums + self.loss.sums_P(model, batch).double()
                counts = counts + self.loss.counts_P(batch)
        total: Any = (torch.as_tensor(self.loss.weights, dtype=torch.float64) * (sums / counts.clamp(min=1)).cpu()).sum()  # pyright: ignore[reportAttributeAccessIssue]
        return float(total)


def row_loss(loss: Loss, model: Any, batch: Batch) -> Tensor:
    """The loss of one row: each part's mean over its tokens there, weighted and added up."""
    sums_P, counts_P = loss.sums_P(model, batch), loss.counts_P(batch)
    return (sums_P / counts_P.clamp(min=1) * sums_P.new_tensor(loss.weights)).sum()


def rows(examples: Sequence[Example], model: Any) -> Iterator[Batch]:
    """Batches of one input each, with all the targets that share it."""
    causal = not model.config.is_encoder_decoder
    for example in examples:
        for pairs in [(pair,) for pair in example] if causal else _by_input(example):
            yield collate([pairs], causal=causal).to(model.device)


def within(examples: Sequence[Example], num_tokens: int) -> Sequence[Example]:
    """The first of them that have so many tokens together, inputs and targets; one at least."""
    totals = itertools.accumulate(sum(len(pair.input) + len(pair.target) for pair in example) for example in examples)
    return examples[: max(1, sum(total <= num_tokens for total in totals))]


def _by_input(example: Example) -> list[Example]:
    inputs = {id(pair.input): pair.input for pair in example}
    return [tuple(pair for pair in example if id(pair.input) == number) for number in inputs]
