"""What T5's encoder and decoder share, and the encoder: it runs once a row, on padded prompts.

The arithmetic is that of transformers' T5Stack. Where it runs cheaper: q, k, v and the feed-forward as llmdistill.decode.modules says, the relative bias
and the mask are joined once for all layers, and only where prompts differ in length is there a mask.

Shapes: R rows, E encoder columns, N tokens of all rows, O those that go through a layer (skipped.py), M model width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.nn.functional as F
from transformers.models.t5.modeling_t5 import T5Attention, T5Block, T5DenseActDense, T5DenseGatedActDense, T5LayerFF, T5LayerSelfAttention, T5Stack

from llmdistill.decode import modules
from llmdistill.decode.skipped import SkippedResidual, layer_gate, of_open, open_tokens, put_back
from llmdistill.models.skipped_feed_forward import SkippedFeedForward

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor


def feed_forward(layer: Any) -> Callable[[Tensor], Tensor]:
    """hidden -> hidden + wo(act(wi(norm(hidden))))."""
    if not modules.is_stock(layer, T5LayerFF):
        return layer
    dense = layer.DenseReluDense
    if modules.is_stock(dense, SkippedFeedForward):
        return SkippedResidual(layer.layer_norm, dense)
    if not modules.is_stock(dense, T5DenseActDense, T5DenseGatedActDense):
        norm = modules.norm(layer.layer_norm)
        return lambda hidden: hidden + dense(norm(hidden))
    linears = [dense.wi_0, dense.wi_1] if isinstance(dense, T5DenseGatedActDense) else [dense.wi]
    return modules.normed_feed_forward(layer.layer_norm, linears, dense.act, dense.wo) or StockFeedForward(layer.layer_norm, linears, dense)


class StockFeedForward:
    """The arithmetic of T5LayerFF, with any linears."""

    def __init__(self, norm: Any, linears: Sequence[Any], dense: Any) -> None:
        self.linears = modules.normed_separate(norm, linears)
        self.activation = modules.activation(dense.act, linears[0])
        self.add_output = modules.residual_linear(dense.wo)
        weight = getattr(dense.wo, "weight", None)  # transformers keeps wo in float32 when the rest of the model is in half precision
        self.dtype = weight.dtype if isinstance(weight, torch.Tensor) and weight.is_floating_point() else None

    def __call__(self, hidden: Tensor) -> Tensor:
        gate, *linear = self.linears(hidden)
        inner = self.activation(gate)
        if linear:
            inner = inner * linear[0]
        return self.add_output(hidden, inner if self.dtype is None else inner.to(self.dtype))


class T5Encoder:
    """The encoder on padded prompts."""

    def __init__(self, stack: Any) -> None:
        self.blocks = [_encoder_block(block) for block in modules.opened(stack, T5Stack).block]
        self.relative_bias = stack.block[0].layer[0].SelfAttention
        self.norm = modules.norm(stack.final_layer_norm)

    def __call__(self, hidden_REM: Tensor, hidden_R1E: Tensor | None, clamp: Callable[[Tensor], Tensor]) -> Tensor:
        """What the decoder reads. hidden_R1E: minus infinity for what is padding; None where nothing is."""
        return self.norm(self.layers(range(len(self.blocks)), hidden_REM, hidden_R1E, clamp))

    def layers(self, indexes: range, hidden_REM: Tensor, hidden_R1E: Tensor | None, clamp: Callable[[Tensor], Tensor]) -> Tensor:
        """The states after these layers."""
        num_rows, num_columns, _ = hidden_REM.shape
        bias = self.relative_bias.compute_bias(num_columns, num_columns, device=hidden_REM.device)
        bias = bias if hidden_R1E is None else bias + hidden_R1E[:, None]
        for gate, qkv, num_heads, add_output, add_feed_forward in self.blocks[indexes.start : indexes.stop]:
            hidden_NM = hidden_REM.reshape(num_rows * num_columns, -1)
            open_O = open_tokens(gate, hidden_NM)
            if open_O is not None and not len(open_O):
                continue
            q, k, v = (states.view(num_rows, num_columns, num_heads, -1).transpose(1, 2) for states in qkv(hidden_REM))
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=1.0)
            attended = attended.transpose(1, 2).reshape(num_rows * num_columns, -1)
            through_OM = clamp(add_output(of_open(hidden_NM, open_O), of_open(attended, open_O)))
            hidden_REM = put_back(hidden_NM, clamp(add_feed_forward(through_OM)), open_O).view(num_rows, num_columns, -1)
        return hidden_REM


EncoderBlock: TypeAlias = (
    "tuple[Callable[[Tensor], Tensor] | None, Callable[[Tensor], Sequence[Tensor]], int, Callable[[Tensor, Tensor], Tensor], Callable[[Tensor], Tensor]]"
)
"""The gate, q k v of the norm, number of heads, what adds the attention's output, the feed-forward."""


def _encoder_block(block: Any) -> EncoderBlock:
    own, last = modules.opened(block, T5Block).layer
    attention = modules.opened(modules.opened(own, T5LayerSelfAttention).SelfAttention, T5Attention)
    qkv = modules.normed_separate(own.layer_norm, [attention.q, attention.k, attention.v])
    return layer_gate(block), qkv, attention.n_heads, modules.residual_linear(attention.o), feed_forward(last)


def keep(hidden: Tensor) -> Tensor:
    return hidden


def clamp_float16(hidden: Tensor) -> Tensor:
    """As T5Block does, so that float16 does not overflow."""
    if hidden.dtype != torch.float16:
        return hidden
    largest = torch.finfo(torch.float16).max
    return hidden.clamp(-largest, largest) if not hidden.isinf().any() else hidden.clamp(1000 - largest, largest - 1000)
