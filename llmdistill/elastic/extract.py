"""A sub-network taken out of the big model, as a small one of its own.

Where all layers are alike, in both stacks of a T5, the result is the stock class with a stock config and a folder that stock transformers loads (and
CTranslate2 and others that read such folders). Otherwise the config says the sizes by layer and llmdistill's class reads them (models/resized.py). A low-rank
linear is in the structure, as ever. Early exits (models/exits.py) come along where they lie between layers that stay, with the thresholds that were calibrated
for this sub-network, if it was (stages/calibrate.py).

transformers' Llama wants a model width that is a multiple of its heads, though the width of a head is a number of its own: 6 of SmolLM2's 9 heads make a
stock Llama of width 576, while 5 of 15 heads at width 512 do not. Such a one becomes a model of llmdistill's class too.
"""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import T5ForConditionalGeneration

from llmdistill.elastic.choice import parse, write
from llmdistill.elastic.cost import num_parameters
from llmdistill.elastic.cuts import Plan, plan
from llmdistill.elastic.described import NOT_STOCK, STOCK
from llmdistill.elastic.kept import KEY, read, space_of
from llmdistill.elastic.space import Space, Subnet, is_even
from llmdistill.elastic.subnet import whole
from llmdistill.models import checkpoint
from llmdistill.models.exit_settings import KEY as EXITS
from llmdistill.models.exit_settings import ExitSettings, read_exits
from llmdistill.models.exits import keep_settings


def extract(folder: Path, subnet: str, out: Path) -> Subnet:
    """Write the sub-network of an elastic checkpoint, written as text (choice.py), as a checkpoint of its own; which one it was."""
    if out.exists():
        raise ValueError(f"{out} exists already: name a folder that does not")
    space, _ = read(folder)
    chosen = parse(subnet, space)
    model, tokenizer = checkpoint.load(folder)
    text, figures = write(chosen, space), {"parameters": num_parameters(space, chosen), "parameters_before": num_parameters(space, space.largest())}
    lineage = json.loads((folder / checkpoint.LINEAGE).read_text(encoding="utf-8"))
    entry = {"technique": "extract", "settings": {"subnet": text}, "measured": figures}
    card = (folder / checkpoint.CARD).read_text(encoding="utf-8").rstrip() + _card(text, figures, stock=is_stock(space, chosen))
    writing = out.with_name(out.name + ".partial")
    checkpoint.save(extracted(model, chosen), tokenizer, writing, lineage=[*lineage, entry], card=card)
    writing.rename(out)
    return chosen


def extracted(model: Any, subnet: Subnet) -> Any:
    """The sub-network as a model with weights of its own; the big one stays as it is. It is no longer elastic."""
    space = space_of(model)
    space.check(subnet)
    with whole(model):
        small = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    made = plan(small, space, subnet)
    for change in made.changes:
        setattr(change.owner, change.name, change.value)
    for stack, layers in made.kept:
        setattr(stack.holder, stack.attribute, nn.ModuleList(layers))
    _own_weights(small, made)
    _configure(small, space, subnet)
    _keep_exits(small, read_exits(model.config), None if subnet == space.largest() else write(subnet, space))
    return small


def _keep_exits(small: Any, before: ExitSettings | None, subnet: str | None) -> None:
    """What the config says of the exits that stay, and no trace where none does. None for the sub-network that is the whole."""
    if before is None:
        return
    settings = read_exits(small.config)
    if settings is None:
        del small.exits
        delattr(small.config, EXITS)
    else:
        calibration = before.calibration if subnet is None else before.subnet_calibrations.get(subnet)
        keep_settings(small, replace(settings, calibration=calibration, subnet_calibrations={}))


def is_stock(space: Space, subnet: Subnet) -> bool:
    """Whether stock transformers loads its extraction."""
    heads_fit = space.shape.architecture != "llama" or subnet.width % subnet.stacks[0].heads[0] == 0
    return is_even(subnet) and heads_fit and not space.shape.head_rank and not any(stack.ranks for stack in space.shape.stacks)


def _own_weights(small: Any, made: Plan) -> None:
    """Copies of the prefixes in place of the whole parameters. What was one parameter and is cut alike stays one."""
    cuts = {(id(cut.module), cut.name): cut for cut in made.cuts}
    copies: dict[tuple[int, int, int | None], nn.Parameter] = {}
    wholes = list(small.parameters())  # keeps them, so that no id is used twice
    for module in list(small.modules()):
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            cut = cuts.get((id(module), name))
            key = (id(parameter), cut.rows if cut else 0, cut.columns if cut else 0)
            if key not in copies:
                prefix = (cut.view() if cut else parameter).detach().clone()
                copies[key] = nn.Parameter(prefix.contiguous(), requires_grad=parameter.requires_grad)
            module._parameters[name] = copies[key]
    del wholes


def _configure(small: Any, space: Space, subnet: Subnet) -> None:
    """A config that says what is there, or where it cannot, what is nearest; the rest is read off the layers (resized.py)."""
    heads, ffn_width = (max(max(getattr(stack, axis)) for stack in subnet.stacks) for axis in ("heads", "ffn_widths"))
    depths = [stack.depth for stack in subnet.stacks]
    if isinstance(small, T5ForConditionalGeneration):
        values = {"d_model": subnet.width, "num_heads": heads, "d_ff": ffn_width, "num_decoder_layers": depths[1]}
        configs: list[tuple[Any, dict[str, Any]]] = [
            (small.config, values | {"num_layers": depths[0]}),
            (small.encoder.config, values | {"num_layers": depths[0]}),
            (small.decoder.config, values | {"num_layers": depths[1]}),
        ]
    else:
        shape = space.shape.stacks[0]
        if space.shape.architecture == "llama":
            heads = next(number for number in range(heads, 0, -shape.group) if subnet.width % number == 0)
        values = {
            "hidden_size": subnet.width,
            "num_attention_heads": heads,
            "num_key_value_heads": heads // shape.group,
            "head_dim": shape.head_width,
            "intermediate_size": ffn_width,
            "num_hidden_layers": depths[0],
        }
        if getattr(small.config, "layer_types", None):
            values["layer_types"] = [small.config.layer_types[layer] for layer in space.stacks[0].kept_layers(depths[0])]
        configs = [(small.config, values)]
    for config, of_config in configs:
        for name, value in of_config.items():
            setattr(config, name, value)
        if hasattr(config, KEY):
            delattr(config, KEY)


def _card(text: str, figures: dict[str, int], *, stock: bool) -> str:
    return f"""

# Extracted
The sub-network `{text}` of the above: {figures["parameters"]:,} parameters of {figures["parameters_before"]:,}. {STOCK if stock else NOT_STOCK}
The figures above are those of the whole.
"""
