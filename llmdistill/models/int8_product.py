"""Products of 8-bit integers: the one place that decides how they are computed.

Shapes: M rows, I inputs, O outputs.

    y_MO = (q_MI @ w_OI^T) * s_M * s_O        q = round(x / s_M), s_M = max|x_M| / 127: each row (token) has a scale of its own, found when it comes

There are two ways on a CPU, and both are exact up to the float scales:

    `aten::_int_mm` multiplies int8 by int8 into int32, from the weight as it is stored. Modules use it, since they need no packed copy.
    oneDNN's qlinear (what TorchInductor calls for a quantized linear) multiplies from a weight packed for it, scales each output and applies a ReLU on the way
    out. It takes signed rows through a reference kernel, a thousand times slower, so rows go in as unsigned, 128 more, which its zero point takes off again.

`PackedWeight`, which the decode engine uses, takes the first for one row and the second for more. Measured on one thread of an AVX-512 VNNI machine (EPYC of
family 25, torch 2.13), microseconds for 1 / 2 / 16 / 32 / 512 rows, the first with the time to scale what it gives:

                                 float32                          _int_mm                       qlinear
    512 inputs, 512 outputs      23 / 38 / 110 / 187 / 2560       7 / 17 / 35 / 55 / 671        23 / 24 / 40 / 59 / 614
    512 inputs, 2048 outputs     88 / 158 / 443 / 769 / 19694     20 / 55 / 126 / 210 / 2775    40 / 40 / 103 / 177 / 2598
    2048 inputs, 512 outputs     71 / 129 / 522 / 839 / 23901     17 / 196 / 260 / 332 / 2636   38 / 38 / 99 / 173 / 2370
    512 inputs, 32128 outputs    10319 / 25185 / 23445 / 46393    341 / 1924 / 3504 / 7016      440 / 401 / 1943 / 3208

and 8 to 200 for quantizing the rows. aten::_weight_int8pack_mm, which leaves rows in bfloat16, takes 32 for one row of 2048 outputs and 7,000 for sixteen.
On processors without VNNI, qlinear adds pairs of products in 16 bits and clips them: `qlinear_is_exact` tries once, and where it is not, _int_mm does it all.

On CUDA _int_mm wants more than 16 rows and sizes that are multiples of 8: they are filled up with zeros. Other devices have no int8 product: the weight is
dequantized there.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST = 127
SMALLEST_SCALE = 1e-30  # a row of zeros has no scale; any will do
CUDA_LEAST_ROWS, CUDA_MULTIPLE = 17, 8
UNSIGNED_OFFSET = 128
MANY_OUTPUTS = 8192  # from here on qlinear is the faster way for one row too
_HALF_AND_OFFSET = {offset: torch.tensor([offset + 0.5]) for offset in (0, UNSIGNED_OFFSET)}  # added before a fraction is cut off


def quantize_rows(x_MI: Tensor) -> tuple[Tensor, Tensor]:
    """Each row as integers from -127 to 127, and its scale (M 1) in float32."""
    x_MI = x_MI.float()
    scale_M1 = x_MI.abs().amax(-1, keepdim=True).div_(LARGEST).clamp_(min=SMALLEST_SCALE)
    return (x_MI / scale_M1).round_().to(torch.int8), scale_M1


def product(x_MI: Tensor, weight_OI: Tensor, scale_O: Tensor) -> Tensor:
    """x times an int8 weight with a scale for each output, in float32; the bias is the caller's."""
    if x_MI.device.type not in ("cpu", "cuda"):
        return F.linear(x_MI.float(), weight_OI.float() * scale_O[:, None])
    if not x_MI.numel():
        return x_MI.new_zeros(len(x_MI), len(weight_OI), dtype=torch.float32)
    quantized_MI, scale_M1 = quantize_rows(x_MI)
    return rescaled(integer_product(quantized_MI, weight_OI), scale_M1, scale_O)


