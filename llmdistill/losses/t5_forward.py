"""The forward pass of T5 in training: the same arithmetic as transformers' modules, in fewer operations.

On a CPU, more than half of a small T5's step is not matrix products. Here q, k and v are one product, position bias and mask are added up once for a stack
and not in each layer, the scores are added to them by the product itself, activations are one operation, and dropout draws 16 random bits for an element
and not 64. Measured for forward and backward of 1 million parameters, 64 rows of 32 tokens: three quarters of the CPU time of the stock modules.

A submodule that is not a plain linear (low-rank, LoRA, int8) is called as it is, except that a down-projection which several low-rank ones share runs once.
Where the larger modules are not stock either, or somebody listens to them (FSDP and ZeRO gather weights when a module is called), the stock forward runs.

Shapes: B rows, L tokens, K tokens that are attended to, D model width, H heads, W width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.activations import NewGELUActivation
from transformers.models.t5 import modeling_t5 as t5

from llmdistill.decode.modules import is_stock, norm
from llmdistill.models.low_rank_linear import LowRankLinear

_OF_STACK = (
    t5.T5Stack,
    t5.T5Block,
    t5.T5LayerSelfAttention,
    t5.T5LayerCrossAttention,
    t5.T5LayerFF,
    t5.T5Attention,
    t5.T5DenseActDense,
    t5.T5DenseGatedActDense,
)


def encode(model: Any, input_BL: Int[Tensor, "B L"], mask_BL: Bool[Tensor, "B L"]) -> Float[Tensor, "B L D"]:
    """The encoder's output."""
    return encode_states(model, input_BL, mask_BL)[0]


def encode_states(
    model: Any, input_BL: Int[Tensor, "B L"], mask_BL: Bool[Tensor, "B L"], after: Sequence[int] = ()
) -> tuple[Float[Tensor, "B L D"], list[Float[Tensor, "B L D"]]]:
    """The encoder's output, and the states after so many layers each."""
    stack = model.encoder
    if not is_plain(stack):
        output = stack(input_ids=input_BL, attention_mask=mask_BL, output_hidden_states=bool(after))
        return output.last_hidden_state, [output.hidden_states[depth] for depth in after]
    p = _dropout_rate(stack)
    hidden = dropout(stack.embed_tokens(input_BL), p)
    bias = torch.where(mask_BL[:, None, None, :], _position_bias(stack, input_BL.shape[1]), _lowest(hidden))
    states: dict[int, Tensor] = {}
    for depth, block in enumerate(stack.block, start=1):
        hidden = _self_attention(block.layer[0], hidden, bias, p)
        hidden = _feed_forward(block.layer[1], hidden, p)
        states[depth] = hidden
    return dropout(norm(stack.final_layer_norm)(hidden), p), [states[depth] for depth in after]


def decode(model: Any, input_BL: Int[Tensor, "B L"], encoded_BKD: Float[Tensor, "B K D"], mask_BK: Bool[Tensor, "B K"]) -> Float[Tensor, "B L D"]:
    """The decoder's output for inputs padded on the right."""
    return decode_states(model, input_BL, encoded_BKD, mask_BK)[0]


def decode_states(
    model: Any,
    input_BL: Int[Tensor, "B L"],
    encoded_BKD: Float[Tensor, "B K D"],
    mask_BK: Bool[Tensor, "B K"],
    after: Sequence[int] = (),
    skipped: Sequence[int] = (),
) -> tuple[Float[Tensor, "B L D"], list[Float[Tensor, "B L D"]]]:
    """The decoder's output, and the states after so many layers each. Layers whose index is in `skipped` are left out."""
    stack = model.decoder
    if not is_plain(stack):
        if skipped:
            raise ValueError("layers cannot be left out of a decoder that is sharded or has layers of its own; set layer_dropout=0")
        output = stack(input_ids=input_BL, encoder_hidden_states=encoded_BKD, encoder_attention_mask=mask_BK, use_cache=False, output_hidden_states=bool(after))
        return output.last_hidden_state, [output.hidden_states[depth] for depth in after]
    p = _dropout_rate(stack)
    num_rows, length = input_BL.shape
    hidden = dropout(stack.embed_tokens(input_BL), p)
    is_past = torch.ones(length, length, dtype=torch.bool, device=hidden.device).tril()
    bias = torch.where(is_past, _position_bias(stack, length), _lowest(hidden)).expand(num_rows, -1, -1, -1)
    cross_bias = hidden.new_zeros(mask_BK.shape).masked_fill_(~mask_BK, _lowest(hidden))[:, None, None, :].expand(-1, bias.shape[1], length, -1)
    latents: dict[int, Tensor] = {}
    states: dict[int, Tensor] = {}
    for index, block in enumerate(stack.block):
        if index not in skipped:
            hidden = _self_attention(block.layer[0], hidden, bias, p)
            hidden = _cross_attention(block.layer[1], hidden, encoded_BKD, cross_bias, p, latents)
            hidden = _feed_forward(block.layer[2], hidden, p)
        states[index + 1] = hidden
    return dropout(norm(stack.final_layer_norm)(hidden), p), [states[depth] for depth in after]


