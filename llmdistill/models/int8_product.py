"""Products of 8-bit integers: the one place that decides how they are computed.

Shapes: M rows, I inputs, O outputs.

    y_MO = (q_MI @ w_OI^T) * s_M * s_O        q = round(x / s_M), s_M = max|x_M| / 127: each row (token) has a scale of its own, found when it comes

`aten::_int_mm` multiplies int8 by int8 into int32, exactly, and reads the weight as it is stored: no packed copy is held beside it. Measured on 2 threads of
an AVX-512 VNNI machine, microseconds for 1 / 16 / 32 / 256 rows:

    512 inputs, 2048 outputs:    float32 89 / 288 / 565 / 3376      _int_mm 10 / 61 / 115 / 1130
    2048 inputs, 512 outputs:    float32 69 / 391 / 610 / 2896      _int_mm 12 / 230 / 265 / 777
    512 inputs, 32128 outputs:   float32 6137 / 11689 / 48171 / -   _int_mm 142 / 994 / 1688 / -

and 10 to 130 for quantizing the rows. oneDNN's qlinear with unsigned rows (zero point 128) and a packed weight is as fast from 16 rows on and five times slower
for one (25 where _int_mm takes 5, at 512 x 512); with signed rows it falls to a reference kernel, a thousand times slower. aten::_weight_int8pack_mm, which
leaves rows in float32, takes 430 for one row of 2048 outputs and 7,000 for sixteen.

On CUDA _int_mm wants more than 16 rows and sizes that are multiples of 8: they are filled up with zeros. Other devices have no int8 product: the weight is
dequantized there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST = 127
SMALLEST_SCALE = 1e-30  # a row of zeros has no scale; any will do
CUDA_LEAST_ROWS, CUDA_MULTIPLE = 17, 8


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
    if quantized_MI.shape[1] == 1:  # where torch's kernel takes the transposed column for something else, and is wrong (2.13)
        return quantized_MI.int() * weight_OI.int().t()
    if quantized_MI.device.type == "cpu":
        return torch.ops.aten._int_mm(quantized_MI, weight_OI.t())
    (num_rows, num_inputs), num_outputs = quantized_MI.shape, len(weight_OI)
    filled_MI = F.pad(quantized_MI, (0, -num_inputs % CUDA_MULTIPLE, 0, max(0, CUDA_LEAST_ROWS - num_rows)))
    filled_OI = F.pad(weight_OI, (0, -num_inputs % CUDA_MULTIPLE, 0, -num_outputs % CUDA_MULTIPLE))
    return torch.ops.aten._int_mm(filled_MI, filled_OI.t())[:num_rows, :num_outputs]


def quantize_weight(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """A weight as integers from -127 to 127, and the scale of each output in float32: max|w| / 127."""
    wide_OI = weight_OI.detach().float()
    scale_O = wide_OI.abs().amax(1).div_(LARGEST).clamp_(min=SMALLEST_SCALE)
    return (wide_OI / scale_O[:, None]).round_().to(torch.int8), scale_O