def rescaled(sum_MO: Tensor, scale_M1: Tensor, scale_O: Tensor) -> Tensor:
    """What an integer product stands for, in float32."""
    return (sum_MO * scale_O).mul_(scale_M1)


def integer_product(quantized_MI: Tensor, weight_OI: Tensor) -> Tensor:
    """The exact product in int32."""
    if quantized_MI.shape[1] == 1:
        return _outer(quantized_MI, weight_OI)
    if quantized_MI.device.type == "cpu":
        return torch.ops.aten._int_mm(quantized_MI, weight_OI.t())
    (num_rows, num_inputs), num_outputs = quantized_MI.shape, len(weight_OI)
    filled_MI = F.pad(quantized_MI, (0, -num_inputs % CUDA_MULTIPLE, 0, max(0, CUDA_LEAST_ROWS - num_rows)))
    filled_OI = F.pad(weight_OI, (0, -num_inputs % CUDA_MULTIPLE, 0, -num_outputs % CUDA_MULTIPLE))
    return torch.ops.aten._int_mm(filled_MI, filled_OI.t())[:num_rows, :num_outputs]


def _outer(quantized_M1: Tensor, weight_O1: Tensor) -> Tensor:
    """The product for one input, where torch's kernel takes the transposed column for something else, and is wrong (2.13)."""
    return quantized_M1.int() * weight_O1.int().t()


