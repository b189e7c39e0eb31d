"""What the gradients of a calibration row are of: its loss, or the answers that the model gives there, as a loss of their own.

A student is mostly compressed on the rows that it was trained on. It knows them by heart, so the loss there is next to nothing, and so is its gradient: what
is left of it is chance, and a ranking by it takes away what other rows need.

The answers: tokens are drawn from the model's own distribution, softened by a temperature as in distillation, and the gradient is that of their softened
cross-entropy. The mean of the squares of such gradients is the Fisher matrix of the softened model, which is the Hessian of the KL divergence from the model
as it is (Kunstner et al. 2019, "Limitations of the Empirical Fisher Approximation", section 2): so a direction counts what leaving it out changes in what is
said, to second order. It needs no labels, and with a temperature of 2 no row says nothing. At a temperature of 1 a student that is sure of its rows has the
same trouble as with the loss.

Held-out perplexity, benchmarks/low_rank.py --parts ranks, of the quickstart's label-only student, of one like it with 12 + 12 layers, and of its multitask
student (each by --checkpoint and --rationales), and of SmolLM2-135M on text that is new to it, where the loss is the better guide:

    kept             label-only            12 + 12 layers           multitask               SmolLM2
                 0.6   0.4   0.25      0.6    0.4   0.25       0.6    0.4   0.25      0.8    0.6    0.4
    uniform     1.41  1.49   1.51     1.47   1.52   1.66     14.15  15.49  17.95     13.7   23.5   49.3
    by loss     1.43  2.42   5.26     1.39   1.43  10.43     14.07  15.60  16.95      8.8   13.2   30.8
    by answers  1.36  1.40   1.51     1.39   1.40   1.50     14.03  15.09  16.90      8.8   13.7   36.6

Shapes: N target tokens, V vocabulary, P parts of the loss.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmdistill.batches import Batch
from llmdistill.compress.calibration import Calibration
from llmdistill.compress.importance import Importance
from llmdistill.train import Loss

if TYPE_CHECKING:
    from jaxtyping import Float, Int

TEMPERATURE = 2.0


def seen_by(importance: Importance, calibration: Calibration) -> Calibration:
    """The rows, with the loss that LOSS or ANSWERS looks at."""
    return calibration if importance is Importance.LOSS else replace(calibration, loss=AnswersLoss(calibration.loss))


@dataclass(frozen=True)
class AnswersLoss:
    """Cross-entropy of tokens that the softened model says itself, in the parts of another loss.

    What is drawn in a row depends on what is read there and on the seed, and not on other rows."""

    loss: Loss
    seed: int = 0

    @property
    def parts(self) -> tuple[str, ...]:
        return self.loss.parts

    @property
    def weights(self) -> tuple[float, ...]:
        return self.loss.weights

    def counts_P(self, batch: Batch) -> Int[Tensor, " P"]:
        """Those of the loss."""
        return self.loss.counts_P(batch)

    def sums_P(self, model: nn.Module, batch: Batch) -> Float[Tensor, " P"]:
        """Of logits that are no numbers the sums are none either."""
        logits_NV = _logits_NV(self.loss, model, batch)
        logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)) / TEMPERATURE
        if bool(torch.isfinite(logits_NV).all()):
            said_N = torch.multinomial(logits_NV.detach().softmax(-1), 1, generator=_generator(batch, self.seed))[:, 0]
            loss_N = F.cross_entropy(logits_NV, said_N, reduction="none")
        else:
            loss_N = logits_NV.sum(-1)
        return loss_N.new_zeros(len(self.parts)).index_add(0, batch.part_N, loss_N)


def _generator(batch: Batch, seed: int) -> torch.Generator:
    read = zlib.crc32(b"".join(ids.cpu().numpy().tobytes() for ids in (batch.input_EL, *(decoded.input_GT for decoded in batch.decoded))))
    return torch.Generator(device=batch.input_EL.device).manual_seed(read + seed)


def _logits_NV(loss: Loss, model: Any, batch: Batch) -> Tensor:
    """What the head says for the target tokens while the loss is computed: the loss knows how to get there."""
    seen: list[Tensor] = []
    hook = model.get_output_embeddings().register_forward_hook(lambda _, inputs, output: seen.append(output))
    try:
        loss.sums_P(model, batch)
    finally:
        hook.remove()
    assert len(seen) == 1
    assert seen[0].shape[:-1] == batch.part_N.shape
    return seen[0]
