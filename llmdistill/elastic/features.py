"""A sub-network as a vector, for predictors: every choice as a number from 0 to 1, always at the same place.

As in OFA and HAT a layer that is left out has zeros in its places, which no layer that stays has. Choices that the space does not leave open take no place.
"""

from __future__ import annotations

from collections.abc import Sequence

from llmdistill.elastic.choice import Subnet
from llmdistill.elastic.space import Space


def features(space: Space, subnet: Subnet) -> tuple[float, ...]:
    """The vector. ValueError where the sub-network is not of this space."""
    space.check(subnet)
    vector = [subnet.width / space.shape.width] if len(space.widths) > 1 else []
    for shape, stack, choice in zip(space.shape.stacks, space.stacks, subnet.stacks, strict=True):
        place = {layer: number for number, layer in enumerate(stack.kept_layers(choice.depth))}
        if len(stack.depths) > 1:
            vector += [float(layer in place) for layer in _optional_layers(space)[shape.name]]
        if shape.shares_heads and len(stack.heads) > 1:
            vector.append(choice.heads[0] / shape.heads)
        open_axes: list[tuple[Sequence[float], float]] = []
        if len(stack.heads) > 1 and not shape.shares_heads:
            open_axes.append((choice.heads, shape.heads))
        if len(stack.ffn_widths) > 1:
            open_axes.append((choice.ffn_widths, shape.ffn_width))
        if len(stack.ranks) > 1:
            open_axes.append((choice.ranks, 1.0))
        for layer in range(shape.num_layers):
            vector += [values[place[layer]] / whole if layer in place else 0.0 for values, whole in open_axes]
    return tuple(vector)


def feature_names(space: Space) -> tuple[str, ...]:
    """What each place of the vector is."""
    names = ["width"] if len(space.widths) > 1 else []
    for shape, stack in zip(space.shape.stacks, space.stacks, strict=True):
        if len(stack.depths) > 1:
            names += [f"{shape.name}.{layer}.stays" for layer in _optional_layers(space)[shape.name]]
        if shape.shares_heads and len(stack.heads) > 1:
            names.append(f"{shape.name}.heads")
        axes = [("heads", len(stack.heads) > 1 and not shape.shares_heads), ("ffn", len(stack.ffn_widths) > 1), ("rank", len(stack.ranks) > 1)]
        names += [f"{shape.name}.{layer}.{axis}" for layer in range(shape.num_layers) for axis, is_open in axes if is_open]
    return tuple(names)


def _optional_layers(space: Space) -> dict[str, list[int]]:
    return {shape.name: sorted(stack.layer_order[stack.depths[0] : stack.depths[-1]]) for shape, stack in zip(space.shape.stacks, space.stacks, strict=True)}