def quantize_weight(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """A weight as integers from -127 to 127, and the scale of each output in float32: max|w| / 127."""
    wide_OI = weight_OI.detach().float()
    scale_O = wide_OI.abs().amax(1).div_(LARGEST).clamp_(min=SMALLEST_SCALE)
    return (wide_OI / scale_O[:, None]).round_().to(torch.int8), scale_O


class Rows(NamedTuple):
    """Rows as integers from -127 to 127, `offset` more where that is how they are multiplied, and what one stands for: a number, or (M 1)."""

    codes_MI: Tensor
    offset: int
    scale: Tensor | float


def quantized(x_MI: Tensor, factor: Tensor | float = 1.0, *, nonnegative: bool = False) -> Rows:
    """Rows of x times a factor, a number or (M 1), which no integer depends on. In few operations, since beside a product of one row each one counts."""
    is_unsigned = x_MI.device.type == "cpu" and unsigned_is_exact()
    if is_unsigned and len(x_MI) == 1:
        scale = max((x_MI if nonnegative else x_MI.abs()).max().item() / LARGEST, SMALLEST_SCALE)
        offset = 0 if nonnegative else UNSIGNED_OFFSET
        return Rows(torch.add(_HALF_AND_OFFSET[offset], x_MI, alpha=1 / scale).to(torch.uint8), offset, float(factor) * scale)
    scale_M1 = (x_MI if nonnegative else x_MI.abs()).amax(-1, keepdim=True).div_(LARGEST).clamp_(min=SMALLEST_SCALE)
    codes_MI = (x_MI / scale_M1).round_().to(torch.int8)
    scale_M1 *= factor
    if not is_unsigned:
        return Rows(codes_MI, 0, scale_M1)
    unsigned_MI = codes_MI.view(torch.uint8)
    return Rows(unsigned_MI, 0, scale_M1) if nonnegative else Rows(unsigned_MI.add_(UNSIGNED_OFFSET), UNSIGNED_OFFSET, scale_M1)  # modulo 256


class PackedWeight:
    """A weight ready for products with one row or many. It reads the given tensors, and packs a copy when it first meets several rows on a CPU."""

    def __init__(self, weight_OI: Tensor, scale_O: Tensor) -> None:
        self.weight_OI, self.scale_O = weight_OI, scale_O
        self._weight_IO = weight_OI.t()
        self._zero_1 = scale_O.new_zeros(1)
        self._for_qlinear: tuple[Tensor, Tensor] | None = None  # packed, and zero points of the outputs, which are zeros
        self._offset_sum_O: Tensor | None = None  # what the offset of unsigned codes adds to a sum

    def product(self, rows: Rows) -> Tensor:
        """The rows times the weight, in float32."""
        if isinstance(rows.scale, float) and not self._goes_through_qlinear(rows):
            return torch.addcmul(self._zero_1, self._sums(rows), self.scale_O, value=rows.scale)
        return self.unscaled(rows).mul_(rows.scale)

    def add_to(self, hidden_MO: Tensor, rows: Rows) -> Tensor:
        """hidden, in float32, and the product."""
        if isinstance(rows.scale, float) and not self._goes_through_qlinear(rows):
            return torch.addcmul(hidden_MO, self._sums(rows), self.scale_O, value=rows.scale)
        return self.unscaled(rows).mul_(rows.scale).add_(hidden_MO)

    def unscaled(self, rows: Rows, *, relu: bool = False) -> Tensor:
        """The product but for the rows' own scales; at least 0 where relu is asked for."""
        if self._goes_through_qlinear(rows):
            if self._for_qlinear is None:
                self._for_qlinear = torch.ops.onednn.qlinear_prepack(self.weight_OI, None), torch.zeros(len(self.scale_O), dtype=torch.int32)
            return _qlinear(rows, *self._for_qlinear, self.scale_O, relu=relu)
        if rows.codes_MI.device.type in ("cpu", "cuda"):
            output_MO = self._sums(rows) * self.scale_O
        else:
            output_MO = F.linear(rows.codes_MI.float(), self.weight_OI.float() * self.scale_O[:, None])
        return output_MO.relu_() if relu else output_MO

    def _goes_through_qlinear(self, rows: Rows) -> bool:
        return rows.codes_MI.dtype == torch.uint8 and (len(rows.codes_MI) > 1 or len(self.scale_O) > MANY_OUTPUTS)

    def _sums(self, rows: Rows) -> Tensor:
        """The exact product of the integers in int32."""
        if rows.codes_MI.dtype == torch.int8:
            return integer_product(rows.codes_MI, self.weight_OI)
        sum_MO = torch.ops.aten._int_mm(rows.codes_MI, self._weight_IO) if rows.codes_MI.shape[1] > 1 else _outer(rows.codes_MI, self.weight_OI)
        if not rows.offset:
            return sum_MO
        if self._offset_sum_O is None:
            self._offset_sum_O = self.weight_OI.sum(1, dtype=torch.int32).mul_(rows.offset)
        return sum_MO.sub_(self._offset_sum_O)


def _qlinear(rows: Rows, packed: Tensor, zero_point_O: Tensor, scale_O: Tensor, *, relu: bool) -> Tensor:
    name = "relu" if relu else "none"
    return torch.ops.onednn.qlinear_pointwise(rows.codes_MI, 1.0, rows.offset, packed, scale_O, zero_point_O, None, 1.0, 0, torch.float32, name, [], "")


@functools.cache
def unsigned_is_exact() -> bool:
    """Whether this build and processor have both operators for unsigned rows, and give sums of the largest products as they are."""
    weight_OI = torch.full((16, 64), LARGEST, dtype=torch.int8)
    weight_OI[::2] = -LARGEST
    rows = Rows(torch.full((3, 64), UNSIGNED_OFFSET + LARGEST, dtype=torch.uint8), UNSIGNED_OFFSET, 1.0)
    expected_MO = torch.full((3, 64), float(LARGEST)) @ weight_OI.float().t()
    try:
        packed = torch.ops.onednn.qlinear_prepack(weight_OI, None)
        output_MO = _qlinear(rows, packed, torch.zeros(16, dtype=torch.int32), torch.ones(16), relu=False)
        sum_MO = torch.ops.aten._int_mm(rows.codes_MI[:1], weight_OI.t()) - UNSIGNED_OFFSET * weight_OI.sum(1)
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    return torch.equal(output_MO, expected_MO) and torch.equal(sum_MO.float(), expected_MO[:1])
