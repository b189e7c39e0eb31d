"""Modules that a token may skip: a gate reads the token, and where it is shut the residual goes on alone.

    y = x + g(x) * f(x),   g(x) = 1 where open(x) >= shut(x), else 0;   open and shut are the two outputs of one linear

Source: Wang et al. 2018, "SkipNet: Learning Dynamic Routing in Convolutional Networks", equation 1, with the smallest of gates (section 3.1): one linear that
reads what the block reads. Where we differ: SkipNet skips for a whole image, we for each token by itself, as Raposo et al. 2024 ("Mixture-of-Depths") do; their
gate however ranks the tokens of a sequence against each other, which a decoder that does not know the next token cannot. So what a token does depends on
the tokens before it alone, and decoding token by token is the same as reading all of them at once. The keys and values of a token are there for all that
come after it, whatever it skips itself. The linear has two outputs and not one so that every tensor of the file begins at a multiple of 8 bytes, for what
a product is bitwise depends on where its operands begin.

With gradients (training) every token is computed and then taken or left by its gate: hard forward, and the gradient of the sigmoid backward (section 3.2, the
straight-through estimate). What is done without is said by the modules themselves: skipped_feed_forward.py, skipped_layer.py.

Shapes: B L rows and tokens, N tokens of all rows, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

Decide: TypeAlias = "Callable[[Skipping, Tensor], Tensor]"
"""From a module and what its gate reads to 0 or 1 for each token."""


class Skipping(nn.Module):
    """What the modules that may be skipped have in common. Their `width` and `num_multiplications` of one token are their own."""

    width: int
    num_multiplications: int
    gate: nn.Linear
    decide: Decide | None
    """Decides in the gate's place, and sees what there is to decide; None but while a loss or a measurement is at work."""

    def add_gate(self) -> None:
        """An empty gate, in the dtype and on the device of the rest."""
        weight = next(parameter for parameter in self.parameters() if parameter.is_floating_point())
        self.gate = nn.Linear(self.width, 2, dtype=weight.dtype, device=weight.device)
        self.decide = None

    @torch.no_grad()
    def open_gate(self, probability: float) -> Self:
        """Every token's gate is open, as sure of it as said; what the token is does not matter yet."""
        self.gate.weight.zero_()
        self.gate.bias[0], self.gate.bias[1] = 0, torch.tensor(probability, dtype=torch.float64).logit().item()
        return self

    def logits(self, read_BLD: Float[Tensor, "*B D"]) -> Float[Tensor, "*B"]:
        """Of the gate being open rather than shut."""
        shut_BL, open_BL = self.gate(read_BLD).unbind(-1)
        return open_BL - shut_BL

    def decided(self, read_BLD: Float[Tensor, "*B D"]) -> Float[Tensor, "*B"]:
        """1 for the tokens that are open and 0 for the others, with the gradient of the sigmoid."""
        return straight_through(self.logits(read_BLD)) if self.decide is None else self.decide(self, read_BLD)


def straight_through(logits: Tensor) -> Tensor:
    """0 or 1, with the gradient of the sigmoid."""
    soft = torch.sigmoid(logits)
    return (logits >= 0).to(soft.dtype) + (soft - soft.detach())


def skipped(model: Any) -> dict[str, Skipping]:
    """The modules of a model that tokens may skip, by their paths."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Skipping)}


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
