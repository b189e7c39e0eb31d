"""Linears of one input in vLLM: as few products as their kinds allow, side by side in one output.

Dense ones are one parallel linear of vLLM, which brings its kernels. Low-rank ones that share their down-projection (QSVD's q, k and v) run it once. Int8 ones
are one product by models/int8_product.py: vLLM's own int8 kernels round by other rules. It goes in as one operator that the compiler does not look into,
since how it is computed depends on the number of rows. What is left runs one by one.

Each knows its `places`: the tensors of the checkpoint that fill it, by name, each with the rows of a parameter where it goes.

Shapes: N tokens, I inputs, O outputs of all linears together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import MergedColumnParallelLinear  # pyright: ignore[reportMissingImports] - in an environment of its own

from llmdistill.models.int8_product import product


@dataclass(frozen=True, kw_only=True)
class Linear:
    """One linear of the stock model."""

    path: str
    inputs: int
    outputs: int
    bias: bool


@dataclass(frozen=True)
class Plan:
    """What config.json says of the modules and tensors (models/structure.py)."""

    structure: Mapping[str, Mapping[str, Any]]
    ties: Mapping[str, str]

    def kind(self, path: str) -> str:
        return self.structure[path]["kind"] if path in self.structure else "dense"

    def shares_down(self, linears: Sequence[Linear]) -> bool:
        """Whether the down-projections of low-rank linears are one and the same."""
        first, *others = [f"{linear.path}.down" for linear in linears]
        names = ("weight", "scale_O") if self.kind(first) == "int8" else ("weight",)
        return all(self.ties.get(f"{other}.{name}") == f"{first}.{name}" for other in others for name in names)


def make_linears(plan: Plan, linears: Sequence[Linear]) -> Any:
    """The module for linears that read one input."""
    kinds, biases = {plan.kind(linear.path) for linear in linears}, {linear.bias for linear in linears}
    if kinds == {"low_rank"} and plan.shares_down(linears):
        return LowRankLinears(plan, linears)
    if len(kinds) == len(biases) == 1 and kinds <= {"dense", "int8"}:
        return (DenseLinears if kinds == {"dense"} else Int8Linears)(linears)
    return SeparateLinears(plan, linears)


class DenseLinears(nn.Module):
    """One matrix."""

    def __init__(self, linears: Sequence[Linear]) -> None:
        super().__init__()
        self.linears = linears
        sizes = [linear.outputs for linear in linears]
        self.joint: Any = MergedColumnParallelLinear(linears[0].inputs, sizes, bias=linears[0].bias, return_bias=False, prefix=linears[0].path)

    def forward(self, hidden_NI: Tensor) -> Tensor:
        return self.joint(hidden_NI)

    def places(self) -> Iterator[tuple[str, Tensor]]:
        yield from rows_of(self.linears, "weight", self.joint.weight)
        if self.joint.bias is not None:
            yield from rows_of(self.linears, "bias", self.joint.bias)


class Int8Linears(nn.Module):
    """One matrix of integers, with a scale for each output."""

    def __init__(self, linears: Sequence[Linear]) -> None:
        super().__init__()
        self.linears = linears
        num_inputs, num_outputs = linears[0].inputs, sum(linear.outputs for linear in linears)
        self.weight = nn.Parameter(torch.empty(num_outputs, num_inputs, dtype=torch.int8), requires_grad=False)
        self.scale_O = nn.Parameter(torch.empty(num_outputs, dtype=torch.float32), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(num_outputs), requires_grad=False) if linears[0].bias else None

    def forward(self, hidden_NI: Tensor) -> Tensor:
        return torch.ops.llmdistill.int8_linear(hidden_NI, self.weight, self.scale_O, self.bias)

    def places(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.named_parameters():
            yield from rows_of(self.linears, name, parameter)


class LowRankLinears(nn.Module):
    """A down-projection, the one of all, and then the up-projections, which read one input too."""

    def __init__(self, plan: Plan, linears: Sequence[Linear]) -> None:
        super().__init__()
        first, rank = linears[0], plan.structure[linears[0].path]["rank"]
        self.down = make_linears(plan, [Linear(path=f"{first.path}.down", inputs=first.inputs, outputs=rank, bias=False)])
        self.up = make_linears(plan, [Linear(path=f"{linear.path}.up", inputs=rank, outputs=linear.outputs, bias=linear.bias) for linear in linears])

    def forward(self, hidden_NI: Tensor) -> Tensor:
        return self.up(self.down(hidden_NI))

    def places(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.down.places()
        yield from self.up.places()


class SeparateLinears(nn.Module):
    """Each by itself."""

    def __init__(self, plan: Plan, linears: Sequence[Linear]) -> None:
        super().__init__()
        self.parts: Any = nn.ModuleList(make_linears(plan, [linear]) for linear in linears)

    def forward(self, hidden_NI: Tensor) -> Tensor:
        return torch.cat([part(hidden_NI) for part in self.parts], -1)

    def places(self) -> Iterator[tuple[str, Tensor]]:
        for part in self.parts:
            yield from part.places()


def rows_of(linears: Sequence[Linear], name: str, parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The rows of a joint parameter that belong to each linear."""
    for linear, rows in zip(linears, parameter.data.split([linear.outputs for linear in linears]), strict=True):
        yield f"{linear.path}.{name}", rows


@torch.library.custom_op("llmdistill::int8_linear", mutates_args=())
def int8_linear(hidden_NI: Tensor, weight_OI: Tensor, scale_O: Tensor, bias_O: Tensor | None) -> Tensor:
    """What models/int8_linear.py gives."""
    output_NO = product(hidden_NI, weight_OI, scale_O)
    if bias_O is not None:
        output_NO += bias_O
    return output_NO.to(hidden_NI.dtype)


@int8_linear.register_fake
def _shape(hidden_NI: Tensor, weight_OI: Tensor, scale_O: Tensor, bias_O: Tensor | None) -> Tensor:
    return hidden_NI.new_empty(hidden_NI.shape[0], weight_OI.shape[0])  # len() would make the compiler take the number of tokens for a constant
