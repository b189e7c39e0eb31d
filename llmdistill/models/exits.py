"""The modules of exits: what reads a token's state where it may leave, before the last layer.

    logits = head(adapter(norm(state)))        T5 with tied embeddings scales by d_model^-0.5 before the head, as after the last layer

Each exit has a norm of its own (that of the last layer is fitted to the last layer's states), which starts as a copy. Where there are adapters, each adds
up(down(x)) to x, and up starts at zero. The head is the model's own, or those rows of it whose tokens the task's answers hold: the whole head at every exit can
cost more than the layers that an exit saves. A gate (D -> 1) says from the normed state alone how likely the exit is to say what the last layer would say.

An exit of an encoder is a norm, an adapter and a gate too: norm and adapter make its states what the decoder reads in place of the whole encoder's, and the
gate judges their mean over the prompt.

They are at `model.exits`; transformers' own forward takes no notice of them, so the checkpoint loads and generates as the full model everywhere.

Shapes: N tokens, D model width, R rank of an adapter, K tokens of the exits' vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from llmdistill.models.anatomy import stacks
from llmdistill.models.exit_settings import KEY, NEVER, ExitSettings, read_exits
from llmdistill.models.structure import ties_of


class Adapter(nn.Module):
    """x -> x + up(down(x))."""

    def __init__(self, width: int, rank: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.down = nn.Linear(width, rank, bias=False, dtype=dtype, device=device)
        self.up = nn.Linear(rank, width, bias=False, dtype=dtype, device=device)
        nn.init.zeros_(self.up.weight)

    def forward(self, x_ND: Tensor) -> Tensor:
        return x_ND + self.up(self.down(x_ND))


class Exits(nn.Module):
    """The modules of all exits; lists have one entry an exit."""

    vocabulary_K: Tensor

    def __init__(self, model: Any, settings: ExitSettings) -> None:
        super().__init__()
        norm = stacks(model)[-1].norm
        width, where = norm.weight.shape[0], {"dtype": norm.weight.dtype, "device": norm.weight.device}
        self.norms = nn.ModuleList(type(norm)(width, norm.variance_epsilon).to(**where) for _ in settings.layers)
        self.adapters = nn.ModuleList(Adapter(width, settings.adapter_rank, **where) for _ in settings.layers if settings.adapter_rank)
        self.gates = nn.ModuleList(nn.Linear(width, 1, **where) for _ in settings.layers if settings.has_gates)
        if settings.encoder_layers:
            self.encoder_norms = nn.ModuleList(type(norm)(width, norm.variance_epsilon).to(**where) for _ in settings.encoder_layers)
            self.encoder_adapters = nn.ModuleList(Adapter(width, settings.adapter_rank, **where) for _ in settings.encoder_layers if settings.adapter_rank)
            self.encoder_gates = nn.ModuleList(nn.Linear(width, 1, **where) for _ in settings.encoder_layers)
        if settings.num_vocabulary:
            self.register_buffer("vocabulary_K", torch.zeros(settings.num_vocabulary, dtype=torch.long, device=norm.weight.device))

    def read(self, place: int, state_ND: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        """What the head and the gate of an exit get."""
        normed_ND = self.norms[place](state_ND)
        return self.adapters[place](normed_ND) if self.adapters else normed_ND

    def encoded(self, place: int, state_BLD: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        """What the decoder reads of prompts that leave the encoder at an exit."""
        normed_BLD = self.encoder_norms[place](state_BLD)
        return self.encoder_adapters[place](normed_BLD) if self.encoder_adapters else normed_BLD

    def encoder_gate(self, place: int, encoded_BLD: Float[Tensor, "B L D"], mask_BL: Bool[Tensor, "B L"]) -> Float[Tensor, " B"]:
        """The logit of how likely the answer is then what it is after the whole encoder."""
        shares_BL1 = mask_BL[:, :, None].to(encoded_BLD.dtype) / mask_BL.sum(1)[:, None, None]
        return self.encoder_gates[place]((encoded_BLD * shares_BL1).sum(1))[:, 0]


def exits_of(model: Any) -> tuple[ExitSettings, Exits] | None:
    """The exits of a model; None where it has none."""
    settings = read_exits(model.config)
    return None if settings is None else (settings, model.exits)


def add_exits(model: Any, settings: ExitSettings, vocabulary: Sequence[int] = ()) -> Exits:
    """Give a model exits that begin as the last layer's norm, with these tokens as their vocabulary."""
    if exits_of(model) is not None:
        raise ValueError("the model has exits already; begin with a checkpoint that has none")
    if len(vocabulary) != settings.num_vocabulary:
        raise ValueError(f"num_vocabulary is {settings.num_vocabulary}, and {len(vocabulary)} tokens are given")
    exits = attach(model, settings)
    first, last = stacks(model)[0].norm, stacks(model)[-1].norm
    with torch.no_grad():
        for norm in exits.norms:
            norm.weight.copy_(last.weight)  # pyright: ignore[reportArgumentType, reportCallIssue]
        for norm in exits.encoder_norms if settings.encoder_layers else ():
            norm.weight.copy_(first.weight)  # pyright: ignore[reportArgumentType, reportCallIssue]
        if settings.num_vocabulary:
            exits.vocabulary_K.copy_(torch.tensor(vocabulary))
    setattr(model.config, KEY, settings.to_json())
    return exits


