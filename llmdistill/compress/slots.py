"""Where the linears of a student are, what each is for, and which of them read the same input.

A slot is a place of the stock model that holds a linear: the q of the third encoder layer's self-attention, the output head. What stands in it may be the
stock nn.Linear or what an earlier technique put there; a low-rank linear has two linears inside, which quantization takes one by one (`leaves`).

Embedding and head are a slot each (`embedding_paths`, `HEAD`); where they are one matrix, they stay one.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import LlamaForCausalLM, PreTrainedModel, Qwen2ForCausalLM, T5ForConditionalGeneration

from llmdistill.models.low_rank_linear import LowRankLinear

HEAD = "lm_head"


class Role(enum.Enum):
    """What a linear does in its block. FFN_IN is wi of a plain T5, or the branch without an activation of a gated one; FFN_GATE is the branch with it."""

    Q = "q"
    K = "k"
    V = "v"
    ATTENTION_OUT = "o"
    CROSS_Q = "cross q"
    CROSS_K = "cross k"
    CROSS_V = "cross v"
    CROSS_OUT = "cross o"
    FFN_IN = "ffn in"
    FFN_GATE = "ffn gate"
    FFN_OUT = "ffn out"
    HEAD = "head"

    @property
    def is_attention(self) -> bool:
        return self not in (Role.FFN_IN, Role.FFN_GATE, Role.FFN_OUT, Role.HEAD)


@dataclass(frozen=True, kw_only=True)
class Slot:
    """A place for a linear. `input` is the same text for all slots that read one and the same tensor; `norm` is the path of the norm that gives it."""

    path: str
    role: Role
    stack: str
    layer: int
    input: str
    norm: str | None

    def module(self, model: nn.Module) -> Any:
        """What stands there now."""
        return model.get_submodule(self.path)


def slots(model: PreTrainedModel) -> list[Slot]:
    """Every linear slot, in the order in which data passes them; the head comes last."""
    if isinstance(model, T5ForConditionalGeneration):
        found = [*_t5("encoder", model.encoder), *_t5("decoder", model.decoder)]
        last = "decoder.final_layer_norm"
    elif isinstance(model, (LlamaForCausalLM, Qwen2ForCausalLM)):
        found = list(_causal(model.model))
        last = "model.norm"
    else:
        raise ValueError(f"a {type(model).__name__} cannot be compressed: use a T5, or a causal model of the Llama or Qwen2 class")
    return [*found, Slot(path=HEAD, role=Role.HEAD, stack="head", layer=0, input=HEAD, norm=last)]


def leaves(model: PreTrainedModel) -> list[tuple[str, nn.Linear, Slot]]:
    """Every plain nn.Linear with its path and slot: the slot's own, or the two inside a low-rank one. A tied factor comes once for each path."""
    found = []
    for slot in slots(model):
        module = slot.module(model)
        parts = [("", module)] if not isinstance(module, LowRankLinear) else [(".down", module.down), (".up", module.up)]
        found += [(slot.path + suffix, part, slot) for suffix, part in parts if type(part) is nn.Linear]
    return found


def plain(model: PreTrainedModel, slot: Slot, method: str) -> nn.Linear:
    """The slot's stock linear; ValueError where something else has taken its place."""
    module = slot.module(model)
    if type(module) is not nn.Linear:
        kind = getattr(module, "kind", type(module).__name__)
        raise ValueError(f"{method} changes linears, and {slot.path} holds a {kind} module already: apply {method} before what put it there")
    return module


def embedding_paths(model: PreTrainedModel) -> tuple[str, ...]:
    """Where the embedding stands; T5 has it under three names."""
    return ("shared", "encoder.embed_tokens", "decoder.embed_tokens") if isinstance(model, T5ForConditionalGeneration) else ("model.embed_tokens",)


def _t5(stack: str, module: Any) -> Iterator[Slot]:
    for layer, block in enumerate(module.block):
        base = f"{stack}.block.{layer}.layer"
        where = {"stack": stack, "layer": layer}
        yield from _attention(f"{base}.0.SelfAttention", (Role.Q, Role.K, Role.V, Role.ATTENTION_OUT), "qkvo", f"{base}.0.layer_norm", where)
        if stack == "decoder":
            attention, norm = f"{base}.1.EncDecAttention", f"{base}.1.layer_norm"
            yield Slot(path=f"{attention}.q", role=Role.CROSS_Q, input=norm, norm=norm, **where)
            for role, name in ((Role.CROSS_K, "k"), (Role.CROSS_V, "v")):
                yield Slot(path=f"{attention}.{name}", role=role, input="encoded", norm="encoder.final_layer_norm", **where)
            yield Slot(path=f"{attention}.o", role=Role.CROSS_OUT, input=f"{attention}.o", norm=None, **where)
        last = len(block.layer) - 1
        base, norm = f"{base}.{last}.DenseReluDense", f"{base}.{last}.layer_norm"
        is_gated = hasattr(block.layer[last].DenseReluDense, "wi_0")
        names = ((Role.FFN_GATE, "wi_0"), (Role.FFN_IN, "wi_1")) if is_gated else ((Role.FFN_IN, "wi"),)
        for role, name in names:
            yield Slot(path=f"{base}.{name}", role=role, input=norm, norm=norm, **where)
        yield Slot(path=f"{base}.wo", role=Role.FFN_OUT, input=f"{base}.wo", norm=None, **where)


def _causal(module: Any) -> Iterator[Slot]:
    for layer in range(len(module.layers)):
        base = f"model.layers.{layer}"
        where = {"stack": "decoder", "layer": layer}
        names = ("q_proj", "k_proj", "v_proj", "o_proj")
        yield from _attention(f"{base}.self_attn", (Role.Q, Role.K, Role.V, Role.ATTENTION_OUT), names, f"{base}.input_layernorm", where)
        norm = f"{base}.post_attention_layernorm"
        for role, name in ((Role.FFN_GATE, "gate_proj"), (Role.FFN_IN, "up_proj")):
            yield Slot(path=f"{base}.mlp.{name}", role=role, input=norm, norm=norm, **where)
        yield Slot(path=f"{base}.mlp.down_proj", role=Role.FFN_OUT, input=f"{base}.mlp.down_proj", norm=None, **where)


def _attention(base: str, roles: tuple[Role, ...], names: Any, norm: str, where: dict[str, Any]) -> Iterator[Slot]:
    *reading, out = zip(roles, names, strict=True)
    for role, name in reading:
        yield Slot(path=f"{base}.{name}", role=role, input=norm, norm=norm, **where)
    yield Slot(path=f"{base}.{out[1]}", role=out[0], input=f"{base}.{out[1]}", norm=None, **where)
