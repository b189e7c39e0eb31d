"""A feed-forward that a token may skip (skipping.py): its gate reads the normed input. Attention is as it was.

Without gradients (inference) the open tokens are computed and no others.

Shapes: B L rows and tokens, N tokens of all rows, M open ones, D model width.
"""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llmdistill.models.feed_forward import FeedForward, in_inference
from llmdistill.models.kind import Settings
from llmdistill.models.skipping import Skipping


class SkippedFeedForward(FeedForward, Skipping):
    """The feed-forward for the tokens whose gate is open, zero for the others."""

    kind: ClassVar[str] = "skipped"

    def __init__(self, stock: nn.Module) -> None:
        super().__init__(stock)
        self.add_gate()

    @classmethod
    def from_settings(cls, settings: Settings, replaced: nn.Module) -> Self:
        """An empty gate beside the parts of a stock feed-forward."""
        if settings:
            raise ValueError(f"a skipped module has no settings, and these are {dict(settings)}")
        return cls(replaced)

    def settings(self) -> dict[str, int]:
        return {}

    def forward(self, hidden_BLD: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        if self.decide is None and in_inference():
            return self._open_ones(hidden_BLD)
        written_BLD = self.output(self.inner(hidden_BLD))
        return written_BLD * self.decided(hidden_BLD)[..., None].to(written_BLD.dtype)

    def _open_ones(self, hidden_BLD: Tensor) -> Tensor:
        hidden_ND = hidden_BLD.reshape(-1, hidden_BLD.shape[-1])
        open_M = (self.logits(hidden_ND) >= 0).nonzero().squeeze(-1)
        if len(open_M) == len(hidden_ND):
            return self.output(self.inner(hidden_BLD))
        written_ND = torch.zeros_like(hidden_ND)
        if len(open_M):
            written_MD = self.output(self.inner(hidden_ND[open_M]))
            written_ND = written_ND.to(written_MD.dtype).index_copy_(0, open_M, written_MD)
        return written_ND.view(hidden_BLD.shape)
