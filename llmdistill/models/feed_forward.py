"""A feed-forward that decides something: the stock module's own parts under their own names, and what a subclass puts beside them.

The parts keep their names (wi_0, wi_1 and wo of a T5, gate_proj, up_proj and down_proj of a causal model), so that whoever looks for a feed-forward's linears
finds them where they always are: low rank, quantization, importance, sizes by layer. The arithmetic is that of the stock modules, operation by operation.

Shapes: D model width, N neurons.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP
from transformers.models.t5.modeling_t5 import T5DenseActDense, T5DenseGatedActDense

from llmdistill.models.anatomy import Layer, stacks

PARTS: dict[type[nn.Module], tuple[tuple[str, ...], str, str]] = {
    T5DenseActDense: (("wi",), "act", "wo"),
    T5DenseGatedActDense: (("wi_0", "wi_1"), "act", "wo"),
    LlamaMLP: (("gate_proj", "up_proj"), "act_fn", "down_proj"),
    Qwen2MLP: (("gate_proj", "up_proj"), "act_fn", "down_proj"),
}
"""What reads the input (the one with the activation first), the activation, and what writes the output."""


class FeedForward(nn.Module):
    """hidden -> out(act(first(hidden)) [* second(hidden)]), with the submodules of a stock one. It has them from now on; the stock module is to be let go."""

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        if type(stock) not in PARTS:
            names = ", ".join(one.__name__ for one in PARTS)
            raise ValueError(f"a {getattr(type(self), 'kind', 'deciding')} module replaces a feed-forward ({names}), and this is a {type(stock).__name__}")
        self.reading, self.activating, self.writing = PARTS[type(stock)]
        for name, part in stock.named_children():
            self.add_module(name, part)

    @property
    def reads(self) -> list[Any]:
        """The one or two linears that read the input."""
        return [getattr(self, name) for name in self.reading]

    @property
    def out(self) -> Any:
        """The linear that writes the output."""
        return getattr(self, self.writing)

    @property
    def activation(self) -> Any:
        """Of what the first of them gives."""
        return getattr(self, self.activating)

    @property
    def width(self) -> int:
        """Of the model."""
        return self.reads[0].in_features

    @property
    def num_neurons(self) -> int:
        return self.out.in_features

    @property
    def num_multiplications(self) -> int:
        """Of one token that goes through."""
        return sum(parameter.numel() for linear in (*self.reads, self.out) for parameter in linear.parameters() if parameter.dim() > 1)

    def inner(self, hidden_D: Tensor) -> Tensor:
        """The neurons."""
        first, *second = self.reads
        inner = self.activation(first(hidden_D))
        return inner * second[0](hidden_D) if second else inner

    def output(self, inner_N: Tensor) -> Tensor:
        """What the neurons write."""
        dropout = self._modules.get("dropout")
        inner_N = inner_N if dropout is None else dropout(inner_N)
        weight = getattr(self.out, "weight", None)  # transformers keeps T5's wo in float32 where the rest is in half precision
        if isinstance(weight, Tensor) and weight.is_floating_point() and weight.dtype != inner_N.dtype:
            inner_N = inner_N.to(weight.dtype)
        return self.out(inner_N)

    def new_linear(self, num_outputs: int) -> nn.Linear:
        """A linear with bias beside the others, that reads the same input."""
        weight = next(parameter for parameter in self.parameters() if parameter.is_floating_point())
        return nn.Linear(self.width, num_outputs, dtype=weight.dtype, device=weight.device)


def feed_forward_of(layer: Layer) -> tuple[nn.Module, str]:
    """Where the feed-forward of a layer hangs: the module that holds it, and its name there."""
    return (layer.module, "mlp") if hasattr(layer.module, "mlp") else (layer.module.layer[-1], "DenseReluDense")


def replace_feed_forwards(model: Any, kind: Any, stack_names: tuple[str, ...]) -> list[Any]:
    """Put a deciding feed-forward, kind(stock), in the place of every stock one of these stacks; the new ones, in order."""
    made = []
    for stack in stacks(model):
        for layer in stack.layers if stack.name in stack_names else ():
            holder, name = feed_forward_of(layer)
            module = kind(getattr(holder, name))
            setattr(holder, name, module.train(model.training))
            made.append(module)
    return made


def in_inference() -> bool:
    """Whether nobody asks for gradients, so that what is decided may be left uncomputed."""
    return not torch.is_grad_enabled()
