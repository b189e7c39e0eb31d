"""Which sub-networks of a checkpoint are legal, as data: the `elastic` key of its config.json.

Axes, as in Once-for-All (Cai et al. 2020, section 3), DynaBERT (Hou et al. 2020) and HAT (Wang et al. 2020):

- feed-forward width and number of attention heads, of each layer: the first neurons and heads stay, which `sorting` has made the most important ones. Heads
  of grouped-query attention leave with their key/value head. The layers of a T5 stack have equally many heads, in self-attention and cross-attention alike,
  since they share one table of position biases with a column for each.
- depth, of each stack: a depth of d keeps the d first of `layer_order`, in their own order, so that a shallower network's layers are among a deeper one's.
- rank, of each layer: the first singular values of its low-rank linears.
- model width: the first channels of everything that is added up along the residual stream. A root mean square norm then takes its mean over fewer channels, so
  what is left is rescaled by every norm, unlike with heads or neurons. It is a sound network all the same, equals its extraction, and is the only axis that
  makes embedding and head smaller, which are most of a small student. Without any training, on a T5 of 1.8 million parameters (held-out loss 0.244 nats):
  three quarters of the width, 25% fewer parameters, 0.28; three quarters of the heads, 5% fewer, 0.29; half the width, 50% fewer, 0.96.

`even` keeps to what one stock config can say: all layers of both stacks alike, but for the depths.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from random import Random
from typing import Any

from llmdistill.elastic.choice import StackChoice, Subnet
from llmdistill.elastic.shape import ModelShape, StackShape

__all__ = ["Space", "StackChoice", "StackSpace", "Subnet"]


@dataclass(frozen=True, kw_only=True)
class StackSpace:
    """The legal values of one stack, ascending; the last of each is the whole. `layer_order`: the layers, those that stay longest first."""

    ffn_widths: tuple[int, ...]
    heads: tuple[int, ...]
    depths: tuple[int, ...]
    ranks: tuple[float, ...]
    layer_order: tuple[int, ...]

    def kept_layers(self, depth: int) -> tuple[int, ...]:
        """The layers that a depth keeps, as they follow one another."""
        return tuple(sorted(self.layer_order[:depth]))


@dataclass(frozen=True, kw_only=True)
class Space:
    """The legal sub-networks of a model of this shape."""

    shape: ModelShape
    widths: tuple[int, ...]
    stacks: tuple[StackSpace, ...]
    even: bool = False

    def __post_init__(self) -> None:
        if len(self.stacks) != len(self.shape.stacks):
            raise ValueError(f"the space has {len(self.stacks)} stacks, and the model has {len(self.shape.stacks)}: give one for each")
        _check_values("widths", self.widths, self.shape.width)
        for shape, stack in zip(self.shape.stacks, self.stacks, strict=True):
            for axis, largest in (("ffn_widths", shape.ffn_width), ("heads", shape.heads), ("depths", shape.num_layers), ("ranks", 1.0)):
                _check_values(f"{axis} of the {shape.name}", getattr(stack, axis), largest)
            if any(heads % shape.group for heads in stack.heads):
                raise ValueError(
                    f"heads of the {shape.name} are {stack.heads}: {shape.group} of them share a key/value head, so give multiples of {shape.group}"
                )
            if sorted(stack.layer_order) != list(range(shape.num_layers)):
                raise ValueError(f"layer_order of the {shape.name} is {stack.layer_order}: give every layer from 0 to {shape.num_layers - 1} once")
            if self.shape.architecture == "llama" and any(width % shape.group for width in self.widths):
                raise ValueError(f"widths are {self.widths}: transformers' Llama wants a multiple of the heads, so give multiples of {shape.group}")
        if self.even:
            self._check_even()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, as config.json holds it."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Space:
        """What `to_json` wrote."""
        stacks = tuple(StackSpace(**{name: tuple(values) for name, values in stack.items()}) for stack in data["stacks"])
        return cls(shape=ModelShape.from_json(data["shape"]), widths=tuple(data["widths"]), stacks=stacks, even=data["even"])

    def largest(self) -> Subnet:
        """The whole model."""
        return self._uniform(-1)

    def smallest(self) -> Subnet:
        """The least of everything."""
        return self._uniform(0)

    def sample(self, generator: Random) -> Subnet:
        """One at random: each axis by itself, uniform over its values."""
        width = generator.choice(self.widths)
        depths = [generator.choice(stack.depths) for stack in self.stacks]
        if self.even:
            heads, ffn, rank = (generator.choice(values) for values in _even_values(self))
            return Subnet(width=width, stacks=tuple(_alike(depth, heads, ffn, rank) for depth in depths))
        choices = []
        for shape, stack, depth in zip(self.shape.stacks, self.stacks, depths, strict=True):
            heads = [generator.choice(stack.heads)] * depth if shape.shares_heads else generator.choices(stack.heads, k=depth)
            ffn_widths, ranks = generator.choices(stack.ffn_widths, k=depth), generator.choices(stack.ranks, k=depth)
            choices.append(StackChoice(heads=tuple(heads), ffn_widths=tuple(ffn_widths), ranks=tuple(ranks)))
        return Subnet(width=width, stacks=tuple(choices))

    def every(self) -> Iterator[Subnet]:
        """All of them; look at `num_subnets` first."""
        for width in self.widths:
            if self.even:
                for depths in itertools.product(*(stack.depths for stack in self.stacks)):
                    for heads, ffn, rank in itertools.product(*_even_values(self)):
                        yield Subnet(width=width, stacks=tuple(_alike(depth, heads, ffn, rank) for depth in depths))
            else:
                per_stack = [list(_choices(shape, stack)) for shape, stack in zip(self.shape.stacks, self.stacks, strict=True)]
                yield from (Subnet(width=width, stacks=choices) for choices in itertools.product(*per_stack))

    @property
    def num_subnets(self) -> int:
        """How many there are."""
        if self.even:
            return len(self.widths) * math.prod(len(stack.depths) for stack in self.stacks) * math.prod(map(len, _even_values(self)))
        number = len(self.widths)
        for shape, stack in zip(self.shape.stacks, self.stacks, strict=True):
            per_layer = len(stack.ffn_widths) * len(stack.ranks) * (1 if shape.shares_heads else len(stack.heads))
            number *= sum(per_layer**depth for depth in stack.depths) * (len(stack.heads) if shape.shares_heads else 1)
        return number

    def check(self, subnet: Subnet) -> None:
        """Raise where it is not legal, naming the axis and the legal values."""
        if len(subnet.stacks) != len(self.stacks):
            raise ValueError(f"the sub-network has {len(subnet.stacks)} stacks, and the model has {len(self.stacks)}")
        _check_one("width", subnet.width, self.widths)
        for shape, stack, choice in zip(self.shape.stacks, self.stacks, subnet.stacks, strict=True):
            _check_one(f"{shape.name}.depth", choice.depth, stack.depths)
            for axis, values, legal in (
                ("heads", choice.heads, stack.heads),
                ("ffn", choice.ffn_widths, stack.ffn_widths),
                ("rank", choice.ranks, stack.ranks),
            ):
                if len(values) != choice.depth:
                    raise ValueError(f"{shape.name}.{axis} has {len(values)} values, and the sub-network has {choice.depth} layers there: give one for each")
                for value in values:
                    _check_one(f"{shape.name}.{axis}", value, legal)
            if shape.shares_heads and len(set(choice.heads)) > 1:
                raise ValueError(
                    f"{shape.name}.heads is {choice.heads}: the layers of this stack share one table of position biases, so give all the same number"
                )
        if self.even and not is_even(subnet):
            raise ValueError("the space is even, and the sub-network's layers differ: give all layers of all stacks the same heads, ffn and rank")

    def _check_even(self) -> None:
        heads, ffn_widths, ranks = _even_values(self)
        if not (heads and ffn_widths and ranks):
            raise ValueError("the space is even, and encoder and decoder have no width or number of heads in common: give them the same values")
        if self.shape.architecture == "llama" and any(width % number for width in self.widths for number in heads):
            raise ValueError(
                f"the space is even, and transformers' Llama wants a model width that is a multiple of the heads, which {self.widths} are not of {heads}: "
                "leave those heads out, or set even=False"
            )

    def _uniform(self, place: int) -> Subnet:
        if self.even:
            heads, ffn, rank = (values[place] for values in _even_values(self))
            return Subnet(width=self.widths[place], stacks=tuple(_alike(stack.depths[place], heads, ffn, rank) for stack in self.stacks))
        choices = (_alike(stack.depths[place], stack.heads[place], stack.ffn_widths[place], stack.ranks[place]) for stack in self.stacks)
        return Subnet(width=self.widths[place], stacks=tuple(choices))


def is_even(subnet: Subnet) -> bool:
    """Whether all layers of all stacks have the same heads, neurons and ranks."""
    return all(len({value for stack in subnet.stacks for value in getattr(stack, axis)}) == 1 for axis in ("heads", "ffn_widths", "ranks"))


def _alike(depth: int, heads: int, ffn_width: int, rank: float) -> StackChoice:
    return StackChoice(heads=(heads,) * depth, ffn_widths=(ffn_width,) * depth, ranks=(rank,) * depth)


def _choices(shape: StackShape, stack: StackSpace) -> Iterator[StackChoice]:
    for depth in stack.depths:
        all_heads = [(heads,) * depth for heads in stack.heads] if shape.shares_heads else itertools.product(stack.heads, repeat=depth)
        rest = itertools.product(itertools.product(stack.ffn_widths, repeat=depth), itertools.product(stack.ranks, repeat=depth))
        for heads, (ffn_widths, ranks) in itertools.product(all_heads, rest):
            yield StackChoice(heads=heads, ffn_widths=ffn_widths, ranks=ranks)


def _even_values(space: Space) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]:
    """The heads, neurons and ranks that all stacks have, ascending."""
    common: list[Any] = [tuple(sorted(set.intersection(*(set(getattr(stack, axis)) for stack in space.stacks)))) for axis in ("heads", "ffn_widths", "ranks")]
    return common[0], common[1], common[2]


def _check_values(what: str, values: tuple[Any, ...], largest: float) -> None:
    if not values or list(values) != sorted(set(values)) or values[0] <= 0 or values[-1] != largest:
        raise ValueError(f"{what} are {values}: give them ascending, above 0, each once, with the whole ({largest}) as the last")


def _check_one(what: str, value: float, legal: tuple[Any, ...]) -> None:
    if value not in legal:
        raise ValueError(f"{what} is {value}: this checkpoint has {', '.join(map(str, legal))}")
