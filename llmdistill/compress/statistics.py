"""What the calibration rows say of the inputs of linears: Gram matrices and mean magnitudes, streamed row by row.

Shapes: T tokens of one row, I inputs of a linear.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llmdistill.compress.calibration import Calibration
from llmdistill.compress.slots import Slot
from llmdistill.models.modes import evaluating

if TYPE_CHECKING:
    from jaxtyping import Float
    from transformers import PreTrainedModel


@dataclass
class InputStatistics:
    """Of everything that one tensor was on the calibration rows."""

    gram_II: Float[Tensor, "I I"]
    """X^T X, summed over tokens, in the dtype asked for."""
    sum_magnitude_I: Float[Tensor, " I"]
    """sum |x|"""
    largest_magnitude_I: Float[Tensor, " I"]
    """max |x|"""
    num_tokens: int = 0

    @property
    def mean_magnitude_I(self) -> Float[Tensor, " I"]:
        return self.sum_magnitude_I / max(1, self.num_tokens)

    def add(self, x: Tensor) -> None:
        """All tokens of some rows without padding."""
        x_TI = x.detach().reshape(-1, x.shape[-1]).to(self.gram_II.dtype)
        self.gram_II += x_TI.t() @ x_TI
        self.sum_magnitude_I += x_TI.abs().sum(0)
        self.largest_magnitude_I = torch.maximum(self.largest_magnitude_I, x_TI.abs().amax(0))
        self.num_tokens += len(x_TI)


@torch.no_grad()
def input_statistics(
    model: PreTrainedModel, wanted: Sequence[Slot], calibration: Calibration, *, dtype: torch.dtype = torch.float64
) -> Mapping[str, InputStatistics]:
    """By `Slot.input`, for each input that one of these slots reads; slots that read the same tensor share one entry."""
    first_reader = {slot.input: slot for slot in reversed(wanted)}
    statistics: dict[str, InputStatistics] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def see(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            if name not in statistics:
                num = x.shape[-1]
                zeros = torch.zeros(num, dtype=dtype, device=x.device)
                statistics[name] = InputStatistics(torch.zeros(num, num, dtype=dtype, device=x.device), zeros, zeros.clone())
            statistics[name].add(x)

        return see

    hooks = [slot.module(model).register_forward_pre_hook(watch(name)) for name, slot in first_reader.items()]
    try:
        with evaluating(model):
            for batch in calibration.batches(model):
                calibration.loss.sums_P(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    missing = sorted(first_reader.keys() - statistics.keys())
    if missing:
        raise AssertionError(f"the forward pass never called the readers of {missing[:3]}")
    return statistics
