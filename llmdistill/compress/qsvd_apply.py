"""QSVD on a model: which weights are one, what the rows and the loss say of them, and the modules that take their places (qsvd.py says why so).

Shapes: T tokens, I inputs, O outputs of all stacked weights, K = min(I, O), R rank.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmdistill.compress import qsvd_maths
from llmdistill.compress.answers_loss import seen_by
from llmdistill.compress.calibration import Calibration, row_loss
from llmdistill.compress.importance import Importance
from llmdistill.compress.low_rank_maths import FLOOR, Gram, Spectrum, activation_gram, floored, spectrum
from llmdistill.compress.method import Applied, Layer
from llmdistill.compress.qsvd import QSVD, Cross, Outputs
from llmdistill.compress.qsvd_maths import Stacked
from llmdistill.compress.ranks import Item, allocate, kept_share, linear_costs
from llmdistill.compress.slots import Role, Slot, plain, slots
from llmdistill.compress.statistics import InputStatistics, input_statistics
from llmdistill.compress.svd import Data
from llmdistill.models.low_rank_linear import LowRankLinear
from llmdistill.models.modes import evaluating, only_trained

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

CROSS = "cross-attention"
MAX_GRAM_BYTES = 2**30  # of the Gram matrices of one pass over the rows
NUM_SAMPLED_ROWS, NUM_SAMPLED_TOKENS = 8, 512
"""On how many the exponent is chosen and errors are told."""


@dataclass(frozen=True)
class Group:
    """Linears that read one input and are decomposed as one."""

    name: str
    slots: tuple[Slot, ...]
    linears: tuple[nn.Linear, ...]

    @property
    def reader(self) -> Slot:
        return self.slots[0]

    def weight_OI(self) -> Tensor:
        """Stacked, in float32 or above."""
        weight_OI = torch.cat([linear.weight.detach() for linear in self.linears])
        return weight_OI.to(torch.promote_types(weight_OI.dtype, torch.float32))

    def item(self, settings: QSVD, importance_K: Tensor) -> Item:
        num_outputs, first = sum(linear.out_features for linear in self.linears), self.linears[0].weight
        rank_cost, full_cost = linear_costs(first.shape[1], num_outputs, settings.budget, bytes_per_number=first.element_size())
        return Item(name=self.name, importance=importance_K.tolist(), rank_cost=rank_cost, full_cost=full_cost)


@dataclass(frozen=True)
class Found:
    """What the rows say of a group."""

    stacked: Stacked
    spectrum: Spectrum
    """Of the scaled weights, in their dtype."""
    gram: Gram | None


@torch.no_grad()
def apply(settings: QSVD, model: PreTrainedModel, calibration: Calibration) -> Applied:
    """Change the model. What cannot be done is found before anything is changed."""
    groups = groups_of(settings, model)
    with evaluating(model):
        scales = _scales(settings, model, groups, calibration)
        found = {group.name: one for group, one in spectra(settings, model, groups, calibration, scales)}
        importances = importances_of(settings, model, groups, found, calibration)
        orders = {name: importance_K.argsort(descending=True, stable=True) for name, importance_K in importances.items()}
        items = [group.item(settings, importances[group.name][orders[group.name]]) for group in groups]
        ranks = allocate(items, settings.keep, settings.ranks)
        dense = {item.name: item.note(ranks[item.name]) for item in items if item.is_dense(ranks[item.name])}
        replaced = [group for group in groups if group.name not in dense]
        inputs = sampled_inputs(model, [group.reader for group in replaced], calibration)
    _warn(found, replaced)
    layers: list[Layer] = []
    for group in replaced:
        kept = qsvd_maths.chosen(found[group.name].spectrum, orders[group.name][: ranks[group.name]])
        layers += _replace(settings, model, group, found[group.name], kept, inputs[group.reader.input])
    layers += [
        Layer(path=slot.path, kind="kept", note=dense[group.name], figures={"rank_share": 1.0})
        for group in groups
        if group.name in dense
        for slot in group.slots
    ]
    numbers = {group.name: sum(linear.weight.numel() for linear in group.linears) for group in groups}
    after = numbers | {item.name: ranks[item.name] * sum(_shape(group)) for item, group in zip(items, groups, strict=True) if item.name not in dense}
    sizes = {group.name: group.linears[0].weight.element_size() for group in groups}
    return Applied(
        figures={
            "parameters_in_scope_before": sum(numbers.values()),
            "parameters_in_scope_after": sum(after.values()),
            "bytes_in_scope_before": sum(number * sizes[name] for name, number in numbers.items()),
            "bytes_in_scope_after": sum(number * sizes[name] for name, number in after.items()),
            "share_kept": round(kept_share(items, ranks), 6),
            "layers_factorised": sum(layer.kind != "kept" for layer in layers),
            "layers_kept": sum(layer.kind == "kept" for layer in layers),
            "shared_down_projections": len(replaced),
            "layers_with_floor": sum(len(group.slots) for group in replaced if _has_floor(found[group.name])),
        },
        layers=tuple(layers),
    )


def _scales(settings: QSVD, model: PreTrainedModel, groups: Sequence[Group], calibration: Calibration) -> dict[str, Tensor]:
    """What each output of each group counts; none where all count alike."""
    if settings.outputs is Outputs.ALIKE:
        return {}
    return output_scales(model, groups, seen_by(Importance[settings.outputs.name], calibration), max(1, settings.num_gradient_rows // 2))


def groups_of(settings: QSVD, model: PreTrainedModel) -> list[Group]:
    """What is decomposed as one, in the order in which data passes."""
    members: dict[str, list[Slot]] = {}
    for slot in slots(model):
        attention = slot.path.rpartition(".")[0]
        if slot.role in (Role.Q, Role.K, Role.V) or (slot.role in (Role.CROSS_K, Role.CROSS_V) and settings.cross is Cross.SEPARATE):
            members.setdefault(attention, []).append(slot)
        elif slot.role in (Role.CROSS_K, Role.CROSS_V) and settings.cross is Cross.JOINT:
            members.setdefault(CROSS, []).append(slot)
    return [Group(name, tuple(group), tuple(plain(model, slot, "QSVD") for slot in group)) for name, group in members.items()]


def spectra(
    settings: QSVD, model: PreTrainedModel, groups: Sequence[Group], calibration: Calibration, scales: Mapping[str, Tensor]
) -> Iterator[tuple[Group, Found]]:
    """In as many passes over the rows as the Gram matrices' memory asks for. Groups without a scale count all outputs alike."""
    bytes_of_group = 8 * max(group.linears[0].in_features ** 2 for group in groups)
    num = len(groups) if settings.data is Data.PLAIN else max(1, MAX_GRAM_BYTES // bytes_of_group)
    for first in range(0, len(groups), num):
        some = groups[first : first + num]
        statistics = {} if settings.data is Data.PLAIN else input_statistics(model, [group.reader for group in some], calibration)
        for group in some:
            weight_OI, gram = group.weight_OI(), None if settings.data is Data.PLAIN else _gram(settings, statistics[group.reader.input])
            scale_O = scales[group.name].to(weight_OI.dtype) if group.name in scales else torch.ones_like(weight_OI[:, 0])
            stacked = Stacked(weight_OI=weight_OI, scale_O=scale_O)
            directions = spectrum(stacked.scaled_OI, None if gram is None else gram.matrix_II)
            yield group, Found(stacked, Spectrum(energy_K=directions.energy_K, left_OK=directions.left_OK.to(weight_OI.dtype)), gram)


def importances_of(settings: QSVD, model: PreTrainedModel, groups: Sequence[Group], found: Mapping[str, Found], calibration: Calibration) -> dict[str, Tensor]:
    """Of every direction of every group, in the spectrum's order."""
    if settings.importance is not Importance.ENERGY:
        return loss_importances(model, groups, found, seen_by(settings.importance, calibration), settings.num_gradient_rows)
    energies = {name: one.spectrum.energy_K for name, one in found.items()}
    return {name: energy_K / (float(energy_K.sum()) or 1.0) for name, energy_K in energies.items()}  # a share, since what a layer's outputs count is unknown


def loss_importances(model: PreTrainedModel, groups: Sequence[Group], found: Mapping[str, Found], calibration: Calibration, num_rows: int) -> dict[str, Tensor]:
    """QSVD's: the mean of the squares over rows."""
    parts = {group.name: found[group.name].stacked.parts(found[group.name].spectrum) for group in groups}
    sums = {group.name: torch.zeros_like(found[group.name].spectrum.energy_K) for group in groups}
    num = 0
    for gradients in row_gradients(model, groups, calibration, num_rows):
        num += 1
        for name, gradient_OI in gradients.items():
            sums[name] += qsvd_maths.row_effects(*parts[name], gradient_OI).double().square()
    return {name: sum_K / num for name, sum_K in sums.items()}


def output_scales(model: PreTrainedModel, groups: Sequence[Group], calibration: Calibration, num_rows: int) -> dict[str, Tensor]:
    """What each output of each group counts."""
    sums: dict[str, Tensor] = {}
    for gradients in row_gradients(model, groups, calibration, num_rows):
        for name, gradient_OI in gradients.items():
            sums[name] = sums.get(name, 0.0) + gradient_OI.double().square().sum(1)
    return {name: qsvd_maths.output_scale(sum_O) for name, sum_O in sums.items()}


def row_gradients(model: PreTrainedModel, groups: Sequence[Group], calibration: Calibration, num_rows: int) -> Iterator[dict[str, Tensor]]:
    """Of each row's own loss, for each group's stacked weights, in float32 or above: a model in less is copied for that. Some rows, spread evenly."""
    differentiable: Any = model
    if any(parameter.dtype in (torch.bfloat16, torch.float16) for parameter in model.parameters()):
        differentiable = copy.deepcopy(model).float()
    weights = [slot.module(differentiable).weight for group in groups for slot in group.slots]
    with only_trained(differentiable, weights):
        for number, batch in enumerate(_some(calibration, num_rows).batches(differentiable)):
            with torch.enable_grad():
                value = row_loss(calibration.loss, differentiable, batch)
            if not bool(torch.isfinite(value)):
                raise ValueError(f"the loss of calibration row {number} is {float(value)}, so it has no gradient for QSVD to look at: look at the model")
            gradients = iter(torch.autograd.grad(value, weights))
            yield {group.name: torch.cat([next(gradients) for _ in group.slots]) for group in groups}


def sampled_inputs(model: PreTrainedModel, readers: Sequence[Slot], calibration: Calibration) -> dict[str, Tensor]:
    """Some tokens of what each of these slots reads, spread evenly over some rows, in float32 or above."""
    few = _some(calibration, NUM_SAMPLED_ROWS)
    most = -(-NUM_SAMPLED_TOKENS // len(few.examples))
    seen: dict[str, list[Tensor]] = {slot.input: [] for slot in readers}

    def see(slot: Slot) -> Any:
        def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x_TI = inputs[0].reshape(-1, inputs[0].shape[-1])
            seen[slot.input].append(x_TI[:: -(-len(x_TI) // most)].to(torch.promote_types(x_TI.dtype, torch.float32)))

        return keep

    handles = [slot.module(model).register_forward_pre_hook(see(slot)) for slot in readers]
    try:
        for batch in few.batches(model):
            few.loss.sums_P(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(tokens) for name, tokens in seen.items()}


def _replace(settings: QSVD, model: PreTrainedModel, group: Group, found: Found, kept: Spectrum, inputs_TI: Tensor) -> Iterator[Layer]:
    """Low-rank linears around one down-projection, in the weights' dtype."""
    first = group.linears[0].weight
    rank, num_directions = len(kept.energy_K), len(found.spectrum.energy_K)
    rotation_RR = qsvd_maths.rotation(settings.rotation, rank, settings.seed)
    rotation_RR = None if rotation_RR is None else rotation_RR.to(first.device)
    beta, _ = qsvd_maths.best_exponent(found.stacked, kept, rotation_RR, inputs_TI, settings.bits)
    up_OR, down_RI = qsvd_maths.split(found.stacked, kept, beta, rotation_RR)
    shared = nn.Parameter(down_RI.to(first.dtype), requires_grad=first.requires_grad)
    latent_TR = inputs_TI @ shared.to(inputs_TI.dtype).t()
    ups = up_OR.to(first.dtype).split([linear.out_features for linear in group.linears])
    figures = {"rank": float(rank), "rank_share": rank / num_directions, "exponent": beta}
    if _has_floor(found) and found.gram is not None:
        figures |= {"num_dead_channels": float(found.gram.num_dead_channels), "floor": found.gram.floor}
    for slot, linear, up in zip(group.slots, group.linears, ups, strict=True):
        module = LowRankLinear.from_factors(up, shared, None if linear.bias is None else linear.bias.detach())
        module.down.weight = shared
        module.requires_grad_(first.requires_grad).train(linear.training)
        model.set_submodule(slot.path, module)
        outputs_TO = inputs_TI @ linear.weight.to(inputs_TI.dtype).t()
        error, size = float((latent_TR @ up.to(inputs_TI.dtype).t() - outputs_TO).norm()), float(outputs_TO.norm())
        yield Layer(path=slot.path, kind=module.kind, figures=figures | {"relative_error": error / size if size else 0.0})


def _gram(settings: QSVD, statistics: InputStatistics) -> Gram:
    return activation_gram(statistics.mean_magnitude_I, settings.alpha) if settings.data is Data.ACTIVATION else floored(statistics.gram_II)


def _shape(group: Group) -> tuple[int, int]:
    return sum(linear.out_features for linear in group.linears), group.linears[0].in_features


def _some(calibration: Calibration, num: int) -> Calibration:
    """At most so many rows, spread evenly."""
    rows = calibration.examples
    return calibration if len(rows) <= num else replace(calibration, examples=[rows[index * len(rows) // num] for index in range(num)])


def _has_floor(found: Found) -> bool:
    return found.gram is not None and found.gram.floor > 0


def _warn(found: Mapping[str, Found], replaced: Sequence[Group]) -> None:
    """Once, of what the rows do not determine."""
    names = [group.name for group in replaced if _has_floor(found[group.name])]
    if names:
        log.warning(
            "QSVD: the inputs of %d of %d decompositions (%s, ...) have directions that the calibration rows never or hardly show: these count %g of a usual "
            "channel. Where that is not expected, give more rows.",
            len(names),
            len(replaced),
            names[0],
            FLOOR,
        )
