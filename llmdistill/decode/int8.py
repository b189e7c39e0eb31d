"""Int8 linears in the decode engine, and what stands around them, in few operations.

Beside a product of one row that takes ten microseconds, each small operation counts. So linears on one input are one product that quantizes it once; and no
number is multiplied with a scale that quantization divides out again: a norm before a linear only has to multiply with its weights, since the codes do not
depend on the root mean square (a factor of the row's scale), and a ReLU between two linears needs no scale of the first.

Up to rounding in float32 that is what the modules give; where rounding moves a number across the middle between two codes, the code differs by one.

Shapes: M rows, I inputs, O outputs of all linears together, D model width, F neurons.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from llmdistill.models.int8_product import PackedWeight, Rows, quantized

if TYPE_CHECKING:
    from torch import Tensor

    from llmdistill.models.int8_linear import Int8Linear


class Int8Joint:
    """The outputs of one or several int8 linears side by side. One linear is read where it is; the integers of several are copied together."""

    def __init__(self, linears: Sequence[Int8Linear]) -> None:
        first = linears[0]
        biases = [first.scale_O.new_zeros(linear.out_features) if linear.bias is None else linear.bias.detach().float() for linear in linears]
        self.weight = PackedWeight(
            first.weight if len(linears) == 1 else torch.cat([linear.weight for linear in linears]),
            first.scale_O if len(linears) == 1 else torch.cat([linear.scale_O for linear in linears]),
        )
        self.bias_O = None if all(linear.bias is None for linear in linears) else torch.cat(biases)

    def __call__(self, x: Tensor) -> Tensor:
        if x.dim() == 2 and x.dtype == torch.float32:
            return self.of(quantized(x))
        return self.of(quantized(x.flatten(0, -2).float())).to(x.dtype).unflatten(0, x.shape[:-1])

    def of(self, rows: Rows) -> Tensor:
        """The outputs for rows that are quantized, in float32."""
        output_MO = self.weight.product(rows)
        return output_MO if self.bias_O is None else output_MO.add_(self.bias_O)

    def add_to(self, hidden: Tensor, x: Tensor) -> Tensor:
        """hidden + self(x)."""
        if hidden.dtype != torch.float32:
            return hidden + self(x)
        return self.add_of(hidden, quantized(x if x.dim() == 2 else x.flatten(0, -2)))

    def add_of(self, hidden: Tensor, rows: Rows) -> Tensor:
        """hidden, in float32, and the outputs for rows that are quantized."""
        if self.bias_O is not None:
            hidden = hidden + self.bias_O
        if hidden.dim() == 2:
            return self.weight.add_to(hidden, rows)
        return self.weight.add_to(hidden.view(-1, hidden.shape[-1]), rows).view(hidden.shape)


class NormedRows:
    """hidden -> rows of a root mean square norm, times a gain. `norm` is the stock module, in float32."""

    def __init__(self, norm: Any, gain: float = 1.0) -> None:
        self.weight_D, self.epsilon, self.gain = norm.weight, norm.variance_epsilon, gain
        self.width = len(norm.weight)
        self.epsilon_1 = norm.weight.new_full((1,), norm.variance_epsilon)

    def __call__(self, hidden: Tensor) -> Rows:
        hidden_MD = hidden if hidden.dim() == 2 else hidden.view(-1, self.width)
        weighted_MD = hidden_MD * self.weight_D
        if len(hidden_MD) == 1 and hidden.device.type == "cpu":
            hidden_D = hidden.view(-1)
            mean_square = torch.dot(hidden_D, hidden_D).item() / self.width + self.epsilon
            return quantized(weighted_MD, self.gain / math.sqrt(mean_square))
        return quantized(weighted_MD, reciprocal_root_mean_square(hidden_MD, self.epsilon_1, self.gain))


def reciprocal_root_mean_square(hidden_MD: Tensor, epsilon_1: Tensor, gain: float = 1.0) -> Tensor:
    """(M 1), in three operations or four."""
    length_M1 = torch.linalg.vector_norm(hidden_MD, 2, -1, True)
    reciprocal_M1 = torch.addcmul(epsilon_1, length_M1, length_M1, value=1 / hidden_MD.shape[-1]).rsqrt_()
    return reciprocal_M1 if gain == 1 else reciprocal_M1.mul_(gain)


class Int8Normed:
    """hidden -> linears(norm(hidden)), side by side, for hidden in float32."""

    def __init__(self, norm: Any, linears: Sequence[Int8Linear], gain: float = 1.0) -> None:
        self.rows, self.joint = NormedRows(norm, gain), Int8Joint(linears)

    def __call__(self, hidden: Tensor) -> Tensor:
        output_MO = self.joint.of(self.rows(hidden))
        return output_MO if hidden.dim() == 2 else output_MO.unflatten(0, hidden.shape[:-1])


class Int8FeedForward:
    """hidden + out(act(gate(norm(hidden))) [* linear(norm(hidden))]), for hidden in float32 and linears without biases."""

    def __init__(self, norm: Any, linears: Sequence[Int8Linear], activation: Callable[[Tensor], Tensor], out: Int8Linear, *, is_relu: bool) -> None:
        self.rows, self.inner, self.out = NormedRows(norm), Int8Joint(linears), Int8Joint([out])
        self.activation, self.is_gated, self.is_relu = activation, len(linears) == 2, is_relu

    def __call__(self, hidden: Tensor) -> Tensor:
        rows = self.rows(hidden)
        inner = self.inner.weight.unscaled(rows, relu=self.is_relu and not self.is_gated)
        if self.is_gated:
            gate_MF, linear_MF = inner.chunk(2, -1)
            rows = quantized(self.activation(gate_MF * rows.scale) * linear_MF, rows.scale)
        elif self.is_relu:
            rows = quantized(inner, rows.scale, nonnegative=True)
        else:
            rows = quantized(self.activation(inner.mul_(rows.scale)))
        return self.out.add_of(hidden, rows)
