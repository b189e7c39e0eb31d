"""A whole layer that a token may skip (skipping.py): attention, cross-attention and feed-forward together. The gate reads the normed input of the first.

A skipped token leaves its keys and values, made of the state that it came with, and is neither asked nor changed.

It is the stock layer with a gate beside its parts, under their own names, so that whoever looks for a layer's linears finds them where they always are.
transformers' forward computes all tokens and takes or leaves them; the decode engine computes no more than it must.

Shapes: B L rows and tokens, D model width.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.t5.modeling_t5 import T5Block

from llmdistill.models.anatomy import stacks
from llmdistill.models.kind import Settings
from llmdistill.models.skipping import Skipping


class SkippedLayer(Skipping):
    """What the three kinds have in common."""

    kind: ClassVar[str]
    replaces: ClassVar[type[nn.Module]]

    def __init__(self, stock: nn.Module) -> None:
        nn.Module.__init__(self)
        if type(stock) is not self.replaces:
            raise ValueError(f"a {self.kind} module replaces a {self.replaces.__name__}, and this is a {type(stock).__name__}")
        self.__dict__.update({name: value for name, value in vars(stock).items() if name not in vars(self)})
        for name, part in stock.named_children():
            self.add_module(name, part)
        self.add_gate()

    @classmethod
    def from_settings(cls, settings: Settings, replaced: nn.Module) -> Self:
        """An empty gate beside the parts of a stock layer."""
        if settings:
            raise ValueError(f"a {cls.kind} module has no settings, and these are {dict(settings)}")
        return cls(replaced)

    def settings(self) -> dict[str, int]:
        return {}

    @property
    def first_norm(self) -> Any:
        """What the first attention reads through."""
        raise NotImplementedError

    @property
    def width(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Of the model."""
        return len(self.first_norm.weight)

    @property
    def num_multiplications(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Of one token that goes through, beside its keys and values, which are made in any case."""
        return sum(parameter.numel() for linear in self.skipped_linears() for parameter in linear.parameters() if parameter.dim() > 1)

    def skipped_linears(self) -> list[nn.Module]:
        """Those that a token passes only where it is open."""
        raise NotImplementedError

    def taken(self, before_BLD: Float[Tensor, "*B D"], after_BLD: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """What went through for the open tokens, what came for the others."""
        open_BL1 = self.decided(self.first_norm(before_BLD))[..., None]
        taken_BLD = torch.where(open_BL1.detach() > 0, after_BLD, before_BLD)
        if not open_BL1.requires_grad:
            return taken_BLD
        soft_BL1 = open_BL1 - open_BL1.detach()  # zero, with the gate's gradient
        return taken_BLD + soft_BL1.to(taken_BLD.dtype) * (after_BLD - before_BLD).detach()


class SkippedT5Block(SkippedLayer, T5Block):
    """Of an encoder or a decoder."""

    kind: ClassVar[str] = "skipped_t5_block"
    replaces: ClassVar[type[nn.Module]] = T5Block

    @property
    def first_norm(self) -> Any:
        return self.layer[0].layer_norm

    def skipped_linears(self) -> list[nn.Module]:
        parts: list[Any] = list(self.layer)
        own, *cross, last = parts
        linears: list[nn.Module] = [own.SelfAttention.q, own.SelfAttention.o]
        linears += [linear for part in cross for linear in (part.EncDecAttention.q, part.EncDecAttention.o)]
        return [*linears, last.DenseReluDense]

    def forward(self, hidden_states: Tensor, *positions: Any, **settings: Any) -> Any:
        """The stock layer's arguments."""
        through, *biases = super().forward(hidden_states, *positions, **settings)
        return self.taken(hidden_states, through), *biases


class _SkippedCausalLayer(SkippedLayer):
    """What the layers of Llama and Qwen2 have in common: all but the name."""

    @property
    def first_norm(self) -> Any:
        return self.input_layernorm

    def skipped_linears(self) -> list[nn.Module]:
        layer: Any = self
        return [layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp]

    def forward(self, hidden_states: Tensor, *positions: Any, **settings: Any) -> Any:
        """The stock layer's arguments."""
        return self.taken(hidden_states, super().forward(hidden_states, *positions, **settings))


class SkippedLlamaLayer(_SkippedCausalLayer, LlamaDecoderLayer):
    """Of a Llama."""

    kind: ClassVar[str] = "skipped_llama_layer"
    replaces: ClassVar[type[nn.Module]] = LlamaDecoderLayer


class SkippedQwen2Layer(_SkippedCausalLayer, Qwen2DecoderLayer):
    """Of a Qwen2."""

    kind: ClassVar[str] = "skipped_qwen2_layer"
    replaces: ClassVar[type[nn.Module]] = Qwen2DecoderLayer


SKIPPED_LAYERS: tuple[type[SkippedLayer], ...] = (SkippedT5Block, SkippedLlamaLayer, SkippedQwen2Layer)


def replace_layers(model: Any, stack_names: tuple[str, ...]) -> list[SkippedLayer]:
    """Put a layer that may be skipped in the place of every stock one of these stacks; the new ones, in order."""
    kinds = {kind.replaces: kind for kind in SKIPPED_LAYERS}
    made = []
    for stack in stacks(model):
        layers = getattr(stack.holder, stack.attribute)
        for number, layer in enumerate(layers) if stack.name in stack_names else ():
            if type(layer) not in kinds:
                raise ValueError(
                    f"layer {number} of the {stack.name} is a {type(layer).__name__}, and only stock layers get a gate: begin with a student without"
                )
            layers[number] = kinds[type(layer)](layer).train(layer.training)
            made.append(layers[number])
    return made
