"""How elastic a student is to be, in fractions of what it has: the settings from which a space is made."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from llmdistill.elastic.shape import ModelShape, StackShape
from llmdistill.elastic.space import Space, StackSpace


@dataclass(frozen=True, kw_only=True)
class Axes:
    """Fractions of each axis; the whole is always among them.

    ffn, width: rounded to multiples of `multiple_of`, where the whole is one: matrices of such sizes are fast, and a sub-network in place and its extraction
    then give bitwise the same (subnet.py).
    heads: rounded to whole key/value groups. depth: to whole layers. Each has at least one left.
    even: only what one stock config can say, so that every sub-network becomes a stock folder.
    """

    kind: ClassVar[str] = "axes"
    ffn: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    heads: tuple[float, ...] = (0.5, 0.75, 1.0)
    depth: tuple[float, ...] = (0.5, 0.75, 1.0)
    width: tuple[float, ...] = (1.0,)
    rank: tuple[float, ...] = (1.0,)
    multiple_of: int = 8
    even: bool = False

    def __post_init__(self) -> None:
        for name in ("ffn", "heads", "depth", "width", "rank"):
            wrong = [fraction for fraction in getattr(self, name) if not 0.0 < fraction <= 1.0]
            if wrong:
                raise ValueError(f"Axes.{name} has {wrong[0]}: fractions are above 0 and at most 1")
        if self.multiple_of < 1:
            raise ValueError(f"Axes.multiple_of is {self.multiple_of}: it must be 1 or more")

    def space(self, shape: ModelShape, layer_orders: Mapping[str, Sequence[int]] | None = None) -> Space:
        """The space of a model. `layer_orders` by stack (layer_order.py measures them); a stack without one keeps its layers spread out evenly."""
        orders = layer_orders or {}
        unknown = sorted(orders.keys() - {stack.name for stack in shape.stacks})
        if unknown:
            raise ValueError(f"layer_orders are given for {unknown}, and the model's stacks are {[stack.name for stack in shape.stacks]}")
        stacks = tuple(self._stack(stack, orders.get(stack.name) or spread_order(stack.num_layers)) for stack in shape.stacks)
        groups = max(stack.group for stack in shape.stacks) if shape.architecture == "llama" else 1  # transformers' Llama divides its width by its heads
        return Space(shape=shape, widths=_rounded(self.width, shape.width, self._step(shape.width) * groups), stacks=stacks, even=self.even)

    def _stack(self, shape: StackShape, layer_order: Sequence[int]) -> StackSpace:
        return StackSpace(
            ffn_widths=_rounded(self.ffn, shape.ffn_width, self._step(shape.ffn_width)),
            heads=_rounded(self.heads, shape.heads, shape.group),
            depths=_rounded(self.depth, shape.num_layers, 1),
            ranks=tuple(sorted({*self.rank, 1.0})) if shape.ranks else (1.0,),
            layer_order=tuple(layer_order),
        )

    def _step(self, whole: int) -> int:
        return self.multiple_of if whole % self.multiple_of == 0 else 1


def spread_order(num_layers: int) -> tuple[int, ...]:
    """Layers in an order whose every beginning is spread over the whole: first, last, then always the middle of the widest gap.

    Half the depth so keeps about every other layer, as LayerDrop (Fan et al. 2020, section 3.3) and DynaBERT found best without measuring.
    """
    order = [0, num_layers - 1][:num_layers]
    while len(order) < num_layers:
        placed = sorted(order)
        gap, first = max((after - before, -before) for before, after in itertools.pairwise(placed))
        order.append(-first + gap // 2)
    return tuple(order)


def _rounded(fractions: Sequence[float], whole: int, step: int) -> tuple[int, ...]:
    """Multiples of the step near these fractions of the whole, and the whole."""
    return tuple(sorted({min(whole, max(step, round(whole * fraction / step) * step)) for fraction in fractions} | {whole}))