def is_plain(stack: Any) -> bool:
    """Whether every module of a stack down to its linears is transformers' own, and nobody listens."""
    return is_stock(stack, t5.T5Stack) and all(
        is_stock(module, *_OF_STACK) for block in stack.block for module in block.modules() if isinstance(module, _OF_STACK) or module is block
    )


def dropout(hidden: Tensor, p: float) -> Tensor:
    """F.dropout; on a CPU with random bits of 16 for each element, which is enough to tell p to one in 65,536."""
    if p == 0.0:
        return hidden
    if hidden.device.type != "cpu":
        return F.dropout(hidden, p, training=True)
    num = hidden.numel()
    words = torch.empty(-(-num // 4), dtype=torch.int64).random_(-(2**63), None)
    kept = words.view(torch.int16)[:num].view(hidden.shape) >= round(p * 2**16) - 2**15
    return hidden * kept.to(hidden.dtype).mul_(1 / (1 - p))


def _dropout_rate(stack: Any) -> float:
    return stack.config.dropout_rate if stack.training else 0.0


def _lowest(hidden: Tensor) -> float:
    return torch.finfo(hidden.dtype).min


def _position_bias(stack: Any, length: int) -> Float[Tensor, "1 H L L"]:
    """The first layer's, which all use."""
    return stack.block[0].layer[0].SelfAttention.compute_bias(length, length)


def _self_attention(layer: Any, hidden: Tensor, bias: Tensor, p: float) -> Tensor:
    attention = layer.SelfAttention
    q, k, v = _projected([attention.q, attention.k, attention.v], norm(layer.layer_norm)(hidden), attention.n_heads)
    return hidden + dropout(attention.o(_attend(q, k, v, bias, p)), p)


def _cross_attention(layer: Any, hidden: Tensor, encoded_BKD: Tensor, bias: Tensor, p: float, latents: dict[int, Tensor]) -> Tensor:
    attention = layer.EncDecAttention
    (q,) = _projected([attention.q], norm(layer.layer_norm)(hidden), attention.n_heads)
    k, v = _projected([attention.k, attention.v], encoded_BKD, attention.n_heads, latents)
    return hidden + dropout(attention.o(_attend(q, k, v, bias, p)), p)


def _feed_forward(layer: Any, hidden: Tensor, p: float) -> Tensor:
    dense, normed = layer.DenseReluDense, norm(layer.layer_norm)(hidden)
    if not isinstance(dense, (t5.T5DenseActDense, t5.T5DenseGatedActDense)):  # one that decides something (models/feed_forward.py)
        return hidden + dropout(dense(normed), p)
    if isinstance(dense, t5.T5DenseGatedActDense):
        inner = _activated(dense.act, dense.wi_0(normed)) * dense.wi_1(normed)
    else:
        inner = _activated(dense.act, dense.wi(normed))
    return hidden + dropout(dense.wo(dropout(inner, p)), p)


def _activated(activation: nn.Module, inner: Tensor) -> Tensor:
    return F.gelu(inner, approximate="tanh") if is_stock(activation, NewGELUActivation) else activation(inner)


def _projected(
    linears: Sequence[nn.Module], hidden_BLD: Tensor, num_heads: int, latents: dict[int, Tensor] | None = None
) -> Sequence[Float[Tensor, "B H L W"]]:
    """The heads of each linear's output; of plain ones in a single product. `latents`: those of this input that other layers have computed."""
    num_rows, length, _ = hidden_BLD.shape
    if all(is_stock(linear, nn.Linear) and linear.bias is None for linear in linears):
        joint = F.linear(hidden_BLD, torch.cat([linear.weight for linear in linears]))  # pyright: ignore[reportCallIssue, reportArgumentType]
        return joint.view(num_rows, length, len(linears), num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    latents = {} if latents is None else latents
    return [_output(linear, hidden_BLD, latents).view(num_rows, length, num_heads, -1).transpose(1, 2) for linear in linears]


def _output(linear: Any, hidden_BLD: Tensor, latents: dict[int, Tensor]) -> Tensor:
    """Of one linear. A down-projection that several low-rank ones share (compress/qsvd.py) is computed by the first of them."""
    if not is_stock(linear, LowRankLinear) or not is_stock(linear.down, nn.Linear):  # with an adapter each has a down-projection of its own
        return linear(hidden_BLD)
    shared = id(linear.down.weight)
    if shared not in latents:
        latents[shared] = linear.down(hidden_BLD)
    return linear.up(latents[shared])


def _attend(
    q: Float[Tensor, "B H L W"], k: Float[Tensor, "B H K W"], v: Float[Tensor, "B H K W"], bias: Float[Tensor, "B H L K"], p: float
) -> Float[Tensor, "B L HW"]:
    """Attention without scaling, as T5 has it. A bias that is trained leaves only the unfused kernel on a CPU, which is slower than these four operations."""
    num_rows, num_heads, _, _ = q.shape
    if q.device.type != "cpu":
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), dropout_p=p, scale=1.0)
    else:
        scores = torch.baddbmm(bias.flatten(0, 1), q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2))
        attended = torch.bmm(dropout(torch.softmax(scores, -1), p), v.flatten(0, 1)).unflatten(0, (num_rows, num_heads))
    return attended.transpose(1, 2).flatten(2)
