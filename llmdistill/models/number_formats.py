"""Numbers of 4, 6 and 8 bits: what each code stands for, and how codes are packed into bytes.

Source: Open Compute Project, "Microscaling Formats (MX) Specification" v1.0: tables 2 to 6 and section 5.3 for the elements, 5.4 and 6.3 for the shared scale.

    e4m3  sign, 4 bits of exponent, 3 of mantissa; no infinity, one NaN a sign; up to 448
    e5m2  as IEEE 754 would have it, with infinities and NaNs (which are never written); up to 57344
    e3m2, e2m3, e2m1    6, 6 and 4 bits, every code a number; up to 28, 7.5 and 6
    int8  two's complement in 64ths; -128 is never written, so that the format is symmetric

A code's magnitudes are in the order of the numbers they stand for, so that nearest and even can be told from their index alone.

Shapes: V codes, N magnitudes, O outputs, I inputs, J bytes of a row.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

ElementName: TypeAlias = Literal["e2m1", "e2m3", "e3m2", "e4m3", "e5m2", "int8"]
BLOCK_SIZE = 32
EXPONENT_BIAS = 127  # of the shared scale, a power of two in 8 bits


@dataclass(frozen=True)
class Element:
    """How a code's bits are read."""

    bits: int
    exponent_bits: int
    mantissa_bits: int
    num_magnitudes: int
    """Those from zero on that are finite; the codes above stand for no number."""

    def magnitude(self, index: int) -> float:
        """The number without its sign."""
        if not self.exponent_bits:
            return index / 64
        exponent, mantissa = divmod(index, 1 << self.mantissa_bits)
        lowest = 2 - (1 << (self.exponent_bits - 1))  # the exponent of subnormals and of the smallest normals
        significand = mantissa / (1 << self.mantissa_bits) + (exponent > 0)
        return math.ldexp(significand, lowest + max(exponent, 1) - 1)

    @property
    def largest(self) -> float:
        return self.magnitude(self.num_magnitudes - 1)

    @property
    def largest_exponent(self) -> int:
        """Of the largest number, as a power of two."""
        return math.frexp(self.largest)[1] - 1


ELEMENTS: dict[str, Element] = {
    "e2m1": Element(4, 2, 1, 8),
    "e2m3": Element(6, 2, 3, 32),
    "e3m2": Element(6, 3, 2, 32),
    "e4m3": Element(8, 4, 3, 127),
    "e5m2": Element(8, 5, 2, 124),
    "int8": Element(8, 0, 7, 128),
}


@functools.cache
def magnitudes_N(name: str) -> Tensor:
    """All magnitudes in float64, rising."""
    element = ELEMENTS[name]
    return torch.tensor([element.magnitude(index) for index in range(element.num_magnitudes)], dtype=torch.float64)


@functools.cache
def values_V(name: str) -> Tensor:
    """What each code stands for, in float32 (which has them all); NaN where it is no finite number."""
    element = ELEMENTS[name]
    half = 1 << (element.bits - 1)
    values = torch.full((2 * half,), math.nan, dtype=torch.float64)
    magnitude_N = magnitudes_N(name)
    values[: element.num_magnitudes] = magnitude_N
    negative = half + torch.arange(element.num_magnitudes) if element.exponent_bits else -torch.arange(element.num_magnitudes) % (2 * half)
    values[negative[1:]] = -magnitude_N[1:]
    if element.exponent_bits:
        values[half] = -0.0
    return values.float()


@functools.cache
def shared_scales_V() -> Tensor:
    """The power of two that each biased exponent stands for, in float64; 255 stands for no number."""
    return torch.tensor([*(math.ldexp(1.0, exponent - EXPONENT_BIAS) for exponent in range(255)), math.nan], dtype=torch.float64)


def num_bytes(num_codes: int, bits: int) -> int:
    """Bytes of a packed row."""
    return {4: -(-num_codes // 2), 6: 3 * -(-num_codes // 4), 8: num_codes}[bits]


def pack(code_OI: Tensor, bits: int) -> Tensor:
    """Codes (uint8) as bytes, the first code in the lowest bits: 2 in one byte, 4 in three, or 1 in one."""
    if bits == 8:
        return code_OI
    if bits == 4:
        code_OI = torch.nn.functional.pad(code_OI, (0, -code_OI.shape[1] % 2))
        return code_OI[:, 0::2] | (code_OI[:, 1::2] << 4)
    a, b, c, d = torch.nn.functional.pad(code_OI, (0, -code_OI.shape[1] % 4)).unflatten(1, (-1, 4)).unbind(-1)
    return torch.stack([a | (b << 6), (b >> 2) | (c << 4), (c >> 4) | (d << 2)], -1).flatten(1)


def unpack(packed_OJ: Tensor, bits: int, num_codes: int) -> Tensor:
    """The codes again, as uint8."""
    if bits == 8:
        return packed_OJ
    if bits == 4:
        return torch.stack([packed_OJ & 15, packed_OJ >> 4], -1).flatten(1)[:, :num_codes]
    a, b, c = packed_OJ.unflatten(1, (-1, 3)).unbind(-1)
    return torch.stack([a & 63, (a >> 6) | (b & 15) << 2, (b >> 4) | (c & 3) << 4, c >> 2], -1).flatten(1)[:, :num_codes]
