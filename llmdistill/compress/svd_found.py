"""What the calibration rows say of the matrices that SVD factorises: the directions of their outputs, and what leaving out each of them costs.

Shapes: I inputs, O outputs, K = min(I, O).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from llmdistill.compress import low_rank_maths as maths
from llmdistill.compress.low_rank_maths import Gram, Spectrum
from llmdistill.compress.ranks import Allocation
from llmdistill.compress.statistics import InputStatistics, input_statistics
from llmdistill.compress.svd import SVD, Data
from llmdistill.compress.svd_targets import Target

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmdistill.compress.calibration import Calibration
    from llmdistill.compress.slots import Slot

MAX_GRAM_BYTES = 2**30  # of the Gram matrices of one pass over the rows


@dataclass(frozen=True)
class Found:
    """What the rows say of one target."""

    spectrum: Spectrum
    num_dead_channels: int = 0
    floor: float = 0.0
    lost_K: Tensor | None = None
    """What leaving out each direction adds to the squared error of the outputs; None where the outputs were not looked at."""
    importance_K: Tensor | None = None
    """What leaving out each direction does to the loss, where that was measured."""

    def by_importance(self, importance_K: Tensor) -> Found:
        """The same directions, those that matter most to the loss first."""
        order_K = importance_K.argsort(descending=True, stable=True)
        spectrum = Spectrum(energy_K=self.spectrum.energy_K[order_K], left_OK=self.spectrum.left_OK[:, order_K])
        return replace(self, spectrum=spectrum, lost_K=None if self.lost_K is None else self.lost_K[order_K], importance_K=importance_K[order_K])

    def figures(self, rank: int) -> dict[str, float]:
        """The error of this rank, and whether a floor was needed."""
        if self.lost_K is None:
            return {"relative_weight_error": self.spectrum.relative_error(rank)}
        total = float(self.lost_K.sum())
        return {"relative_error": (float(self.lost_K[rank:].sum()) / total) ** 0.5 if total else 0.0} | self.floor_figures()

    def floor_figures(self) -> dict[str, float]:
        return {"num_dead_channels": self.num_dead_channels, "floor": self.floor} if self.floor else {}


def look(settings: SVD, model: PreTrainedModel, targets: Sequence[Target], calibration: Calibration) -> Iterator[tuple[str, Found]]:
    """Spectra of all targets, in as many passes over the rows as the Gram matrices' memory asks for."""
    ranks_by_rows = settings.data is not Data.PLAIN and not (settings.in_order and settings.ranks is Allocation.UNIFORM)
    with_inputs = [target for target in targets if target.slot is not None and ranks_by_rows]
    yield from ((target.path, found_of(settings, target, None)) for target in targets if target not in with_inputs)
    for group in _passes(with_inputs):
        slots: list[Slot] = [target.slot for target in group if target.slot is not None]
        statistics = input_statistics(model, slots, calibration)
        yield from ((target.path, found_of(settings, target, statistics[slot.input])) for target, slot in zip(group, slots, strict=True))


def _passes(targets: Sequence[Target]) -> Iterator[list[Target]]:
    """In their order, so many at a time as MAX_GRAM_BYTES has room for; those that read the same input together."""
    group: list[Target] = []
    inputs: dict[str, int] = {}
    for target in targets:
        assert target.slot is not None
        num_bytes = 8 * target.weight_OI.shape[1] ** 2
        if group and target.slot.input not in inputs and sum(inputs.values()) + num_bytes > MAX_GRAM_BYTES:
            yield group
            group, inputs = [], {}
        group.append(target)
        inputs[target.slot.input] = num_bytes
    if group:
        yield group


def found_of(settings: SVD, target: Target, statistics: InputStatistics | None) -> Found:
    """A target's spectrum; without statistics that of its weight."""
    scaled_OI = target.scaled_OI
    if statistics is None:
        spectrum = maths.spectrum(scaled_OI, None)
        return Found(spectrum, lost_K=spectrum.energy_K if settings.data is not Data.PLAIN and target.slot is None else None)
    gram = gram_of(settings, statistics)
    spectrum = maths.spectrum(scaled_OI, gram.matrix_II)
    lost_K = maths.lost_energy(scaled_OI, spectrum, statistics.gram_II)
    compact = Spectrum(energy_K=spectrum.energy_K, left_OK=spectrum.left_OK.float())
    return Found(compact, gram.num_dead_channels, gram.floor, lost_K)


def gram_of(settings: SVD, statistics: InputStatistics) -> Gram:
    if settings.data is Data.ACTIVATION:
        return maths.activation_gram(statistics.mean_magnitude_I, settings.alpha)
    return maths.floored(statistics.gram_II)
