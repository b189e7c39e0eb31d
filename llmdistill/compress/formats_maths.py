"""Weights as codes of few bits: each the nearest number that the format has, ties to the even code, what is too large to the largest.

Shapes: O outputs, I inputs, G blocks = ceil(I / 32), S inputs of a block.

Block scaling: the shared exponent is that of the block's largest weight, less that of the largest number of the element (MX specification v1.0, section 6.3).
The largest weight may then be above the largest number, up to a third in e2m1, and is clipped. `search` also tries the exponent above that and takes the
better of the two by squared error: the same format, which every reader of it understands.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llmdistill.models.number_formats import BLOCK_SIZE, ELEMENTS, EXPONENT_BIAS, shared_scales_V, values_V

CHUNK_NUMBERS = 2**21


def nearest_codes(x: Tensor, element: str) -> Tensor:
    """The code (uint8) of the nearest number, for numbers in any shape, in float32 or above. Magnitudes are counted in the order of their sizes."""
    format_, size = ELEMENTS[element], x.abs()
    if format_.exponent_bits:
        lowest, steps = 2 - (1 << (format_.exponent_bits - 1)), 1 << format_.mantissa_bits  # an exponent has that many magnitudes, and so have the subnormals
        significand, exponent = torch.frexp(size)  # half to one: `exponent` is one above that of the format
        is_normal = (exponent > lowest) & (size > 0)  # zero has no exponent
        in_steps = torch.where(is_normal, significand * (2 * steps), size * (steps * 2.0**-lowest)).round_()  # torch rounds ties to even
        index = in_steps + torch.where(is_normal, exponent - 1 - lowest, 0) * steps  # a mantissa that was rounded up to the next exponent is right as well
    else:
        index = (size * 64).round_()
    index = index.clamp_(max=format_.num_magnitudes - 1).int()
    negative = index + (1 << (format_.bits - 1)) if format_.exponent_bits else -index % (1 << format_.bits)
    return torch.where(x < 0, negative, index).to(torch.uint8)


def by_channel(weight_OI: Tensor, element: str) -> tuple[Tensor, Tensor]:
    """Codes, and a float32 scale (O, 1) that makes each output's largest weight the largest number."""
    wide_OI = weight_OI.detach().to(torch.promote_types(weight_OI.dtype, torch.float32))
    scale_O1 = (wide_OI.abs().amax(1, keepdim=True) / ELEMENTS[element].largest).float()
    scale_O1 = torch.where(scale_O1 > 0, scale_O1, 1)
    return nearest_codes(wide_OI / scale_O1.to(wide_OI.dtype), element), scale_O1


def by_block(weight_OI: Tensor, element: str, *, search: bool) -> tuple[Tensor, Tensor]:
    """Codes, and each block's biased exponent (uint8)."""
    num_inputs = weight_OI.shape[1]
    chunks = [_by_block(chunk_OI, element, search) for chunk_OI in weight_OI.split(max(1, CHUNK_NUMBERS // num_inputs))]
    code_OI, exponent_OG = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    return code_OI[:, :num_inputs], exponent_OG


def _by_block(weight_OI: Tensor, element: str, search: bool) -> tuple[Tensor, Tensor]:
    wide_OI = weight_OI.detach().to(torch.promote_types(weight_OI.dtype, torch.float32))
    weight_OGS = F.pad(wide_OI, (0, -wide_OI.shape[1] % BLOCK_SIZE)).unflatten(1, (-1, BLOCK_SIZE))
    largest_OG = weight_OGS.abs().amax(-1)
    exponent_OG = torch.where(largest_OG > 0, torch.frexp(largest_OG).exponent - 1 - ELEMENTS[element].largest_exponent, 0)
    code_OGS, error_OG, exponent_OG = _with_exponent(weight_OGS, exponent_OG, element)
    if search:
        other_OGS, other_error_OG, other_exponent_OG = _with_exponent(weight_OGS, exponent_OG + 1, element)
        better_OG = other_error_OG < error_OG
        code_OGS = torch.where(better_OG[..., None], other_OGS, code_OGS)
        exponent_OG = torch.where(better_OG, other_exponent_OG, exponent_OG)
    return code_OGS.flatten(1), (exponent_OG + EXPONENT_BIAS).to(torch.uint8)


def _with_exponent(weight_OGS: Tensor, exponent_OG: Tensor, element: str) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, squared error, and the exponent as far as a byte can hold it."""
    exponent_OG = exponent_OG.clamp(-EXPONENT_BIAS, EXPONENT_BIAS)
    scale_OG1 = shared_scales_V().to(weight_OGS.device, weight_OGS.dtype)[exponent_OG + EXPONENT_BIAS][..., None]
    code_OGS = nearest_codes(weight_OGS / scale_OG1, element)
    off_OGS = values_V(element).to(weight_OGS.device)[code_OGS.int()] * scale_OG1 - weight_OGS
    return code_OGS, off_OGS.square().sum(-1), exponent_OG
