"""Which layers cannot be quantized, found by measurement: they are kept as they were, and the report says which and why.

Some layers lose far more than others: T5's `wo`, whose inputs have a few channels hundreds of times as large as the rest, overflows or turns to nonsense in
low precision in several tools, and which layers do so differs from one student to the next. So nothing is decided by name. All candidates are quantized
and the held-out loss is measured once; where it has risen by no more than the limit, that was all. Otherwise each candidate is quantized alone, which ranks
them by their own rise, and the fewest are kept, the most sensitive first, with which the rise of the whole is within the limit. A candidate whose own rise is
above the limit is among them, except where another one makes up for it.

Cost: one measurement where all is well. Else one short measurement a candidate (on `num_rows` rows, the same ones before and after, so that the difference is
that of the layer and not of the rows) and some full ones, since the number to keep is looked for by doubling and then by halving, to a tenth of itself. Of many
candidates, those are measured alone whose rise is estimated to be largest (estimated_rise.py: one pass for all of them), and the others rank behind them by
the estimate.

A loss that is not finite counts as an infinite rise.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from llmdistill.compress.calibration import within
from llmdistill.compress.estimated_rise import estimated_rises
from llmdistill.compress.method import Layer

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from llmdistill.compress.calibration import Calibration

log = logging.getLogger(__name__)

Candidate: TypeAlias = "str | tuple[str, ...]"
"""A path, or several that are quantized together or not at all (an embedding and the head that is tied to it)."""
Replace: TypeAlias = "Callable[[Any, str], nn.Module]"
"""Puts the quantized module in the place of the one at this path of the model, and gives back the one that was there."""

NUM_ROWS, MAX_TOKENS = 16, 1024
"""Of the rows on which candidates are measured alone."""
NUM_MEASURED = 16
"""So many candidates are quantized alone, the most sensitive ones by estimate, where there are more."""


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """What was found. The quantized modules of all candidates that are not kept are in the model."""

    loss_before: float
    loss_after: float
    """Held-out loss in nats, as the model is now."""
    loss_all_quantized: float
    """Held-out loss with nothing kept; it may be infinite or no number."""
    kept: tuple[Layer, ...]
    """The layers that stay as they were, the most sensitive first."""
    rises: dict[str, float]
    """The rise of each path's candidate when quantized alone, in nats, of those that were measured; empty where no single ones had to be."""

    def is_kept(self, path: str) -> bool:
        return any(layer.path == path for layer in self.kept)


def keep_sensitive(
    model: PreTrainedModel, candidates: Sequence[Candidate], quantize: Replace, calibration: Calibration, max_loss_rise: float, *, num_rows: int = NUM_ROWS
) -> Sensitivity:
    """Quantize the candidates, but for the fewest that keep the held-out loss from rising by more than `max_loss_rise` nats. No path may come twice."""
    if not (math.isfinite(max_loss_rise) and max_loss_rise >= 0):
        raise ValueError(f"max_loss_rise is {max_loss_rise}; give the nats by which the held-out loss may rise, 0 or more, such as 0.02")
    groups = [(candidate,) if isinstance(candidate, str) else candidate for candidate in candidates]
    before = calibration.mean_loss(model) if calibration.known_loss is None else calibration.known_loss
    if not math.isfinite(before):
        raise ValueError(f"the held-out loss is {before} before anything is quantized, so no rise can be measured: look at the model, or use a wider dtype")
    swaps = [_Swap(model, paths, quantize) for paths in groups]
    everything = after = calibration.mean_loss(model)
    kept: list[int] = []
    rises: dict[int, float] = {}
    if _rise(before, everything) > max_loss_rise:
        log.info("with all layers quantized the held-out loss goes from %.4f to %.4f nats: looking for the sensitive ones", before, everything)
        few = replace(calibration, held_out=within((calibration.held_out or calibration.examples)[:num_rows], MAX_TOKENS))
        for swap in swaps:
            swap.put(quantized=False)
        suspects, others = _suspects(model, swaps, few)
        rises = _alone(model, swaps, suspects, few)
        ranked = [*sorted(suspects, key=lambda index: -rises[index]), *others]
        kept, after = _fewest(model, swaps, ranked, calibration, before, max_loss_rise)
    notes = [(path, rises.get(index)) for index in kept for path in groups[index]]
    return Sensitivity(
        loss_before=before,
        loss_after=after,
        loss_all_quantized=everything,
        kept=tuple(Layer(path=path, kind="kept", note=_note(rise, _rise(before, everything), max_loss_rise), figures=_figures(rise)) for path, rise in notes),
        rises={path: rise for index, rise in rises.items() for path in groups[index]},
    )


