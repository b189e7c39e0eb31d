"""A feed-forward that tokens may skip, with its norm and residual: only open tokens pass through, and one that is shut costs a norm and a small product.

The arithmetic is that of models/skipped_feed_forward.py; the linears run as llmdistill.decode.modules says.

Shapes: N tokens, O open ones, M model width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmdistill.decode import modules

if TYPE_CHECKING:
    from torch import Tensor, nn

    from llmdistill.models.skipped_feed_forward import SkippedFeedForward


class SkippedResidual:
    """hidden -> hidden + feed_forward(norm(hidden)) for the open tokens; it may reuse the memory of `hidden`."""

    def __init__(self, norm: nn.Module, module: SkippedFeedForward) -> None:
        self.norm = modules.norm(norm)
        self.gate = module.logits
        self.reads = modules.separate_linears(module.reads)
        self.activation = modules.activation(module.activation, module.reads[0])
        self.add_output = modules.residual_linear(module.out)
        weight = getattr(module.out, "weight", None)  # transformers keeps T5's wo in float32 when the rest of the model is in half precision
        self.dtype = weight.dtype if weight is not None and weight.is_floating_point() else None

    def __call__(self, hidden: Tensor) -> Tensor:
        width = hidden.shape[-1]
        normed_NM = self.norm(hidden).view(-1, width)
        is_open_N = self.gate(normed_NM) >= 0
        if len(normed_NM) == 1:
            return self._through(hidden.view(1, width), normed_NM).view(hidden.shape) if is_open_N.item() else hidden
        open_O = is_open_N.nonzero().squeeze(-1)
        if not len(open_O):
            return hidden
        hidden_NM = hidden.reshape(-1, width)
        if len(open_O) == len(hidden_NM):
            return self._through(hidden_NM, normed_NM).view(hidden.shape)
        through_OM = self._through(hidden_NM[open_O], normed_NM[open_O])
        return hidden_NM.to(through_OM.dtype).index_copy_(0, open_O, through_OM).view(hidden.shape)

    def _through(self, hidden_OM: Tensor, normed_OM: Tensor) -> Tensor:
        first, *second = self.reads(normed_OM)
        inner = self.activation(first)
        if second:
            inner = inner * second[0]
        return self.add_output(hidden_OM, inner if self.dtype is None else inner.to(self.dtype))
