"""What a sub-network is in terms of the big model: which parameters are cut to a prefix, which attributes change, which layers stay.

One plan serves both uses: `subnet` shows the model these prefixes in place, `extract` copies them out. So what runs in place is what is extracted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from llmdistill.elastic.exit_cuts import exits_within
from llmdistill.elastic.shape import StackShape
from llmdistill.elastic.space import Space, Subnet
from llmdistill.models.anatomy import Layer, Stack, embeddings, stacks
from llmdistill.models.exit_settings import KEY as EXITS
from llmdistill.models.exits import exits_of, keep_places
from llmdistill.models.low_rank_linear import LowRankLinear
from llmdistill.models.resized import set_heads


@dataclass(frozen=True, eq=False)
class Cut:
    """Parameter `name` of a module, of which the first rows and columns stay; `columns` is None for a vector."""

    module: nn.Module
    name: str
    rows: int
    columns: int | None = None

    @property
    def whole(self) -> nn.Parameter:
        """The parameter that is cut, also while a prefix hides it."""
        parameter = self.module._parameters[self.name]
        assert parameter is not None
        return parameter

    def view(self) -> Tensor:
        """The prefix, in the parameter's own memory."""
        return self.whole[: self.rows] if self.columns is None else self.whole[: self.rows, : self.columns]


@dataclass(frozen=True, eq=False)
class Change:
    """Attribute `name` of an object has another value."""

    owner: Any
    name: str
    value: Any


@dataclass(eq=False)
class Plan:
    """Everything that makes the big model the sub-network. `kept` are the layers of each stack that stay, as modules."""

    cuts: list[Cut] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    kept: list[tuple[Stack, list[Any]]] = field(default_factory=list)


def plan(model: Any, space: Space, subnet: Subnet) -> Plan:
    """The plan for a legal sub-network. Parameters that stay whole are not in it."""
    kept = {stack.name: legal.kept_layers(choice.depth) for stack, legal, choice in zip(space.shape.stacks, space.stacks, subnet.stacks, strict=True)}
    made = shorter(model, kept)
    width = subnet.width
    for embedding in embeddings(model):
        _cut_table(made, embedding, width)
    _linear(made, model.lm_head, width, space.shape.vocabulary, min(space.shape.head_rank, width))
    if hasattr(model, "model_dim"):
        _change(made, model, "model_dim", width)
    for stack, shape, choice in zip(stacks(model), space.shape.stacks, subnet.stacks, strict=True):
        for place, number in enumerate(kept[stack.name]):
            sizes = {"width": width, "heads": choice.heads[place], "ffn_width": choice.ffn_widths[place]}
            layer = stack.layers[number]
            _layer(made, layer, shape, sizes, shape.cut_ranks(number, choice.ranks[place], **sizes))
        _norm(made, stack.norm, width)
        if stack.has_bias_table:
            _cut_table(made, stack.bias_table, choice.heads[0])
    _exits(made, model, space, subnet)
    return made


def shorter(model: Any, kept: Mapping[str, Sequence[int]]) -> Plan:
    """The plan that only leaves layers out: of each stack named, those stay that are given, ascending."""
    made = Plan()
    for stack in stacks(model):
        numbers = list(kept.get(stack.name, range(len(stack.layers))))
        if len(numbers) == len(stack.layers):
            continue
        made.kept.append((stack, [stack.layers[number].module for number in numbers]))
        for place, number in enumerate(numbers):
            for attention in stack.layers[number].attentions:
                _change(made, attention, "layer_idx", place)  # the cache of transformers' generate counts layers
        if stack.has_bias_table and numbers[0] != 0:  # the first layer that stays takes the table over
            first = stack.layers[numbers[0]].attentions[0]
            made.changes += [Change(first, "has_relative_attention_bias", True), Change(first, "relative_attention_bias", stack.bias_table)]
    return made


def _layer(made: Plan, layer: Layer, shape: StackShape, sizes: dict[str, int], ranks: dict[str, int]) -> None:
    for place in layer.places:
        inputs, outputs = shape.sizes(place.role, **sizes)
        _linear(made, place.module, inputs, outputs, ranks.get(place.role, 0))
    for attention in layer.attentions:
        for name, value in set_heads(attention, sizes["heads"]).items():
            _change(made, attention, name, value)
    for norm in layer.norms:
        _norm(made, norm, sizes["width"])


def _exits(made: Plan, model: Any, space: Space, subnet: Subnet) -> None:
    """Those that the sub-network has; `exits` of its config is None where it has none."""
    found = exits_of(model)
    if found is None or subnet == space.largest():
        return
    settings, exits = found
    within = exits_within(settings, space, subnet)
    _change(made, model.config, EXITS, None if within is None else within[0].to_json())
    if within is None:
        return
    for name, modules in keep_places(exits, *within[1:]).items():
        made.changes.append(Change(exits, name, modules))
    for place in within[1]:
        _exit(made, exits.norms[place], exits.adapters, exits.gates, place, subnet.width)
    for place in within[2]:
        _exit(made, exits.encoder_norms[place], exits.encoder_adapters, exits.encoder_gates, place, subnet.width)


def _exit(made: Plan, norm: Any, adapters: Any, gates: Any, place: int, width: int) -> None:
    """One exit's modules; of adapters and gates there may be none."""
    _norm(made, norm, width)
    if adapters:
        _linear(made, adapters[place].down, width, adapters[place].down.out_features, 0)
        _linear(made, adapters[place].up, adapters[place].up.in_features, width, 0)
    if gates:
        _linear(made, gates[place], width, 1, 0)


def _linear(made: Plan, module: Any, inputs: int, outputs: int, rank: int) -> None:
    _check_kind(module, LowRankLinear if rank else nn.Linear)
    if rank:
        _linear(made, module.down, inputs, rank, 0)
        _linear(made, module.up, rank, outputs, 0)
        _change(made, module, "rank", rank)
    else:
        _cut(made, module, "weight", outputs, inputs)
        if module.bias is not None:
            _cut(made, module, "bias", outputs)
    _change(made, module, "in_features", inputs)
    _change(made, module, "out_features", outputs)


def _norm(made: Plan, norm: nn.Module, width: int) -> None:
    _cut(made, norm, "weight", width)


def _cut_table(made: Plan, table: nn.Embedding, width: int) -> None:
    _check_kind(table, nn.Embedding)
    _cut(made, table, "weight", table.num_embeddings, width)
    _change(made, table, "embedding_dim", width)


def _check_kind(module: Any, expected: type) -> None:
    """What took a module's place after the space was made would be cut wrongly, and in silence."""
    if type(module) is not expected:
        found, planned = (getattr(kind, "kind", kind.__name__) for kind in (type(module), expected))
        raise ValueError(
            f"where the space of this elastic model has a module of kind {planned} there is one of kind {found}: the model was changed after it was made "
            "elastic, so its sub-networks are no more. Extract one first and change that, or change the model first and make it elastic then"
        )


def _cut(made: Plan, module: nn.Module, name: str, rows: int, columns: int | None = None) -> None:
    cut = Cut(module, name, rows, columns)
    if tuple(cut.whole.shape) != ((rows,) if columns is None else (rows, columns)):
        made.cuts.append(cut)


def _change(made: Plan, owner: Any, name: str, value: Any) -> None:
    if getattr(owner, name) != value:
        made.changes.append(Change(owner, name, value))