class _Swap:
    """A candidate's modules, both as they were and quantized, either of them in the model. Made with the quantized ones in."""

    def __init__(self, model: Any, paths: tuple[str, ...], quantize: Replace) -> None:
        self.model, self.paths = model, paths
        self.original = [model.get_submodule(path) for path in paths]  # all of them first: several paths may lead through one module
        for path in paths:
            quantize(model, path)
        self.quantized = [model.get_submodule(path) for path in paths]

    def put(self, *, quantized: bool) -> None:
        for path, module in zip(self.paths, self.quantized if quantized else self.original, strict=True):
            self.model.set_submodule(path, module)


def _suspects(model: Any, swaps: Sequence[_Swap], few: Calibration) -> tuple[list[int], list[int]]:
    """Which candidates are to be quantized alone, and the others, the most sensitive by estimate first. None is quantized now."""
    if len(swaps) <= NUM_MEASURED:
        return list(range(len(swaps))), []
    exchanges = [list(zip(swap.original, swap.quantized, strict=True)) for swap in swaps]
    estimates = estimated_rises(model, exchanges, replace(few, examples=few.held_out))
    known = sorted((index for index, one in enumerate(estimates) if one is not None), key=lambda index: -(estimates[index] or 0.0))
    unknown = [index for index, one in enumerate(estimates) if one is None]
    return [*unknown, *known[:NUM_MEASURED]], known[NUM_MEASURED:]


def _alone(model: Any, swaps: Sequence[_Swap], suspects: Sequence[int], few: Calibration) -> dict[int, float]:
    """The rise of each of these candidates quantized alone. None is quantized before and after."""
    before = few.mean_loss(model)
    rises = {}
    for index in suspects:
        swaps[index].put(quantized=True)
        rises[index] = _rise(before, few.mean_loss(model))
        swaps[index].put(quantized=False)
    return rises


def _fewest(
    model: Any, swaps: Sequence[_Swap], ranked: Sequence[int], calibration: Calibration, before: float, max_loss_rise: float
) -> tuple[list[int], float]:
    """The fewest of the ranked candidates, from the first on, whose keeping is enough, and the loss then. All others are quantized in the end."""

    def loss_with(num_kept: int) -> float:
        for place, index in enumerate(ranked):
            swaps[index].put(quantized=place >= num_kept)
        return calibration.mean_loss(model)

    too_few, enough, loss = 0, len(ranked), before  # with none kept the loss was too high, with all kept it is what it was
    while enough - too_few > max(1, enough // 10):
        doubled = 2 * too_few or 1  # usually few are enough: so upwards from one, and by halves once it was too many
        middle = doubled if enough == len(ranked) and doubled < enough else (too_few + enough) // 2
        measured = loss_with(middle)
        if _rise(before, measured) <= max_loss_rise:
            enough, loss = middle, measured
        else:
            too_few = middle
    for place, index in enumerate(ranked):
        swaps[index].put(quantized=place >= enough)
    return list(ranked[:enough]), loss


def _rise(before: float, after: float) -> float:
    return after - before if math.isfinite(after) else math.inf


def _note(alone: float | None, everything: float, limit: float) -> str:
    """Why a layer is kept."""
    together = "is not finite" if math.isinf(everything) else f"rises by {everything:.4f} nats"
    if alone is None:
        return f"with every layer quantized the held-out loss {together}, {limit:g} is allowed, and this is among the most sensitive by estimate"
    if math.isinf(alone):
        return "quantized alone it makes the held-out loss infinite or no number"
    if alone > limit:
        return f"quantized alone it raises the held-out loss by {alone:.4f} nats, more than the {limit:g} allowed"
    return f"with every layer quantized the held-out loss {together}, {limit:g} is allowed, and this is one of the most sensitive ({alone:.4f} nats alone)"


def _figures(alone: float | None) -> dict[str, float]:
    """No infinity: it is not JSON."""
    return {"loss_rise_alone_nats": alone} if alone is not None and math.isfinite(alone) else {}
