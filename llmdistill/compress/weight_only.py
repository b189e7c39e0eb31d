"""What the weight-only methods share: each plain linear is replaced by a module of fewer bits, but for those that are to be kept.

Shapes: I inputs, O outputs, R rank.

Linears that share a weight (a tied factor of a joint factorisation) are quantized once and go on sharing it. A weight that is an embedding too stays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from llmdistill.compress.calibration import Calibration, within
from llmdistill.compress.method import Applied, Layer
from llmdistill.compress.sensitivity import keep_sensitive
from llmdistill.compress.slots import HEAD, Slot, leaves
from llmdistill.compress.statistics import input_statistics

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_STATISTICS_TOKENS = 8192  # a mean square needs few
Make: TypeAlias = "Callable[[nn.Linear, Tensor], nn.Module]"
"""The quantized module in place of a linear whose inputs have these mean squares (I)."""


def quantize_linears(
    model: PreTrainedModel, calibration: Calibration, make: Make, *, kind: str, head: bool, keep: Sequence[str], max_loss_rise: float
) -> Applied:
    """Replace the linears of the blocks, and the head where it is wanted, as far as the held-out loss allows."""
    found = leaves(model)
    if not found:
        raise ValueError(f"{kind} replaces plain linears, and this model has none left: apply it before, or instead of, what took their places")
    linears = {path: linear for path, linear, _ in found}
    left_alone = {path: reason for path, linear, slot in found if (reason := _reason(model, path, linear, slot, head, keep))}
    unused = [pattern for pattern in keep if not any(fnmatchcase(path, pattern) for path in linears)]
    if unused:
        raise ValueError(f"keep={unused[0]!r} matches no linear of this model; its linears are {', '.join(list(linears)[:4])}, ...")
    wanted = [path for path in linears if path not in left_alone]
    if not wanted:
        return Applied(figures={"layers_quantized": 0, "layers_kept": len(left_alone)}, layers=tuple(_kept(left_alone)))
    gram_by_path = mean_grams(model, [(path, slot) for path, _, slot in found if path in wanted], calibration)
    made: dict[tuple[int, int], nn.Module] = {}
    by_weight: dict[tuple[int, int], list[str]] = {}
    for path in wanted:
        by_weight.setdefault(_identity(linears[path]), []).append(path)

    def quantize(model: Any, path: str) -> nn.Module:
        linear = linears[path]
        identity = _identity(linear)
        if identity not in made:
            made[identity] = make(linear, gram_by_path[path].diagonal())
        model.set_submodule(path, made[identity])
        return linear

    sensitivity = keep_sensitive(model, [tuple(paths) for paths in by_weight.values()], quantize, calibration, max_loss_rise)
    kept = {layer.path: layer for layer in sensitivity.kept}
    changed = [
        Layer(path=path, kind=kind, figures=figures_of(linears[path], made[_identity(linears[path])], gram_by_path[path]))
        for path in wanted
        if path not in kept
    ]
    figures = {
        "layers_quantized": len(changed),
        "layers_kept": len(left_alone) + len(kept),
        "held_out_loss_rise_nats": sensitivity.loss_after - sensitivity.loss_before,
    }
    return Applied(figures=figures, layers=(*changed, *sensitivity.kept, *_kept(left_alone)), held_out_loss=sensitivity.loss_after)


def bits_per_weight(module: nn.Module, num_weights: int) -> float:
    """Everything that stands for the weight, scales included; the bias is no part of it."""
    return 8 * sum(tensor.nbytes for name, tensor in module.named_parameters() if name != "bias") / num_weights


def _reason(model: Any, path: str, linear: nn.Linear, slot: Slot, head: bool, keep: Sequence[str]) -> str:
    """Why a linear is left alone; nothing where it is not."""
    if any(fnmatchcase(path, pattern) for pattern in keep):
        return "the settings say so"
    if slot.path == HEAD and not head:
        return "the settings leave the head alone"
    if any(linear.weight is parameter for parameter in model.get_input_embeddings().parameters()):
        return "its weight is the embedding as well"
    return ""


def _kept(reasons: dict[str, str]) -> list[Layer]:
    return [Layer(path=path, kind="kept", note=reason) for path, reason in reasons.items()]


def _identity(linear: nn.Linear) -> tuple[int, int]:
    return id(linear.weight), id(linear.bias)


@torch.no_grad()
def mean_grams(model: PreTrainedModel, wanted: Sequence[tuple[str, Slot]], calibration: Calibration) -> dict[str, Tensor]:
    """The mean of x x^T of each linear's input. The second factor of a low-rank linear reads what the first one makes of it."""
    few = dataclasses.replace(calibration, examples=within(calibration.examples, MAX_STATISTICS_TOKENS))
    statistics = input_statistics(model, [slot for _, slot in wanted], few, dtype=torch.float32)
    grams = {}
    for path, slot in wanted:
        of_slot = statistics[slot.input]
        mean_II = of_slot.gram_II / max(1, of_slot.num_tokens)
        if path == f"{slot.path}.up":
            down_RI = slot.module(model).down.weight.to(mean_II.dtype)
            mean_II = down_RI @ mean_II @ down_RI.t()
        grams[path] = mean_II
    return grams


@torch.no_grad()
def figures_of(linear: nn.Linear, module: Any, gram_II: Tensor) -> dict[str, float]:
    """Bits, and the errors of the weight and of the outputs on the calibration rows, relative to their size."""
    weight_OI = linear.weight.detach().float()
    off_OI = module.dequantized_OI(torch.float32) - weight_OI

    def size(matrix_OI: Tensor) -> float:
        return max(float(((matrix_OI @ gram_II) * matrix_OI).sum()), 0.0) ** 0.5

    weight_norm, output_norm = float(weight_OI.norm()), size(weight_OI)
    return {
        "bits": bits_per_weight(module, weight_OI.numel()),
        "relative_weight_error": float(off_OI.norm()) / weight_norm if weight_norm else 0.0,
        "relative_error": size(off_OI) / output_norm if output_norm else 0.0,
    }
