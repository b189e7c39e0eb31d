"""The sizes of a student as plain numbers: all that spaces and costs need to know of it, without torch and without the model.

The roles of a layer's linears are those of models/anatomy.py: q, k, v, o, the same with cross_ before them, ffn_gate, ffn_in, ffn_out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class StackShape:
    """One stack, all of whose layers have these sizes. `group` is the number of query heads that share a key/value head; heads leave by whole groups.

    biases: the roles whose linear has a bias.
    ranks: of the linears that are low-rank, under "layer.role", such as ("0.q", 16).
    shared: the low-rank linears whose first factor is that of another one of their layer, with that one's name: ("0.k", "0.q").
    num_buckets: rows of the table of position biases, which has one column for each head; 0 where there is none. Its columns serve every layer of the stack,
    so the layers have equally many heads.
    """

    name: str
    num_layers: int
    heads: int
    group: int
    head_width: int
    ffn_width: int
    roles: tuple[str, ...]
    num_norms: int
    biases: tuple[str, ...] = ()
    ranks: tuple[tuple[str, int], ...] = ()
    shared: tuple[tuple[str, str], ...] = ()
    num_buckets: int = 0

    @property
    def shares_heads(self) -> bool:
        """Whether all layers have the same number of heads."""
        return self.num_buckets > 0

    def sizes(self, role: str, *, width: int, heads: int, ffn_width: int) -> tuple[int, int]:
        """Inputs and outputs of a linear, for a layer of these sizes."""
        if role.startswith("ffn"):
            return (ffn_width, width) if role == "ffn_out" else (width, ffn_width)
        queries = heads * self.head_width
        if role in ("o", "cross_o"):
            return queries, width
        return width, (queries if role in ("q", "cross_q") else queries // self.group)

    def cut_ranks(self, layer: int, fraction: float, *, width: int, heads: int, ffn_width: int) -> dict[str, int]:
        """How many singular values of each low-rank linear of a layer stay, by role: at least one, and no more than a matrix of its size has.

        Those that share a factor are one matrix, with the outputs of all: it may have more than a grouped-query key alone has outputs.
        """
        ranks, shared = dict(self.ranks), dict(self.shared)
        source_of = {role: shared.get(f"{layer}.{role}", f"{layer}.{role}") for role in self.roles if f"{layer}.{role}" in ranks}
        sizes = {role: self.sizes(role, width=width, heads=heads, ffn_width=ffn_width) for role in source_of}
        outputs = Counter[str]()
        for role, source in source_of.items():
            outputs[source] += sizes[role][1]
        return {
            role: min(sizes[role][0], outputs[source], max(1, round(ranks[source] * fraction)))  # what shares a factor has the same inputs
            for role, source in source_of.items()
        }


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The whole model. `head_rank` is 0 where the output head is no low-rank linear."""

    architecture: str
    vocabulary: int
    width: int
    tied_head: bool
    head_rank: int = 0
    stacks: tuple[StackShape, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelShape:
        """What `to_json` wrote, with lists for tuples where a file has been in between."""
        stacks = tuple(_stack(stack) for stack in data["stacks"])
        return cls(**{**data, "stacks": stacks})


def _stack(data: Mapping[str, Any]) -> StackShape:
    pairs = {name: tuple((first, second) for first, second in data[name]) for name in ("ranks", "shared")}
    return StackShape(**{**data, **pairs, **{name: tuple(data[name]) for name in ("roles", "biases")}})
