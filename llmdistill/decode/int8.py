"""Int8 linears in the decode engine: several on one input quantize it once, and are multiplied as one.

Shapes: M rows, I inputs, O outputs of all linears together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeGuard

import torch

from llmdistill.models.int8_linear import Int8Linear
from llmdistill.models.int8_product import integer_product, product, quantize_rows, rescaled

if TYPE_CHECKING:
    from torch import Tensor, nn


def are_int8(modules: Sequence[nn.Module]) -> TypeGuard[Sequence[Int8Linear]]:
    return all(type(module) is Int8Linear for module in modules)


class Int8Joint:
    """The outputs of one or several int8 linears side by side. One linear is read where it is; the integers of several are copied together."""

    def __init__(self, linears: Sequence[Int8Linear]) -> None:
        first = linears[0]
        biases = [first.scale_O.new_zeros(linear.out_features) if linear.bias is None else linear.bias.detach().float() for linear in linears]
        self.weight_OI = first.weight if len(linears) == 1 else torch.cat([linear.weight for linear in linears])
        self.scale_O = first.scale_O if len(linears) == 1 else torch.cat([linear.scale_O for linear in linears])
        self.bias_O = None if all(linear.bias is None for linear in linears) else torch.cat(biases)

    def __call__(self, x: Tensor) -> Tensor:
        output = product(x if x.dim() == 2 else x.flatten(0, -2), self.weight_OI, self.scale_O)
        if self.bias_O is not None:
            output += self.bias_O
        output = output.to(x.dtype)
        return output if x.dim() == 2 else output.unflatten(0, x.shape[:-1])

    def add_to(self, hidden: Tensor, x: Tensor) -> Tensor:
        """hidden + self(x), in one more operation than self(x)."""
        if hidden.dtype != torch.float32 or self.bias_O is not None:
            return hidden + self(x)
        rows_MI = x.flatten(0, -2)
        quantized_MI, scale_M1 = quantize_rows(rows_MI)
        output = rescaled(integer_product(quantized_MI, self.weight_OI), scale_M1, self.scale_O)
        return output.view(hidden.shape).add_(hidden)
