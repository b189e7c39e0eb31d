"""A model in another mode for a while: in evaluation, with gradients for some of its weights alone, or in training without dropout."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """In eval mode within, and as before afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def only_trained(model: Any, weights: Collection[nn.Parameter] = ()) -> Iterator[None]:
    """These have gradients within, and no others."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    wanted = {id(weight) for weight in weights}
    try:
        for parameter, _ in before:
            parameter.requires_grad_(id(parameter) in wanted)
        yield
    finally:
        for parameter, was_trained in before:
            parameter.requires_grad_(was_trained)


@contextmanager
def without_dropout(model: Any) -> Iterator[None]:
    """Nothing is dropped by the model's own modules. transformers keeps the rates in modules and configs; T5 has a config for each stack."""
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    places = [(module, "p") for module in model.modules() if isinstance(module, nn.Dropout)]
    places += [(owner, name) for owner in (*model.modules(), *configs.values()) for name in ("dropout", "dropout_rate", "attention_dropout")]
    rates = [(owner, name, getattr(owner, name)) for owner, name in places if isinstance(getattr(owner, name, None), float)]
    for owner, name, _ in rates:
        setattr(owner, name, 0.0)
    try:
        yield
    finally:
        for owner, name, rate in rates:
            setattr(owner, name, rate)
