"""What of a sub-network takes time, as numbers that a latency is a weighted sum of.

As in ProxylessNAS (Cai et al. 2019, section 3.3.1) a network takes the sum of what its parts take. The parts here are those that the space leaves open, added
up over the layers of a stack, which all have one shape: a layer that stays, its heads, its neurons, its rank, each as a share of the whole, and each also times
the share of the model width where that is open, since matrices grow in both; besides them the model width by itself, for embedding and head, and 1 for all
that is always there. (The weight of a part so is milliseconds for all heads of one layer, say.) What is closed takes no place.

So at a given model width every feature is a sum over layers of what each choice adds: a mean over random choices is exactly what expected_cost.py computes.
"""

from __future__ import annotations

from llmdistill.elastic.choice import Subnet
from llmdistill.elastic.shape import StackShape
from llmdistill.elastic.space import Space, StackSpace


def latency_feature_names(space: Space) -> tuple[str, ...]:
    """What each place is, such as fixed, width, decoder.layers, decoder.ffn and `decoder.ffn x width`."""
    has_width = len(space.widths) > 1
    names = ["fixed", "width"] if has_width else ["fixed"]
    for shape, stack in zip(space.shape.stacks, space.stacks, strict=True):
        names += [f"{shape.name}.{part}{times}" for part in _open_parts(shape, stack) for times in ("", " x width")[: 1 + has_width]]
    return tuple(names)


def latency_features(space: Space, subnet: Subnet) -> tuple[float, ...]:
    """The vector, in the order of the names. ValueError where the sub-network is not of this space."""
    space.check(subnet)
    width, has_width = subnet.width / space.shape.width, len(space.widths) > 1
    vector = [1.0, width] if has_width else [1.0]
    for shape, stack, choice in zip(space.shape.stacks, space.stacks, subnet.stacks, strict=True):
        work = _rank_work(space.shape.width, shape)
        sums = {
            "layers": float(choice.depth),
            "heads": sum(choice.heads) / shape.heads,
            "ffn": sum(choice.ffn_widths) / shape.ffn_width,
            "rank": sum(rank * work[layer] for rank, layer in zip(choice.ranks, stack.kept_layers(choice.depth), strict=True)),
        }
        for part in _open_parts(shape, stack):
            vector += [sums[part], sums[part] * width] if has_width else [sums[part]]
    return tuple(vector)


def _open_parts(shape: StackShape, stack: StackSpace) -> list[str]:
    values = {"layers": stack.depths, "heads": stack.heads, "ffn": stack.ffn_widths, "rank": stack.ranks}
    return [part for part, legal in values.items() if len(legal) > 1 and (part != "rank" or shape.ranks)]


def _rank_work(width: int, shape: StackShape) -> list[float]:
    """What the low-rank linears of each layer compute when whole, as a share of the layer where it is most."""
    ranks = dict(shape.ranks)
    work = [
        sum(ranks.get(f"{layer}.{role}", 0) * sum(shape.sizes(role, width=width, heads=shape.heads, ffn_width=shape.ffn_width)) for role in shape.roles)
        for layer in range(shape.num_layers)
    ]
    return [one / max(1, *work) for one in work]
