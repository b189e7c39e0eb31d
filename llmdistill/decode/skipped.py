"""What tokens skip: of a batch, only the open tokens go through a feed-forward or the linears of a layer, and the others keep their states.

The arithmetic is that of models/skipped_feed_forward.py and models/skipped_layer.py; the linears run as llmdistill.decode.modules says. A single token that is
shut costs a norm and a small product, and where it skips a layer its keys and values.

Shapes: N tokens, O open ones, M model width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from llmdistill.decode import modules
from llmdistill.models.skipped_layer import SkippedLayer

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from llmdistill.models.skipped_feed_forward import SkippedFeedForward


def layer_gate(layer: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """hidden -> whether each token goes through the layer; None where all do."""
    if not isinstance(layer, SkippedLayer):
        return None
    if modules.is_norm_float32(layer.first_norm) and modules.is_plain_linear(layer.gate):
        return NormedGate(layer)
    norm, logits = modules.norm(layer.first_norm), layer.logits
    return lambda hidden: logits(norm(hidden)) >= 0


class NormedGate:
    """Norm and gate at once: w (x / rms) + b >= 0 is w x + b rms >= 0, with the norm's weight in w. What is asked of every token should cost little."""

    def __init__(self, layer: SkippedLayer) -> None:
        (shut_M, open_M), (shut, open_) = layer.gate.weight.detach(), layer.gate.bias.detach().tolist()
        self.weight_M = (open_M - shut_M) * layer.first_norm.weight.detach()
        self.bias = open_ - shut
        self.epsilon, self.width = float(layer.first_norm.variance_epsilon), layer.width

    def __call__(self, hidden_NM: Tensor) -> Tensor:
        mean_square_N = torch.linalg.vector_norm(hidden_NM, dim=-1).square_().div_(self.width).add_(self.epsilon)
        return torch.add(hidden_NM @ self.weight_M, mean_square_N.sqrt_(), alpha=self.bias) >= 0


def open_tokens(gate: Callable[[Tensor], Tensor] | None, hidden_NM: Tensor) -> Tensor | None:
    """The numbers of the tokens that go through; None where all do."""
    if gate is None:
        return None
    is_open_N = gate(hidden_NM)
    if len(hidden_NM) == 1:
        return None if is_open_N.item() else is_open_N.nonzero().squeeze(-1)
    open_O = is_open_N.nonzero().squeeze(-1)
    return None if len(open_O) == len(hidden_NM) else open_O


def of_open(x: Tensor, open_O: Tensor | None) -> Tensor:
    """(N, ...) -> (O, ...)."""
    return x if open_O is None else x[open_O]


def put_back(hidden_NM: Tensor, through_OM: Tensor, open_O: Tensor | None) -> Tensor:
    """The states after: those that went through, and the others as they were, in whose memory it is."""
    return through_OM if open_O is None else hidden_NM.index_copy_(0, open_O, through_OM)


class SkippedResidual:
    """hidden -> hidden + feed_forward(norm(hidden)) for the open tokens; it may reuse the memory of `hidden`."""

    def __init__(self, norm: nn.Module, module: SkippedFeedForward) -> None:
        self.norm = modules.norm(norm)
        self.logits = module.logits
        self.reads = modules.separate_linears(module.reads)
        self.activation = modules.activation(module.activation, module.reads[0])
        self.add_output = modules.residual_linear(module.out)
        weight = getattr(module.out, "weight", None)  # transformers keeps T5's wo in float32 when the rest of the model is in half precision
        self.dtype = weight.dtype if weight is not None and weight.is_floating_point() else None

    def __call__(self, hidden: Tensor) -> Tensor:
        width = hidden.shape[-1]
        normed_NM = self.norm(hidden).reshape(-1, width)
        open_O = open_tokens(self.is_open, normed_NM)
        if open_O is not None and not len(open_O):
            return hidden
        hidden_NM = hidden.reshape(-1, width)
        through_OM = self._through(of_open(hidden_NM, open_O), of_open(normed_NM, open_O))
        return put_back(hidden_NM.to(through_OM.dtype), through_OM, open_O).view(hidden.shape)

    def is_open(self, normed_NM: Tensor) -> Tensor:
        """Whether each token goes through."""
        return self.logits(normed_NM) >= 0

    def _through(self, hidden_OM: Tensor, normed_OM: Tensor) -> Tensor:
        first, *second = self.reads(normed_OM)
        inner = self.activation(first)
        if second:
            inner = inner * second[0]
        return self.add_output(hidden_OM, inner if self.dtype is None else inner.to(self.dtype))
