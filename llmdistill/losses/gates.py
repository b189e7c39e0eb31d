"""What the gates of a model decide in one run over a batch, and what that costs.

A gate sees padding too; what it decides there counts for nothing. Cost is in multiplications of what a token skips, so that a wide layer counts more than a
narrow one, and what is reported is the share of all of them that is done.

Shapes: B L rows and tokens of one call, A tokens of all calls of a stack one after the other, N real ones among them, R rows of the encoder or of a causal
model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llmdistill.batches import Batch
from llmdistill.models.skipping import Skipping, decided_by, skipped, straight_through

ENCODER, DECODER = "encoder", "decoder"


def gate_costs(model: Any) -> dict[str, int]:
    """Multiplications behind each gate, by its path."""
    modules = skipped(model)
    if not modules:
        raise ValueError("the model has no gates, so there is nothing to skip; give it some first (the SkipLayers stage)")
    return {path: module.num_multiplications for path, module in modules.items()}


def stack_of(path: str) -> str:
    """The stack that a module is in."""
    return ENCODER if path.startswith("encoder.") else DECODER


@dataclass(frozen=True)
class RealTokens:
    """The real tokens of a stack: where they are among those of all its calls, and the row of each."""

    index_N: Int[Tensor, " N"]
    row_N: Int[Tensor, " N"]


def real_tokens(batch: Batch) -> dict[str, RealTokens]:
    """By stack. A T5 decoder is called once for each part, and its tokens are those that predict a target."""
    row_EL = torch.arange(len(batch.input_EL), device=batch.input_EL.device)[:, None].expand(batch.input_EL.shape)
    read = RealTokens(index_N=batch.mask_EL.flatten().nonzero().squeeze(-1), row_N=row_EL[batch.mask_EL])
    if not batch.decoded:
        return {DECODER: read}
    return {ENCODER: read, DECODER: RealTokens(index_N=batch.position_N, row_N=target_rows_N(batch))}


def target_rows_N(batch: Batch) -> Int[Tensor, " N"]:
    """The row of each target token."""
    if not batch.decoded:
        return batch.position_N // batch.input_EL.shape[1]
    row_A = torch.cat([decoded.rows_G.repeat_interleave(decoded.input_GT.shape[1]) for decoded in batch.decoded])
    return row_A.index_select(0, batch.position_N)


def count(batch: Batch, costs: Mapping[str, int]) -> Int[Tensor, ""]:
    """Multiplications behind all gates if all were open."""
    num_tokens = {stack: len(tokens.index_N) for stack, tokens in real_tokens(batch).items()}
    return batch.target_N.new_tensor(sum(cost * num_tokens[stack_of(path)] for path, cost in costs.items()))


@dataclass
class Decided:
    """What each gate has said, call by call: open or not, and where actions were drawn, their log-probabilities."""

    costs: Mapping[str, int]
    open: dict[str, list[Tensor]] = field(default_factory=dict)
    log_probability: dict[str, list[Tensor]] = field(default_factory=dict)

    def cost(self, batch: Batch) -> Float[Tensor, ""]:
        """Multiplications that were done."""
        return torch.stack([self.cost_of(path, batch) for path in self.costs]).sum()

    def cost_of(self, path: str, batch: Batch) -> Float[Tensor, ""]:
        """Multiplications behind one gate that were done."""
        return self.costs[path] * self._real(self.open[path], real_tokens(batch)[stack_of(path)]).sum()

    def shares_R(self, batch: Batch) -> Float[Tensor, " R"]:
        """Of each row's multiplications, the part that was done."""
        done_R, all_R = (self._by_row(batch, {path: [cost * one for one in of[path]] for path, cost in self.costs.items()}) for of in (self.open, self._ones()))
        return done_R / all_R

    def log_probabilities_R(self, batch: Batch) -> Float[Tensor, " R"]:
        """Of all actions of each row together."""
        return self._by_row(batch, self.log_probability)

    def _by_row(self, batch: Batch, values: Mapping[str, list[Tensor]]) -> Tensor:
        tokens = real_tokens(batch)
        sums_R = next(iter(values.values()))[0].new_zeros(len(batch.input_EL))
        for path, calls in values.items():
            of_stack = tokens[stack_of(path)]
            sums_R = sums_R.index_add(0, of_stack.row_N, self._real(calls, of_stack))
        return sums_R

    def _ones(self) -> dict[str, list[Tensor]]:
        return {path: [torch.ones_like(one) for one in calls] for path, calls in self.open.items()}

    @staticmethod
    def _real(calls: list[Tensor], tokens: RealTokens) -> Float[Tensor, " N"]:
        return torch.cat([one.flatten() for one in calls]).index_select(0, tokens.index_N)


Rule: TypeAlias = Callable[[str, int, Skipping, Tensor], "tuple[Tensor, Tensor | None]"]
"""From a gate's path, the number of this call, the module and what its gate reads to open or not, and a log-probability where it was drawn."""


@contextmanager
def deciding_by(model: Any, costs: Mapping[str, int], rule: Rule) -> Iterator[Decided]:
    """Within, the gates follow this rule; what they decided is filled in as the model runs."""
    path_of = {id(module): path for path, module in skipped(model).items()}
    decided = Decided(costs)

    def decide(module: Skipping, read_BLD: Tensor) -> Tensor:
        path = path_of[id(module)]
        calls = decided.open.setdefault(path, [])
        open_BL, log_probability_BL = rule(path, len(calls), module, read_BLD)
        calls.append(open_BL)
        if log_probability_BL is not None:
            decided.log_probability.setdefault(path, []).append(log_probability_BL)
        return open_BL

    with decided_by(model, decide):
        yield decided


def hard(path: str, call: int, module: Skipping, read_BLD: Tensor) -> tuple[Tensor, None]:
    """As in inference, with the gradient of the sigmoid (section 3.2 of SkipNet)."""
    return straight_through(module.logits(read_BLD)), None
