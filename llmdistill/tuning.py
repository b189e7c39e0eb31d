"""What of a model is trained: all of it, or low-rank updates beside frozen weights that are merged into them at the end.

Source: Hu et al. 2021, "LoRA", section 4, through peft. Where we differ: the factors of a low-rank linear are linears to update too; and linears that share one
weight (the down-projection of QSVD's q, k and v) share one update, which is merged once, so that they share their weight afterwards. peft would give each its
own, and add all of them to the one weight.

No torch at import: stages and pipelines hold the settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Full:
    """All weights are trained."""

    kind: ClassVar[str] = "full"


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Low-rank updates are trained beside frozen weights, and merged into them at the end (peft)."""

    kind: ClassVar[str] = "lora"
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.05
    modules: tuple[str, ...] = ()
    """Names of the linears to update; empty updates all but the head."""

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0 or not 0 <= self.dropout < 1:
            raise ValueError(f"LoRA has rank {self.rank}, alpha {self.alpha} and dropout {self.dropout}; give 1 or more, more than 0, and 0 up to less than 1")


def adapt(model: nn.Module, tuning: Full | LoRA, *, seed: int) -> None:
    """Make the model ready to train, in place: with LoRA its linears get their updates, and nothing else is trained. The same seed gives the same updates."""
    if isinstance(tuning, Full):
        return
    import torch
    from peft import LoraConfig, inject_adapter_in_model

    paths = _linears(model, tuning.modules)
    groups = _sharing(model, paths)
    torch.manual_seed(seed)
    config = LoraConfig(
        r=tuning.rank,
        lora_alpha=tuning.alpha,  # pyright: ignore[reportArgumentType] - a float is fine
        lora_dropout=tuning.dropout,
        target_modules=paths,
    )
    inject_adapter_in_model(config, model)
    for first, *others in groups:
        for other in others:
            for name in ("lora_A", "lora_B"):
                _factor(model, other, name).weight = _factor(model, first, name).weight


def merge(model: nn.Module, tuning: Full | LoRA) -> None:
    """Add the updates to their weights and take them out of the model, in place."""
    if isinstance(tuning, Full):
        return
    from peft.tuners.lora import LoraLayer

    merged: set[int] = set()
    updated: list[tuple[str, Any]] = [(path, module) for path, module in model.named_modules() if isinstance(module, LoraLayer)]
    for path, layer in updated:
        linear = layer.get_base_layer()
        if id(linear.weight) not in merged:
            layer.merge()
            merged.add(id(linear.weight))
        model.set_submodule(path, linear)


def _linears(model: Any, names: Sequence[str]) -> list[str]:
    """Paths of the linears to update. A name is the end of a path; that of a low-rank linear means both factors."""
    from torch import nn

    from llmdistill.models.low_rank_linear import LowRankLinear

    linears = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    if not names:
        head = model.get_output_embeddings()
        of_head = {id(module) for module in head.modules()} if head is not None else set()
        found = [path for path, linear in linears.items() if id(linear) not in of_head]
        if not found:
            raise ValueError("LoRA updates linears, and this model has none beside its head: train all weights, with tuning=Full()")
        return found
    within = {path: [path] for path in linears}
    within |= {path: [f"{path}.down", f"{path}.up"] for path, module in model.named_modules() if isinstance(module, LowRankLinear)}
    chosen: set[str] = set()
    for name in names:
        matches = [parts for path, parts in within.items() if path == name or path.endswith(f".{name}")]
        if not matches:
            raise ValueError(f"LoRA.modules has {name!r}, and no linear has that name; there are {', '.join(sorted({_last(path) for path in within}))}")
        chosen |= {part for parts in matches for part in parts}
    return [path for path in linears if path in chosen]


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _sharing(model: nn.Module, paths: Sequence[str]) -> list[list[str]]:
    """The paths in groups that share one weight. ValueError where something that gets no update shares it."""
    places: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), []).append(name)
    groups: dict[int, list[str]] = {}
    for path in paths:
        weight: Any = model.get_submodule(path).weight
        groups.setdefault(id(weight), []).append(path)
    for identity, group in groups.items():
        others = sorted(set(places[identity]) - {f"{path}.weight" for path in group})
        if others:
            raise ValueError(
                f"LoRA would update {group[0]}, whose weight is {', '.join(others)} as well, and they would no longer be one: "
                "name all of its linears in LoRA.modules or none; what is an embedding too is trained with tuning=Full() only"
            )
    return list(groups.values())


def _factor(model: nn.Module, path: str, name: str) -> Any:
    return model.get_submodule(path).get_submodule(f"{name}.default")
