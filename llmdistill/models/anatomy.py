"""The parts of a student by what they do: stacks, their layers, the linears of a layer and which sizes each of them joins.

T5 and the causal models differ in names only. Whoever changes sizes goes through this description and not through names: a linear reads one axis and
writes another, so cutting neurons, heads or channels is the same few lines for all of them.

A group is what cannot be divided among heads: one key/value head with the query heads that read it. In T5 every head is a group.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import LlamaForCausalLM, PreTrainedModel, Qwen2ForCausalLM, T5ForConditionalGeneration


class Axis(enum.Enum):
    """What the inputs or outputs of a linear are."""

    WIDTH = "channels of the model width"
    HEADS = "query heads"
    GROUPS = "key/value heads"
    NEURONS = "neurons of the feed-forward"


@dataclass(frozen=True, eq=False)
class Place:
    """Where a linear of a layer stands: attribute `name` of `holder`. Its role is q, k, v or o, cross_q and so on, ffn_gate, ffn_in or ffn_out."""

    role: str
    holder: nn.Module
    name: str
    inputs: Axis
    outputs: Axis

    @property
    def module(self) -> Any:
        """The linear that is there, of whatever kind."""
        return getattr(self.holder, self.name)


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer. `attentions` are the modules, self-attention first; each has its places in `attention_places`."""

    module: Any
    attentions: tuple[Any, ...]
    attention_places: tuple[tuple[Place, ...], ...]
    feed_forward: tuple[Place, ...]
    norms: tuple[Any, ...]

    @property
    def places(self) -> tuple[Place, ...]:
        return (*(place for places in self.attention_places for place in places), *self.feed_forward)


@dataclass(frozen=True, eq=False)
class Stack:
    """The layers, which are attribute `attribute` of `holder`, and the norm after them. A T5 stack has one table of position biases, in its first layer."""

    name: str
    holder: Any
    attribute: str
    layers: tuple[Layer, ...]
    norm: Any
    head_width: int
    group: int
    has_bias_table: bool

    @property
    def bias_table(self) -> Any:
        """The embedding with one column for each head, or None."""
        return self.layers[0].attentions[0].relative_attention_bias if self.has_bias_table else None


def stacks(model: PreTrainedModel) -> tuple[Stack, ...]:
    """Encoder and decoder of a T5, or the one stack of a causal model, which is called decoder too."""
    if isinstance(model, T5ForConditionalGeneration):
        return _t5("encoder", model.encoder), _t5("decoder", model.decoder)
    if isinstance(model, (LlamaForCausalLM, Qwen2ForCausalLM)):
        inner: Any = model.model
        first = inner.layers[0].self_attn
        layers = tuple(_causal_layer(layer) for layer in inner.layers)
        return (Stack("decoder", inner, "layers", layers, inner.norm, first.head_dim, first.num_key_value_groups, has_bias_table=False),)
    raise ValueError(f"a {type(model).__name__} has no layers that are known here: use a T5, or a causal model of the Llama or Qwen2 class")


def embeddings(model: Any) -> tuple[Any, ...]:
    """Every embedding module; T5 has three, which hold one matrix."""
    if isinstance(model, T5ForConditionalGeneration):
        return model.shared, model.encoder.embed_tokens, model.decoder.embed_tokens
    return (model.model.embed_tokens,)


def _t5(name: str, stack: Any) -> Stack:
    layers = tuple(_t5_layer(block) for block in stack.block)
    head_width = stack.block[0].layer[0].SelfAttention.key_value_proj_dim
    return Stack(name, stack, "block", layers, stack.final_layer_norm, head_width, 1, has_bias_table=True)


def _t5_layer(block: Any) -> Layer:
    attentions = [block.layer[0].SelfAttention, *(part.EncDecAttention for part in block.layer[1:-1])]
    places = [tuple(_attention(module, ("q", "k", "v", "o"), prefix)) for module, prefix in zip(attentions, ("", "cross_"), strict=False)]
    dense = block.layer[-1].DenseReluDense
    names = {"ffn_gate": "wi_0", "ffn_in": "wi_1", "ffn_out": "wo"} if hasattr(dense, "wi_0") else {"ffn_in": "wi", "ffn_out": "wo"}
    return Layer(block, tuple(attentions), tuple(places), tuple(_feed_forward(dense, names)), tuple(part.layer_norm for part in block.layer))


def _causal_layer(layer: Any) -> Layer:
    places = tuple(_attention(layer.self_attn, ("q_proj", "k_proj", "v_proj", "o_proj"), ""))
    feed_forward = tuple(_feed_forward(layer.mlp, {"ffn_gate": "gate_proj", "ffn_in": "up_proj", "ffn_out": "down_proj"}))
    return Layer(layer, (layer.self_attn,), (places,), feed_forward, (layer.input_layernorm, layer.post_attention_layernorm))


def _attention(module: Any, names: tuple[str, ...], prefix: str) -> Iterator[Place]:
    axes = ((Axis.WIDTH, Axis.HEADS), (Axis.WIDTH, Axis.GROUPS), (Axis.WIDTH, Axis.GROUPS), (Axis.HEADS, Axis.WIDTH))
    for role, name, (inputs, outputs) in zip("qkvo", names, axes, strict=True):
        yield Place(prefix + role, module, name, inputs, outputs)


def _feed_forward(module: Any, names: dict[str, str]) -> Iterator[Place]:
    for role, name in names.items():
        inputs, outputs = (Axis.NEURONS, Axis.WIDTH) if role == "ffn_out" else (Axis.WIDTH, Axis.NEURONS)
        yield Place(role, module, name, inputs, outputs)
