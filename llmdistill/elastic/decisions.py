"""The open decisions of a space as one flat list: what methods choose that know of choices, and not of stacks and layers.

A decision is the model width, the depth of a stack, or the heads, neurons or rank of a layer; heads are one decision for a stack whose layers share them, and
in an even space heads, neurons and rank are one decision each for the whole model. What has one legal value only is no decision. `choices` are positions in the
decisions' values, one for each decision, and any such choices are a legal sub-network. A stack's depth comes before what concerns its layers, so whoever
chooses one after the other knows already which layers stay: decisions about the others are inactive, and make no difference.

The list is the "search space as a sequence of choices" of NASNet (Zoph et al. 2018) and ENAS (Pham et al. 2018), with the depth-conditional layers of
Once-for-All (Cai et al. 2020).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmdistill.elastic.choice import StackChoice, Subnet
from llmdistill.elastic.space import Space

_FIELDS = {"heads": "heads", "ffn": "ffn_widths", "rank": "ranks"}
LAYER_AXES = tuple(_FIELDS)
"""What is chosen of a layer, by the names of choice.py."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """One thing to choose. `axis` is width, depth, heads, ffn or rank; no stack or layer means that it holds for all; values ascend, the last is the whole."""

    axis: str
    stack: str | None
    layer: int | None
    values: tuple[Any, ...]

    @property
    def name(self) -> str:
        """Such as width, encoder.depth or decoder.3.ffn."""
        return ".".join(str(part) for part in (self.stack, self.layer, self.axis) if part is not None)


class Decisions:
    """Those of a space, in `open`, the width first, then stack by stack."""

    def __init__(self, space: Space) -> None:
        self.space = space
        everything = _all(space)
        self.open = tuple(decision for decision in everything if len(decision.values) > 1)
        self._values = {(decision.axis, decision.stack, decision.layer): decision.values for decision in everything}
        self._place = {(decision.axis, decision.stack, decision.layer): place for place, decision in enumerate(self.open)}
        self._depth_place = {stack.name: self._place.get(("depth", stack.name, None)) for stack in space.shape.stacks}
        self._position = {shape.name: {layer: place for place, layer in enumerate(stack.layer_order)} for shape, stack in self._stacks()}

    def place(self, axis: str, stack: str | None = None, layer: int | None = None) -> int | None:
        """Which of `open` says it for this stack or layer; None where it is not open."""
        return next((self._place[key] for key in _keys(axis, stack, layer) if key in self._place), None)

    def values(self, axis: str, stack: str | None = None, layer: int | None = None) -> tuple[Any, ...]:
        """The legal values, be they open or not, in the order of the choices."""
        return next(self._values[key] for key in _keys(axis, stack, layer) if key in self._values)

    def largest(self) -> list[int]:
        """The choices that are the whole model."""
        return [len(decision.values) - 1 for decision in self.open]

    def subnet(self, choices: Sequence[int]) -> Subnet:
        """The sub-network that the choices are."""
        if len(choices) != len(self.open) or any(not 0 <= choice < len(decision.values) for choice, decision in zip(choices, self.open, strict=False)):
            raise ValueError(f"choices are {list(choices)}: give {len(self.open)} positions, one below {[len(decision.values) for decision in self.open]} each")

        def value(axis: str, stack: str | None, layer: int | None) -> Any:
            place = self.place(axis, stack, layer)
            return self.values(axis, stack, layer)[-1] if place is None else self.open[place].values[choices[place]]

        stacks = []
        for shape, stack in self._stacks():
            kept = stack.kept_layers(value("depth", shape.name, None))
            stacks.append(StackChoice(**{_FIELDS[axis]: tuple(value(axis, shape.name, layer) for layer in kept) for axis in LAYER_AXES}))
        return Subnet(width=value("width", None, None), stacks=tuple(stacks))

    def choices(self, subnet: Subnet) -> tuple[int, ...]:
        """The choices that are this sub-network, with the whole for inactive ones; ValueError where it is not legal."""
        self.space.check(subnet)
        found: dict[int, Any] = {}

        def note(value: Any, axis: str, stack: str | None = None, layer: int | None = None) -> None:
            place = self.place(axis, stack, layer)
            if place is not None:
                found[place] = self.open[place].values.index(value)

        note(subnet.width, "width")
        for (shape, stack), choice in zip(self._stacks(), subnet.stacks, strict=True):
            note(choice.depth, "depth", shape.name)
            for number, layer in enumerate(stack.kept_layers(choice.depth)):
                for axis in LAYER_AXES:
                    note(getattr(choice, _FIELDS[axis])[number], axis, shape.name, layer)
        return tuple(found.get(place, whole) for place, whole in enumerate(self.largest()))

    def is_active(self, place: int, choices: Sequence[int]) -> bool:
        """Whether a decision makes a difference, given the choices before it."""
        decision = self.open[place]
        depth_place = None if decision.layer is None else self._depth_place[str(decision.stack)]
        return depth_place is None or self.open[depth_place].values[choices[depth_place]] > self._position[str(decision.stack)][decision.layer or 0]

    def depth_places(self, place: int) -> tuple[int, ...]:
        """The open depths of the stacks that a decision concerns; none for depths and the model width."""
        decision = self.open[place]
        if decision.axis in ("width", "depth"):
            return ()
        return tuple(depth for name, depth in self._depth_place.items() if depth is not None and decision.stack in (name, None))

    def kept_at(self, stack: str, layer: int) -> tuple[bool, ...]:
        """For each depth of a stack, in the order of its values, whether the layer stays."""
        return tuple(depth > self._position[stack][layer] for depth in self.values("depth", stack))

    def _stacks(self) -> list[tuple[Any, Any]]:
        return list(zip(self.space.shape.stacks, self.space.stacks, strict=True))


def _keys(axis: str, stack: str | None, layer: int | None) -> tuple[tuple[str, str | None, int | None], ...]:
    """Where it may be said: for the layer, the stack or all."""
    return (axis, stack, layer), (axis, stack, None), (axis, None, None)


def _all(space: Space) -> list[Decision]:
    """Also those with one value."""
    found = [Decision(axis="width", stack=None, layer=None, values=space.widths)]
    if space.even:
        found += [Decision(axis="depth", stack=shape.name, layer=None, values=stack.depths) for shape, stack in _pairs(space)]
        for axis in LAYER_AXES:
            common = set.intersection(*(set(getattr(stack, _FIELDS[axis])) for stack in space.stacks))
            found.append(Decision(axis=axis, stack=None, layer=None, values=tuple(sorted(common))))
        return found
    for shape, stack in _pairs(space):
        found.append(Decision(axis="depth", stack=shape.name, layer=None, values=stack.depths))
        if shape.shares_heads:
            found.append(Decision(axis="heads", stack=shape.name, layer=None, values=stack.heads))
        for layer in range(shape.num_layers):
            axes = [axis for axis in LAYER_AXES if not (axis == "heads" and shape.shares_heads)]
            found += [Decision(axis=axis, stack=shape.name, layer=layer, values=getattr(stack, _FIELDS[axis])) for axis in axes]
    return found


def _pairs(space: Space) -> list[tuple[Any, Any]]:
    return list(zip(space.shape.stacks, space.stacks, strict=True))
