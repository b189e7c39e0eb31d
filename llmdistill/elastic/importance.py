"""How much the loss depends on each neuron, attention head and channel: |activation x gradient|, summed over rows.

To first order, setting an activation a to zero changes a row's loss by -a dL/da, summed over its tokens. The importance is the sum of its magnitudes over the
rows (Molchanov et al. 2019, "Importance estimation for neural network pruning", equation 8, for one row at a time; DynaBERT section 2.1; Minitron section 2.2
uses activations alone). What leaves together is added up before the magnitude is taken: a head's channels, and the heads of a key/value group.

No activation is stored. A neuron goes into one linear, y = W a, and sum over tokens of a dL/da = sum over outputs of W dL/dW in the neuron's column; a channel
of a norm's output w x is w dL/dw likewise. So all of it is read from the gradients of a few weights, which autograd has anyway.

Shapes: O outputs, I inputs, N neurons, G groups, M model width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmdistill.batches import Example
from llmdistill.elastic.measure import shape_of
from llmdistill.elastic.rows import part_weights_P, rows
from llmdistill.elastic.subnet import whole
from llmdistill.models.anatomy import stacks
from llmdistill.models.low_rank_linear import LowRankLinear
from llmdistill.models.modes import evaluating, only_trained
from llmdistill.train import Loss

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerImportance:
    """Of one layer; `groups` for each attention module, self-attention first."""

    neurons_N: Float[Tensor, " N"]
    groups: tuple[Float[Tensor, " G"], ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Importance:
    """By stack and layer, and of the channels of the model width: what their places in all norms' outputs have together."""

    layers: Mapping[str, tuple[LayerImportance, ...]]
    channels_M: Float[Tensor, " M"]


def importance(model: Any, examples: Sequence[Example], loss: Loss) -> Importance:
    """Measured on these rows, in eval mode, in float64 sums."""
    with whole(model), evaluating(model):
        shape_of(model)  # refuses what elastic students cannot have
        read = _Read(model)
        with only_trained(model, read.weights):
            weights_P = part_weights_P(model, examples, loss)
            for batch in rows(model, examples):
                with torch.enable_grad():
                    row_loss = (weights_P.to(torch.float32) * loss.sums_P(model, batch)).sum()
                    read.add(torch.autograd.grad(row_loss, read.weights, allow_unused=True))
        return read.result()


class _Read:
    """The weights that are looked at, and the sums over the rows so far."""

    def __init__(self, model: Any) -> None:
        self.stacks = stacks(model)
        outs = [(stack, place) for stack in self.stacks for layer in stack.layers for place in layer.places if place.role in ("o", "cross_o", "ffn_out")]
        self.outs = [_reading_weight(place.module) for _, place in outs]
        self.group_sizes = [0 if place.role == "ffn_out" else stack.group * stack.head_width for stack, place in outs]
        self.norms = [norm.weight for stack in self.stacks for norm in (*(norm for layer in stack.layers for norm in layer.norms), stack.norm)]
        self.weights: list[nn.Parameter] = [*self.outs, *self.norms]
        if len({id(weight) for weight in self.weights}) < len(self.weights):
            raise ValueError("two layers share the weights that their heads, neurons or channels go into, so their importance cannot be told apart")
        self.sums: list[Tensor] = [torch.zeros(self._units(index), dtype=torch.float64, device=weight.device) for index, weight in enumerate(self.weights)]

    def _units(self, index: int) -> int:
        num = self.weights[index].shape[-1]
        return num // self.group_sizes[index] if index < len(self.outs) and self.group_sizes[index] else num

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        """One row's gradients."""
        for index, (weight, gradient) in enumerate(zip(self.weights, gradients, strict=True)):
            if gradient is None:
                continue
            change = weight.detach().double() * gradient.double()
            if index < len(self.outs):
                change = change.sum(0)
                if self.group_sizes[index]:
                    change = change.unflatten(0, (-1, self.group_sizes[index])).sum(1)
            self.sums[index] += change.abs()

    def result(self) -> Importance:
        sums = iter(self.sums)
        layers = {}
        for stack in self.stacks:
            of_stack = []
            for layer in stack.layers:
                groups = tuple(next(sums) for _ in layer.attentions)
                of_stack.append(LayerImportance(neurons_N=next(sums), groups=groups))
            layers[stack.name] = tuple(of_stack)
        return Importance(layers=layers, channels_M=torch.stack(list(sums)).sum(0))


def _reading_weight(module: Any) -> Any:
    """The matrix that the activations go into."""
    return module.down.weight if isinstance(module, LowRankLinear) else module.weight
