"""In which order the layers of a stack leave: by what the loss is without them.

Layers cannot be moved like neurons, so their order is data of the space. It is found by removal, as ShortGPT (Men et al. 2024) and Minitron (section 2.2) find
it: the loss on some rows with a layer left out. Two layers that do one another's work both look dispensable, so by default the order is greedy: the layer
whose loss is least without it leaves, and the rest is measured anew. That takes a pass over the rows for each layer and each layer that leaves; at once, one
pass for each layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmdistill.batches import Example
from llmdistill.elastic.cuts import shorter
from llmdistill.elastic.rows import mean_loss
from llmdistill.elastic.subnet import applied, whole
from llmdistill.models.anatomy import stacks
from llmdistill.train import Loss


def layer_orders(model: Any, examples: Sequence[Example], loss: Loss, *, fewest: int = 1, greedy: bool = True) -> dict[str, tuple[int, ...]]:
    """For each stack its layers, those that stay longest first; the order is measured down to `fewest` layers, where the greedy one may stop."""
    if fewest < 1:
        raise ValueError(f"fewest is {fewest}: at least 1 layer of a stack stays")
    return {stack.name: _order(model, stack.name, len(stack.layers), examples, loss, fewest, greedy) for stack in stacks(model)}


def _order(model: Any, stack: str, num_layers: int, examples: Sequence[Example], loss: Loss, fewest: int, greedy: bool) -> tuple[int, ...]:
    remaining, left = list(range(num_layers)), []
    losses = dict.fromkeys(remaining, 0.0)
    while len(remaining) > max(fewest, 1):
        losses = {layer: _loss_with(model, stack, [other for other in remaining if other != layer], examples, loss) for layer in remaining}
        if not greedy:
            break
        leaves = min(remaining, key=lambda layer: (losses[layer], layer))
        remaining.remove(leaves)
        left.append(leaves)
    return (*sorted(remaining, key=lambda layer: (-losses[layer], layer)), *reversed(left))


def _loss_with(model: Any, stack: str, kept: Sequence[int], examples: Sequence[Example], loss: Loss) -> float:
    with whole(model), applied(shorter(model, {stack: kept})):
        return mean_loss(model, examples, loss)
