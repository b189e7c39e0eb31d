"""SVD on a model: statistics, ranks, factors (svd.py says why so).

Shapes: I inputs, O outputs, K = min(I, O), R rank.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmdistill.compress import low_rank_maths as maths
from llmdistill.compress.answers_loss import seen_by
from llmdistill.compress.block_by_block import Original, Rows, groups_of_block, stack_paths
from llmdistill.compress.importance import Importance
from llmdistill.compress.loss_importance import loss_importances
from llmdistill.compress.low_rank_maths import FLOOR, ShiftedMoments, Spectrum
from llmdistill.compress.method import Applied, Layer
from llmdistill.compress.ranks import Allocation, Item, allocate, kept_share
from llmdistill.compress.statistics import InputStatistics, input_statistics
from llmdistill.compress.svd import SVD, Data
from llmdistill.compress.svd_found import Found, found_of, gram_of, look
from llmdistill.compress.svd_targets import Target, targets_of
from llmdistill.core.stage import JsonScalar
from llmdistill.models.modes import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmdistill.compress.calibration import Calibration

log = logging.getLogger(__name__)


@torch.no_grad()
def apply(settings: SVD, model: PreTrainedModel, calibration: Calibration) -> Applied:
    """Changes the model; with `in_order` layer by layer."""
    with evaluating(model):
        targets, kept = targets_of(model, settings.scope, settings.budget, calibration, counts_tokens=settings.data is not Data.PLAIN)
        found = dict(look(settings, model, targets, calibration))
        if settings.ranks is Allocation.GLOBAL and settings.importance is not Importance.ENERGY:
            found = by_loss(settings, model, calibration, targets, found)
        return factorise(settings, model, calibration, targets, kept, found)


def by_loss(settings: SVD, model: PreTrainedModel, calibration: Calibration, targets: Sequence[Target], found: Mapping[str, Found]) -> dict[str, Found]:
    """What was found, with directions in the order of what they do to the answers or the loss."""
    lefts = {path: one.spectrum.left_OK for path, one in found.items()}
    importances = loss_importances(model, targets, lefts, seen_by(settings.importance, calibration), settings.num_gradient_rows)
    return {path: one.by_importance(importances[path]) for path, one in found.items()}


@torch.no_grad()
def factorise(
    settings: SVD, model: PreTrainedModel, calibration: Calibration, targets: Sequence[Target], kept: Sequence[Layer], found: Mapping[str, Found]
) -> Applied:
    """Choose ranks by what was found, and replace the targets."""
    items = [_item(settings, target, found[target.path]) for target in targets]
    ranks = allocate(items, settings.keep, settings.ranks)
    dense = {item.name: item for item in items if item.is_dense(ranks[item.name])}
    work = _Work(settings, model, ranks, found, [target for target in targets if target.path not in dense])
    with evaluating(model):
        if settings.in_order:
            _in_order(work, calibration)
        else:
            for target in work.targets:
                work.factorise(target, found[target.path].spectrum, target.scaled_OI, found[target.path].figures(ranks[target.path]))
    work.warn()
    left = [Layer(path=path, kind="kept", note=item.note(ranks[path]), figures={"rank_share": 1.0}) for path, item in dense.items()]
    return Applied(figures=_figures(targets, work, kept_share(items, ranks), len(kept) + len(left)), layers=(*work.layers, *left, *kept))


def _figures(targets: Sequence[Target], work: _Work, share: float, num_kept: int) -> dict[str, JsonScalar]:
    """Of the weights in scope; biases are none."""
    numbers = {target.path: target.weight_OI.numel() for target in targets}
    after = numbers | {target.path: work.ranks[target.path] * sum(target.weight_OI.shape) for target in work.targets}
    num_bytes = {target.path: target.weight_OI.element_size() for target in targets}
    return {
        "parameters_in_scope_before": sum(numbers.values()),
        "parameters_in_scope_after": sum(after.values()),
        "bytes_in_scope_before": sum(number * num_bytes[path] for path, number in numbers.items()),
        "bytes_in_scope_after": sum(number * num_bytes[path] for path, number in after.items()),
        "share_kept": round(share, 6),
        "layers_factorised": len(work.targets),
        "layers_kept": num_kept,
        "layers_with_floor": len(work.dead_channels),
        "dead_channels": sum(work.dead_channels.values()),
    }


class _Work:
    """Factorises one target after the other, and remembers what became of them."""

    def __init__(self, settings: SVD, model: PreTrainedModel, ranks: Mapping[str, int], found: Mapping[str, Found], targets: Sequence[Target]) -> None:
        self.settings, self.model, self.ranks, self.found, self.targets = settings, model, ranks, found, targets
        self.layers: list[Layer] = []
        self.dead_channels: dict[str, int] = {}
        """Of each target whose inputs needed the floor."""

    def factorise(self, target: Target, spectrum: Spectrum, weight_OI: Tensor, figures: Mapping[str, float]) -> None:
        """Replace a target by the projection of `weight_OI`, its own or a corrected one."""
        rank = self.ranks[target.path]
        if "floor" in figures:
            self.dead_channels[target.path] = int(figures["num_dead_channels"])
        for path, kind in target.replace(self.model, *maths.factors(weight_OI, spectrum, rank)):
            self.layers.append(Layer(path=path, kind=kind, figures={"rank": rank, "rank_share": rank / len(spectrum.energy_K), **figures}))

    def warn(self) -> None:
        """Once, of what the rows do not determine."""
        if self.dead_channels:
            log.warning(
                "SVD: the inputs of %d of %d layers have directions that the calibration rows never or hardly show (fewer tokens than channels, channels that "
                "are always zero or the same; %d dead channels): these count %g of a usual channel. Where that is not expected, give more rows.",
                len(self.dead_channels),
                len(self.targets),
                sum(self.dead_channels.values()),
                FLOOR,
            )


def _item(settings: SVD, target: Target, found: Found) -> Item:
    rank_cost, full_cost = target.costs(settings.budget)
    importance_K = found.spectrum.energy_K if found.importance_K is None else found.importance_K
    if found.importance_K is None and settings.ranks is Allocation.GLOBAL:  # a share, since what an output counts is not known
        importance_K = importance_K / (float(importance_K.sum()) or 1.0)
    return Item(name=target.path, importance=importance_K.tolist(), rank_cost=rank_cost, full_cost=full_cost)


def _in_order(work: _Work, calibration: Calibration) -> None:
    """Embedding, stacks block by block, head; each target for the inputs that it has when its turn comes."""
    model, settings = work.model, work.settings
    original = Original(model, calibration) if settings.refine else None
    by_path = {target.path: target for target in work.targets}
    for target in work.targets:
        if target.embeddings:
            found = found_of(settings, target, None if target.slot is None else _collected(model, target, calibration))
            work.factorise(target, found.spectrum, target.scaled_OI, found.figures(work.ranks[target.path]))
    slots = [target.slot for target in work.targets if target.slot is not None]
    for stack_path in stack_paths(model):
        rows = Rows(model, stack_path, calibration)
        blocks: Any = model.get_submodule(stack_path)
        for number, block in enumerate(blocks):
            groups = groups_of_block(slots, f"{stack_path}.{number}")
            inside = [[slot.path.removeprefix(f"{stack_path}.{number}.") for slot in group] for group in groups]
            before = original.inputs(stack_path, block, [paths[0] for paths in inside]) if original else None
            for group, paths in zip(groups, inside, strict=True):
                moments = _moments(rows.inputs(block, paths[0]), [row[paths[0]] for row in before] if before else None)
                for slot in group:
                    _factorise_shifted(work, by_path[slot.path], *moments)
            rows.advance(block)
    for target in work.targets:
        if target.slot is not None and target.slot.stack == "head" and not target.embeddings:
            _factorise_shifted(work, target, _collected(model, target, calibration), None)


def _collected(model: PreTrainedModel, target: Target, calibration: Calibration) -> InputStatistics:
    assert target.slot is not None
    return input_statistics(model, [target.slot], calibration)[target.slot.input]


def _moments(inputs: Iterator[Tensor], originals: Sequence[Tensor] | None) -> tuple[InputStatistics, ShiftedMoments | None]:
    """Of the inputs as they are now, and with those that they were."""
    statistics: InputStatistics | None = None
    moments: ShiftedMoments | None = None
    for number, x in enumerate(inputs):
        if statistics is None:
            width = x.shape[-1]
            zeros_II, zeros_I = (torch.zeros(*shape, dtype=torch.float64, device=x.device) for shape in ((width, width), (width,)))
            statistics = InputStatistics(zeros_II, zeros_I, zeros_I.clone())
            moments = None if originals is None else ShiftedMoments(gram_II=zeros_II, cross_II=zeros_II.clone(), original_II=zeros_II.clone())
        statistics.add(x)
        if moments is not None and originals is not None:
            now_TI, then_TI = (one.reshape(-1, one.shape[-1]).double() for one in (x, originals[number]))
            moments.cross_II += now_TI.t() @ then_TI
            moments.original_II += then_TI.t() @ then_TI
    assert statistics is not None
    return statistics, moments


def _factorise_shifted(work: _Work, target: Target, statistics: InputStatistics, moments: ShiftedMoments | None) -> None:
    """For these inputs; with `moments`, towards what the target gave on the original ones."""
    weight_OI, rank = target.scaled_OI, work.ranks[target.path]
    if moments is None:
        found = found_of(work.settings, target, statistics)
        work.factorise(target, found.spectrum, weight_OI, found.figures(rank))
        return
    gram = gram_of(work.settings, statistics)
    corrected_OI = maths.corrected(weight_OI, moments.gram_II, moments.cross_II)
    spectrum = maths.spectrum(corrected_OI, gram.matrix_II)
    left_OR = spectrum.left_OK[:, :rank]
    error = maths.shifted_error(weight_OI, left_OR @ (left_OR.t() @ corrected_OI), moments)
    work.factorise(target, spectrum, corrected_OI, {"relative_error": error} | Found(spectrum, gram.num_dead_channels, gram.floor).floor_figures())
