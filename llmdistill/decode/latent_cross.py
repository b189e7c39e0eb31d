"""Cross-attention of T5 from one latent that all layers share, in place of keys and values of each layer.

Where the keys and values of all decoder layers have one down-projection (compress/qsvd.py, Cross.JOINT), a row's encoder output is projected once, to latents c
of C channels. Two ways lead on:

    expanded  k = U_k c and v = U_v c for every layer when the row is admitted, as without a latent: 2 * layers * H * D numbers a column of the encoder
    latent    c alone is kept: C numbers a column, whatever the number of layers

T5 has no rotary embedding, so that nothing stands between the up-projections and what reads them, and they move to the other side of the products:

    scores_h = q_h . (U_k,h c) = (q_h U_k,h) . c        outputs_h = sum_e p_e U_v,h c_e = U_v,h (sum_e p_e c_e)

A step then multiplies by C where it multiplied by D, and by the two up-projections besides, for one token; an admission saves them, for each column. In
return all heads, beams and layers read the same latents, where expanded each head reads keys and values of its own.

Shapes: R rows, W slots a row (beams), S = R*W slots, H heads, D head width, E encoder columns, M model width, C channels of the latent (its rank).
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmdistill.decode import modules
from llmdistill.decode.cache import COLUMN_BLOCK

if TYPE_CHECKING:
    from jaxtyping import Float


MAX_CHANNELS_BY_HEAD_WIDTH = 4
"""Up to here the latent is the cheaper way. Measured: the cross-attention of one step in all 6 layers of T5-small's shape (8 heads of 64), 128 columns, one
thread, milliseconds:

                         1 row    8 rows    32 rows
    expanded              0.10      1.5       6.5
    latent, 128 channels  0.19      0.8       2.8
    latent, 256 channels  0.47      1.8       5.5
    latent, 384 channels  0.50      2.5      13.0

and an admission saves 2.5 to 8 milliseconds a row. At 4 times the head width a step costs about as much either way, less with many rows or long prompts, and
the admission is saved; above that long answers lose again. Memory is less in any case."""


class CrossCache(enum.Enum):
    """What is kept of a row's encoder output."""

    EXPANDED = "keys and values of every layer"
    LATENT = "one latent for all layers"
    BY_RULE = "the latent where the layers share one and it is the cheaper way, else keys and values"


class JointLatent:
    """The down-projection that the keys and values of all layers share, and the up-projections of each, on the side of queries and outputs."""

    def __init__(self, attentions: Sequence[Any]) -> None:
        """Of the layers' cross-attentions."""
        self.rank = int(attentions[0].k.rank)
        self.project = modules.linear(attentions[0].k.down)
        self._attentions = attentions
        self._key_HDC: list[Tensor] = []
        self._value_HCD: list[Tensor] = []

    def absorb(self, dtype: torch.dtype) -> None:
        """Makes ready for `queries` and `outputs`: the up-projections by head. Integers are read as the numbers that they stand for."""
        for attention in self._attentions:
            key_HDC, value_HDC = (_weight(linear.up, dtype).unflatten(0, (attention.n_heads, -1)) for linear in (attention.k, attention.v))
            self._key_HDC.append(key_HDC.contiguous())
            self._value_HCD.append(value_HDC.transpose(1, 2).contiguous())

    def queries(self, index: int, queries_SQ: Tensor, width: int) -> Float[Tensor, "R W*H C"]:
        """Those of layer `index`, as they meet latents."""
        num_heads, head_width, _ = self._key_HDC[index].shape
        absorbed_HSC = torch.bmm(queries_SQ.view(-1, num_heads, head_width).transpose(0, 1), self._key_HDC[index])
        return absorbed_HSC.transpose(0, 1).reshape(-1, width * num_heads, self.rank)

    def outputs(self, index: int, attended_RGC: Tensor) -> Float[Tensor, "S H*D"]:
        """What layer `index` makes of the latents that its heads attended to."""
        num_heads = len(self._value_HCD[index])
        attended_HSC = attended_RGC.reshape(-1, num_heads, self.rank).transpose(0, 1)
        return torch.bmm(attended_HSC, self._value_HCD[index]).transpose(0, 1).flatten(1)


class LatentStore:
    """The latents of all rows; what SlotStore is for keys and values."""

    def __init__(self, rank: int, *, dtype: torch.dtype, device: torch.device) -> None:
        self.latents_REC = torch.zeros(0, 0, rank, dtype=dtype, device=device)  # zeros, for what a mask hides must be a number

    def reserve(self, num_slots: int, num_columns: int, *, used_slots: int, used_columns: int) -> None:
        """Makes room, keeping what is in the first `used_slots` and `used_columns`."""
        old_REC = self.latents_REC
        if num_slots <= old_REC.shape[0] and num_columns <= old_REC.shape[1]:
            return
        num_columns = max(-(-num_columns // COLUMN_BLOCK) * COLUMN_BLOCK, old_REC.shape[1])
        self.latents_REC = old_REC.new_zeros(max(num_slots, old_REC.shape[0]), num_columns, old_REC.shape[2])
        kept_REC = old_REC[:used_slots, :used_columns]
        self.latents_REC[: kept_REC.shape[0], : kept_REC.shape[1]] = kept_REC

    def rearrange(self, order: Sequence[int], *, width: int, num_columns: int) -> None:
        """Place i of the rows gets what was in place order[i]."""
        assert width == 1
        for place, source in enumerate(order):
            if source != place:
                self.latents_REC[place, :num_columns] = self.latents_REC[source, :num_columns]


def joint_latent(attentions: Sequence[Any]) -> JointLatent | None:
    """Of a decoder's cross-attentions; None where their keys and values have no common down-projection, or biases after it."""
    projections = [linear for attention in attentions for linear in (attention.k, attention.v)]
    if not modules.share_down(projections) or any(linear.up.bias is not None for linear in projections):
        return None
    return JointLatent(attentions)


def keeps_latent(latent: JointLatent | None, asked: CrossCache, attentions: Sequence[Any]) -> bool:
    """Whether the latent is what is kept."""
    if latent is None:
        if asked is CrossCache.LATENT:
            raise ValueError(
                "cross_cache is LATENT, but the keys and values of this model's decoder layers have no down-projection in common: "
                "compress it by QSVD with cross=JOINT, or leave cross_cache at BY_RULE"
            )
        return False
    if asked is not CrossCache.BY_RULE:
        return asked is CrossCache.LATENT
    is_plain = all(modules.is_plain_linear(linear.up) for attention in attentions for linear in (attention.k, attention.v))
    return is_plain and latent.rank <= MAX_CHANNELS_BY_HEAD_WIDTH * attentions[0].key_value_proj_dim


def _weight(up: Any, dtype: torch.dtype) -> Tensor:
    return up.weight.detach().to(dtype) if modules.is_plain_linear(up) else up.dequantized_OI(dtype)
