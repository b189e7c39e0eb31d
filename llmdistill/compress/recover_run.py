"""Recovery: a compressed student is trained for a while, and ends with the best weights that it had, those it began with included.

The loss comes from outside (losses/recover.py with the uncompressed student in it), so that this file knows only how to train: the student's weights in float32
whatever they are stored in, updates of LoRA merged, fake quantization put in before and made integers afterwards.

Dropout is off unless asked for. Measured on the quickstart's student (1.8 million parameters, 50 steps at a learning rate of 1e-4, KL at a temperature of 2 on
validation rows): after SVD to half of its parameters and int8, KL from the uncompressed student falls from 0.37 to 0.063 without dropout and to 0.091 with it;
trained as int4 by KL alone it falls from 0.0080 to 0.0051 without, and with dropout no evaluation was better than the start.

What is trained is a copy. The training loop may shard it or move it, and what it keeps is written in `folder`; the weights are then read into the model itself,
prepared in the same way. A run that was killed is called again with the same arguments, the model as it was at first and the same folder, and goes on.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llmdistill.batches import collate, split
from llmdistill.compress.int4 import Int4
from llmdistill.compress.int8 import Int8
from llmdistill.compress.lsq import convert, install_lsq
from llmdistill.compress.method import Applied, Layer, Method
from llmdistill.compress.recovery import Recover
from llmdistill.core.stage import JsonScalar
from llmdistill.models.int8_embedding import Int8Embedding
from llmdistill.models.modes import without_dropout
from llmdistill.train import Journal, Lessons, Loss, train
from llmdistill.train_settings import Best
from llmdistill.train_setup import this_process
from llmdistill.train_state import read_weights
from llmdistill.tuning import adapt, merge

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmdistill.compress.calibration import Calibration

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class QuantizationAware:
    """The integer method that follows, and the rows on which it finds its scales and what is too sensitive for it."""

    method: Method
    calibration: Calibration

    def __post_init__(self) -> None:
        if not isinstance(self.method, (Int8, Int4)):
            raise ValueError(
                f"quantization-aware training is for int8 and int4, and the method that follows is {self.method.kind}: set quantization_aware=False"
            )


@dataclass(frozen=True, kw_only=True)
class Recovered:
    """What the recovery did."""

    figures: Mapping[str, JsonScalar]
    quantized: Applied | None = None
    """What quantization-aware training has left in the model, in place of what the method's own `apply` says."""


def recover(
    model: PreTrainedModel,
    loss: Loss,
    lessons: Lessons,
    settings: Recover,
    folder: Path,
    *,
    seed: int,
    journal: Journal,
    aware: QuantizationAware | None = None,
) -> Recovered:
    """Train the model, in place; with `aware` it has integer weights afterwards. Every process of a launch calls this, and each ends with the same weights."""
    if settings.quantization_aware and aware is None:
        raise ValueError("Recover.quantization_aware needs an int8 or int4 after the recovery; add one, or set quantization_aware=False")
    aware = aware if settings.quantization_aware else None
    best = settings.settings.best
    process = this_process()
    with _in_float32(model), _on(model, process.device or torch.device("cpu")), nullcontext() if settings.dropout else without_dropout(model):
        applied = None
        if aware is not None:
            quantized = copy.deepcopy(model)
            applied = aware.method.apply(quantized, aware.calibration)
            install_lsq(model, quantized, start=settings.steps)
            del quantized
        before = _figures(model, loss, lessons, settings)
        student = copy.deepcopy(model)
        for one in (student, model):
            adapt(one, settings.tuning, seed=seed)
        num_trained = sum(parameter.numel() for parameter in student.parameters() if parameter.requires_grad)
        trained = train(student, lessons, loss, settings.settings, folder, seed=seed, journal=journal)
        del student
        figures: dict[str, JsonScalar] = {**trained.figures, "trained_parameters": num_trained}
        if best is Best.LAST or _is_better(before[best.figure], float(trained.figures[f"kept_{best.figure}"]), best):
            read_weights(model, trained.weights)
        else:
            log.warning("recovery has not made the student better: %s was %.4f before; the weights stay as they were", best.figure, before[best.figure])
            figures |= {"kept_step": 0, f"kept_{best.figure}": before[best.figure]}
        merge(model, settings.tuning)
        errors = convert(model) if aware is not None else {}
        after = _figures(model, loss, lessons, settings)
    process.wait_for_everyone()  # the caller may remove the folder
    figures |= {f"{name}_before": value for name, value in before.items()} | {f"{name}_after": value for name, value in after.items()}
    return Recovered(figures=figures, quantized=None if applied is None else _as_trained(applied, errors))


def _as_trained(applied: Applied, errors: Mapping[str, float]) -> Applied:
    """What the method said of each layer, with the errors of the weights as they were trained."""
    layers = []
    for layer in applied.layers:
        figures = {"bits": layer.figures["bits"], "relative_weight_error": errors[layer.path]} if layer.path in errors else dict(layer.figures)
        layers.append(Layer(path=layer.path, kind=layer.kind, note=layer.note, figures=figures))
    counts = {name: value for name, value in applied.figures.items() if name in ("layers_quantized", "layers_kept")}
    return Applied(figures=counts | {"quantization_aware": True}, layers=tuple(layers))


@torch.no_grad()
def _figures(model: Any, loss: Loss, lessons: Lessons, settings: Recover) -> dict[str, float]:
    """Losses of the validation rows by part in nats a token, and the score; nothing without such rows."""
    if not lessons.validation:
        return {}
    model.eval()
    sums, counts = 0.0, 0
    for piece in split(lessons.validation, settings.settings, 1)[0]:
        batch = collate(piece, causal=not model.config.is_encoder_decoder).to(model.device)
        sums, counts = sums + loss.sums_P(model, batch).double(), counts + loss.counts_P(batch)
    means: list[float] = (sums / counts.clamp(min=1)).tolist()  # pyright: ignore[reportAttributeAccessIssue]
    total = sum(weight * mean for weight, mean in zip(loss.weights, means, strict=True))
    figures = {"validation_loss": total} | {f"validation_loss_{part}": mean for part, mean in zip(loss.parts, means, strict=True)}
    return figures | (dict(lessons.score(model)) if lessons.score is not None else {})


def _is_better(before: float, after: float, best: Best) -> bool:
    """Whether training has helped; what it began with may be no number."""
    return not math.isfinite(before) or (after > before if best.more_is_better else after < before)


@contextmanager
def _in_float32(model: nn.Module) -> Iterator[None]:
    """Weights of two bytes are trained in four, and have two again afterwards. Buffers stay as they are."""
    narrow = [(parameter, parameter.dtype) for parameter in model.parameters() if parameter.dtype in (torch.bfloat16, torch.float16)]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in narrow:
        parameter.data = parameter.data.float()
    yield
    for parameter, dtype in narrow:
        parameter.data = parameter.data.to(dtype)
    for parameter, flag in trainable:
        parameter.requires_grad_(flag)
    for module in model.modules():
        if isinstance(module, Int8Embedding) and narrow:
            module.to(narrow[0][1])


@contextmanager
def _on(model: nn.Module, device: torch.device) -> Iterator[None]:
    """The model on a device for a while."""
    home = next(model.parameters()).device
    model.to(device)
    yield
    model.to(home)
