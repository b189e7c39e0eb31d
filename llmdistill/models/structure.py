"""Structure as data: which submodules of the stock model are replaced, by what, and which tensors are one and the same.

config.json of a changed model holds

    "structure": {"decoder.block.0.layer.0.SelfAttention.q": {"kind": "low_rank", "rank": 8}, ...}
    "ties": {"lm_head.weight": "shared.weight", ...}

Loading builds the stock class, swaps in the modules that the structure names and reads the safetensors strictly; there is no code in a checkpoint and no
pickle. Both are read off the model itself when it is saved, so they cannot say anything else than what is there: a technique replaces modules with
`model.set_submodule(path, module)`, shares tensors as it likes, and has nothing to declare.

Paths may nest: a module that replaces a linear may itself have its inner linears replaced (an int8 factor of a low-rank linear), the outer one first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from llmdistill.models.channel_gated_feed_forward import ChannelGatedFeedForward
from llmdistill.models.int4_linear import Int4Linear
from llmdistill.models.int8_embedding import Int8Embedding
from llmdistill.models.int8_linear import Int8Linear
from llmdistill.models.low_rank_embedding import LowRankEmbedding
from llmdistill.models.low_rank_linear import LowRankLinear
from llmdistill.models.skipped_feed_forward import SkippedFeedForward
from llmdistill.models.skipped_layer import SkippedLlamaLayer, SkippedQwen2Layer, SkippedT5Block
from llmdistill.models.stored_linear import StoredLinear
from llmdistill.models.tensor_linear import CPLinear, TuckerLinear

KINDS: tuple[Any, ...] = (
    LowRankLinear,
    LowRankEmbedding,
    Int8Linear,
    Int8Embedding,
    Int4Linear,
    StoredLinear,
    TuckerLinear,
    CPLinear,
    SkippedFeedForward,
    SkippedT5Block,
    SkippedLlamaLayer,
    SkippedQwen2Layer,
    ChannelGatedFeedForward,
)
"""Every kind there is (module classes as kind.py describes). A new technique adds its class here."""


def structure_of(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The replaced modules of a model, by path, each with its kind and settings."""
    replaced: list[tuple[str, Any]] = [(path, module) for path, module in model.named_modules(remove_duplicate=False) if type(module) in KINDS]
    return {path: {"kind": module.kind, **module.settings()} for path, module in replaced}


def install(model: nn.Module, structure: Mapping[str, Mapping[str, Any]]) -> None:
    """Swap in the modules that a structure names, still empty."""
    kinds = {kind.kind: kind for kind in KINDS}
    for path in sorted(structure, key=lambda path: (path.count("."), path)):
        settings = dict(structure[path])
        name = settings.pop("kind", None)
        if name not in kinds:
            raise ValueError(
                f"the structure has kind {name!r} at {path!r}, and this llmdistill knows {sorted(kinds)}; "
                "the checkpoint may come from a later version: upgrade llmdistill"
            )
        try:
            replaced = model.get_submodule(path)
        except AttributeError:
            raise ValueError(f"the structure replaces {path!r}, and a {type(model).__name__} has no such module") from None
        try:
            module = kinds[name].from_settings(settings, replaced)
        except ValueError as error:
            raise ValueError(f"the structure does not fit at {path!r}: {error}") from error
        model.set_submodule(path, module)


def dtype_of(model: nn.Module) -> torch.dtype:
    """In what dtype a model computes: that of its own numbers, since those of a kind (a scale, a bfloat16 zero) may be of another."""
    for module in model.modules():
        for parameter in module._parameters.values():
            if type(module) not in KINDS and parameter is not None and parameter.is_floating_point():
                return parameter.dtype
    raise ValueError(f"the {type(model).__name__} has no floating-point weight outside of replaced modules, not even a norm")


def ties_of(model: nn.Module) -> dict[str, str]:
    """The parameters that are the same as an earlier one, each with the name of that one."""
    first_name: dict[int, str] = {}
    ties = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        source = first_name.setdefault(id(parameter), name)
        if source != name:
            ties[name] = source
    return ties