def attach(model: Any, settings: ExitSettings) -> Exits:
    """The modules, in their place and still empty."""
    num_layers = len(stacks(model)[-1].layers)
    if max(settings.layers, default=0) >= num_layers:
        raise ValueError(f"the exits are after layers {list(settings.layers)}, and the decoder has {num_layers}: each must be less")
    if settings.encoder_layers and len(stacks(model)) < 2:
        raise ValueError(f"encoder_layers is {list(settings.encoder_layers)}, and a {type(model).__name__} has no encoder: leave it empty")
    if max(settings.encoder_layers, default=0) >= len(stacks(model)[0].layers):
        raise ValueError(f"the encoder's exits are after layers {list(settings.encoder_layers)}, and it has {len(stacks(model)[0].layers)}: each must be less")
    model.exits = Exits(model, settings)
    return model.exits


def keep_places(exits: Exits, places: Sequence[int], encoder_places: Sequence[int]) -> dict[str, nn.ModuleList]:
    """The lists of modules of exits of which only some stay, by the names of their attributes."""
    names = {prefix + name: kept for prefix, kept in (("", places), ("encoder_", encoder_places)) for name in ("norms", "adapters", "gates")}
    lists = {name: getattr(exits, name, ()) for name in names}
    return {name: nn.ModuleList(modules[place] for place in names[name]) for name, modules in lists.items() if len(modules) not in (0, len(names[name]))}


def keep_settings(model: Any, settings: ExitSettings) -> None:
    """Other settings for exits that are there: another confidence, a calibration."""
    setattr(model.config, KEY, settings.to_json())


def digest(model: Any) -> str:
    """sha256 of the weights and of what else decides what a confidence is; a model in another dtype has another one."""
    settings = read_exits(model.config)
    uncalibrated = None if settings is None else replace(settings, calibration=None, subnet_calibrations={}).to_json()
    ties = ties_of(model)
    found = hashlib.sha256(json.dumps(uncalibrated, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if name not in ties:
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def own_threshold(model: Any) -> float:
    """That of the smallest delta which was calibrated; NEVER where nothing was. ValueError where it was calibrated for other weights."""
    settings = read_exits(model.config)
    if settings is None or settings.calibration is None:
        return NEVER
    check_calibration(model)
    return settings.calibration.points[0].threshold if settings.calibration.points else NEVER


def check_calibration(model: Any) -> None:
    """Raise where the thresholds of a model were calibrated for other weights."""
    settings = read_exits(model.config)
    if settings is not None and settings.calibration is not None and settings.calibration.weights != digest(model):
        raise ValueError(
            "the thresholds of this checkpoint's exits were calibrated for other weights, or for these in another dtype: what they promise does not hold here. "
            "Calibrate it as it is (the CalibrateExits stage), or give an exit_threshold of your own"
        )
