"""Inputs of which some tokens are others: what a student that knows its rows by heart is not sure of.

Gates of exits learn where an exit says what the last layer says. On the rows that the student was trained on that is nearly everywhere, so that they learn to
say yes; on rows with other words in them it is not, and they learn to tell. Of half of the rows, up to a share of the input tokens are replaced by tokens at
random: the share is drawn for a row, uniform from 0. What is drawn belongs to the row and the step (losses/token_noise.py), whatever batch it is in.

Shapes: E L rows of inputs and their tokens, N target tokens.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Bool
from torch import Tensor

from llmdistill.batches import Batch
from llmdistill.losses.gates import DECODER, ENCODER
from llmdistill.losses.token_noise import TokenNoise

WHETHER_ROW, SHARE, WHETHER_TOKEN, WHICH = range(4)


def with_noise(batch: Batch, most: float, vocabulary_size: int, seed: int) -> Batch:
    """The batch, with up to the share `most` of the input tokens of half of its rows replaced."""
    noise, stack = TokenNoise(batch, seed), ENCODER if batch.decoded else DECODER
    last_E1 = batch.mask_EL.sum(1, keepdim=True) - 1
    is_noisy_E1 = noise.uniform_BL(stack, 0, WHETHER_ROW).gather(1, last_E1) < 0.5
    share_E1 = most * noise.uniform_BL(stack, 0, SHARE).gather(1, last_E1) * is_noisy_E1
    other_EL = (noise.uniform_BL(stack, 0, WHICH) * vocabulary_size).long()
    is_other_EL = (noise.uniform_BL(stack, 0, WHETHER_TOKEN) < share_E1) & _is_read(batch)
    return replace(batch, input_EL=torch.where(is_other_EL, other_EL.to(batch.input_EL.dtype), batch.input_EL))


def _is_read(batch: Batch) -> Bool[Tensor, "E L"]:
    """Where the input is: of a causal row what comes before its first target token."""
    if batch.decoded:
        return batch.mask_EL
    num_rows, length = batch.input_EL.shape
    row_N, place_N = batch.position_N // length, batch.position_N % length
    first_E = place_N.new_full((num_rows,), length).scatter_reduce_(0, row_N, place_N, "amin")
    return batch.mask_EL & (torch.arange(length, device=first_E.device) <= first_E[:, None])
