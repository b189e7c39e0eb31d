"""Linears in integers only: a reference, for what runs on machines without floating point. Nothing in this package serves with it.

Source: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", sections 2.1 to 2.4. A real number
r is S (q - Z), with q an unsigned 8-bit integer and Z the one that stands for zero. A product of two such is again one of q's own kind (equations 3 to 7):

    q3 = Z3 + M (I Z1 Z2 - Z1 a2 - Z2 a1 + sum q1 q2)      M = S1 S2 / S3, a1 and a2 the sums of q1's rows and q2's columns

M alone is no integer. It is 2^-shift times a 32-bit fixed-point number of at least a half, and multiplying by it is a doubling high multiplication that rounds
and saturates, then a shift that rounds to nearest, ties away from zero (section 2.2, appendix B). The bias is a 32-bit integer of scale S1 S2 without a zero
(section 2.4), and a ReLU is no more than the lower end of q3's range.

Where we differ: M may be 1 or more (then the shift goes left first, and saturates), and S2 and with it M may be one for each output.

Shapes: M rows, I inputs, O outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Int, UInt8

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1


@dataclass(frozen=True)
class Range:
    """What codes stand for: r = scale * (q - zero). `scale` is one number, or one for each row of a weight."""

    scale: Tensor
    zero: int

    @classmethod
    def of(cls, low: float, high: float) -> Range:
        """The range that holds these and zero, which is one of its numbers (section 3)."""
        low, high = min(low, 0.0), max(high, 0.0)
        scale = (high - low) / 255 or 1.0
        return cls(torch.tensor(scale, dtype=torch.float64), round(-low / scale))

    @classmethod
    def of_rows(cls, weight_OI: Tensor) -> Range:
        """One symmetric range for each row; 128 stands for zero, and 0 is not used, as section 3.1 asks of weights."""
        largest_O1 = weight_OI.double().abs().amax(1, keepdim=True)
        return cls(torch.where(largest_O1 > 0, largest_O1 / 127, 1), 128)

    def quantize(self, real: Tensor) -> Tensor:
        """The nearest codes, in uint8."""
        return ((real.double() / self.scale).round() + self.zero).clamp(0, 255).to(torch.uint8)

    def real(self, code: Tensor) -> Tensor:
        """What codes stand for, in float64."""
        return (code.double() - self.zero) * self.scale


def fixed_point(multiplier: Tensor) -> tuple[Tensor, Tensor]:
    """Positive numbers as M0 * 2^-31 * 2^-shift, with 2^30 <= M0 < 2^31 (equation 6): the two, as int64 tensors. A negative shift goes left."""
    if not bool(((multiplier > 0) & torch.isfinite(multiplier)).all()):
        raise ValueError(f"a multiplier is {float(multiplier.min())} to {float(multiplier.max())}; scales, and so their ratios, are positive and finite")
    mantissa, exponent = torch.frexp(multiplier.double())
    whole = (mantissa * 2**31).round().long()
    overflows = whole == 2**31  # rounded up to the next power of two
    return torch.where(overflows, whole // 2, whole), (-exponent - overflows.to(exponent.dtype)).long()


def doubling_high_multiply(a: Tensor, b: Tensor) -> Tensor:
    """round(a b / 2^31) of 32-bit integers, ties away from zero; -2^31 times itself, which would be 2^31, saturates."""
    product = a.long() * b.long()
    nudged = product + torch.where(product >= 0, 2**30, 1 - 2**30)
    return torch.div(nudged, 2**31, rounding_mode="trunc").clamp(max=INT32_MAX)


def rounding_shift(x: Tensor, bits: Tensor) -> Tensor:
    """round(x / 2^bits), ties away from zero."""
    divisor = 1 << bits
    remainder = x & (divisor - 1)
    threshold = (divisor - 1 >> 1) + (x < 0).long()  # x >> bits rounds down: a negative half stays there, a positive one goes up
    return (x >> bits) + (remainder > threshold).long()


def multiply(accumulated: Tensor, multiplier: Tensor, shift: Tensor) -> Tensor:
    """A 32-bit accumulator times a fixed-point number: what `fixed_point` gave."""
    left, right = (-shift).clamp(min=0), shift.clamp(min=0)
    shifted = (accumulated.long() << left.clamp(max=31)).clamp(INT32_MIN, INT32_MAX)
    return rounding_shift(doubling_high_multiply(shifted, multiplier), right.clamp(max=62))


@dataclass(frozen=True, kw_only=True)
class IntegerLinear:
    """A linear, with a ReLU after it or not: uint8 in, uint8 out, and integers between."""

    code_OI: UInt8[Tensor, "O I"]
    weight_zero: int
    input_zero: int
    output_zero: int
    bias_O: Int[Tensor, " O"]
    multiplier_O: Int[Tensor, " O"]
    shift_O: Int[Tensor, " O"]
    relu: bool

    @classmethod
    def of(cls, weight_OI: Tensor, bias_O: Tensor | None, input_range: Range, output_range: Range, *, relu: bool) -> IntegerLinear:
        """From a linear in floating point, and what its inputs and outputs range over."""
        weight_range = Range.of_rows(weight_OI)
        scale_O = (weight_range.scale * input_range.scale).flatten().expand(len(weight_OI))
        multiplier_O, shift_O = fixed_point(scale_O / output_range.scale)
        whole_O = torch.zeros(len(weight_OI), dtype=torch.float64) if bias_O is None else (bias_O.double() / scale_O).round()
        if bool((whole_O.abs() > INT32_MAX).any()):
            raise ValueError("a bias is beyond 32 bits at the scale of its products: its row of the weight, or the input's range, is next to nothing beside it")
        return cls(
            code_OI=weight_range.quantize(weight_OI),
            weight_zero=weight_range.zero,
            input_zero=input_range.zero,
            output_zero=output_range.zero,
            bias_O=whole_O.long(),
            multiplier_O=multiplier_O,
            shift_O=shift_O,
            relu=relu,
        )

    def accumulated(self, code_MI: UInt8[Tensor, "M I"]) -> Int[Tensor, "M O"]:
        """The sums before they are scaled, in the order of equation 7: zeros are taken off the sums and not off the codes. They must fit 32 bits."""
        q1_MI, q2_OI = code_MI.long(), self.code_OI.long()
        num_inputs = q1_MI.shape[1]
        sums_MO = num_inputs * self.input_zero * self.weight_zero - self.input_zero * q2_OI.sum(1) - self.weight_zero * q1_MI.sum(1, keepdim=True)
        sums_MO = sums_MO + q1_MI @ q2_OI.t() + self.bias_O
        assert bool((sums_MO.abs() <= INT32_MAX).all()), "more than 32 bits"
        return sums_MO

    def __call__(self, code_MI: UInt8[Tensor, "M I"]) -> UInt8[Tensor, "M O"]:
        scaled_MO = multiply(self.accumulated(code_MI), self.multiplier_O, self.shift_O)
        lowest = self.output_zero if self.relu else 0
        return (scaled_MO + self.output_zero).clamp(lowest, 255).to(torch.uint8)
