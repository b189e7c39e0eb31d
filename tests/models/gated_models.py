"""What the tests of modules that decide share: gates that are open for some tokens and shut for others, and logits with gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=Any)


def with_random_gates(modules: Sequence[Module]) -> Sequence[Module]:
    """The modules, each gate of which is open for some tokens and shut for others."""
    for module in modules:
        nn.init.normal_(module.gate.weight, std=2)
        nn.init.zeros_(module.gate.bias)
    return modules


def with_gradients(model: Any) -> torch.Tensor:
    """Logits of some rows, outside of inference mode."""
    ids_BL = torch.randint(2, 96, (3, 7), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids_BL} | ({"decoder_input_ids": ids_BL[:, :5]} if model.config.is_encoder_decoder else {})
    return model(**inputs).logits
