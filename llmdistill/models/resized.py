"""Students whose layers differ in size: heads and feed-forward widths of each layer, as data in config.json.

transformers' configs have one number of heads and one feed-forward width for all layers (T5's even for both stacks). A student that was cut layer by layer
has more, so its config says

    "sizes": {"decoder": {"heads": [4, 2], "ffn_widths": [256, 128]}}

for each stack that differs from the stock sizes. Loading builds the stock class, puts linears of these sizes in, then the structure's modules and the weights.
What is put in are the stock classes, so everything that knows them (the decode engine, training, quantization) treats such a student as any other. As with
structure, sizes are read off the model when it is saved.

The heads of a T5 stack share one table of position biases (its first layer's), so that all its layers have equally many.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from torch import nn
from transformers import PreTrainedModel

from llmdistill.models.anatomy import Axis, Layer, Stack, stacks

Sizes: TypeAlias = "dict[str, dict[str, list[int]]]"


def sizes_of(model: PreTrainedModel) -> Sizes:
    """The stacks whose layers are not all as the config says, each with its heads and feed-forward widths by layer."""
    sizes: Sizes = {}
    for stack in stacks(model):
        heads = [num_heads(stack, layer) for layer in stack.layers]
        ffn_widths = [ffn_width(layer) for layer in stack.layers]
        if set(heads) != {model.config.num_attention_heads} or set(ffn_widths) != {stock_ffn_width(model)}:
            sizes[stack.name] = {"heads": heads, "ffn_widths": ffn_widths}
    return sizes


def resize(model: PreTrainedModel, sizes: Mapping[str, Mapping[str, Sequence[int]]]) -> None:
    """Give the layers of a newly built stock model these sizes. The linears that change are empty: the safetensors fill them."""
    by_name = {stack.name: stack for stack in stacks(model)}
    for name, of_stack in sizes.items():
        stack = by_name.get(name)
        if stack is None or set(of_stack) != {"heads", "ffn_widths"} or any(len(numbers) != len(stack.layers) for numbers in of_stack.values()):
            raise ValueError(f"the sizes in config.json do not fit: {name!r} has {dict(of_stack)}, and this model's stacks are {_described(by_name)}")
        if stack.has_bias_table and len(set(of_stack["heads"])) > 1:
            raise ValueError(f"the sizes in config.json give the layers of {name!r} {of_stack['heads']} heads: a T5 stack has one number for all its layers")
        for layer, heads, width in zip(stack.layers, of_stack["heads"], of_stack["ffn_widths"], strict=True):
            if heads < 1 or heads % stack.group or width < 1:
                raise ValueError(
                    f"the sizes in config.json give {name!r} {heads} heads and {width} neurons: give multiples of {stack.group} heads, and 1 or more"
                )
            _resize_layer(stack, layer, heads, width)
        if stack.has_bias_table:
            table = stack.bias_table
            stack.layers[0].attentions[0].relative_attention_bias = nn.Embedding(
                table.num_embeddings, of_stack["heads"][0], dtype=table.weight.dtype, device=table.weight.device
            )


def set_heads(attention: Any, heads: int) -> dict[str, int]:
    """What a module that knows its number of heads must be told; of the causal ones, none does."""
    return {"n_heads": heads, "inner_dim": heads * attention.key_value_proj_dim} if hasattr(attention, "n_heads") else {}


def num_heads(stack: Stack, layer: Layer) -> int:
    """Query heads of a layer's self-attention."""
    return layer.attention_places[0][0].module.out_features // stack.head_width


def ffn_width(layer: Layer) -> int:
    """Neurons of a layer."""
    return layer.feed_forward[-1].module.in_features


def stock_ffn_width(model: PreTrainedModel) -> int:
    """The config's number of neurons."""
    return getattr(model.config, "d_ff", None) or model.config.intermediate_size


def _resize_layer(stack: Stack, layer: Layer, heads: int, width: int) -> None:
    numbers: dict[Axis, int] = {Axis.HEADS: heads * stack.head_width, Axis.GROUPS: heads // stack.group * stack.head_width, Axis.NEURONS: width}
    for place in layer.places:
        linear: Any = place.module
        inputs, outputs = numbers.get(place.inputs) or linear.in_features, numbers.get(place.outputs) or linear.out_features
        if (inputs, outputs) != (linear.in_features, linear.out_features):
            bias, weight = linear.bias is not None, linear.weight
            setattr(place.holder, place.name, nn.Linear(inputs, outputs, bias=bias, dtype=weight.dtype, device=weight.device))
    for attention in layer.attentions:
        for name, value in set_heads(attention, heads).items():
            setattr(attention, name, value)


def _described(by_name: Mapping[str, Stack]) -> str:
    return ", ".join(f"{name} of {len(stack.layers)} layers" for name, stack in by_name.items())
