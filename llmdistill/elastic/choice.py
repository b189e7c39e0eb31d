"""A sub-network: how wide, how deep, how many heads and neurons in each layer that stays.

It is written as one line of text, `axis=value` with commas between:

    encoder.depth=2,encoder.ffn=256+128,decoder.depth=1,decoder.heads=2

A value is one for all layers, or one for each layer that stays with + between, first layer first. Without `encoder.` or `decoder.` it holds for both. What is
not said is the largest there is. The axes are width (without a stack), depth, heads, ffn and rank. `largest` and `smallest` stand alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmdistill.elastic.space import Space

AXES = ("depth", "heads", "ffn", "rank")


@dataclass(frozen=True, kw_only=True)
class StackChoice:
    """The layers of one stack that stay, from the first to the last: query heads, neurons and fraction of the singular values of each."""

    heads: tuple[int, ...]
    ffn_widths: tuple[int, ...]
    ranks: tuple[float, ...]

    @property
    def depth(self) -> int:
        """How many layers stay; which, the space says."""
        return len(self.heads)


@dataclass(frozen=True, kw_only=True)
class Subnet:
    """One choice; `stacks` in the model's order, so that a T5's encoder comes first and a causal model has one. A space says whether it is legal."""

    width: int
    stacks: tuple[StackChoice, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Subnet:
        """What `to_json` wrote, with lists for tuples where a file has been in between."""
        return cls(width=data["width"], stacks=tuple(StackChoice(**{name: tuple(values) for name, values in stack.items()}) for stack in data["stacks"]))


def write(subnet: Subnet, space: Space) -> str:
    """The line of text that `parse` reads; all that can be chosen is in it."""
    parts = [f"width={subnet.width}"] if len(space.widths) > 1 else []
    for shape, choice, legal in zip(space.shape.stacks, subnet.stacks, space.stacks, strict=True):
        named: dict[str, tuple[Any, tuple[Any, ...]]] = {
            "depth": ((choice.depth,), legal.depths),
            "heads": (choice.heads, legal.heads),
            "ffn": (choice.ffn_widths, legal.ffn_widths),
            "rank": (choice.ranks, legal.ranks),
        }
        parts += [f"{shape.name}.{axis}={_joined(values)}" for axis, (values, can_be) in named.items() if len(can_be) > 1]
    return ",".join(parts) or "largest"


def parse(text: str, space: Space) -> Subnet:
    """The legal sub-network that a line stands for."""
    if text in ("largest", "smallest"):
        return space.largest() if text == "largest" else space.smallest()
    names = [shape.name for shape in space.shape.stacks]
    width, said = space.widths[-1], {name: {} for name in names}
    for part in text.split(","):
        key, equals, value = part.partition("=")
        stack, dot, axis = key.strip().rpartition(".")
        if equals and key.strip() == "width":
            width = _one(_numbers(value, part, whole=True), part)
        elif not equals or axis not in AXES or (dot and stack not in names):
            raise ValueError(
                f"{part!r} in {text!r} is no choice of this checkpoint: write width=NUMBER, or {', '.join(AXES)} with =NUMBER or =NUMBER+NUMBER+..., "
                f"for one stack as in {names[-1]}.ffn=64 (stacks: {', '.join(names)}), or largest or smallest"
            )
        else:
            numbers = _numbers(value, part, whole=axis != "rank")
            for name in [stack] if dot else names:
                said[name][axis] = [_one(numbers, part)] if axis == "depth" else numbers
    choices = []
    for name, legal in zip(names, space.stacks, strict=True):
        (depth,) = said[name].get("depth", legal.depths[-1:])
        if depth not in legal.depths:
            raise ValueError(f"{name}.depth is {depth}: this checkpoint has {', '.join(map(str, legal.depths))}")
        heads, ffn_widths, ranks = (
            _by_layer(said[name].get(axis, [largest]), depth, f"{name}.{axis}")
            for axis, largest in (("heads", legal.heads[-1]), ("ffn", legal.ffn_widths[-1]), ("rank", legal.ranks[-1]))
        )
        choices.append(StackChoice(heads=heads, ffn_widths=ffn_widths, ranks=ranks))
    subnet = Subnet(width=width, stacks=tuple(choices))
    space.check(subnet)
    return subnet


def _joined(values: tuple[Any, ...]) -> str:
    return str(values[0]) if len(set(values)) == 1 else "+".join(map(str, values))


def _numbers(text: str, part: str, *, whole: bool) -> list[Any]:
    try:
        return [int(number) if whole else float(number) for number in text.split("+")]
    except ValueError:
        raise ValueError(f"{part!r} has no {'whole numbers' if whole else 'numbers'} after the =; write one, or one for each layer with + between") from None


def _one(numbers: list[Any], part: str) -> Any:
    if len(numbers) > 1:
        raise ValueError(f"{part!r} has {len(numbers)} values, and the whole has one width and each stack one depth: give one")
    return numbers[0]


def _by_layer(values: list[Any], depth: int, key: str) -> tuple[Any, ...]:
    if len(values) not in (1, depth):
        raise ValueError(f"{key} has {len(values)} values for {depth} layers: give one for all, or {depth}")
    return tuple(values * depth if len(values) == 1 else values)
