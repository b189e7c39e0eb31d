"""Random numbers that belong to a token: functions of a seed, the step, the place in the model, and of the tokens up to this one.

So they are the same whatever micro-batch the token's row is in, however it is padded and whoever computes it: a step that draws actions has one gradient.
torch's own generators give a tensor's numbers in the order of its memory, and cannot promise that.

The tokens are hashed position by position and added up (mod 2^64) from the row's start; what comes out is mixed with the place by the finalizer of
SplitMix64 (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators"). A T5 decoder's row starts from the hash of what its encoder read.

Shapes: B L rows and tokens of one call.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llmdistill.batches import Batch
from llmdistill.losses.gates import DECODER, ENCODER

# Odd 64-bit constants, as signed integers: SplitMix64's increment and its two multipliers.
GOLDEN, FIRST, SECOND = (number - 2**64 for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


class TokenNoise:
    """The numbers of one batch."""

    def __init__(self, batch: Batch, seed: int) -> None:
        self.salt = seed * 2**32 + batch.step
        read_EL = _prefixes(batch.input_EL)
        if not batch.decoded:
            self.keys: dict[str, list[Tensor]] = {DECODER: [read_EL]}
            return
        last_E1 = batch.mask_EL.sum(1, keepdim=True) - 1
        whole_E = _mixed(read_EL.gather(1, last_E1).squeeze(1))
        decoded = [_prefixes(one.input_GT) + whole_E.index_select(0, one.rows_G)[:, None] for one in batch.decoded]
        self.keys = {ENCODER: [read_EL], DECODER: decoded}

    def uniform_BL(self, stack: str, call: int, *place: int) -> Float[Tensor, "B L"]:
        """One number from 0 up to 1 for each token of a stack's call, another one for each place."""
        key_BL = self.keys[stack][call]
        for number in (self.salt, *place):
            key_BL = _mixed(key_BL ^ _mixed(key_BL.new_tensor(number + 1) * GOLDEN))
        return ((key_BL >> 11) & (2**53 - 1)).double() / 2**53


def _prefixes(tokens_BL: Int[Tensor, "B L"]) -> Int[Tensor, "B L"]:
    """The hash of each token and those before it."""
    position_L = torch.arange(1, tokens_BL.shape[1] + 1, device=tokens_BL.device)
    return _mixed(tokens_BL.long() * GOLDEN ^ _mixed(position_L)).cumsum(1)


def _mixed(x: Tensor) -> Tensor:
    """SplitMix64's finalizer; int64 wraps, and its shift to the right brings in the sign, which is masked away."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * FIRST
    x = (x ^ ((x >> 27) & (2**37 - 1))) * SECOND
    return x ^ ((x >> 31) & (2**33 - 1))
