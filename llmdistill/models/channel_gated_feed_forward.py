"""A feed-forward of which each token uses some groups of neurons only: those that a small linear finds salient for it.

    s = relu(W x + b)                          one number for each of G groups of neurons that stand side by side
    y = out(neurons * s), where s is among the `kept` largest; the other groups are not there

Source: Gao et al. 2019, "Dynamic Channel Pruning: Feature Boosting and Suppression", equations 5 to 8: a linear predicts the saliency of each channel, winners
take all, and what is kept is multiplied by its saliency, through which the predictor learns. Squeeze-and-excitation (Hu et al. 2018) is that without winners.
Where we differ: both squeeze a whole image into its mean, we have one token at a time and nothing to squeeze; and groups take the place of single channels, so
that what is kept is a few slices of the weights, which a CPU reads at full speed.

With gradients (training), and where the linears are not plain or a group is so thin that a slice costs more to call than to compute, everything is computed and
masked. Otherwise each group is computed for the tokens that keep it, and for no others: the same result to rounding.

Shapes: B L rows and tokens, M tokens of all rows, T tokens that keep one group, D model width, G groups, N neurons, K neurons of a group.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from llmdistill.models.feed_forward import FeedForward, in_inference
from llmdistill.models.kind import Settings

LEAST_SLICE = 2**15
"""Numbers of a linear in one group. With 2 + 2 layers of width 128 and 32 neurons a group (2^12) slices took 1.2 to 1.7 times as long as the plain model."""


class ChannelGatedFeedForward(FeedForward):
    """The feed-forward with the `kept` most salient groups of its neurons, token by token."""

    kind: ClassVar[str] = "channel_gated"

    def __init__(self, stock: nn.Module, *, groups: int, kept: int) -> None:
        super().__init__(stock)
        if not 1 <= kept <= groups:
            raise ValueError(f"a channel_gated module has {groups} groups and keeps {kept}: keep 1 to all of them")
        if self.num_neurons % groups:
            raise ValueError(f"{self.num_neurons} neurons are no {groups} groups of one size; give a number of groups that divides them")
        self.groups, self.kept = groups, kept
        self.saliency = self.new_linear(groups)
        with torch.no_grad():
            self.saliency.weight.zero_()
            self.saliency.bias.fill_(1)

    @classmethod
    def from_settings(cls, settings: Settings, replaced: nn.Module) -> Self:
        """An empty saliency beside the parts of a stock feed-forward."""
        groups, kept = settings.get("groups"), settings.get("kept")
        if not isinstance(groups, int) or not isinstance(kept, int) or set(settings) != {"groups", "kept"}:
            raise ValueError(f"the settings of a channel_gated module are {{'groups': int, 'kept': int}}, and these are {dict(settings)}")
        return cls(replaced, groups=groups, kept=kept)

    def settings(self) -> Mapping[str, int]:
        return {"groups": self.groups, "kept": self.kept}

    @property
    def group_size(self) -> int:
        """Neurons of a group."""
        return self.num_neurons // self.groups

    def salience(self, hidden_BLD: Float[Tensor, "*B D"]) -> Float[Tensor, "*B G"]:
        """What each group is multiplied by: 0 for those that are not kept."""
        salience_BLG = F.relu(self.saliency(hidden_BLD))
        if self.kept == self.groups:
            return salience_BLG
        winners = salience_BLG.topk(self.kept, -1).indices
        return salience_BLG * torch.zeros_like(salience_BLG).scatter_(-1, winners, 1)

    def forward(self, hidden_BLD: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        salience_BLG = self.salience(hidden_BLD)
        if self.kept < self.groups and in_inference() and self._is_sliceable(hidden_BLD):
            return self._sliced(hidden_BLD.reshape(-1, self.width), salience_BLG.view(-1, self.groups)).view(hidden_BLD.shape)
        return self.masked(hidden_BLD, salience_BLG)

    def masked(self, hidden_BLD: Tensor, salience_BLG: Tensor) -> Tensor:
        """All neurons, multiplied by what their groups are."""
        inner_BLGK = self.inner(hidden_BLD).unflatten(-1, (self.groups, self.group_size))
        return self.output((inner_BLGK * salience_BLG[..., None]).flatten(-2))

    def _sliced(self, hidden_MD: Tensor, salience_MG: Tensor) -> Tensor:
        """Group by group. A slice of the rows of what reads, and of the columns of what writes, is no copy."""
        num_tokens = len(hidden_MD)
        written_MD = hidden_MD.new_zeros(num_tokens, self.out.out_features)
        if self.out.bias is not None:
            written_MD += self.out.bias
        kept_by, tokens = (salience_MG > 0).t().nonzero().unbind(-1)
        counts = torch.bincount(kept_by, minlength=self.groups).tolist()
        for group, tokens_T in enumerate(tokens.split(counts)):
            if len(tokens_T) == num_tokens:
                inner_MK = self._inner_of(group, hidden_MD) * salience_MG[:, group, None]
                written_MD.addmm_(inner_MK, self._columns(group).t())
            elif len(tokens_T):
                inner_TK = self._inner_of(group, hidden_MD[tokens_T]) * salience_MG[tokens_T, group, None]
                written_MD.index_add_(0, tokens_T, inner_TK @ self._columns(group).t())
        return written_MD

    def _inner_of(self, group: int, hidden_TD: Tensor) -> Tensor:
        """The neurons of one group."""
        slice_K = self._slice(group)
        first, *second = (F.linear(hidden_TD, one.weight[slice_K], None if one.bias is None else one.bias[slice_K]) for one in self.reads)
        inner_TK = self.activation(first)
        return inner_TK * second[0] if second else inner_TK

    def _columns(self, group: int) -> Tensor:
        """What reads them."""
        return self.out.weight[:, self._slice(group)]

    def _slice(self, group: int) -> slice:
        return slice(group * self.group_size, (group + 1) * self.group_size)

    def _is_sliceable(self, hidden_BLD: Tensor) -> bool:
        """Whether there are slices, and thick ones: plain linears in one dtype, and no dropout."""
        linears: list[Any] = [*self.reads, self.out]
        is_thick = self.group_size * self.width >= LEAST_SLICE
        return is_thick and not self.training and all(type(one) is nn.Linear and one.weight.dtype == hidden_BLD.dtype for one in linears)
