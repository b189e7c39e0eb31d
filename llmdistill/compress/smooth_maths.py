"""Where SmoothQuant's scales can be folded, and the folding (smooth.py says what and why).

Shapes: I inputs of the linears that are smoothed, O outputs.

A fold has a giver, whose output channels are divided by the scales, and readers, whose weights are multiplied by them. The giver's output must go to the
readers and nowhere else, and none of the tensors may be in use anywhere else: a head that is the embedding too cannot be scaled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmdistill.compress.method import Applied, Layer
from llmdistill.compress.slots import Role, Slot, slots
from llmdistill.compress.statistics import input_statistics
from llmdistill.models.low_rank_linear import LowRankLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmdistill.compress.calibration import Calibration

SMALLEST_SHARE = 1e-5  # of the largest channel: a silent channel is no reason for an endless scale


@dataclass(frozen=True, kw_only=True)
class Fold:
    """A giver (its path), and the slots that read what it gives. `obstacle`: why it cannot be used, nothing where it can."""

    giver: str
    readers: tuple[Slot, ...]
    obstacle: str


@torch.no_grad()
def smooth(model: PreTrainedModel, calibration: Calibration, *, alpha: float, feed_forward: bool, powers_of_two: bool) -> Applied:
    """Fold scales wherever it can be done."""
    folds = [*(_feed_forward_folds(model) if feed_forward else ()), *_norm_folds(model)]
    usable = [fold for fold in folds if not fold.obstacle]
    if not usable:
        raise ValueError(
            f"smooth scales plain and low-rank linears, and there is no place for it in this model ({folds[-1].obstacle}): put it before the others"
        )
    statistics = input_statistics(model, [fold.readers[0] for fold in usable], calibration, dtype=torch.float32)
    layers = []
    for fold in usable:
        largest_I = statistics[fold.readers[0].input].largest_magnitude_I
        scale_I = _scales(largest_I, [_reading(slot.module(model)) for slot in fold.readers], alpha, powers_of_two)
        for weight in {id(weight): weight for weight in (_reading(slot.module(model)) for slot in fold.readers)}.values():
            weight.mul_(scale_I.to(weight.dtype))
        for tensor in _given(model.get_submodule(fold.giver)):
            tensor.div_((scale_I if tensor.ndim == 1 else scale_I[:, None]).to(tensor.dtype))
        figures = {"input_peak_before": _peak(largest_I), "input_peak_after": _peak(largest_I / scale_I)}
        layers += [Layer(path=slot.path, kind="smooth", note=f"scales are in {fold.giver}", figures=figures) for slot in fold.readers]
    layers += [Layer(path=slot.path, kind="kept", note=fold.obstacle) for fold in folds if fold.obstacle for slot in fold.readers]
    return Applied(figures={"inputs_smoothed": len(usable), "inputs_left": len(folds) - len(usable)}, layers=tuple(layers))


def _scales(largest_I: Tensor, weights: Sequence[Tensor], alpha: float, powers_of_two: bool) -> Tensor:
    """Equation 4. Silent channels count as a small share of the largest."""
    weight_I = torch.stack([weight.abs().amax(0).float() for weight in weights]).amax(0)
    inputs_I, weight_I = (peak_I.clamp(min=float(peak_I.max()) * SMALLEST_SHARE) for peak_I in (largest_I.float(), weight_I))
    scale_I = inputs_I**alpha / weight_I ** (1 - alpha)
    scale_I = torch.where(torch.isfinite(scale_I) & (scale_I > 0), scale_I, 1)  # all inputs, or all weights, are zero
    return scale_I.log2().round().exp2() if powers_of_two else scale_I


def _peak(largest_I: Tensor) -> float:
    """How much larger the largest channel is than the middle one."""
    return float(largest_I.max() / largest_I.median().clamp(min=torch.finfo(torch.float32).tiny))


def _norm_folds(model: Any) -> Iterator[Fold]:
    """One for each input that a norm gives: all its readers are slots (slots.py)."""
    by_input: dict[str, list[Slot]] = {}
    for slot in slots(model):
        if slot.norm is not None:
            by_input.setdefault(slot.input, []).append(slot)
    for readers in by_input.values():
        norm = str(readers[0].norm)
        yield Fold(giver=norm, readers=tuple(readers), obstacle=_obstacle(model, norm, readers))


def _feed_forward_folds(model: Any) -> Iterator[Fold]:
    """The linear before each feed-forward's output, where the output is proportional to it: the branch without an activation, or before a ReLU."""
    by_layer: dict[tuple[str, int], dict[Role, Slot]] = {}
    for slot in slots(model):
        by_layer.setdefault((slot.stack, slot.layer), {})[slot.role] = slot
    for roles in by_layer.values():
        if Role.FFN_OUT in roles:
            giver, out = roles[Role.FFN_IN], roles[Role.FFN_OUT]
            is_proportional = Role.FFN_GATE in roles or getattr(model.config, "dense_act_fn", "") == "relu"
            obstacle = _obstacle(model, giver.path, [out]) if is_proportional else "there is an activation other than a ReLU before it"
            yield Fold(giver=giver.path, readers=(out,), obstacle=obstacle)


def _obstacle(model: Any, giver: str, readers: Sequence[Slot]) -> str:
    """Why these cannot be scaled; nothing where they can."""
    modules = [model.get_submodule(giver), *(slot.module(model) for slot in readers)]
    for path, module in zip([giver, *(slot.path for slot in readers)], modules, strict=True):
        is_norm = module is modules[0] and type(module).__name__.endswith("Norm") and getattr(module, "bias", None) is None
        if not is_norm and type(module) not in (nn.Linear, LowRankLinear):
            return f"{path} is a {getattr(module, 'kind', type(module).__name__)} module"
    uses = Counter(id(tensor) for _, tensor in model.named_parameters(remove_duplicate=False))
    ours = Counter([id(tensor) for tensor in _given(modules[0])] + [id(_reading(module)) for module in modules[1:]])
    names = {id(tensor): name for name, tensor in model.named_parameters()}
    shared = [names[number] for number, num_ours in ours.items() if uses[number] > num_ours]
    if shared:
        return f"{shared[0]} is in use elsewhere as well"
    return "the same weight gives and reads" if {id(tensor) for tensor in _given(modules[0])} & {id(_reading(module)) for module in modules[1:]} else ""


def _reading(module: Any) -> Tensor:
    """The weight that the input meets."""
    return module.down.weight if isinstance(module, LowRankLinear) else module.weight


def _given(module: Any) -> list[Tensor]:
    """What is to be divided, with the output channels first."""
    last = module.up if isinstance(module, LowRankLinear) else module
    return [tensor for tensor in (last.weight, getattr(last, "bias", None)) if tensor is not None]
