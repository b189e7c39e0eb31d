"""The rows that importance is measured on: one input at a time, unpadded, with the targets that share it, and the loss as training counts it.

Shapes: P parts of the loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from llmdistill.batches import Batch, Example, collate
from llmdistill.models.modes import evaluating
from llmdistill.train import Loss

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def rows(model: Any, examples: Sequence[Example]) -> Iterator[Batch]:
    """A batch for each input."""
    if not examples:
        raise ValueError("there are no rows to measure importance on: give a few dozen, in tokens, of what the student is to learn")
    causal = not model.config.is_encoder_decoder
    for example in examples:
        inputs = {id(pair.input): None for pair in example}
        groups = [(pair,) for pair in example] if causal else [tuple(pair for pair in example if id(pair.input) == number) for number in inputs]
        for pairs in groups:
            yield collate([pairs], causal=causal).to(model.device)


def part_weights_P(model: Any, examples: Sequence[Example], loss: Loss) -> Float[Tensor, " P"]:
    """What each part's sum is multiplied by: its weight over the number of its tokens in all rows."""
    counts_P = torch.stack([loss.counts_P(batch) for batch in rows(model, examples)]).sum(0)
    return torch.as_tensor(loss.weights, dtype=torch.float64, device=counts_P.device) / counts_P.clamp(min=1)


@torch.inference_mode()
def mean_loss(model: Any, examples: Sequence[Example], loss: Loss) -> float:
    """The loss of the model as it is at present, in eval mode."""
    weights_P = part_weights_P(model, examples, loss)
    with evaluating(model):
        return float(sum((weights_P * loss.sums_P(model, batch).double()).sum() for batch in rows(model, examples)))
