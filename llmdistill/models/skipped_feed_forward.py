"""A feed-forward that a token may skip: a gate reads the token, and where it is shut the residual goes on alone.

    y = g(x) * f(x),   g(x) = 1 where open(x) >= shut(x), else 0;   open and shut are the two outputs of one linear

Source: Wang et al. 2018, "SkipNet: Learning Dynamic Routing in Convolutional Networks", equation 1, with the smallest of gates (section 3.1): one linear that
reads what the block reads. Where we differ: SkipNet skips for a whole image, we for each token by itself, as Raposo et al. 2024 ("Mixture-of-Depths")
do; their gate however ranks the tokens of a sequence against each other, which a decoder that does not know the next token cannot. So what a token does
depends on the tokens before it alone, and decoding token by token is the same as reading all of them at once. Attention is never skipped: the keys and values
of a token are there for all that come after it. The linear has two outputs and not one so that every tensor of the file begins at a multiple of 8 bytes, for
what a product is bitwise depends on where its operands begin.

With gradients (training) every token is computed and multiplied by its gate: hard forward, and the gradient of the sigmoid backward (section 3.2, the
straight-through estimate). Without (inference) only the open tokens are.

Shapes: B L rows and tokens, N tokens of all rows, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Self, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llmdistill.models.feed_forward import FeedForward, deciding, in_inference
from llmdistill.models.kind import Settings

Decide: TypeAlias = "Callable[[SkippedFeedForward, Tensor], Tensor]"
"""From a module and what it reads to 0 or 1 for each token."""


class SkippedFeedForward(FeedForward):
    """The feed-forward for the tokens whose gate is open, zero for the others."""

    kind: ClassVar[str] = "skipped"

    def __init__(self, stock: nn.Module) -> None:
        super().__init__(stock)
        self.gate = self.new_linear(2)
        self.decide: Decide | None = None
        """Decides in the gate's place, and sees what there is to decide; None but while a loss or a measurement is at work."""

    @classmethod
    def from_settings(cls, settings: Settings, replaced: nn.Module) -> Self:
        """An empty gate beside the parts of a stock feed-forward."""
        if settings:
            raise ValueError(f"a skipped module has no settings, and these are {dict(settings)}")
        return cls(replaced)

    def settings(self) -> dict[str, int]:
        return {}

    @torch.no_grad()
    def open_gate(self, probability: float) -> Self:
        """Every token's gate is open, as sure of it as said; what the token is does not matter yet."""
        self.gate.weight.zero_()
        self.gate.bias[0], self.gate.bias[1] = 0, torch.tensor(probability, dtype=torch.float64).logit().item()
        return self

    def logits(self, hidden_BLD: Float[Tensor, "*B D"]) -> Float[Tensor, "*B"]:
        """Of the gate being open rather than shut."""
        shut_BL, open_BL = self.gate(hidden_BLD).unbind(-1)
        return open_BL - shut_BL

    def forward(self, hidden_BLD: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        if self.decide is not None:
            return self._all(hidden_BLD, self.decide(self, hidden_BLD))
        if in_inference():
            return self._open_ones(hidden_BLD)
        return self._all(hidden_BLD, straight_through(self.logits(hidden_BLD)))

    def _all(self, hidden_BLD: Tensor, open_BL: Tensor) -> Tensor:
        written_BLD = self.output(self.inner(hidden_BLD))
        return written_BLD * open_BL[..., None].to(written_BLD.dtype)

    def _open_ones(self, hidden_BLD: Tensor) -> Tensor:
        hidden_ND = hidden_BLD.reshape(-1, hidden_BLD.shape[-1])
        open_M = open_tokens(self, hidden_ND)
        if len(open_M) == len(hidden_ND):
            return self.output(self.inner(hidden_BLD))
        written_ND = torch.zeros_like(hidden_ND)
        if len(open_M):
            written_MD = self.output(self.inner(hidden_ND[open_M]))
            written_ND = written_ND.to(written_MD.dtype).index_copy_(0, open_M, written_MD)
        return written_ND.view(hidden_BLD.shape)


def open_tokens(module: SkippedFeedForward, hidden_ND: Float[Tensor, "N D"]) -> Tensor:
    """The numbers of the tokens whose gate is open."""
    return (module.logits(hidden_ND) >= 0).nonzero().squeeze(-1)


def straight_through(logits: Tensor) -> Tensor:
    """0 or 1, with the gradient of the sigmoid."""
    soft = torch.sigmoid(logits)
    return (logits >= 0).to(soft.dtype) + (soft - soft.detach())


def skipped(model: Any) -> dict[str, SkippedFeedForward]:
    """The feed-forwards of a model that tokens may skip, by their paths."""
    return {path: module for path, module in deciding(model).items() if isinstance(module, SkippedFeedForward)}


@contextmanager
def decided_by(model: Any, decide: Decide) -> Iterator[None]:
    """Within, `decide` has the gates."""
    modules = skipped(model).values()
    for module in modules:
        module.decide = decide
    try:
        yield
    finally:
        for module in modules:
            module.decide = None
