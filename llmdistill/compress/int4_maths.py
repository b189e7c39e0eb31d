"""The 4-bit codes, scales and zeros of a weight: for each group those with the least squared error, where the inputs say how much each weight's error counts.

Shapes: O outputs, I inputs, G groups = ceil(I / group_size), S inputs of a group.

A group's codes begin as the nearest on the grid from its least to its largest weight. Then narrower grids are tried, since a few weights at the ends cost less
when clipped than the wider step costs all the others; and on each, scale and zero are fitted again to the codes by least squares. Everything is judged as it
will be stored, with scale and zero in bfloat16. The plain grid is among the candidates, so the error is never above that of rounding to nearest.

The squares are weighed by the mean square of the input that a weight meets, as AWQ (Lin et al. 2023, section 3.2) weighs its choice of scales: then it is
the output's squared error, if inputs are uncorrelated. AWQ's rescaling of channels is not done here: SmoothQuant (smooth.py) folds such scales where it can.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.72)
MIDDLE, LARGEST = 8, 15
IMPORTANCE_FLOOR = 1e-3  # of the mean: a channel that was silent on the calibration rows need not be silent for ever
CHUNK_NUMBERS = 2**21


def quantize(weight_OI: Tensor, mean_square_I: Tensor, group_size: int, *, ratios: tuple[float, ...] = RATIOS) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (O, I) from 0 to 15, and scales and zeros (O, G) in bfloat16: weight = (code - 8) * scale + zero."""
    num_inputs = weight_OI.shape[1]
    filling = -num_inputs % group_size
    importance_I = mean_square_I.float() / mean_square_I.float().mean().clamp(min=torch.finfo(torch.float32).tiny) + IMPORTANCE_FLOOR
    importance_GS = F.pad(importance_I, (0, filling)).unflatten(0, (-1, group_size))
    chunks = [_quantized(_grouped(chunk_OI, filling, group_size), importance_GS, ratios) for chunk_OI in weight_OI.split(max(1, CHUNK_NUMBERS // num_inputs))]
    code_OGS, scale_OG, zero_OG = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    return code_OGS.flatten(1)[:, :num_inputs], scale_OG, zero_OG


def _grouped(weight_OI: Tensor, filling: int, group_size: int) -> Tensor:
    """In groups; a short last one is filled up with its last weight, which changes neither its least nor its largest."""
    weight_OI = weight_OI.detach().float()
    return torch.cat([weight_OI, weight_OI[:, -1:].expand(-1, filling)], 1).unflatten(1, (-1, group_size))


def _quantized(weight_OGS: Tensor, importance_GS: Tensor, ratios: tuple[float, ...]) -> tuple[Tensor, Tensor, Tensor]:
    low_OG, high_OG = weight_OGS.amin(-1), weight_OGS.amax(-1)
    best_error_OG = torch.full_like(low_OG, torch.inf)
    best_code_OGS = torch.zeros_like(weight_OGS, dtype=torch.uint8)
    best_scale_OG, best_zero_OG = (torch.zeros_like(low_OG, dtype=torch.bfloat16) for _ in range(2))
    for ratio in ratios:
        scale_OG = (high_OG - low_OG) * (ratio / LARGEST)
        zero_OG = (high_OG + low_OG) / 2 + scale_OG / 2  # code 7.5 is the middle of the grid
        for is_fitted in (False, True):
            if is_fitted:
                scale_OG, zero_OG = _fit(weight_OGS, _codes(weight_OGS, scale_OG, zero_OG), importance_GS, scale_OG, zero_OG)
            rounded_scale_OG, rounded_zero_OG = scale_OG.bfloat16(), zero_OG.bfloat16()
            code_OGS = _codes(weight_OGS, rounded_scale_OG.float(), rounded_zero_OG.float())
            off_OGS = torch.addcmul(rounded_zero_OG.float()[..., None], code_OGS, rounded_scale_OG.float()[..., None]).sub_(weight_OGS)
            error_OG = (off_OGS.square_() * importance_GS).sum(-1)
            better_OG = error_OG < best_error_OG
            best_error_OG = torch.where(better_OG, error_OG, best_error_OG)
            best_code_OGS = torch.where(better_OG[..., None], (code_OGS + MIDDLE).to(torch.uint8), best_code_OGS)
            best_scale_OG, best_zero_OG = torch.where(better_OG, rounded_scale_OG, best_scale_OG), torch.where(better_OG, rounded_zero_OG, best_zero_OG)
    return best_code_OGS, best_scale_OG, best_zero_OG


def _codes(weight_OGS: Tensor, scale_OG: Tensor, zero_OG: Tensor) -> Tensor:
    """The nearest codes, less 8, as float32."""
    safe_OG = torch.where(scale_OG == 0, 1, scale_OG)
    return ((weight_OGS - zero_OG[..., None]) / safe_OG[..., None]).round_().clamp_(-MIDDLE, LARGEST - MIDDLE)


def _fit(weight_OGS: Tensor, code_OGS: Tensor, importance_GS: Tensor, scale_OG: Tensor, zero_OG: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero with the least weighted squared error for these codes; as they were where all codes are the same."""
    total_G = importance_GS.sum(-1)
    mean_code_OG = (code_OGS * importance_GS).sum(-1) / total_G
    mean_weight_OG = (weight_OGS * importance_GS).sum(-1) / total_G
    centred_OGS = code_OGS - mean_code_OG[..., None]
    spread_OG = (centred_OGS.square() * importance_GS).sum(-1)
    fitted_OG = (centred_OGS * importance_GS * weight_OGS).sum(-1) / spread_OG.clamp(min=torch.finfo(torch.float32).tiny)
    is_usable_OG = spread_OG > 0
    return torch.where(is_usable_OG, fitted_OG, scale_OG), torch.where(is_usable_OG, mean_weight_OG - fitted_OG * mean_code_OG, zero_OG)
