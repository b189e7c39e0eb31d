"""The shape of a model in memory (shape.py), read off its modules."""

from __future__ import annotations

from typing import Any

from torch import nn

from llmdistill.elastic.shape import ModelShape, StackShape
from llmdistill.models.anatomy import Place, Stack, embeddings, stacks
from llmdistill.models.deciding import deciding
from llmdistill.models.low_rank_linear import LowRankLinear
from llmdistill.models.resized import ffn_width, num_heads
from llmdistill.models.t5 import head_is_tied


def shape_of(model: Any) -> ModelShape:
    """The sizes of a model whose layers are all alike and whose linears are plain or low-rank; ValueError where it is not."""
    head = model.lm_head
    if type(head) not in (nn.Linear, LowRankLinear):
        raise ValueError(f"the output head is a {_kind(head)} module, and elastic students have plain or low-rank linears: quantize after extraction")
    embedding = embeddings(model)[0]
    if type(embedding) is not nn.Embedding:
        raise ValueError(
            f"the embedding is a {_kind(embedding)} module, and elastic students have a plain one: factorise attention and feed-forward alone (SVD.scope), "
            "and quantize after extraction"
        )
    gated = next(iter(deciding(model)), None)
    if gated is not None:
        raise ValueError(f"{gated} is a {_kind(model.get_submodule(gated))} module, whose gate sub-networks would share: extract one first, and gate that")
    family = {"t5": "t5", "llama": "llama", "qwen2": "qwen2"}[model.config.model_type.removeprefix("llmdistill_")]
    return ModelShape(
        architecture=family,
        vocabulary=head.out_features,
        width=head.in_features,
        tied_head=head_is_tied(model),
        head_rank=head.rank if isinstance(head, LowRankLinear) else 0,
        stacks=tuple(_stack_shape(stack) for stack in stacks(model)),
    )


def _stack_shape(stack: Stack) -> StackShape:
    first = stack.layers[0]
    sizes = {(num_heads(stack, layer), ffn_width(layer), tuple(_checked(place).bias is not None for place in layer.places)) for layer in stack.layers}
    if len(sizes) > 1:
        raise ValueError(f"the layers of the {stack.name} differ in size: it was cut already; make the whole model elastic, and cut that")
    places = [(f"{number}.{place.role}", place.module) for number, layer in enumerate(stack.layers) for place in layer.places]
    low_rank = [(name, module) for name, module in places if isinstance(module, LowRankLinear)]
    first_name: dict[int, str] = {}
    shared = [(name, source) for name, module in low_rank if (source := first_name.setdefault(id(module.down.weight), name)) != name]
    for name, source in shared:
        if name.split(".")[0] != source.split(".")[0]:
            raise ValueError(
                f"the low-rank linears {name} and {source} of the {stack.name} share a factor: only those of one layer may, since layers are cut apart. "
                "Where that is QSVD's cross-attention, use QSVD(cross=SEPARATE)"
            )
    return StackShape(
        name=stack.name,
        num_layers=len(stack.layers),
        heads=num_heads(stack, first),
        group=stack.group,
        head_width=stack.head_width,
        ffn_width=ffn_width(first),
        roles=tuple(place.role for place in first.places),
        num_norms=len(first.norms),
        biases=tuple(place.role for place in first.places if _checked(place).bias is not None),
        ranks=tuple((name, module.rank) for name, module in low_rank),
        shared=tuple(shared),
        num_buckets=stack.bias_table.num_embeddings if stack.has_bias_table else 0,
    )


def _checked(place: Place) -> nn.Linear:
    """The linear that has the bias: the place's own, or the second of a low-rank one."""
    module = place.module
    if type(module) is LowRankLinear and all(type(factor) is nn.Linear for factor in (module.down, module.up)):
        return module.up
    if type(module) is not nn.Linear:
        raise ValueError(f"a {place.role} is a {_kind(module)} module, and elastic students have plain or low-rank linears: quantize after extraction")
    return module


def _kind(module: Any) -> str:
    return getattr(module, "kind", type(module).__name__)
