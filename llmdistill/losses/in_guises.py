"""Another loss, of an elastic student as a whole and of its sub-networks: the mean over them.

Which sub-networks, and how the model becomes one, comes from outside, as in losses/in_place.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor, nn

from llmdistill.batches import Batch
from llmdistill.losses.in_place import Guise
from llmdistill.train import Loss


@dataclass(frozen=True, kw_only=True)
class LossInGuises:
    """The mean of a loss over the whole model and its sub-networks."""

    loss: Loss
    guises: Callable[[int], Sequence[Guise]]
    """The sub-networks of a step of training; the whole counts besides."""
    watched: Sequence[Guise]
    """The sub-networks of every evaluation."""

    @property
    def parts(self) -> tuple[str, ...]:
        return self.loss.parts

    @property
    def weights(self) -> tuple[float, ...]:
        return self.loss.weights

    def counts_P(self, batch: Batch) -> Int[Tensor, " P"]:
        """Those of the loss: a mean counts once."""
        return self.loss.counts_P(batch)

    def sums_P(self, model: nn.Module, batch: Batch) -> Float[Tensor, " P"]:
        """The mean of the sums. Every sub-network runs once."""
        guises = self.guises(batch.step) if model.training else self.watched
        sums_P = self.loss.sums_P(model, batch)
        for guise in guises:
            with guise(model):
                sums_P = sums_P + self.loss.sums_P(model, batch)
        return sums_P / (1 + len(guises))
