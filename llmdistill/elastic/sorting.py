"""Neurons, heads and channels in the order of their importance, so that the first ones are the best sub-network: the same function in another order.

Once-for-All sorts channels and DynaBERT neurons and heads before training ("network rewiring", section 2.1). What is permuted together:

- neurons of a layer: the rows of what makes them, the columns of what reads them;
- heads of an attention, in key/value groups: the rows of q, k and v with their biases, the columns of o. In a T5 stack the table of position biases is shared
  by all layers, head h of each using column h: so self-attention has one order for all layers of the stack, by the sum of their importances, and the
  table's columns follow. Cross-attention has no table, and each its own order. Rotary positions are the same for all heads;
- channels of the model width, if asked for: columns of embedding and head, norms, and one side of every linear, in both stacks of a T5 alike.

The heads within a group, and the channels within a head, stay as they are, for they are never cut.

Shapes: U units in a permutation (neurons, groups or channels), I indices into a dimension of a weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmdistill.elastic.importance import Importance
from llmdistill.elastic.measure import shape_of
from llmdistill.elastic.subnet import whole
from llmdistill.models.anatomy import Axis, embeddings, stacks
from llmdistill.models.low_rank_linear import LowRankLinear

if TYPE_CHECKING:
    from jaxtyping import Int


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerOrder:
    """Place i gets what was in place order[i]. `groups_U` for each attention module, self-attention first."""

    neurons_U: Int[Tensor, " U"]
    groups_U: tuple[Int[Tensor, " U"], ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Order:
    """By stack and layer; `channels_U` of the model width."""

    layers: Mapping[str, tuple[LayerOrder, ...]]
    channels_U: Int[Tensor, " U"]


def order_by(importance: Importance, *, channels: bool) -> Order:
    """The most important first; equal ones stay as they were. Without `channels` those of the model width keep their places: right where it is not elastic."""
    layers = {}
    for name, of_stack in importance.layers.items():
        shared = len(importance.layers) > 1  # a T5: one order for the self-attention of all layers
        first = torch.stack([layer.groups[0] for layer in of_stack]).sum(0)
        layers[name] = tuple(
            LayerOrder(
                neurons_U=_descending(layer.neurons_N),
                groups_U=(_descending(first if shared else layer.groups[0]), *(_descending(groups) for groups in layer.groups[1:])),
            )
            for layer in of_stack
        )
    identity = torch.arange(len(importance.channels_M), device=importance.channels_M.device)
    return Order(layers=layers, channels_U=_descending(importance.channels_M) if channels else identity)


@torch.no_grad()
def sort(model: Any, order: Order) -> None:
    """Put the model into this order, in its own memory. Its function stays, to rounding."""
    with whole(model):
        shape_of(model)  # refuses what has no such order
        permute = _Permute()
        channels = order.channels_U
        for embedding in embeddings(model):
            permute(embedding.weight, 1, channels)
        permute.inputs(model.lm_head, channels)
        for stack in stacks(model):
            for layer, of_layer in zip(stack.layers, order.layers[stack.name], strict=True):
                for places, groups in zip(layer.attention_places, of_layer.groups_U, strict=True):
                    indices = {
                        Axis.WIDTH: channels,
                        Axis.HEADS: _blocks(groups, stack.group * stack.head_width),
                        Axis.GROUPS: _blocks(groups, stack.head_width),
                    }
                    for place in places:
                        permute.linear(place.module, indices[place.inputs], indices[place.outputs])
                for place in layer.feed_forward:
                    indices = {Axis.WIDTH: channels, Axis.NEURONS: of_layer.neurons_U}
                    permute.linear(place.module, indices[place.inputs], indices[place.outputs])
                for norm in layer.norms:
                    permute(norm.weight, 0, channels)
            permute(stack.norm.weight, 0, channels)
            if stack.has_bias_table:
                first, *others = (of_layer.groups_U[0] for of_layer in order.layers[stack.name])
                if any(not torch.equal(first, other) for other in others):
                    raise ValueError(
                        f"the layers of the {stack.name} have heads in different orders, and share one table of position biases: give all the same order"
                    )
                permute(stack.bias_table.weight, 1, first)


class _Permute:
    """Permutes dimensions of parameters, each once, however many modules hold it."""

    def __init__(self) -> None:
        self.done: set[tuple[int, int]] = set()

    def __call__(self, weight: Tensor, dimension: int, indices_I: Tensor) -> None:
        if (id(weight), dimension) not in self.done:
            self.done.add((id(weight), dimension))
            weight.copy_(weight.index_select(dimension, indices_I.to(weight.device)))

    def inputs(self, module: Any, indices_I: Tensor) -> None:
        self((module.down if isinstance(module, LowRankLinear) else module).weight, 1, indices_I)

    def linear(self, module: Any, inputs_I: Tensor, outputs_I: Tensor) -> None:
        self.inputs(module, inputs_I)
        out = module.up if isinstance(module, LowRankLinear) else module
        self(out.weight, 0, outputs_I)
        if out.bias is not None:
            self(out.bias, 0, outputs_I)


def _descending(importance_U: Tensor) -> Tensor:
    return torch.sort(importance_U, descending=True, stable=True).indices


def _blocks(units_U: Tensor, size: int) -> Tensor:
    """Indices of the channels of these units, each of which has `size` in a row."""
    return (units_U[:, None] * size + torch.arange(size, device=units_U.device)).flatten()
